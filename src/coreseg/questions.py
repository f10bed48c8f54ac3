"""Questions as people ask them: about a category, or about one of several lesions by what sets it apart.

Source: templates per category as in the paper's benchmark; synonyms, held-out wordings and attribute questions are
our choice. Any category works; the table of lay words only adds variety to those it knows.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Real, UInt8
from scipy import ndimage

from coreseg.errors import DataError
from coreseg.masks import label_lesions, smallest_lesion_px
from coreseg.nouns import plural, with_article
from coreseg.sentences import pick
from coreseg.types import MAX_BOXES

_TEMPLATES = (
    "Segment the {one}.",
    "Segment the {one} in this image.",
    "Please segment the {one}.",
    "Locate and segment the {one}.",
    "Locate the {one} in this picture.",
    "Where is the {one}?",
    "Where is the {one} in this image?",
    "Where can the {one} be seen?",
    "Where do you see {a_one}?",
    "Is there {a_one} in this picture? Show me where.",
    "Is there {a_one} in this image?",
    "Is {a_one} visible here? If so, mark it.",
    "Can you find the {one}?",
    "Can you show me the {one}?",
    "Find the {one}.",
    "Find and outline the {one} in this scan.",
    "Outline every {one}.",
    "Mark all {many} in the image.",
    "Show all {many}.",
    "Are there any {many} here? Mark them.",
    "Highlight the {one}.",
    "Which part of the image shows {a_one}?",
    "Which pixels belong to the {one}?",
    "Draw a mask over the {one}.",
)
_HELD_OUT_TEMPLATES = (
    "Delineate the {one} for me.",
    "Trace the {one} in the picture, please.",
    "I am looking for {a_one}. Where should I look?",
    "Could you point out each {one}?",
    "Do you notice any {many} in this scan?",
    "What area is affected by the {one}?",
    "Give me the contour of the {one}.",
    "Identify and delineate all {many} you can see.",
    "Does this show {a_one}, and if so, where exactly?",
    "Produce a segmentation of the {one}.",
)

_REQUESTS = (
    "Segment {target}.",
    "Please segment {target}.",
    "Segment {target} in this image.",
    "Locate and segment {target}.",
    "Find {target}.",
    "Mark {target}.",
    "Show me {target}.",
    "Outline only {target}.",
    "Highlight {target} in the picture.",
    "Can you mark {target}?",
)
_HELD_OUT_REQUESTS = (
    "Delineate {target} for me.",
    "Could you point out {target}?",
    "Trace {target}, please.",
    "Just {target}: where exactly?",
    "I need the contour of {target}.",
)

# Kind of attribute: what sets the lesion apart, in training and held out.
_TARGETS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "largest": (
        ("the largest {one}", "the biggest {one}"),
        ("the most extensive {one}", "the {one} with the most area"),
    ),
    "smallest": (
        ("the smallest {one}", "the tiniest {one}"),
        ("the {one} with the least area", "the least {one} in size"),
    ),
    "left": (("the leftmost {one}", "the {one} furthest to the left"), ("the {one} nearest to the left border",)),
    "right": (("the rightmost {one}", "the {one} furthest to the right"), ("the {one} nearest to the right border",)),
    "upper": (("the uppermost {one}", "the {one} furthest up"), ("the highest {one}", "the {one} nearest to the top")),
    "lower": (
        ("the lowest {one}", "the {one} furthest down"),
        ("the bottommost {one}", "the {one} nearest to the bottom"),
    ),
    "brightest": (("the brightest {one}", "the lightest {one}"), ("the {one} that shines most", "the palest {one}")),
    "darkest": (
        ("the darkest {one}", "the least bright {one}"),
        ("the {one} that looks blackest", "the dimmest {one}"),
    ),
    "all but largest": (
        ("all {many} but the largest", "every {one} except the biggest"),
        ("all {many} apart from the most extensive", "the {many} without the largest one"),
    ),
    "all but smallest": (
        ("all {many} but the smallest", "every {one} except the tiniest"),
        ("all {many} apart from the least in size", "the {many} without the smallest one"),
    ),
}

ATTRIBUTES = tuple(_TARGETS)

# Everyday words that say nothing of a lesion; none of them stands in a held-out wording.
_FILLER = (
    "hello thanks doctor nurse colleague patient man woman child years old came yesterday today morning evening "
    "week month since before after again still never often sometimes maybe perhaps really quite rather very too "
    "also only because although when while who which why how they we he she it his her our your their was were "
    "been being have had has would might must shall may not no yes sorry kindly quickly slowly report letter note "
    "ward clinic hospital home school work family history pain fever cough weight sugar pressure smoker treatment "
    "drug surgery follow first second third last next new early late good bad better worse clear blurred question "
    "answer help want think know believe wish tell said asked wrote sent got took made went saw seemed felt "
    "changed grew stayed quality screen paper room hand water light night number two five seven twenty hundred"
)
_FILLER_WORDS = tuple(_FILLER.split())

# Category: words used in training, words held out.
_LAY_WORDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "brain tumor": (("brain tumour", "brain mass"), ("brain growth", "intracranial tumor")),
    "breast tumor": (("breast tumour", "breast lump"), ("breast mass", "breast lesion")),
    "foot ulcer": (("ulcer", "open sore"), ("wound", "foot wound")),
    "intracranial hemorrhage": (("brain bleed", "intracranial haemorrhage"), ("bleeding", "bleed")),
    "ischemic stroke lesion": (("ischaemic stroke", "infarct"), ("stroke", "stroke area")),
    "kidney tumor": (("kidney tumour", "renal tumor"), ("kidney mass", "renal mass")),
    "liver tumor": (("liver tumour", "hepatic tumor"), ("liver lesion", "liver mass")),
    "lung opacity": (("lung infiltrate", "lung shadow"), ("consolidation", "pneumonia patch")),
    "lung tumor": (("lung tumour", "lung mass"), ("lung cancer", "pulmonary tumor")),
    "multiple sclerosis lesion": (("ms lesion", "white matter lesion"), ("ms plaque", "demyelinating plaque")),
    "myocardial infarction": (("heart attack scar", "infarcted heart muscle"), ("myocardial scar", "heart damage")),
    "pigmented lesion": (("mole", "pigmented skin lesion"), ("skin mole", "dark skin spot")),
    "polyp": (("bowel polyp", "colon polyp"), ("growth in the bowel", "intestinal polyp")),
    "retinal exudate": (("hard exudate", "exudate"), ("fatty deposit", "yellow retinal deposit")),
    "retinal haemorrhage": (("retinal hemorrhage", "retinal bleed"), ("bleeding in the retina", "blood spot")),
    "thyroid nodule": (("thyroid lump", "nodule in the thyroid"), ("thyroid mass", "thyroid lesion")),
}


_UNNAMED = ("lesion", "abnormality", "finding", "change", "spot", "thing", "problem", "anomaly", "area", "disease")

# Of names, but in questions about anything too; and everyday words that are spelled like a name.
_VAGUE_WORDS = (
    "area bowel brain breast colon damage dark eye foot found heart kidney liver lung matter muscle open retina show "
    "skin white would yellow"
)
_VAGUE = frozenset(_VAGUE_WORDS.split())
_SIMILAR = 0.8


def names_of(category: str) -> tuple[str, ...]:
    """A category and the lay words for it."""
    return (category, *(word for words in _LAY_WORDS.get(category.lower(), ()) for word in words))


def names_any(question: str, categories: Iterable[str]) -> bool:
    """Whether a question has a word of one of the categories, or of its lay names; typing errors do no harm."""
    names = [name for category in categories for name in names_of(category)]
    if any(name.casefold() in question.casefold() for name in names):
        return True
    known = {word for name in names for word in _words(name)}
    return any(difflib.get_close_matches(word, known, n=1, cutoff=_SIMILAR) for word in _words(question))


def _words(text: str) -> set[str]:
    """Its words of four letters or more that tell something, in the singular, and "ms"."""
    words = re.findall(r"[a-z]+", text.lower())
    return {word.rstrip("s") if len(word) > 4 else word for word in words if len(word) >= 4 or word == "ms"} - _VAGUE


def ask(category: str, rng: np.random.Generator, held_out: bool = False) -> str:
    """One question about a category, from the training templates or from the held-out ones.

    Training questions also vary in case and closing mark, and name the category in other words a third of the time.
    A held-out question shares neither its template nor its lay word with training.
    """
    noun = _noun(category, rng, held_out)
    template = pick(_HELD_OUT_TEMPLATES if held_out else _TEMPLATES, rng)
    text = template.format(one=noun, a_one=with_article(noun), many=plural(noun))
    return text if held_out else _typed(text, rng)


def ask_without_name(category: str, rng: np.random.Generator) -> str:
    """A question that names no lesion, or badly: "Where is the tumor?", "Show all spots.", "Find the braain tmuor."

    For training, where the picture shows one category only: a reasoner made from scratch takes words that it does not
    know for some other category, and then sees none of that. It is to fall back on what the picture shows.
    """
    if rng.random() < 0.25:
        text = " ".join(pick((_invented(rng), *_FILLER_WORDS), rng) for _ in range(rng.integers(2, 8)))
        return _typed(f"{text.capitalize()}{pick(('.', '?'), rng)}", rng)
    words = _noun(category, rng, held_out=False).split(" ")
    misspelled = " ".join(_misspelled(word, rng) for word in words)
    noun = pick((words[-1], f"{_invented(rng)} {words[-1]}", misspelled, pick(_UNNAMED, rng), _invented(rng)), rng)
    return _typed(pick(_TEMPLATES, rng).format(one=noun, a_one=with_article(noun), many=plural(noun)), rng)


@dataclass(frozen=True)
class Wordings:
    """How plain questions are worded in training, beside the templates.

    own_words: questions that people wrote, by category.  own_words_share: how many are taken from there.
    unnamed_share: of the others, how many name no lesion (`ask_without_name`).
    """

    own_words: Mapping[str, tuple[str, ...]]
    own_words_share: float
    unnamed_share: float

    @cached_property
    def _by_name(self) -> Mapping[str, tuple[str, ...]]:
        """Of `own_words` those that name what they are about."""
        return {
            category: tuple(text for text in texts if names_any(text, [category]))
            for category, texts in self.own_words.items()
        }

    def ask(self, category: str, rng: np.random.Generator, there: bool = True, alone: bool = True) -> str:
        """One question about a category, that is there or not, and stands alone in its pictures or beside others.

        What is not there is asked for by its name only: other words may mean what is.
        """
        own = (self.own_words if there else self._by_name).get(category, ())
        if own and rng.random() < self.own_words_share:
            return pick(own, rng)
        # Nothing is drawn for what is switched off, so that settings from before it was there see what they saw.
        if there and alone and self.unnamed_share and rng.random() < self.unnamed_share:
            return ask_without_name(category, rng)
        return ask(category, rng)


def _invented(rng: np.random.Generator) -> str:
    """A word that nobody knows, of two to four syllables."""
    parts = (tuple("bcdfghklmnprstvz"), tuple("aeiou"), ("", *"lmnrs"))
    return "".join(pick(part, rng) for _ in range(rng.integers(2, 5)) for part in parts)


def read_own_words(path: Path) -> dict[str, tuple[str, ...]]:
    """Questions that people wrote, by category: a TOML file of lines such as `polyp = ["polip?", "Any polyps here?"]`.

    Raises DataError where it is anything else.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the questions cannot be read ({error}). Expected a TOML file.") from error
    for category, texts in table.items():
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            raise DataError(f'{path}: {category!r} is {texts!r}, expected a list of questions such as ["Any polyps?"].')
    if not table:
        raise DataError(f'{path}: no questions in it. Expected lines such as polyp = ["Any polyps?"].')
    return {category: tuple(texts) for category, texts in table.items()}


def among_other_words(question: str, rng: np.random.Generator) -> str:
    """The question with words around and between that say nothing of a lesion: "Thanks week. Where old is the polyp?"

    For training: a reasoner made from scratch knows the words of its templates only, and what follows an unknown one
    may be anything. Their order is random, so that it learns to listen for what it knows and not to one more template.
    """
    words = question.split(" ")
    for place in range(len(words), 0, -1):
        if rng.random() < 0.1:
            words.insert(place, pick(_FILLER_WORDS, rng))
    before, after = (" ".join(pick(_FILLER_WORDS, rng) for _ in range(rng.integers(7))) for _ in range(2))
    text = " ".join(words)
    if before:
        text = f"{before.capitalize()}{pick(('.', ',', '?', ':', ''), rng)} {text}"
    return f"{text} {after.capitalize()}{pick(('.', '?', ''), rng)}" if after else text


def mistyped(question: str, rng: np.random.Generator) -> str:
    """The question with typing errors: in one long word of six a letter left out, doubled, or after its neighbour."""
    words = question.split(" ")
    for place, word in enumerate(words):
        if len(word) >= 4 and rng.random() < 1 / 6:
            words[place] = _misspelled(word, rng)
    return " ".join(words)


def _misspelled(word: str, rng: np.random.Generator) -> str:
    """The word with a letter within it left out, doubled, or after its neighbour; short ones as they are."""
    if len(word) < 4:
        return word
    at = int(rng.integers(1, len(word) - 1))
    wrong = (word[at + 1 :], word[at] * 2 + word[at + 1 :], word[at + 1] + word[at] + word[at + 2 :])
    return word[:at] + pick(wrong, rng)


@dataclass(frozen=True)
class AttributeQuestion:
    """A question about some of several lesions. `mask` is its answer; `kind` says what sets them apart."""

    text: str
    mask: Bool[np.ndarray, "height width"]
    kind: str


def attribute_questions(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    category: str,
    rng: np.random.Generator,
    held_out: bool = False,
) -> list[AttributeQuestion]:
    """Every attribute question that this picture answers without doubt, one of each kind; none for a single lesion.

    Lesions are the components that the box convention counts, two to eight of them. Asked only by a clear margin:
    largest and smallest by a factor of 1.5 in area to the next; leftmost, rightmost, uppermost and lowest by both
    outer border and centre, the centre by a tenth of the picture; brightest and darkest by 0.08 of the full range.
    "All but" takes three lesions or more. Sides are the picture's.

    Components too small to count are not lesions of their own: an answer of one lesion leaves them out, "all but one"
    is the whole mask without that one, and where there are any nothing is asked about the smallest.
    """
    labels, areas_px = label_lesions(mask)
    lesions = np.flatnonzero(areas_px >= smallest_lesion_px(mask.size))
    if not 2 <= len(lesions) <= MAX_BOXES:
        return []
    crumbs = len(lesions) < np.count_nonzero(areas_px)
    questions = []
    for kind, lesion in _set_apart(image, labels, areas_px, lesions).items():
        if crumbs and kind == "smallest":
            continue
        one = labels == lesion
        questions.append(AttributeQuestion(ask_for_one(kind, category, rng, held_out), one, kind))
        if kind in ("largest", "smallest") and len(lesions) > 2:
            kind = f"all but {kind}"
            questions.append(AttributeQuestion(ask_for_one(kind, category, rng, held_out), mask & ~one, kind))
    return questions


def _set_apart(
    image: UInt8[np.ndarray, "height width 3"],
    labels: Int[np.ndarray, "height width"],
    areas_px: Int[np.ndarray, " labels"],
    lesions: Int[np.ndarray, " lesions"],
) -> dict[str, int]:
    """The label that stands out by a clear margin, per kind; kinds in which none does are left out."""
    boxes = ndimage.find_objects(labels)
    rows, columns = np.array([[(a.start, a.stop) for a in boxes[label - 1]] for label in lesions]).transpose(1, 2, 0)
    y, x = np.array(ndimage.center_of_mass(labels > 0, labels, lesions)).T
    light = ndimage.mean(image.mean(axis=2), labels, lesions) / 255.0
    boxes_xyxy = np.stack([columns[0], rows[0], columns[1], rows[1]], axis=1)
    found = clearly_apart(boxes_xyxy, np.stack([x, y], axis=1), areas_px[lesions], light, 0.08, labels.shape)
    return {kind: int(lesions[number]) for kind, number in found.items()}


def clearly_apart(
    boxes: Int[np.ndarray, "lesions 4"],
    centres: Float[np.ndarray, "lesions 2"],
    areas: Real[np.ndarray, " lesions"],
    light: Float[np.ndarray, " lesions"],
    light_margin: float,
    size_hw: tuple[int, ...],
) -> dict[str, int]:
    """Which of two lesions or more stands out by the margins of `attribute_questions`, per kind that one does in.

    Boxes (xyxy) and centres (x, y) in px of a picture of that size; how bright the lesions are, and by how much the
    brightest and the darkest have to differ from the next, in any unit.
    """
    (height, width), (x, y), (x1, y1, x2, y2), sizes = size_hw, centres.T, boxes.T, np.log(areas)
    found = {}
    # Each kind: what must be least, by which margin, and a second measure that must be least for the same lesion.
    for kind, values, margin, check in (
        ("largest", -sizes, np.log(1.5), -sizes),
        ("smallest", sizes, np.log(1.5), sizes),
        ("left", x, 0.1 * width, x1),
        ("right", -x, 0.1 * width, -x2),
        ("upper", y, 0.1 * height, y1),
        ("lower", -y, 0.1 * height, -y2),
        ("brightest", -light, light_margin, -light),
        ("darkest", light, light_margin, light),
    ):
        first, second = np.argsort(values, kind="stable")[:2]
        if values[second] - values[first] >= margin and np.all(np.delete(check, first) > check[first]):
            found[kind] = int(first)
    return found


def ask_for_one(kind: str, category: str, rng: np.random.Generator, held_out: bool = False) -> str:
    """A question about what stands out among several lesions, or about all but it; `kind` is one of `ATTRIBUTES`."""
    noun = _noun(category, rng, held_out)
    in_training, in_test = _TARGETS[kind]
    target = pick(in_test if held_out else in_training, rng).format(one=noun, many=plural(noun))
    text = pick(_HELD_OUT_REQUESTS if held_out else _REQUESTS, rng).format(target=target)
    return text if held_out else _typed(text, rng)


def _noun(category: str, rng: np.random.Generator, held_out: bool) -> str:
    """The category, or a third of the time one of its lay words."""
    in_training, in_test = _LAY_WORDS.get(category.lower(), ((), ()))
    lay_words = in_test if held_out else in_training
    return pick(lay_words, rng) if lay_words and rng.random() < 1 / 3 else category


def _typed(text: str, rng: np.random.Generator) -> str:
    """The text as someone in a hurry may type it: at times without capitals, at times without its closing mark."""
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text[:-1]
    return text
