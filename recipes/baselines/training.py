"""What the scripts of the trained baselines share: options, rows, and how rows are drawn.

Training is that of `coreseg.train.baselines`, on a budget of processor time, with the draws of
`recipes/nano/segmenter.py`.
"""

import argparse
from pathlib import Path

from segmenter import draw_weights

from coreseg.data.store import LesionSet
from coreseg.evaluate.trained import TrainedBaseline
from coreseg.train.baselines import fit, load_rows
from coreseg.train.loop import Budget


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of both scripts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu-minutes", type=float, default=40.0, help="user and system time of the training steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def categories_of(sets: list[LesionSet]) -> list[str]:
    """What the training rows ask for, in alphabetical order."""
    return sorted({sample.category for lesions in sets for sample in lesions.split("train")})


def train(model: TrainedBaseline, groups: list[dict], sets: list[LesionSet], options: argparse.Namespace) -> None:
    """Spend the budget on `groups` of parameters, each with its "lr", and leave the averaged model in `options.out`."""
    rows = [(lesions, sample) for lesions in sets for sample in lesions.split("train")]
    weights = draw_weights([sample.source for _, sample in rows])
    budget = Budget(minutes=options.cpu_minutes)
    loaded = load_rows(rows, model.categories, model.size_px)
    trained, steps = fit(model, groups, loaded, weights, budget, options.out, seed=options.seed, description=model.name)
    asked = {name: value for name, value in vars(options).items() if name not in ("datasets", "out")}
    trained.save(options.out, {"steps": steps, "rows": len(rows), **asked})
