"""What the scripts of the trained baselines share: options, rows, and how rows are drawn.

Training is that of `coreseg.train.baselines`, on a budget of time, with the draws of
`recipes/nano/segmenter.py`.
"""

import argparse
from pathlib import Path

import torch
from segmenter import draw_weights

from coreseg.data.store import LesionSet
from coreseg.evaluate.trained import TrainedBaseline
from coreseg.train.baselines import categories_of, train_and_save
from coreseg.train.loop import Budget
from coreseg.types import Sample


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="of training: processor time, or on a GPU the time")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--strength", type=float, default=1.0, help="of the changes that pictures undergo")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def train(model: TrainedBaseline, groups: list[dict], sets: list[LesionSet], options: argparse.Namespace) -> None:
    """Spend the budget on `groups` of parameters, each with its "lr", and leave the averaged model in `options.out`.

    Kept with it are all other `options`.
    """
    rows = training_rows(sets)
    weights = draw_weights([sample.source for _, sample in rows])
    asked = {name: value for name, value in vars(options).items() if name not in ("datasets", "out")}
    budget = Budget(minutes=options.minutes)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train_and_save(
        model,
        groups,
        rows,
        weights,
        budget,
        options.out,
        asked,
        seed=options.seed,
        batch=options.batch,
        strength=options.strength,
    )


def training_rows(sets: list[LesionSet]) -> list[tuple[LesionSet, Sample]]:
    """The rows of all sets that are trained on."""
    return [(lesions, sample) for lesions in sets for sample in lesions.split("train")]


def asked_for(sets: list[LesionSet]) -> list[str]:
    """The categories of those rows."""
    return categories_of(sample for _, sample in training_rows(sets))
