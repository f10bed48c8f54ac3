"""How many lies do the checks on a reasoning text find? Plants lies of many kinds in measured descriptions and counts.

    python recipes/data/lies.py LESIONS [--split val] [--seed 0]

A measured description is true by construction. For each row and each kind of lie that its picture allows, one
statement is replaced by a false one, or a false sentence is added, and the text goes through what `coreseg data review`
asks of it without a judge: form and pixels. Prints a Markdown table, kind by kind, of what is found where the lie is in
the describer's own words; in words that `coreseg.sentences` was widened for; and in words held out from that. Kinds
that no check reads stand in it too. Below, the false alarms: on descriptions as they are, and on truths put into other
words.

Our choice: a statement is contradicted only where it is plain, which means that no second value counts as true near a
threshold, and sizes by two steps or more. All words were written before they were tried.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coreseg.data.build.describe import describe
from coreseg.data.build.quality import Facts, pixel_faults, text_faults
from coreseg.data.store import LesionSet
from coreseg.masks import label_lesions
from coreseg.nouns import plural
from coreseg.sentences import pick, word

OWN, SEEN, UNSEEN = VOCABULARIES = ("describer's words", "words seen", "words held out")


@dataclass(frozen=True)
class Row:
    """A picture with its mask, its true description, and what can be measured of it."""

    image: np.ndarray
    mask: np.ndarray
    modality: str
    anatomy: str
    category: str
    text: str
    facts: Facts

    @classmethod
    def of(cls, image: np.ndarray, mask: np.ndarray, modality: str, anatomy: str, category: str, seed: int) -> "Row":
        text = describe(image, mask, modality, anatomy, category, seed)
        return cls(image, mask, modality, anatomy, category, text, Facts.of(image, mask))

    def plain(self, kind: str) -> str:
        """The measured value where no other counts as true, else nothing."""
        value = self.facts.measured.get(kind, "")
        return value if self.facts.true.get(kind) == {value} else ""

    @property
    def parts(self) -> tuple[str, str]:
        """The text up to what it says of healthy tissue, and the rest, which is what it sees."""
        end = self.text.index(". ", self.text.index("ealthy")) + 2
        return self.text[:end], self.text[end:]


Plant = Callable[[Row, np.random.Generator, str], str | None]
"""Gives a false text in one of the vocabularies; None where the row does not allow the lie, or not in these words."""


@dataclass(frozen=True)
class Lie:
    """One kind of lie. `read_as` is what should find it: a kind of statement, "any", "form", or "" for nothing."""

    name: str
    read_as: str
    plant: Plant


# --- a statement replaced by another of its kind ---------------------------------------------------------------------

# Values in words that are not the describer's, for the place in the sentence that its own stand in: those that the
# patterns of `coreseg.sentences` were widened for, and those held out from that.
WORDS: Mapping[str, Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "side": {
        "left": (
            ("to the left of the midline", "near the left edge of the picture", "far to the left"),
            ("on the left-hand side", "left of centre", "at the left"),
        ),
        "right": (
            ("to the right of the midline", "near the right edge of the picture", "far to the right"),
            ("on the right-hand side", "right of centre", "at the right"),
        ),
        "centre": (
            ("in the centre of the picture", "close to the midline", "in the central third"),
            ("around the midline", "in the middle of the image", "at the centre of the frame"),
        ),
        "both": (
            ("on either side of the midline", "on the left and on the right", "bilaterally"),
            ("left as well as right", "on the two sides of the picture", "in either half"),
        ),
    },
    "place": {
        "upper": (
            ("in the top third", "near the upper edge of the picture", "high up in the picture"),
            ("at the top of the frame", "in the uppermost part", "above the middle"),
        ),
        "lower": (
            ("in the bottom third", "near the lower edge of the picture", "low down in the picture"),
            ("at the bottom of the frame", "in the lowermost part", "below the middle"),
        ),
        "middle": (
            ("midway between top and bottom", "at half height", "in the middle third from top to bottom"),
            ("vertically in the middle", "at about mid height", "between the top and the bottom third"),
        ),
        "spread": (
            ("all the way from the top to the bottom", "along the full height of the picture"),
            ("over the entire height of the picture", "from the upper to the lower end", "from the very top down"),
        ),
    },
    "size": {
        "tiny": (("minute", "pinpoint", "barely visible"), ("minuscule", "extremely small", "speck-like")),
        "small": (("little", "smallish", "fairly little"), ("rather small", "little", "of small size")),
        "large": (("big", "bulky", "rather big"), ("sizable", "of considerable size", "substantial")),
        "very large": (("huge", "massive", "enormous"), ("giant", "vast", "extremely large")),
    },
    "count": {
        "one": (("a solitary", "only one", "just one"), ("a lone", "exactly one", "an isolated")),
        "two": (
            ("a couple of", "two separate", "a pair of separate"),
            ("two distinct", "a couple of separate", "twin"),
        ),
        "four": (("four separate", "as many as four"), ("four individual", "a total of four")),
        "several": (
            ("multiple", "at least five", "a whole cluster of"),
            ("more than four", "half a dozen", "a lot of"),
        ),
    },
    "shape": {
        "round": (("ball-shaped", "circular", "roundish"), ("disc-shaped", "rounded", "globular")),
        "elongated": (
            ("long and narrow", "stretched", "cigar-shaped"),
            ("strip-like", "drawn-out", "much longer than wide"),
        ),
        "irregular": (
            ("star-shaped", "with many lobes", "jagged"),
            ("irregularly formed", "ragged", "of no regular shape"),
        ),
    },
    "edge": {
        "sharp": (
            ("clear-cut margins", "a distinct boundary", "well-circumscribed margins"),
            ("sharply marked borders", "clearly defined margins", "a crisp rim"),
        ),
        "blurred": (
            ("hazy margins", "a boundary that fades into its surroundings", "poorly demarcated borders"),
            ("fuzzy contours", "an unclear boundary", "borders that are hard to make out"),
        ),
    },
    "contrast": {
        "darker": (
            ("hypointense", "blacker than what surrounds it", "of lower brightness than its surroundings"),
            ("hypodense", "less bright than its surroundings", "clearly darker than the rest"),
        ),
        "brighter": (
            ("hyperintense", "whiter than what surrounds it", "of higher brightness than its surroundings"),
            ("hyperdense", "lighter than its surroundings", "clearly brighter than the rest"),
        ),
        "similar": (
            ("isointense", "equally bright as its surroundings", "of the same brightness as its surroundings"),
            ("isodense", "alike in brightness to what surrounds it", "no brighter and no darker than its surroundings"),
        ),
    },
    "texture": {
        "homogeneous": (
            ("a uniform interior", "an even inner structure", "an interior of one tone"),
            ("a uniform texture", "a consistent interior", "a homogeneous inside"),
        ),
        "heterogeneous": (
            ("a patchy interior", "a non-uniform inside", "an interior of many tones"),
            ("a varied interior", "a mottled texture", "an interior that is not the same all over"),
        ),
    },
}  # fmt: skip


def said(kind: str, value: str, rng: np.random.Generator, words: str) -> str:
    """A value in one of the vocabularies."""
    return word(kind, value, rng) if words == OWN else pick(WORDS[kind][value][words == UNSEEN], rng)


def swap(kind: str, instead: Mapping[str, str]) -> Plant:
    """Replaces the statement of one kind: `instead` gives the false value for each measured one."""

    def plant(row: Row, rng: np.random.Generator, words: str) -> str | None:
        value = row.plain(kind)
        if value not in instead:
            return None
        opening, seen = row.parts
        new = said(kind, instead[value], rng, words)
        wordings = {word(kind, value, np.random.default_rng(seed)) for seed in range(20)}
        pattern = rf"\b(?:{'|'.join(sorted(wordings, key=len, reverse=True))})\b"
        lied, swapped = re.subn(pattern, lambda old: match_case(new, old[0]), seen, count=1, flags=re.IGNORECASE)
        assert swapped, f"{kind} {value} is not in {seen!r}"
        return opening + lied

    return plant


def match_case(new: str, old: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def absent(row: Row, rng: np.random.Generator, words: str) -> str | None:
    """Says of a picture with a lesion that it has none."""
    if not row.mask.any():
        return None
    if words == OWN:
        empty = np.zeros_like(row.mask)
        return describe(row.image, empty, row.modality, row.anatomy, row.category, int(rng.integers(2**32)))
    sentences = {
        SEEN: ("No {0} is visible.", "There is no sign of any {0}.", "A {0} is not seen.", "I cannot find any {0}."),
        UNSEEN: ("The picture shows no {0}.", "It is free of any {0}.", "The {0} is absent.", "There is no {0} here."),
    }
    return row.parts[0] + pick(sentences[words], rng).format(row.category)


def invented(row: Row, rng: np.random.Generator, words: str) -> str | None:
    """Describes a lesion in a picture without one."""
    if row.mask.any():
        return None
    size, shape, place, side = (
        said(kind, pick(tuple(WORDS[kind]), rng), rng, words) for kind in ("size", "shape", "place", "side")
    )
    return f"{row.parts[0]}A {size} {shape} area lies {place}, {side}. This fits {row.category}."


# --- a false sentence added ------------------------------------------------------------------------------------------


def added(seen: tuple[str, ...], unseen: tuple[str, ...], when: Callable[[Row], object] = lambda row: True) -> Plant:
    """Adds a sentence that is false of every picture with a lesion where `when` holds."""

    def plant(row: Row, rng: np.random.Generator, words: str) -> str | None:
        if words == OWN or not row.mask.any() or not when(row):
            return None
        return f"{row.text} {pick(seen if words == SEEN else unseen, rng).format(row.category)}"

    return plant


def denied(row: Row, rng: np.random.Generator, words: str) -> str | None:
    """Denies something true of the only lesion."""
    verbs = {
        "side": "does not lie",
        "place": "does not lie",
        "shape": "is not",
        "edge": "does not have",
        "contrast": "is not",
    }
    true = {kind: value for kind in verbs if (value := row.plain(kind)) in WORDS[kind]}
    if row.plain("count") != "one" or not true:
        return None
    kind = pick(tuple(true), rng)
    return f"{row.text} It {verbs[kind]} {said(kind, true[kind], rng, words)}."


@dataclass(frozen=True)
class Largest:
    """The largest lesion: its middle as a share of the width, its width over height, its share of all lesions."""

    x: float
    aspect: float
    share: float

    @classmethod
    def of(cls, mask: np.ndarray) -> "Largest":
        labels, areas_px = label_lesions(mask)
        rows, columns = np.nonzero(labels == areas_px.argmax())
        aspect = float((np.ptp(columns) + 1) / (np.ptp(rows) + 1))
        return cls(float(columns.mean() / mask.shape[1]), aspect, float(areas_px.max() / areas_px.sum()))


def turned(row: Row) -> str | None:
    """Says of an elongated lesion that lies that it stands, or the other way round."""
    aspect = Largest.of(row.mask).aspect
    if row.plain("shape") != "elongated" or 1 / 1.5 < aspect < 1.5:
        return None
    return f"{row.text} Its long axis runs {'vertically' if aspect > 1 else 'horizontally'}."


def largest_elsewhere(row: Row) -> str | None:
    """Puts the largest of several lesions on the wrong side."""
    x = Largest.of(row.mask).x
    if row.plain("side") != "both" or 0.4 < x < 0.6:
        return None
    return f"{row.text} The largest one lies on the {'left' if x > 0.5 else 'right'}."


def compared(row: Row) -> str | None:
    """Calls the smaller of two lesions on two sides the larger one."""
    largest = Largest.of(row.mask)
    if row.plain("side") != "both" or row.plain("count") != "two" or largest.share < 0.6:
        return None
    larger, smaller = ("left", "right") if largest.x > 0.5 else ("right", "left")
    return f"{row.text} The {larger} one is larger than the {smaller} one."


def once(lie: Callable[[Row], str | None]) -> Plant:
    """A lie of one wording, counted with the words held out: nothing was widened for it."""
    return lambda row, rng, words: lie(row) if words == UNSEEN and row.mask.any() else None


# --- another name ----------------------------------------------------------------------------------------------------


def other_category(row: Row, rng: np.random.Generator, words: str) -> str | None:
    others = tuple(name for name in ("foot ulcer", "colon polyp", "lung opacity") if row.category not in name)
    text = row.text.replace(plural(row.category), "{0}s").replace(row.category, "{0}")
    return text.format(pick(others, rng)) if words == OWN else None


def other_opening(modality: str = "", anatomy: str = "") -> Plant:
    """Opens with what the describer says of another modality or part of the body."""

    def plant(row: Row, rng: np.random.Generator, words: str) -> str | None:
        if words != OWN or modality == row.modality or anatomy == row.anatomy:
            return None
        names = modality or row.modality, anatomy or row.anatomy
        other = describe(row.image, row.mask, *names, row.category, int(rng.integers(2**32)))
        return other[: other.index(". ")] + row.text[row.text.index(". ") :]

    return plant


def both_ways(a: str, b: str) -> Mapping[str, str]:
    return {a: b, b: a}


LIES = (
    Lie("right for left, left for right", "side", swap("side", both_ways("left", "right"))),
    Lie("both sides for one", "side", swap("side", {"left": "both", "right": "both"})),
    Lie("one side for both", "side", swap("side", {"both": "left"})),
    Lie("the centre for a side", "side", swap("side", {"left": "centre", "right": "centre"})),
    Lie("a side for the centre", "side", swap("side", {"centre": "right"})),
    Lie("top for bottom, bottom for top", "place", swap("place", both_ways("upper", "lower"))),
    Lie("one end for mid height", "place", swap("place", {"middle": "lower"})),
    Lie("mid height for one end", "place", swap("place", {"upper": "middle", "lower": "middle"})),
    Lie("the whole height for one end", "place", swap("place", {"upper": "spread", "lower": "spread"})),
    Lie("too large", "size", swap("size", {"tiny": "large", "small": "very large", "medium": "very large"})),
    Lie("too small", "size", swap("size", {"very large": "small", "large": "tiny", "medium": "tiny"})),
    Lie("several for one", "count", swap("count", {"one": "several"})),
    Lie("one for several", "count", swap("count", dict.fromkeys(("two", "three", "four", "several"), "one"))),
    Lie("a wrong number", "count", swap("count", {"two": "four", "three": "two", "four": "two", "several": "two"})),
    Lie("round for elongated or irregular", "shape", swap("shape", {"elongated": "round", "irregular": "round"})),
    Lie("elongated for round", "shape", swap("shape", {"round": "elongated"})),
    Lie("irregular for round", "shape", swap("shape", {"round": "irregular"})),
    Lie("a blurred edge for a sharp one", "edge", swap("edge", {"sharp": "blurred"})),
    Lie("a sharp edge for a blurred one", "edge", swap("edge", {"blurred": "sharp"})),
    Lie("brighter for darker, darker for brighter", "contrast", swap("contrast", both_ways("darker", "brighter"))),
    Lie("no contrast for some", "contrast", swap("contrast", {"darker": "similar", "brighter": "similar"})),
    Lie("an uneven texture for an even one", "texture", swap("texture", {"homogeneous": "heterogeneous"})),
    Lie("an even texture for an uneven one", "texture", swap("texture", {"heterogeneous": "homogeneous"})),
    Lie("no lesion where there is one", "count", absent),
    Lie("a lesion where there is none", "any", invented),
    Lie("a truth denied", "any", denied),
    Lie(
        "a wrong share of the picture, in words", "size",
        added(
            ("It takes up half of the picture.", "It fills most of the picture."),
            ("It occupies nearly a third of the image.", "It spreads over three quarters of the frame."),
            lambda row: row.plain("size") in ("tiny", "small"),
        ),
    ),
    Lie("another category", "form", other_category),
    Lie(
        "a share in digits", "form",
        added(("It covers 37 % of the picture.",), ("It takes up 1/3 of the image.", "Some 40 per cent are covered.")),
    ),
    Lie(
        "coordinates", "form",
        added(
            ("Its centre is at [120, 45].", "It begins at pixel 40.", "It lies at x = 12."),
            ("The box is (12, 30, 48, 61).", "Its column is 117.", "Along the x-axis it is far out."),
        ),
    ),
    Lie(
        "a length in digits", "form",
        added(
            ("It is about 3 cm across.", "Its diameter is 12 mm."),
            ("It measures 1.5 by 2 cm.", "Its width is 8 millimetres."),
        ),
    ),
    Lie(
        "a length in words", "form",
        added(
            ("It is about three centimetres across.", "It measures a few millimetres."),
            ("It is two cm wide.", "It is an inch across."),
        ),
    ),
    Lie(
        "the drawn line", "form",
        added(
            ("The outlined region is the {0}.", "The cyan line shows where it ends.", "It is marked by the contour."),
            ("The {0} is inside the blue outline.", "The annotation shows it.", "It lies within the drawn border."),
        ),
    ),
    Lie(
        "a side of the patient", "form",
        added(
            ("It is on the patient's left.", "This is the anatomical right.", "It is on the left side of the patient."),
            ("It is to the patient's right.", "For the patient it is on the left."),
        ),
    ),
    Lie("another modality", "", other_opening(modality="mri")),
    Lie("another part of the body", "", other_opening(anatomy="knee")),
    Lie("upright for lying, lying for upright", "", once(turned)),
    Lie("the largest on the wrong side", "", once(largest_elsewhere)),
    Lie("the smaller one called the larger", "", once(compared)),
    Lie("another colour", "", once(lambda row: f"{row.text} It is green.")),
)  # fmt: skip


TRUTHS = tuple(swap(kind, {value: value for value in values}) for kind, values in WORDS.items())
"""No lies: each puts one statement into other words that say the same."""


@dataclass
class Count:
    """How many lies of one kind were planted, and found."""

    planted: int = 0
    found: int = 0

    def __str__(self) -> str:
        return f"{self.found} of {self.planted}" if self.planted else ""


@dataclass(frozen=True)
class Trial:
    """What came out.

    counts: by lie and vocabulary. untouched: texts as they were, `found` those with a fault. truths: the same of truths
    in other words, by vocabulary. passed: lies that were not found, with their texts. refuted: truths that were.
    """

    counts: Mapping[tuple[str, str], Count]
    untouched: Count
    truths: Mapping[str, Count]
    passed: list[tuple[str, str]]
    refuted: list[str]


def faulty(text: str, row: Row) -> bool:
    """Whether review, without a judge, finds something wrong."""
    return bool(text_faults(text, row.category) or pixel_faults(text, row.facts, row.category))


def plant_all(rows: Iterable[Row], seed: int) -> Trial:
    counts: dict[tuple[str, str], Count] = defaultdict(Count)
    truths: dict[str, Count] = defaultdict(Count)
    untouched, passed, refuted = Count(), list[tuple[str, str]](), list[str]()
    for number, row in enumerate(rows):
        untouched.planted += 1
        untouched.found += faulty(row.text, row)
        for lie in LIES:
            for index, words in enumerate(VOCABULARIES):
                text = lie.plant(row, np.random.default_rng([seed, number, index]), words)
                if text is not None:
                    found = faulty(text, row)
                    counts[lie.name, words].planted += 1
                    counts[lie.name, words].found += found
                    if not found:
                        passed.append((lie.name, text))
        for plant in TRUTHS:
            for index, words in enumerate(VOCABULARIES):
                text = plant(row, np.random.default_rng([seed, number, index]), words)
                if text is not None:
                    found = faulty(text, row)
                    truths[words].planted += 1
                    truths[words].found += found
                    if found:
                        refuted.append(text)
    return Trial(counts, untouched, truths, passed, refuted)


def rows_of(lesions: LesionSet, split: str) -> Iterable[Row]:
    for number, sample in enumerate(lesions.split(split)):
        image, mask = lesions.image(sample), lesions.mask(sample)
        yield Row.of(image, mask, sample.modality, sample.anatomy, sample.category, number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passed", action="store_true", help="print the lies that passed, and false alarms")
    options = parser.parse_args()
    trial = plant_all(rows_of(LesionSet.open(options.dataset), options.split), options.seed)
    if options.passed:
        print(
            "\n".join(
                f"{name}: {text}" for name, text in [*trial.passed, *(("refuted", text) for text in trial.refuted)]
            )
        )
        raise SystemExit
    print(f"| lie | read as | {' | '.join(VOCABULARIES)} |\n|{'---|' * (2 + len(VOCABULARIES))}")
    for lie in LIES:
        cells = [str(trial.counts[lie.name, words]) for words in VOCABULARIES]
        print(f"| {lie.name} | {lie.read_as or 'not read'} | {' | '.join(cells)} |")
    print(f"\nFalse alarms: {trial.untouched} descriptions as they are; truths in other words:")
    print("; ".join(f"{words} {trial.truths[words]}" for words in VOCABULARIES))
