"""What can be scored without looking: a model that does not beat this has not learned to see."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import compress
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from coreseg.answer import answer_sentence, render
from coreseg.data.build.describe import in_words
from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.evaluate.run import Images
from coreseg.masks import area_shares
from coreseg.sentences import KINDS, find_all
from coreseg.types import Answer, Box, Result, Sample

GRID = 128
"""Side of the square that all training masks are brought to; finer than any mean of them has detail."""
_THRESHOLDS = np.linspace(0.02, 0.98, 49)
_ALWAYS_SAID = {"count": "one", "side": "centre", "place": "middle"}


@dataclass(frozen=True)
class Guess:
    """Where the lesions of one category usually are.

    mean_mask: share of the training images with lesion there, over the frame squeezed to `GRID` x `GRID`.
    threshold: the guess is where `mean_mask` is at least this; it gives the best mean Dice on the training rows.
    box: `x1, y1, x2, y2` in [0, 1] of width and height: the mean of each row's largest box.
    words: of each kind of statement the value that the training rows' reasoning states most often.
    """

    mean_mask: Float[np.ndarray, "grid grid"]
    threshold: float
    box: Float[np.ndarray, "4"]
    words: Mapping[str, str]


@dataclass(frozen=True)
class BlindBaseline:
    """Answers from the category alone: its mean training mask, mean box and commonest words; the image gives its size.

    A category that training lacks gets the guess over all categories. Always says that the lesion is there. Our
    choice throughout.
    """

    by_category: Mapping[str, Guess]
    overall: Guess
    settings: Mapping[str, Any]
    name: str = "blind"

    @classmethod
    def fit(cls, lesion_set: LesionSet, split: str = "train") -> "BlindBaseline":
        """Measure the lesion-bearing rows of `split`. Raises DataError where there are none."""
        rows = [sample for sample in lesion_set.split(split) if sample.boxes]
        if not rows:
            raise DataError(f"the set at {lesion_set.root} shows no lesion in split {split!r} to fit a blind guess on")
        masks = [lesion_set.mask(sample) for sample in rows]
        shares = np.stack([_resized(mask, GRID, GRID) for mask in masks])
        boxes = np.stack([_largest_box(sample.boxes, mask) for sample, mask in zip(rows, masks, strict=True)])
        texts = [sample.reasoning for sample in rows]
        categories = [sample.category for sample in rows]
        of_category = {name: np.array([each == name for each in categories]) for name in sorted(set(categories))}
        guesses = {
            name: _guess(shares[of_it], boxes[of_it], list(compress(texts, of_it)))
            for name, of_it in of_category.items()
        }
        overall = _guess(shares, boxes, texts)
        # An answer must not outlive the rows that it was learned from.
        learned = sha256(repr([(name, guess.words) for name, guess in guesses.items()]).encode())
        learned.update(shares.tobytes() + boxes.tobytes())
        return cls(guesses, overall, {"split": split, "rows": len(rows), "learned": learned.hexdigest()[:16]})

    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """See `coreseg.evaluate.Predictor`; of the samples only what kind of picture and lesion it is is used."""
        return [self._result(sample, image) for sample, image in zip(samples, images, strict=True)]

    def _result(self, sample: Sample, image: np.ndarray) -> Result:
        start = time.perf_counter()
        guess = self.by_category.get(sample.category, self.overall)
        height, width = image.shape[:2]
        box = _in_pixels(guess.box, width, height)
        rng = np.random.default_rng(0)
        reasoning = in_words(guess.words, sample.modality, sample.anatomy, sample.category, rng)
        answer = Answer(sample.category, (box,), reasoning, found=True)
        return Result(
            mask=_resized(guess.mean_mask, height, width) >= guess.threshold,
            boxes=np.array([box]),
            reasoning=reasoning,
            answer=answer_sentence(answer),
            text=render(answer),
            found=True,
            valid=True,
            seconds=time.perf_counter() - start,
            image=image,
        )


def _guess(
    shares: Float[np.ndarray, "rows grid grid"], boxes: Float[np.ndarray, "rows 4"], texts: Sequence[str]
) -> Guess:
    mean_mask = shares.mean(axis=0)
    # Tiny lesions that wander leave a faint mean, so the candidates are shares of its maximum.
    candidates = _THRESHOLDS * mean_mask.max()
    guesses = (mean_mask.ravel() >= candidates[:, None]).astype(np.float32)
    references = shares.reshape(len(shares), -1)
    areas = guesses.sum(axis=1) + references.sum(axis=1)[:, None]
    mean_dice = (2 * references @ guesses.T / areas).mean(axis=0)
    return Guess(mean_mask, float(candidates[mean_dice.argmax()]), boxes.mean(axis=0), _commonest_words(texts))


def _commonest_words(texts: Sequence[str]) -> dict[str, str]:
    said = {kind: Counter[str]() for kind in KINDS}
    for text in texts:
        for kind, values in find_all(text).items():
            said[kind].update(sorted(values))
    commonest = {kind: counts.most_common(1)[0][0] for kind, counts in said.items() if counts}
    return _ALWAYS_SAID | commonest


def _resized(
    values: Float[np.ndarray, "_ _"] | Bool[np.ndarray, "_ _"], height: int, width: int
) -> Float[np.ndarray, "height width"]:
    """Each cell of the new grid is the mean over its area, so that the smallest lesion still counts for its area."""
    rows = area_shares(values.shape[0], height) @ values.astype(np.float32)
    resized: Float[np.ndarray, "height width"] = (area_shares(values.shape[1], width) @ rows.T).T
    return resized


def _largest_box(boxes: Sequence[Box], mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "4"]:
    height, width = mask.shape
    x1, y1, x2, y2 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return np.array([x1 / width, y1 / height, x2 / width, y2 / height])


def _in_pixels(box: Float[np.ndarray, "4"], width: int, height: int) -> Box:
    """The box in whole pixels, inside the image and with area."""
    x1, y1 = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return x1, y1, max(round(box[2] * width), x1 + 1), max(round(box[3] * height), y1 + 1)
