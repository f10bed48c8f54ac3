"""What one answer's record holds, and what records add up to.

Source: mDice, mIoU and failure rate are the paper's. Our choice: every other figure, because a small or lucky model
must not look good.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Any, TypeVar

import numpy as np

from coreseg.answer import parse
from coreseg.evaluate.sureness import sureness
from coreseg.metrics import Interval, bootstrap_interval, is_failure, macro_bootstrap_interval, macro_mean
from coreseg.sentences import KINDS, find_all
from coreseg.types import Box

NEAR_MISS_DICE = 0.05
"""Below this the overlap is an accident. Source: the paper's segment reward switches to boxes there."""


@dataclass(frozen=True)
class Record:
    """One question about one row, its answer and its scores in [0, 1].

    attribute: empty for the question about the whole category, else which lesions it asked for, such as "largest".
    lesion_share: foreground of the asked mask over the image's area; 0 on a lesion-free sample.
    predicted_share: the same of the answered mask; 0 where the form is invalid.
    wrong_category: the answer has a valid form and names another category than the asked one.
    boxes: as written, in original pixels.
    whole_dice: attribute questions only: what the reference mask of the whole category scores against the asked one.
    plain_dice: attribute questions only: the same of the mask that this predictor gave to the plain question.
    rest_dice, plain_rest_dice: attribute questions only: Dice of the answered mask, and of that to the plain question,
    with the category's lesions that were not asked for.
    other_dice: where the same image also shows another category: Dice of the answered mask with that one's lesions.
    reference_words, mask_words: of each kind of statement that can be measured on the asked mask, and on the answered
    one, the measured value and after it the others that count as true; None in records of earlier versions.
    confidence, signs: as in the result; None where the predictor has none, and in records of earlier versions.
    """

    file_name: str
    mask_file_name: str
    source: str
    modality: str
    anatomy: str
    category: str
    case: str
    attribute: str
    question: str
    lesion_share: float
    text: str
    valid: bool
    found: bool
    wrong_category: bool
    predicted_share: float
    dice: float
    iou: float
    detect: float
    boxes: tuple[Box, ...]
    seconds: float
    whole_dice: float | None = None
    plain_dice: float | None = None
    rest_dice: float | None = None
    plain_rest_dice: float | None = None
    other_dice: float | None = None
    reference_words: Mapping[str, Sequence[str]] | None = None
    mask_words: Mapping[str, Sequence[str]] | None = None
    confidence: float | None = None
    signs: Mapping[str, float] | None = None

    @property
    def drawn_with(self) -> str:
        """What a bootstrap draws as one: the case, or the image where the case is unknown.

        So that several questions about one image do not pass for several images.
        """
        return self.case or self.file_name


Figure = dict[str, float]
"""`mean` with its 95 % interval, `low` and `high`, by case; in % of the scores' unit."""

AnyRecord = TypeVar("AnyRecord", bound=Record)
Score = Callable[[Record], float]

SCORES: dict[str, Score] = {
    "dice": lambda record: record.dice,
    "iou": lambda record: record.iou,
    "detect": lambda record: record.detect,
    "failure": lambda record: is_failure(record.dice, record.valid),
    "invalid": lambda record: not record.valid,
    "missed": lambda record: record.valid and is_failure(record.dice, record.valid),
    "near_miss": lambda record: record.dice < NEAR_MISS_DICE,
    "wrong_category": lambda record: record.wrong_category,
}
"""What every row with the lesion is scored by, in [0, 1]."""


def is_empty(record: Record) -> bool:
    """Whether the answer gave no mask: right on a lesion-free row, which is what specificity counts."""
    return record.predicted_share == 0


def is_given(record: Record) -> bool:
    """Whether the answer says that there is a lesion and gives its mask, which is what sensitivity counts."""
    return record.found and not is_empty(record)


def is_called_absent(record: Record) -> bool:
    """Whether the answer says that there is no lesion; one that says otherwise may come with an empty mask too."""
    return record.valid and not record.found


def attribute_gain(record: Record) -> float:
    """Of an attribute question: Dice less that of the predictor's own mask of the whole category."""
    return record.dice - (record.plain_dice or 0.0)


def summarise(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """What the records add up to, as plain JSON; figures in % with their intervals.

    - `n`, `n_lesion`, `n_lesion_free`: rows, and how many of them show the lesion or do not.
    - `pooled`, `macro`: every score of the lesion-bearing rows, as the mean over rows and over the means of the sets.
      `failure` = `invalid` form + `missed` (valid form, Dice 0); `near_miss` = Dice below 0.05, failures included.
    - `by`: the pooled scores within each source, modality, anatomy, category and lesion-size quartile.
    - `presence`: `specificity` = lesion-free rows with an empty mask, also by source; `sensitivity` = lesion-bearing
      rows that were called found and given a mask. Lesion-free rows enter nothing else. An empty mask may come of words
      that see a lesion, or of an invalid answer: `called_absent` and `invalid_lesion_free` stand beside.
    - `agreement`: detect score of the written boxes against those of the answer's own mask, on lesion-bearing rows that
      were called found, pooled and macro.
    - `pairs`: the rows whose image shows another category too: Dice with the asked lesions and with the `other` ones,
      pooled and by source. The two questions share the image's maps, so only the prompt can tell them apart.
    - `attributes`: the attribute questions apart, see `_attributes`.
    - `statements`: whether what the reasoning states is true, see `_statements`.
    - `confidence`: whether the model knows how good its masks are, see `coreseg.evaluate.sureness`.
    - `seconds_median`: wall time per image.

    A block without rows is None.
    """
    plain = [record for record in records if not record.attribute]
    lesion = [record for record in plain if record.lesion_share > 0]
    return {
        "n": len(plain),
        "n_lesion": len(lesion),
        "n_lesion_free": len(plain) - len(lesion),
        "pooled": _pooled(lesion, seed) if lesion else None,
        "macro": _macro(lesion, seed) if lesion else None,
        "by": {
            **{part: _by(lesion, attrgetter(part), seed) for part in _PARTS},
            "size": _by(lesion, _size_quartile(lesion), seed),
        },
        "presence": _presence(lesion, [record for record in plain if record.lesion_share == 0], seed),
        "agreement": _agreement([record for record in lesion if record.found and record.signs is not None], seed),
        "pairs": _pairs([record for record in lesion if record.other_dice is not None], seed),
        "attributes": _attributes([record for record in records if record.attribute], seed),
        "statements": _statements([record for record in lesion if record.reference_words is not None], seed),
        "confidence": _sureness([record for record in plain if record.confidence is not None], seed),
        "seconds_median": median(record.seconds for record in plain) if plain else None,
    }


_PARTS = ("source", "modality", "anatomy", "category")


def figure(records: Sequence[AnyRecord], score: Callable[[AnyRecord], float], seed: int) -> Figure:
    """The mean of a score over records, with its interval."""
    values = [float(score(record)) for record in records]
    return _percent(float(np.mean(values)), bootstrap_interval(values, [record.drawn_with for record in records], seed))


def _percent(mean: float, interval: Interval) -> Figure:
    return {"mean": 100 * mean, "low": 100 * interval.low, "high": 100 * interval.high}


def _pooled(records: Sequence[Record], seed: int) -> dict[str, Any]:
    return {"n": len(records), **{name: figure(records, score, seed) for name, score in SCORES.items()}}


def _macro(records: Sequence[Record], seed: int) -> dict[str, Any]:
    sets = len({record.source for record in records})
    return {"sets": sets, **{name: _macro_figure(records, score, seed) for name, score in SCORES.items()}}


def _macro_figure(records: Sequence[Record], score: Score, seed: int) -> Figure:
    """The mean over the sets' means of a score, with its interval."""
    values = [float(score(record)) for record in records]
    sets, cases = [record.source for record in records], [record.drawn_with for record in records]
    return _percent(macro_mean(values, sets), macro_bootstrap_interval(values, cases, sets, seed))


def _by(records: Sequence[Record], part: Callable[[Record], str], seed: int) -> dict[str, Any]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(part(record), []).append(record)
    return {name: _pooled(groups[name], seed) for name in sorted(groups)}


def _size_quartile(records: Sequence[Record]) -> Callable[[Record], str]:
    """Names the quarter of the lesion-bearing rows, by share of the image, that a row's lesions fall in."""
    shares = [record.lesion_share for record in records] or [0.0]
    edges = np.quantile(shares, [0, 0.25, 0.5, 0.75, 1])

    def name(record: Record) -> str:
        quarter = int(np.searchsorted(edges[1:-1], record.lesion_share))
        return f"Q{quarter + 1}: {100 * edges[quarter]:.3g} to {100 * edges[quarter + 1]:.3g} % of the image"

    return name


def _presence(lesion: Sequence[Record], lesion_free: Sequence[Record], seed: int) -> dict[str, Any]:
    sources = sorted({record.source for record in lesion_free})
    return {
        "sensitivity": figure(lesion, is_given, seed) if lesion else None,
        "specificity": figure(lesion_free, is_empty, seed) if lesion_free else None,
        "called_absent": figure(lesion_free, is_called_absent, seed) if lesion_free else None,
        "invalid_lesion_free": figure(lesion_free, SCORES["invalid"], seed) if lesion_free else None,
        "specificity_by_source": {
            source: figure([record for record in lesion_free if record.source == source], is_empty, seed)
            for source in sources
        },
    }


def _agreement(records: Sequence[Record], seed: int) -> dict[str, Any] | None:
    if not records:
        return None

    def agrees(record: Record) -> float:
        return record.signs["boxes"] if record.signs else 0.0

    return {"n": len(records), "pooled": figure(records, agrees, seed), "macro": _macro_figure(records, agrees, seed)}


def _sureness(records: Sequence[Record], seed: int) -> dict[str, Any] | None:
    told, cases = [record.confidence or 0.0 for record in records], [record.drawn_with for record in records]
    return sureness(told, [record.dice for record in records], cases, seed)


def _statements(records: Sequence[Record], seed: int) -> dict[str, Any] | None:
    """What the reasoning states of lesions that are there, kind by kind, and whether it is true.

    - `kinds`: how many kinds an answer states, on average.
    - `by`, for each kind: `n`, the rows where it can be measured and is stated, and what share of the first that is
      (`stated`); `balanced`, the balanced accuracy: the mean over the measured values of the share of their rows where
      all that is stated counts as true; `own`, the same beside the answer's own mask.

    Saying always the same gets a balanced accuracy of one over the number of values, but for what lies near a limit.
    """
    if not records:
        return None
    parsed = [parse(record.text) if record.valid else None for record in records]
    stated = [find_all(answer.reasoning) if answer else {} for answer in parsed]
    told = list(zip(records, stated, strict=True))
    by = {}
    for kind in KINDS:
        true = [(record, said.get(kind), (record.reference_words or {}).get(kind)) for record, said in told]
        own = [(record, said.get(kind), (record.mask_words or {}).get(kind)) for record, said in told]
        measurable = sum(bool(words) for _, _, words in true)
        spoken = [(record, said, words) for record, said, words in true if said and words]
        by[kind] = {
            "n": len(spoken),
            "stated": 100 * len(spoken) / measurable if measurable else None,
            "balanced": _balanced(spoken, seed),
            "own": _balanced([(record, said, words) for record, said, words in own if said and words], seed),
        }
    return {"kinds": float(np.mean([len(said) for said in stated])), "by": by}


def _balanced(judged: Sequence[tuple[Record, set[str], Sequence[str]]], seed: int) -> Figure | None:
    """Balanced accuracy of what is said, by the first of the true values, the measured one."""
    if not judged:
        return None
    right = [float(said <= set(true)) for _, said, true in judged]
    cases, values = [record.drawn_with for record, _, _ in judged], [true[0] for _, _, true in judged]
    return _percent(macro_mean(right, values), macro_bootstrap_interval(right, cases, values, seed))


def _pairs(records: Sequence[Record], seed: int) -> dict[str, Any] | None:
    def both(rows: Sequence[Record]) -> dict[str, Any]:
        other = figure(rows, lambda record: record.other_dice or 0.0, seed)
        return {"n": len(rows), "dice": figure(rows, SCORES["dice"], seed), "other": other}

    sources = sorted({record.source for record in records})
    by = {source: both([record for record in records if record.source == source]) for source in sources}
    return {**both(records), "by": by} if records else None


def _attributes(records: Sequence[Record], seed: int) -> dict[str, Any] | None:
    """Scores of the questions about some of the lesions, with what ignoring the attribute would have got.

    `whole`: the perfect mask of the whole category. `plain`: this predictor's own mask of the whole category.
    `gain`: Dice less `plain`, paired; about 0 means that the attribute was not understood. `by`: gain by attribute.
    `rest`, `plain_rest`: Dice of its mask, and of its own mask of the whole category, with the lesions not asked for.
    """
    if not records:
        return None

    kinds = sorted({record.attribute for record in records})
    beside = [record for record in records if record.rest_dice is not None]
    return {
        **_pooled(records, seed),
        "whole": figure(records, lambda record: record.whole_dice or 0.0, seed),
        "plain": figure(records, lambda record: record.plain_dice or 0.0, seed),
        "gain": figure(records, attribute_gain, seed),
        "rest": figure(beside, lambda record: record.rest_dice or 0.0, seed) if beside else None,
        "plain_rest": figure(beside, lambda record: record.plain_rest_dice or 0.0, seed) if beside else None,
        "by": {
            kind: figure([record for record in records if record.attribute == kind], attribute_gain, seed)
            for kind in kinds
        },
    }
