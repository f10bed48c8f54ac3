"""Whether a model knows how good its masks are: its confidence beside the Dice that came out.

Source: risk-coverage curves, Geifman and El-Yaniv (arXiv 1705.08500), here with 1 - Dice as the risk. Our choice: what
counts as a good mask, and calibration by bins of equally many answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from coreseg.metrics import GOOD_DICE, statistic_interval

BINS = 10
COVERAGES = (90, 75, 50)
"""In %: how good the masks are of so many answers, the surest ones."""

Scores = Float[np.ndarray, " rows"]


def sureness(
    told: Sequence[float], dices: Sequence[float], cases: Sequence[str], seed: int = 0
) -> dict[str, Any] | None:
    """The figures as plain JSON, in %, each with its interval by case; None without rows.

    - `auroc`: how often a good mask (Dice of 0.5 or more) is told to be better than one that is not; 50 for a constant,
      None where there are only masks of one kind.
    - `calibration_error`: how far confidence and Dice are apart, by tenths of the answers from the least to the most
      sure.
    - `risk`: the mean of 1 - Dice; `risk_kept`: the mean of that over all shares of answers, the surest first: a
      constant confidence has `risk` itself, and `risk_best` is the least that any order could have.
    - `kept_90`, `kept_75`, `kept_50`: mDice of that share of the answers, the surest ones.
    """
    if not len(told):
        return None
    sure, dice = np.asarray(told, dtype=float), np.asarray(dices, dtype=float)

    def figure(statistic: Callable[[Scores, Scores], float]) -> dict[str, float] | None:
        mean = statistic(sure, dice)
        if np.isnan(mean):
            return None
        interval = statistic_interval(lambda rows: statistic(sure[rows], dice[rows]), cases, seed)
        return {"mean": 100 * mean, "low": 100 * interval.low, "high": 100 * interval.high}

    return {
        "n": len(sure),
        "auroc": figure(auroc),
        "calibration_error": figure(calibration_error),
        "risk": figure(lambda _, dice: float(1 - dice.mean())),
        "risk_kept": figure(lambda sure, dice: float(risks(sure, dice).mean())),
        "risk_best": figure(lambda _, dice: float(risks(dice, dice).mean())),
        **{f"kept_{share}": figure(_kept(share)) for share in COVERAGES},
    }


def auroc(sure: Scores, dice: Scores) -> float:
    """Area under the ROC curve of telling good masks from others by the confidence; NaN with one kind alone."""
    good = dice >= GOOD_DICE
    pairs = int(good.sum()) * int((~good).sum())
    if not pairs:
        return float("nan")
    # Mann and Whitney's U, over the number of pairs; ties count half.
    return float((rankdata(sure)[good].sum() - good.sum() * (good.sum() + 1) / 2) / pairs)


def calibration_error(sure: Scores, dice: Scores) -> float:
    """The mean distance between confidence and Dice over bins of equally many answers, sorted by confidence."""
    order: Int[np.ndarray, " rows"] = np.argsort(sure, kind="stable")
    bins = np.array_split(order, min(BINS, len(order)))
    return float(sum(len(each) * abs(sure[each].mean() - dice[each].mean()) for each in bins) / len(order))


def risks(sure: Scores, dice: Scores) -> Scores:
    """The mean of 1 - Dice over the surest answer, the surest two, and so on to all; equally sure ones share theirs."""
    order = np.argsort(-sure, kind="stable")
    _, tied = np.unique(-sure[order], return_inverse=True)
    level = (np.bincount(tied, weights=1 - dice[order]) / np.bincount(tied))[tied]
    curve: Scores = np.cumsum(level) / np.arange(1, len(order) + 1)
    return curve


def _kept(share: int) -> Callable[[Scores, Scores], float]:
    return lambda sure, dice: float(1 - risks(sure, dice)[max(1, round(len(dice) * share / 100)) - 1])
