"""How good a model expects its own mask to be.

An answer shows how sure it is: whether the mask's probabilities are near 0 and 1, whether the written boxes lie around
the mask, how large it is, how likely the words were. A logistic regression turns these signs into the expected Dice.
They mean the same whatever the weights, so that a few hundred answers teach it, about pictures that the model was not
trained on, or that another model of the same recipe was not.

Source: our choice throughout; that the disagreement of a model with itself predicts its Dice is Roy et al. (arXiv
1811.09800).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit
from transformers.utils.hub import cached_file

from coreseg.errors import DataError, ModelError
from coreseg.masks import mask_to_boxes
from coreseg.metrics import Boxes, detect_score

FILE = "confidence.json"
FEWEST = 30
"""Answers that a regression needs."""
RIDGE = 1.0
"""Weight of the squared weights of signs at deviation 1, in answers. Our choice: a few hundred answers are usual."""
SMALLEST_SHARE = 1e-5


@dataclass(frozen=True)
class Signs:
    """What an answer shows of how sure it is. All but the words are 0 where there is no mask.

    found: 1 where it gives a mask.
    sharp: Dice of the mask's probabilities with the mask, 1 where all are 0 or 1.
    boxes: detect score of the written boxes against the mask's.
    size: logarithm of the mask's share of the picture, from 0 for 1e-5 or less to 1 for all of it.
    words: mean log-probability of its tokens, fixed ones included.
    """

    found: float
    sharp: float
    boxes: float
    size: float
    words: float

    @classmethod
    def read(
        cls,
        mask: Bool[np.ndarray, "height width"],
        boxes: Boxes,
        logits: Float[torch.Tensor, "map_height map_width"] | None,
        words: float,
    ) -> "Signs":
        """The signs of one answer: mask and boxes in the picture's own pixels, logits as they are decoded."""
        if logits is None or not mask.any():
            return cls(found=0.0, sharp=0.0, boxes=0.0, size=0.0, words=words)
        probabilities, inside = logits.float().sigmoid(), logits > 0
        total = float(probabilities.sum()) + int(inside.sum())
        return cls(
            found=1.0,
            sharp=2 * float(probabilities[inside].sum()) / total,
            boxes=detect_score(boxes, mask_to_boxes(mask)),
            size=1 - float(np.log10(max(mask.mean(), SMALLEST_SHARE)) / np.log10(SMALLEST_SHARE)),
            words=words,
        )


NAMES = tuple(each.name for each in fields(Signs))


@dataclass(frozen=True)
class Confidence:
    """A logistic regression of Dice on an answer's signs."""

    weights: Mapping[str, float]
    bias: float

    @classmethod
    def fit(cls, signs: Sequence[Mapping[str, float]], dices: Sequence[float]) -> "Confidence":
        """From the signs and the Dice of answers about pictures that the model was not trained on.

        Dice is a share, so it is the target as it is. Raises DataError for fewer than 30 answers.
        """
        if len(signs) < FEWEST:
            raise DataError(f"{len(signs)} answers; expected at least {FEWEST} to tell from how sure a model may be")
        seen = np.array([[each[name] for name in NAMES] for each in signs])
        target = np.asarray(dices)
        mean, deviation = seen.mean(0), np.maximum(seen.std(0), 1e-6)
        inputs = (seen - mean) / deviation

        def loss(parameters: Float[np.ndarray, " parameters"]) -> tuple[float, Float[np.ndarray, " parameters"]]:
            weights, bias = parameters[:-1], parameters[-1]
            scores = inputs @ weights + bias
            value = np.sum(np.logaddexp(0, scores) - target * scores) + RIDGE / 2 * weights @ weights
            errors = expit(scores) - target
            return float(value), np.append(inputs.T @ errors + RIDGE * weights, errors.sum())

        found = minimize(loss, np.zeros(len(NAMES) + 1), jac=True, method="L-BFGS-B").x
        weights = found[:-1] / deviation
        return cls(dict(zip(NAMES, weights.tolist(), strict=True)), float(found[-1] - weights @ mean))

    def of(self, signs: Mapping[str, float]) -> float:
        """The Dice to expect, in [0, 1]."""
        return float(expit(self.bias + sum(self.weights[name] * signs[name] for name in NAMES)))

    def save(self, folder: Path) -> None:
        """Write it beside a checkpoint."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, place: str | Path) -> "Confidence | None":
        """That of a checkpoint, in a folder or at a hub; None where it has none. ModelError for a damaged one."""
        file = cached_file(str(place), FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return None
        try:
            told = json.loads(Path(file).read_text(encoding="utf-8"))
            return cls({name: float(told["weights"][name]) for name in NAMES}, float(told["bias"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file}: damaged ({error}); copy it again, or write it anew: coreseg merge --confidence"
            ) from error
