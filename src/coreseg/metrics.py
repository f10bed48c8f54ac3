"""The scores: masks, boxes, failure, and how sure a mean is. Shared by the rewards and by evaluation.

The empty-mask convention, stated here once for the whole package: **two empty masks agree, so their Dice and IoU are
1**; one empty mask against a non-empty one scores 0. The same holds for two empty lists of boxes. Our choice: the
paper has no lesion-free images.

Masks of one pair share a frame and a size, boxes of one pair share a frame; every score is in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from coreseg.types import Box

Boxes = Sequence[Box] | Int[np.ndarray, "_ 4"]
"""Half-open `x1, y1, x2, y2` with area, as an array or as tuples; both may be empty."""

GOOD_DICE = 0.5
"""From here on a mask is a good one: what a confidence is measured by, and warned below. Our choice."""


def dice(prediction: Bool[np.ndarray, "height width"], reference: Bool[np.ndarray, "height width"]) -> float:
    """Twice the overlap over the sum of the two areas. Two empty masks score 1."""
    total_px = _area_px(prediction) + _area_px(reference)
    return 2 * _overlap_px(prediction, reference) / total_px if total_px else 1.0


def iou(prediction: Bool[np.ndarray, "height width"], reference: Bool[np.ndarray, "height width"]) -> float:
    """Overlap over union. Two empty masks score 1."""
    overlap_px = _overlap_px(prediction, reference)
    union_px = _area_px(prediction) + _area_px(reference) - overlap_px
    return overlap_px / union_px if union_px else 1.0


def _area_px(mask: Bool[np.ndarray, "height width"]) -> int:
    return int(np.count_nonzero(mask))


def _overlap_px(prediction: Bool[np.ndarray, "height width"], reference: Bool[np.ndarray, "height width"]) -> int:
    if prediction.shape != reference.shape:  # broadcasting would score a mask in a foreign frame silently
        raise ValueError(f"masks of {prediction.shape} and {reference.shape} have no common frame; resize one first")
    return _area_px(prediction & reference)


def is_failure(dice_score: float, valid: bool) -> bool:
    """Whether an answer about a lesion that is there counts as failed: Dice 0, or an invalid form.

    Source: the paper's failure rate. Not defined on lesion-free samples, which are reported apart.
    """
    return dice_score == 0.0 or not valid


def box_iou(first: Boxes, second: Boxes) -> Float[np.ndarray, "first second"]:
    """IoU of every box of `first` with every box of `second`."""
    a, b = _box_array(first)[:, None], _box_array(second)[None, :]
    sides_px = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = sides_px.clip(min=0).prod(axis=-1)
    ious: Float[np.ndarray, "first second"] = overlap / (_box_areas(a) + _box_areas(b) - overlap)
    return ious


def _box_array(boxes: Boxes) -> Int[np.ndarray, "count 4"]:
    return np.asarray(boxes, dtype=np.int64).reshape(-1, 4)


def _box_areas(boxes: Int[np.ndarray, "*count 4"]) -> Int[np.ndarray, "*count"]:
    areas: Int[np.ndarray, "*count"] = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    return areas


def detect_score(predicted: Boxes, reference: Boxes) -> float:
    """How well the written boxes name the lesions: mean IoU of the matched pairs times F1.

    The Hungarian algorithm pairs boxes one to one for the largest total IoU. Pairs without overlap are not matches:
    the reference is missed, the prediction is a false alarm. Both lists empty scores 1, one of them empty 0.

    Source: the paper's bipartite detection reward. Our choice: the threshold IoU > 0.
    """
    boxes = len(predicted) + len(reference)
    if not boxes:
        return 1.0
    ious = box_iou(predicted, reference)
    # With k matches the mean IoU is total / k and F1 is 2 k / boxes: k cancels, and pairs without overlap add nothing.
    total = ious[linear_sum_assignment(ious, maximize=True)].sum()
    return float(2 * total / boxes)


@dataclass(frozen=True)
class Interval:
    """A bootstrap percentile interval, in the units of the values."""

    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], cases: Sequence[str], seed: int = 0, draws: int = 1000, level: float = 0.95
) -> Interval:
    """Interval of the mean when the cases, not the images, are drawn again.

    Images of one patient go together, so that ten slices do not pass for ten patients. An empty case is unknown and
    counts as a case of its own; where patients are unknown the interval is therefore too narrow. A single case gives
    an interval without width, which says nothing about its certainty. Percentile method, deterministic by `seed`.

    Raises ValueError without values, or with lists of different lengths.
    """
    return macro_bootstrap_interval(values, cases, [""] * len(values), seed, draws, level)


def macro_bootstrap_interval(
    values: Sequence[float],
    cases: Sequence[str],
    sets: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean of the set means, cases drawn again within each set.

    The sets themselves are held fixed: it says how sure the figure is on these sets, not on others. Raises as
    `bootstrap_interval`.
    """
    _require_equal_lengths(values, sets)
    means = _drawn_macro_means(np.array([values], dtype=float), cases, sets, np.random.default_rng(seed), draws)
    return _percentile_interval(means[:, 0], level)


def difference_interval(
    differences: Float[np.ndarray, "a_seeds b_seeds rows"],
    cases: Sequence[str],
    sets: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Interval of the macro mean of B - A when training seeds and cases are both drawn again.

    `differences[i, j]` are those of B's run `j` less A's run `i`, row by row. Each draw takes as many of A's runs as
    there are and, apart, as many of B's, both with replacement, and the cases of each set as
    `macro_bootstrap_interval` does (sets that all have one name give the pooled mean). With one run a side it is the
    interval of the paired differences and says nothing about training noise. With few runs it is too narrow: a
    bootstrap of n values understates their variance by 1 / n of it.

    Source: Owen, "The pigeonhole bootstrap" (2007), for two crossed factors, here with two groups of seeds. Raises as
    `bootstrap_interval`.
    """
    a_seeds, b_seeds, rows = differences.shape
    rng = np.random.default_rng(seed)
    means = _drawn_macro_means(differences.reshape(-1, rows), cases, sets, rng, draws).reshape(draws, a_seeds, b_seeds)
    a_shares, b_shares = (
        rng.multinomial(count, np.full(count, 1 / count), draws) / count for count in (a_seeds, b_seeds)
    )
    return _percentile_interval(np.einsum("dab,da,db->d", means, a_shares, b_shares), level)


def statistic_interval(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float],
    cases: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Interval of what is no mean, a function of the rows' numbers, when the cases are drawn again.

    Draws for which the statistic is NaN, since one side of a comparison is missing, are left out; where all are, so is
    the interval. Raises as `bootstrap_interval`.
    """
    _require_equal_lengths(np.empty(len(cases)), cases)
    _, of_row = np.unique(np.asarray(_keys(cases)), return_inverse=True)
    count = int(of_row.max()) + 1
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    rows = np.arange(len(cases))
    found = np.array([statistic(np.repeat(rows, drawn[of_row])) for drawn in times])
    found = found[~np.isnan(found)]
    return _percentile_interval(found, level) if len(found) else Interval(np.nan, np.nan)


def macro_mean(values: Sequence[float], sets: Sequence[str]) -> float:
    """Mean of the set means, every set with the same weight. Raises ValueError without values."""
    _require_equal_lengths(values, sets)
    _, of_value = np.unique(np.asarray(sets), return_inverse=True)
    return float(np.mean(np.bincount(of_value, weights=values) / np.bincount(of_value)))


def _drawn_macro_means(
    values: Float[np.ndarray, "runs rows"],
    cases: Sequence[str],
    sets: Sequence[str],
    rng: np.random.Generator,
    draws: int,
) -> Float[np.ndarray, "draws runs"]:
    """Each run's mean of the set means in each of `draws` resamples of the cases within their sets."""
    _require_equal_lengths(values[0], sets)
    _require_equal_lengths(values[0], cases)
    of_set = [[row for row, name in enumerate(sets) if name == one] for one in sorted(set(sets))]
    drawn = [_drawn_means(values[:, rows], [cases[row] for row in rows], rng, draws) for rows in of_set]
    means: Float[np.ndarray, "draws runs"] = np.mean(drawn, axis=0)
    return means


def _drawn_means(
    values: Float[np.ndarray, "runs rows"], cases: Sequence[str], rng: np.random.Generator, draws: int
) -> Float[np.ndarray, "draws runs"]:
    """Each run's mean in each of `draws` resamples of the cases, the same cases for every run."""
    _, of_value = np.unique(np.asarray(_keys(cases)), return_inverse=True)
    sums = np.stack([np.bincount(of_value, weights=run) for run in values], axis=1)
    counts = np.bincount(of_value)
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
    means: Float[np.ndarray, "draws runs"] = (times @ sums) / (times @ counts)[:, None]
    return means


def _keys(cases: Sequence[str]) -> list[str]:
    """The cases, unknown ones with a name each."""
    return [case or f"\0{row}" for row, case in enumerate(cases)]  # \0: no case name can collide with it


def _percentile_interval(means: Float[np.ndarray, " draws"], level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _require_equal_lengths(values: Sequence[float] | Float[np.ndarray, " rows"], names: Sequence[str]) -> None:
    if len(values) == 0 or len(values) != len(names):
        raise ValueError(f"{len(values)} values with {len(names)} names: expected as many of both, and at least one")
