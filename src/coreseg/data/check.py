"""Check a data set: do its rows and files agree, and does anything cross its splits?

What can be proved is proved: a known case (patient) in two splits is a leak. Where cases are unknown, pictures that
look like one (`coreseg.data.lookalikes`) are searched for, and the report says what that leaves open. Text burned into
pictures (`coreseg.data.burned_in`), which may name a patient, is pointed out.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from tqdm import tqdm

from coreseg.data.burned_in import find_text
from coreseg.data.lookalikes import Fingerprint, Sign, find_matches, fingerprint
from coreseg.data.store import SPLITS, LesionSet
from coreseg.errors import CoreSegError
from coreseg.masks import mask_to_boxes
from coreseg.types import Box, Sample

_SHOWN = 10
_EXPLAINED: Mapping[Sign, str] = {
    "pixels": "equal pixels",
    "hash": "{:.0f} of 256 hash bits differ",
    "thumbnail": "correlation {:.2f}",
}


@dataclass(frozen=True)
class CaseLeak:
    """A known case with rows in several splits."""

    case: str
    splits: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Lookalike:
    """Two pictures in different splits that look like one; file names in the data set's folder.

    `first` equals `second` where one file has rows in two splits. score: as in `coreseg.data.lookalikes.Match`.
    """

    first: str
    second: str
    splits: tuple[str, str]
    sign: Sign
    score: float


@dataclass(frozen=True)
class CheckReport:
    """What a check found. `counts` are rows by source and split; `problems` are rows and files that disagree.

    burned_in: by file name, boxes around what looks like text in a picture.
    """

    rows: int
    images: int
    negatives: int
    unknown_case: int
    counts: Mapping[str, Mapping[str, int]]
    problems: tuple[str, ...]
    case_leaks: tuple[CaseLeak, ...]
    lookalikes: tuple[Lookalike, ...]
    burned_in: Mapping[str, tuple[Box, ...]]

    @property
    def clean(self) -> bool:
        """Whether nothing was found; what cannot be proved does not count, nor text in pictures: it may be harmless."""
        return not (self.problems or self.case_leaks or self.lookalikes)

    def text(self, *, everything: bool = False) -> str:
        """The report for a reader: counts, findings (ten of a kind, or every one), and what remains unproved."""
        shown = None if everything else _SHOWN
        findings = (
            ("rows or files with faults", list(self.problems)),
            (
                "cases in several splits",
                [f"{leak.case}: {leak.rows} rows in {', '.join(leak.splits)}" for leak in self.case_leaks],
            ),
            ("pairs of pictures that look alike in different splits", [_told(pair) for pair in self.lookalikes]),
            (
                "pictures with what looks like text, perhaps a name or a date (guessed from pixels: look at them)",
                [f"{name}: {len(boxes)} lines, one at {list(boxes[0])}" for name, boxes in self.burned_in.items()],
            ),
        )
        lines = [f"{self.rows} rows on {self.images} images, {self.negatives} of them without a lesion.", ""]
        lines += [_table_line(name, by_split) for name, by_split in self.counts.items()]
        for title, found in findings:
            lines += [
                "",
                f"{len(found) or 'No'} {title}{':' if found else '.'}",
                *(f"  {line}" for line in found[:shown]),
            ]
            if len(found) > len(found[:shown]):
                lines.append(f"  … and {len(found) - _SHOWN} more (--all names them)")
        return "\n".join([*lines, "", self._unproved()])

    def _unproved(self) -> str:
        if not self.unknown_case:
            return "Every row names its case: no patient crosses splits unless listed above, if the cases are right."
        return (
            f"Not proved: {self.unknown_case} rows name no case, so two different pictures of one patient may lie in "
            "two splits. Only pictures that look alike were searched for; mirrored, turned or strongly cropped copies "
            "are not found."
        )


def check_set(lesion_set: LesionSet, *, progress: bool = True) -> CheckReport:
    """Read every row, image and mask of a set, and compare all pictures across splits.

    One image with rows for two categories is no leak as long as they share a split. Nothing is raised for what is
    found: it is in the report. Some 3,000 images of 384 px take well under a minute on one core.
    """
    problems: list[str] = []
    prints: dict[str, Fingerprint] = {}
    burned_in: dict[str, tuple[Box, ...]] = {}
    negatives = 0
    for sample in tqdm(lesion_set.samples, desc="Checking", unit="row", disable=not progress):
        try:
            if sample.file_name not in prints:
                image = lesion_set.image(sample)
                prints[sample.file_name] = fingerprint(image)
                if boxes := find_text(image):
                    burned_in[sample.file_name] = boxes
            problems += _problems_of(lesion_set, sample)
        except CoreSegError as error:
            problems.append(str(error))
        negatives += not sample.boxes
    return CheckReport(
        rows=len(lesion_set.samples),
        images=len({sample.file_name for sample in lesion_set.samples}),
        negatives=negatives,
        unknown_case=sum(not sample.case for sample in lesion_set.samples),
        counts=_counts(lesion_set),
        problems=tuple(problems),
        case_leaks=case_leaks(lesion_set),
        lookalikes=_lookalikes(lesion_set, prints),
        burned_in=burned_in,
    )


def _problems_of(lesion_set: LesionSet, sample: Sample) -> list[str]:
    mask = lesion_set.mask(sample)
    expected = [tuple(box) for box in mask_to_boxes(mask).tolist()]
    if list(sample.boxes) == expected:
        return []
    height, width = mask.shape
    where = f"{sample.mask_file_name} ({sample.category})"
    outside = [box for box in sample.boxes if box[2] > width or box[3] > height]
    if outside:
        return [f"{where}: the box {list(outside[0])} leaves the image of {width}x{height} px."]
    return [f"{where}: the row has the boxes {list(sample.boxes)}, its mask {expected}."]


def _counts(lesion_set: LesionSet) -> dict[str, dict[str, int]]:
    counted = Counter((sample.source, sample.split) for sample in lesion_set.samples)
    sources = sorted({source for source, _ in counted})
    return {source: {split: counted[source, split] for split in SPLITS} for source in sources}


def case_leaks(lesion_set: LesionSet) -> tuple[CaseLeak, ...]:
    """The known cases that have rows in several splits; no picture is read."""
    splits_of: dict[str, list[str]] = {}
    for sample in lesion_set.samples:
        if sample.case:
            splits_of.setdefault(sample.case, []).append(sample.split)
    return tuple(
        CaseLeak(case, tuple(split for split in SPLITS if split in splits), len(splits))
        for case, splits in splits_of.items()
        if len(set(splits)) > 1
    )


def _lookalikes(lesion_set: LesionSet, prints: Mapping[str, Fingerprint]) -> tuple[Lookalike, ...]:
    names_in = {
        split: list(dict.fromkeys(sample.file_name for sample in lesion_set.split(split) if sample.file_name in prints))
        for split in SPLITS
    }
    found: list[Lookalike] = []
    for one, other in combinations(SPLITS, 2):
        first, second = names_in[one], names_in[other]
        matches = find_matches([prints[name] for name in first], [prints[name] for name in second])
        found += [
            Lookalike(first[match.first], second[match.second], (one, other), match.sign, match.score)
            for match in matches
        ]
    return tuple(found)


def _told(pair: Lookalike) -> str:
    (one, other), why = pair.splits, _EXPLAINED[pair.sign].format(pair.score)
    if pair.first == pair.second:
        return f"{pair.first} has rows in {one} and in {other}"
    return f"{pair.first} ({one}) and {pair.second} ({other}): {why}"


def _table_line(source: str, by_split: Mapping[str, int]) -> str:
    return f"  {source}: " + ", ".join(f"{count} {split}" for split, count in by_split.items() if count)
