"""Curves of several stage-2 runs: mean and range over the seeds of each arm as a picture, and where they end as text.

python recipes/nano/curves.py RUN… --out PNG [--reach DICE]

A run's arm is its folder's name up to the last dash: `dual-0`, `dual-1` and `dual-2` are one arm. Needs matplotlib.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = tuple[list[float], list[float]]
PANELS = {
    "dice": "mean Dice, validation rows",
    "mask_spread": "groups whose mask rewards spread by > 0.05",
    "zero_variance": "groups whose rewards are all alike",
    "valid": "valid answers",
}


def curves(run: Path) -> dict[str, Curve]:
    """Step and value of each panel's figure."""
    looks = [json.loads(line) for line in (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    logged = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found: dict[str, Curve] = {"dice": ([look["step"] for look in looks], [look["dice"] for look in looks])}
    for name in list(PANELS)[1:]:
        lines = [line for line in logged if name in line]
        found[name] = ([line["step"] for line in lines], [line[name] for line in lines])
    return found


def draw(arms: Mapping[str, Sequence[dict[str, Curve]]], out: Path) -> None:
    """One panel a figure; a line is the mean over seeds, its shade their range, as far as all of them got."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for arm, runs in arms.items():
            # Time ends the runs, so the last step is another one in each.
            steps = [step for step in runs[0][name][0] if step <= min(run[name][0][-1] for run in runs)]
            values = np.array([np.interp(steps, *run[name]) for run in runs])
            (line,) = axis.plot(steps, values.mean(axis=0), label=f"{arm} ({len(runs)})")
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def reached(curve: Curve, value: float) -> float:
    """The first step at which the curve stands at the value or above; infinite where it never does."""
    return next((step for step, height in zip(*curve, strict=True) if height >= value), float("inf"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reach", type=float, default=0.5)
    options = parser.parse_args()
    arms = defaultdict(list)
    for run in options.runs:
        arms[run.name.rsplit("-", 1)[0]].append(curves(run))
        found = arms[run.name.rsplit("-", 1)[0]][-1]
        spread = np.mean(found["mask_spread"][1])
        steps, dices = found["dice"]
        print(
            f"{run.name}: {steps[-1]} steps, Dice {dices[0]:.3f} at the first look, {dices[-1]:.3f} at the last, "
            f"{options.reach} at step {reached(found['dice'], options.reach):g}; spread {100 * spread:.1f} %"
        )
    draw(arms, options.out)
