"""Which rows are hard: groups and folds to score them in, and where the sorted scores are cut. No file is read here.

The score of a row is its **out-of-fold Dice**: that of a small U-Net which was trained on other cases of the same
group. With errors e = 1 - Dice, a group keeps the rows whose

    Dice <= min(1 - x_min, Dice at the knee)

so a row is kept where both call it hard. x_min is where the tail of the errors begins to follow a power law
p(e) ~ e^-alpha; the knee is where the Dice, sorted with the hardest row first, stops rising steeply. Where one of the
two is missing the other stands alone; where both are, or where together they would keep every row, the hardest 30 % are
kept and the rule says so.

Source: the paper's difficulty-aware filtering: power law (Clauset, Shalizi and Newman, arXiv 0706.1062, as in
`powerlaw`) and Kneedle (Satopaa et al. 2011, as in `kneed`). Our choice: the formula, for the paper does not say how
x_min enters (its one example ends at a Dice of about 0.16 that keeps some 10 of 135 rows); pools, folds, fallbacks.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from coreseg.statements import Features
from coreseg.types import Sample

POOL = "(pooled)"
"""The group of all sources that are too small for a model of their own."""

FALLBACK_SHARE = 0.3
MIN_TAIL = 10
"""A power law is fitted to so many rows at least."""
MIN_BULGE = 0.1
"""A knee lies so far above the straight line from the hardest to the easiest row, both axes scaled to 1; below, noise
makes knees of its own."""
MAX_FITTED = 1000
"""Of more rows, so many in equal steps through the sorted ones are fitted: the libraries take quadratic time."""


# --- what is scored by what ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """One training of one group: the rows to train on, and those of other cases that it scores."""

    group: str
    number: int
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """Group and number, from 1, in words."""
        return f"{self.group}, fold {self.number + 1}"

    @property
    def key(self) -> str:
        """A name for its files."""
        return f"fold-{crc32(self.name.encode()):08x}"


def group_rows(samples: Sequence[Sample], pool_under: int, folds: int) -> dict[str, list[Sample]]:
    """The rows with a lesion by group: a source of its own, or `POOL`, the last.

    Pooled are all sources with fewer than `pool_under` such rows, or with fewer cases than `folds`. One pool and not
    one a modality: in small collections most of those would still be too small.
    """
    lesions = [sample for sample in samples if sample.boxes]
    rows, keys = Counter(sample.source for sample in lesions), case_keys(lesions)
    cases = {source: {keys[sample] for sample in lesions if sample.source == source} for source in rows}
    alone = {source for source in rows if rows[source] >= pool_under and len(cases[source]) >= folds}
    groups: dict[str, list[Sample]] = {source: [] for source in sorted(alone)}
    groups[POOL] = []
    for sample in lesions:
        groups[sample.source if sample.source in alone else POOL].append(sample)
    return {name: members for name, members in groups.items() if members}


def case_keys(samples: Sequence[Sample]) -> dict[Sample, str]:
    """What must stay in one fold with each row: its case, or its picture where that is unknown."""
    of_picture = {sample.file_name: sample.case for sample in samples if sample.case}
    return {sample: of_picture.get(sample.file_name, f"picture {sample.file_name}") for sample in samples}


def split_folds(group: str, samples: Sequence[Sample], folds: int, seed: int) -> list[Fold]:
    """Folds of about equal size that no case crosses; with fewer cases than `folds`, one a case.

    The same for the same seed. A single case gives no fold: nothing is left to learn from.
    """
    keys = case_keys(samples)
    sizes = Counter(keys.values())
    cases = sorted(sizes)
    drawn = [cases[index] for index in np.random.default_rng(seed).permutation(len(cases))]
    filled = [0] * min(folds, len(sizes))
    fold_of: dict[str, int] = {}
    for case in sorted(drawn, key=lambda name: -sizes[name]):
        fold_of[case] = filled.index(min(filled))
        filled[fold_of[case]] += sizes[case]
    numbers = [fold_of[keys[sample]] for sample in samples]
    apart = [[number == fold for number in numbers] for fold in range(len(filled))] if len(filled) > 1 else []
    return [
        Fold(
            group,
            number,
            train=tuple(sample for sample, out in zip(samples, held_out, strict=True) if not out),
            held_out=tuple(sample for sample, out in zip(samples, held_out, strict=True) if out),
        )
        for number, held_out in enumerate(apart)
    ]


# --- where the scores are cut ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """The tail of the errors: p(e) ~ e^-alpha for e >= x_min, which holds for the `tail` hardest rows.

    distance: the largest between the two cumulative distributions, Kolmogorov's and Smirnov's; above some 0.1 the
    tail is hardly a power law.
    """

    x_min: float
    alpha: float
    tail: int
    distance: float

    def dice(self) -> Float[np.ndarray, " tail"]:
        """The Dice that the law expects of the tail's rows, the hardest first; not below 0."""
        ranks = np.arange(1, self.tail + 1)
        expected: Float[np.ndarray, " tail"] = 1 - self.x_min * (self.tail / ranks) ** (1 / (self.alpha - 1))
        return expected.clip(min=0)


@dataclass(frozen=True)
class Knee:
    """Where the sorted scores stop rising steeply: the number of rows up to there, and the Dice of the last of them."""

    rank: int
    dice: float


@dataclass(frozen=True)
class Decision:
    """What is kept of some rows, in their order, and why.

    `threshold` is the highest score that is kept; `rule` says in words what decided. Law and knee are there where they
    were found, whether or not they decided.
    """

    kept: Bool[np.ndarray, " rows"]
    threshold: float | None
    rule: str
    power_law: PowerLaw | None = None
    knee: Knee | None = None


def decide(
    scores: Float[np.ndarray, " rows"], *, keep_share: float | None = None, fit_from: int = 50, seed: int = 0
) -> Decision:
    """Which of these rows are hard, by their scores: a Dice, or with `keep_share` anything that is higher for easier.

    With `keep_share` exactly that share of the scored rows is kept (rounded, one at least), ties drawn by `seed`;
    otherwise all rows up to the threshold of the module's formula, so that ties stay together. Fewer than `fit_from`
    rows are cut by the fallback. Rows without a score (NaN) are not kept.
    """
    scored = np.isfinite(scores)
    curve = np.sort(scores[scored])
    if not len(curve):
        return Decision(scored, None, "nothing, because no row has a score")
    if keep_share is not None:
        return _hardest(scores, keep_share, f"the hardest {keep_share:.0%}", seed)
    fallback = f"the hardest {FALLBACK_SHARE:.0%}, because "
    if len(curve) < fit_from:
        return _hardest(scores, FALLBACK_SHARE, f"{fallback}{len(curve)} rows are too few for a fit", seed)
    if curve[0] == curve[-1]:
        return _hardest(scores, FALLBACK_SHARE, f"{fallback}every row has the same score", seed)
    law, knee = fit_power_law(curve), find_knee(curve)
    limits = ([float(curve[law.tail - 1])] if law else []) + ([knee.dice] if knee else [])
    threshold = min(limits, default=np.inf)
    if threshold >= curve[-1]:
        reason = "law and knee together would keep every row" if limits else "neither a power law nor a knee was found"
        return _hardest(scores, FALLBACK_SHARE, f"{fallback}{reason}", seed, law, knee)
    names = ("the power law alone, as no knee was found", "the knee alone, as no power law was found")
    rule = "the lower of 1 - x_min and the Dice at the knee" if law and knee else names[0 if law else 1]
    return Decision(scored & (np.nan_to_num(scores, nan=np.inf) <= threshold), threshold, rule, law, knee)


def _hardest(
    scores: Float[np.ndarray, " rows"],
    share: float,
    rule: str,
    seed: int,
    law: PowerLaw | None = None,
    knee: Knee | None = None,
) -> Decision:
    """Exactly this share of the scored rows; which of equal ones is drawn, not left to their order in the file."""
    scored = np.flatnonzero(np.isfinite(scores))
    lots = np.random.default_rng(seed).permutation(len(scored))
    hardest = scored[np.lexsort((lots, scores[scored]))][: max(1, round(share * len(scored)))]
    kept = np.zeros(len(scores), dtype=bool)
    kept[hardest] = True
    return Decision(kept, float(scores[hardest].max()), rule, law, knee)


def fit_power_law(curve: Float[np.ndarray, " rows"]) -> PowerLaw | None:
    """Clauset's fit to the errors of sorted Dice, hardest first: the x_min of the smallest Kolmogorov-Smirnov distance.

    None where no tail of `MIN_TAIL` rows can be fitted.
    """
    import powerlaw

    errors = 1 - curve[:: -(-len(curve) // MAX_FITTED)]
    errors = errors[errors > 0]
    if len(errors) <= MIN_TAIL or errors[-1] >= errors[MIN_TAIL - 1]:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is asked for below
        limits = (errors[-1], errors[MIN_TAIL - 1])
        fit = powerlaw.Fit(errors, xmin=limits, parameter_ranges={"alpha": [1, None]}, verbose=0)
    if fit.noise_flag or not (np.isfinite(fit.alpha) and fit.alpha > 1):
        return None
    return PowerLaw(float(fit.xmin), float(fit.alpha), int((1 - curve >= fit.xmin).sum()), float(fit.D))


def find_knee(curve: Float[np.ndarray, " rows"]) -> Knee | None:
    """The knee of sorted Dice, hardest first, or None where Kneedle finds none that stands out (`MIN_BULGE`).

    Of several it is the one furthest above the line from end to end: noise has its knees anywhere.
    """
    from kneed import KneeLocator

    ranks = np.arange(len(curve))
    # With the last, or the ends of the curve are not those of the sample.
    sampled = np.union1d(ranks[:: -(-len(curve) // MAX_FITTED)], ranks[-1:])
    found = KneeLocator(sampled, curve[sampled], curve="concave", direction="increasing", online=True)
    bulge = dict(zip(found.x.tolist(), found.y_difference.tolist(), strict=True))
    furthest = max(map(int, found.all_knees), key=lambda index: bulge[index], default=0)
    if not bulge[furthest] >= MIN_BULGE:
        return None
    return Knee(furthest + 1, float(curve[furthest]))


def ease(seen: Sequence[Features]) -> Float[np.ndarray, " rows"]:
    """A quick stand-in for the Dice of one source's rows, in (0, 1], higher for easier; no model is asked.

    The mean of three ranks within the source: size of the largest lesion, strength of its contrast, sharpness of its
    edge (`coreseg.statements`). What is too small to be measured ranks lowest. Our choice; it orders rows and means
    nothing in itself, so no threshold can be fitted to it.
    """
    measured = [[each.size, abs(each.contrast or 0.0), each.step or 0.0] for each in seen]
    ranks: Float[np.ndarray, " rows"] = rankdata(np.array(measured), axis=0).mean(axis=1) / len(seen)
    return ranks
