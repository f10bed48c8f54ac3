"""How readily a model should say "Yes": the bias of that word which finds as many lesions as wanted, and what it costs.

    python recipes/nano/readiness.py DATASET… --model CHECKPOINT [--sensitivity 98] [--write]

Nano's descriptions say in the first word of their third sentence whether there is something. While the model answers
the plain question of every validation row, how much likelier "Yes" is than "No" there is read off. A model that finds
as many without a bias gets none: other lesions than these may be harder to find. That is also why the default asks for
a point more than the 97 % that nano should reach elsewhere. With --write the bias goes into the checkpoint's
config.json, as `word_bias`. Choose it on pictures that the model was not trained on, and not on those that it is
reported on.

Prints the bias, and for each data set the sensitivity and specificity without and with it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor

from coreseg.data.store import LesionSet
from coreseg.errors import CoreSegError
from coreseg.evaluate.predictors import ModelPredictor
from coreseg.evaluate.run import evaluate
from coreseg.model.assemble import find_checkpoint

SENTENCES_BEFORE = 2


class Watch(LogitsProcessor):
    """Notes how much likelier " Yes" is than " No" where an answer's third sentence begins; leaves the scores alone.

    tokens: of " Yes", " No" and ".". odds: what is noted is added to it, a row an answer; NaN where none begins.
    """

    def __init__(self, inner: LogitsProcessor, tokens: Sequence[int], odds: list[float]) -> None:
        self.inner, self.odds = inner, odds
        self.yes, self.no, self.stop = tokens
        self.before: int | None = None
        self.place = len(odds)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the next word, by `inner`."""
        scores = self.inner(input_ids, scores)
        if self.before is None:
            self.before = input_ids.shape[1]
            self.odds += [float("nan")] * len(input_ids)
        for row, ids in enumerate(input_ids[:, self.before :].tolist()):
            if ids and ids[-1] == self.stop and ids.count(self.stop) == SENTENCES_BEFORE:
                self.odds[self.place + row] = float(scores[row, self.yes] - scores[row, self.no])
        return scores


def share(rows: np.ndarray) -> str:
    """Of rows for which something holds."""
    return f"{100 * rows.mean():5.1f} % of {len(rows)}" if len(rows) else "none"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--sensitivity", type=float, default=98.0, help="in %%, over all of the data sets' lesions")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    try:
        predictor = ModelPredictor.load(options.model, None, None, constrained=True)
        model, processor = predictor.segmenter.model, predictor.segmenter.processor
        model.config.word_bias = {}
        tokens = [processor.tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (" Yes", " No", ".")]
        usual, odds, found = processor.constraint, list[float](), list[np.ndarray]()
        processor.constraint = lambda frames, openings=(): Watch(usual(frames, openings), tokens, odds)
        for path in options.datasets:
            records = evaluate(LesionSet.open(path), predictor, batch_size=16).records
            found.append(np.array([[record.lesion_share > 0, record.found] for record in records]))
    except CoreSegError as error:
        parser.error(str(error))
    scores = np.split(np.array(odds), np.cumsum([len(rows) for rows in found])[:-1])
    # An answer of another shape stays as sure as it is: no bias reaches it.
    sure = [
        np.where(np.isnan(s), np.where(rows[:, 1], np.inf, -np.inf), s) for s, rows in zip(scores, found, strict=True)
    ]
    lesions = np.concatenate([s[rows[:, 0]] for s, rows in zip(sure, found, strict=True)])
    bias = max(0.0, 1e-3 - float(np.quantile(lesions, 1 - options.sensitivity / 100, method="lower")))
    print(f"bias of Yes {bias:.3f}; {np.isnan(odds).sum()} of {len(odds)} answers were of another shape")
    for path, s, rows in zip(options.datasets, sure, found, strict=True):
        there = rows[:, 0]
        print(
            f"{path}: found {share(s[there] > 0)}, with the bias {share(s[there] + bias > 0)}; "
            f"called absent {share(s[~there] <= 0)}, with the bias {share(s[~there] + bias <= 0)}"
        )
    if options.write:
        model.config.word_bias = {tokens[0]: bias}
        model.config.save_pretrained(find_checkpoint(options.model))
