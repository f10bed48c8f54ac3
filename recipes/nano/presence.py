"""Does nano overlook a lesion, or does greedy writing split its yes over many wordings?

    python recipes/nano/presence.py DATASET --model MODEL --out EVALUATION

The descriptions that nano learned from say what picture it is, what healthy tissue looks like, and third what they
found: in one of two wordings where that is nothing, in many where it is something. The likeliest next word may thus be
of the "nothing" kind although the others together are likelier. Here the sum decides, and the likeliest word of the
side that it is on is written. EVALUATION is as `coreseg evaluate --out` writes it, for `coreseg compare`.

Prints mDice, detect, sensitivity and specificity, and of the summed probability as a score: the area under the ROC
curve, and the specificity where 97 % of the lesions are found.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from readiness import ThirdSentence
from transformers import LogitsProcessor

from coreseg.data.store import LesionSet
from coreseg.errors import CoreSegError
from coreseg.evaluate.predictors import ModelPredictor
from coreseg.evaluate.report import write_summary
from coreseg.evaluate.run import evaluate

NOTHING = (" Here", " The")
"""How a third sentence begins that found nothing ("Here nothing unusual …", "The whole picture …")."""
SENSITIVITY = 0.97


class BySum(ThirdSentence):
    """Keeps the words of the likelier side."""

    def __init__(self, inner: LogitsProcessor, nothing: Sequence[int], stop: int, odds: list[float]) -> None:
        self.nothing = list(nothing)
        super().__init__(inner, stop, odds)

    def decide(self, scores: torch.Tensor) -> float:
        """By the sum over all wordings of either side."""
        of_nothing = torch.zeros_like(scores, dtype=torch.bool)
        of_nothing[self.nothing] = True
        odds = float(scores[~of_nothing].logsumexp(0) - scores[of_nothing].logsumexp(0))
        scores.masked_fill_(of_nothing if odds > 0 else ~of_nothing, -torch.inf)
        return odds


def decide_by_sum(predictor: ModelPredictor) -> list[float]:
    """Change how the predictor writes; the log-odds of "something" of each answer gather in the list, in order."""
    processor, odds = predictor.segmenter.processor, list[float]()
    usual, tokens = processor.constraint, processor.tokenizer
    *nothing, stop = (tokens(text, add_special_tokens=False)["input_ids"][-1] for text in (*NOTHING, "."))
    processor.constraint = lambda frames, openings=(): BySum(usual(frames, openings), nothing, stop, odds)
    return odds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    try:
        if options.out.exists():
            parser.error(f"{options.out} is already there; give a new folder")
        predictor = ModelPredictor.load(options.model, None, None, constrained=True)
        odds = decide_by_sum(predictor)
        evaluation = evaluate(LesionSet.open(options.dataset), predictor, out=options.out, batch_size=16)
    except CoreSegError as error:
        parser.error(str(error))
    write_summary(options.out / "summary.json", evaluation)
    summary = evaluation.summary
    for block in ("pooled", "macro"):
        print(block, {name: round(summary[block][name]["mean"], 1) for name in ("dice", "detect", "failure")})
    print(
        {name: round(summary["presence"][name]["mean"], 1) for name in ("sensitivity", "specificity", "called_absent")}
    )
    # An answer of another shape is as sure as it is: it said what it said.
    sure = [np.inf if record.found else -np.inf for record in evaluation.records]
    scores = np.where(np.isnan(odds), sure, odds)
    lesion = np.array([record.lesion_share > 0 for record in evaluation.records])
    there, free = scores[lesion], scores[~lesion]
    area = np.mean((there[:, None] > free) + 0.5 * (there[:, None] == free))
    limit = np.quantile(there, 1 - SENSITIVITY)
    at_limit = np.mean(free < limit)
    print(f"area under the ROC curve {100 * area:.1f}; specificity at a sensitivity of 97 % {100 * at_limit:.1f}")
    print(f"{np.isnan(odds).sum()} of {len(odds)} answers were of another shape")
