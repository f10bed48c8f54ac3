"""The text contract: what the model must write, how it is written, read, and enforced.

    <think> R </think><answer> The {category} is|are located at [[x1, y1, x2, y2], ...]. The mask is <seg>. </answer>
    <think> R </think><answer> No {category} is visible. </answer>

Boxes are half-open integer pixels in the frame of the image that the multimodal model saw. The first form is the
paper's (arXiv 2603.05911); the second, for an absent lesion, and the box convention are our choice.

A text is built from *pieces*, each tokenised by itself. So the fixed parts are the very same token ids in training and
under the grammar, whatever merges a tokenizer knows, and text from outside can never turn into a marker.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

import numpy as np
from jaxtyping import Int

from coreseg.errors import InputError, ModelError
from coreseg.nouns import plural
from coreseg.types import MAX_BOXES, Answer, Box

SEG_TOKEN: Final = "<seg>"

INSTRUCTION: Final = "Describe the picture first, then give the boxes and the mask."
"""What follows every question in the prompt. Our choice."""

MAX_QUESTION_CHARACTERS: Final = 2_000

_MARKER = r"</?think>|</?answer>|<seg>"
_FORM = re.compile(
    rf"<think> (?P<reasoning>(?:(?!{_MARKER}).)*?) ?</think><answer> "
    r"(?:The (?P<category>[^<>\[\]]+?) (?:is|are) located at (?P<boxes>\[\[[0-9, \[\]]+\]\])\. The mask is <seg>\."
    r"|No (?P<absent>[^<>\[\]]+?) is visible\.) </answer>",
    re.DOTALL,
)
_BOX = re.compile(r"\[([0-9]{1,6}), ([0-9]{1,6}), ([0-9]{1,6}), ([0-9]{1,6})\]")


def check_question(question: str) -> None:
    """Raises InputError for a question that is empty or too long."""
    if not question.strip():
        raise InputError("the question is empty; expected something like 'Where is the foot ulcer?'")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise InputError(
            f"the question has {len(question):,} characters; expected at most {MAX_QUESTION_CHARACTERS:,}: shorten it"
        )


def check_reasoning(reasoning: str) -> None:
    """Raises InputError for a reasoning that spells a marker: no answer that holds it could be read."""
    if marker := re.search(_MARKER, reasoning):
        raise InputError(f"the reasoning holds {marker.group()!r}, which marks the answer's parts; leave it out")


@dataclass(frozen=True)
class Piece:
    """A stretch of text tokenised by itself; `free` text comes from outside and holds no marker tokens."""

    text: str
    free: bool = False


def opening(reasoning: str) -> list[Piece]:
    """The think block and the start of the answer block, in the pieces they are tokenised in."""
    words = [Piece(f" {reasoning}", free=True)] if reasoning else []
    return [Piece("<think>"), *words, Piece(" </think><answer>")]


def pieces(answer: Answer) -> list[Piece]:
    """The answer's text in the pieces it is tokenised in; joined, they are the text of `render`."""
    opened = opening(answer.reasoning)
    category = Piece(f" {answer.category}", free=True)
    if not answer.found:
        return [*opened, Piece(" No"), category, Piece(" is visible. </answer>")]
    parts = [*opened, Piece(" The"), category, Piece(f" {'is' if len(answer.boxes) == 1 else 'are'} located at [[")]
    for number, box in enumerate(answer.boxes):
        parts += [Piece("], [")] if number else []
        for corner, value in enumerate(box):
            parts += [Piece(", ")] if corner else []
            parts.append(Piece(str(value)))
    return [*parts, Piece("]]. The mask is "), Piece(SEG_TOKEN), Piece(". </answer>")]


def render(answer: Answer) -> str:
    """The answer in its exact text form."""
    return "".join(piece.text for piece in pieces(answer))


def answer_sentence(answer: Answer) -> str:
    """What a person reads: the content of the answer block, in the right number, without the mask marker."""
    if not answer.found:
        return f"No {answer.category} is visible."
    one = len(answer.boxes) == 1
    name = f"{answer.category} is" if one else f"{plural(answer.category)} are"
    return f"The {name} located at {[list(box) for box in answer.boxes]}."


def parse(text: str, frame_wh: tuple[int, int] | None = None) -> Answer | None:
    """The answer in a model's text, or None where its form is invalid.

    Invalid are: anything but the exact form (space around the whole is ignored), an empty category, no box or more
    than eight, a box without area, and, where the frame's width and height are given, a box that leaves it.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        return None
    reasoning, category = match["reasoning"].strip(), (match["category"] or match["absent"]).strip()
    if not category:
        return None
    if match["absent"]:
        return Answer(category=category, boxes=(), reasoning=reasoning, found=False)
    boxes = tuple((int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in _BOX.findall(match["boxes"]))
    if match["boxes"] != str([list(box) for box in boxes]) or not 0 < len(boxes) <= MAX_BOXES:
        return None
    if not all(_inside(box, frame_wh) for box in boxes):
        return None
    return Answer(category=category, boxes=boxes, reasoning=reasoning, found=True)


def _inside(box: Box, frame_wh: tuple[int, int] | None) -> bool:
    x1, y1, x2, y2 = box
    width, height = frame_wh or (x2, y2)
    return x1 < x2 <= width and y1 < y2 <= height


def encode(tokenizer: Any, parts: Sequence[Piece]) -> list[int]:
    """The token ids of the pieces, one after another; spelled-out markers in free text stay ordinary text."""
    return [token for part in parts for token in (_ids if part.free else _kept_ids)(tokenizer, part)]


def _ids(tokenizer: Any, part: Piece) -> list[int]:
    ids: list[int] = tokenizer(part.text, add_special_tokens=False, split_special_tokens=part.free)["input_ids"]
    return ids


# Every answer repeats the fixed parts and its numbers, and a tokenizer's call costs more than its work.
_kept_ids = lru_cache(maxsize=1024)(_ids)


Allowed = Int[np.ndarray, " ids"]
Walk = Generator[Allowed, int, None]
Meaning = TypeVar("Meaning")


def forced(ids: Sequence[int]) -> Walk:
    """A walk that leaves no choice, and ends with the last id."""
    for token in ids:
        yield np.array([token])


class AnswerGrammar:
    """Which token may come next, so that every finished text parses.

    The reasoning is free up to `reasoning_budget` tokens; only what could spell a marker (`<`) and special tokens are
    kept out of it. The category is free as well: words of letters, digits and hyphens, up to `category_budget` tokens.
    Everything else is forced or a choice between the allowed continuations, box coordinates included.

    Raises ModelError for a tokenizer whose pieces do not join to the same text again, since boxes and form could not
    be trusted then.
    """

    def __init__(self, tokenizer: Any, reasoning_budget: int = 160, category_budget: int = 12) -> None:
        self._tokenizer = tokenizer
        self._reasoning_budget = reasoning_budget
        self._category_budget = category_budget
        self._cached: dict[str, tuple[int, ...]] = {}
        example = pieces(Answer("foot ulcer", ((0, 1, 12, 345), (7, 8, 90, 256)), "Seen here.", found=True))
        text = tokenizer.decode(encode(tokenizer, example), clean_up_tokenization_spaces=False)
        if text != "".join(piece.text for piece in example):
            raise ModelError(
                f"this tokenizer does not reproduce the answer form: got {text!r}; a byte-level tokenizer is needed"
            )
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
        prose = [i for i, t in texts.items() if t and "<" not in t]
        words = [i for i in prose if re.fullmatch(r" ?[A-Za-z0-9-]+", texts[i])]
        self._prose = np.array(prose)
        self._prose_start = np.array([i for i in prose if re.match(r" \S", texts[i])])
        self._words = np.array(words)
        self._words_start = np.array([i for i in words if texts[i].startswith(" ")])

    def max_tokens(self, frame_wh: tuple[int, int]) -> int:
        """An upper bound of a whole answer's length, its end-of-text token included."""
        longest = max(len(self._ids(str(n))) for n in range(max(frame_wh) + 1))
        per_box = 4 * longest + 3 * len(self._ids(", ")) + len(self._ids("], ["))
        fixed = sum(len(self._ids(t)) for t in ("<think>", " </think><answer>", " The", " are located at [["))
        closing = sum(len(self._ids(t)) for t in ("]]. The mask is ", SEG_TOKEN, ". </answer>"))
        return self._reasoning_budget + self._category_budget + fixed + closing + MAX_BOXES * per_box + 8

    def walk(self, frame_wh: tuple[int, int], opened: Sequence[int] = ()) -> Walk:
        """One answer, token by token: yields the ids allowed next and is sent the id that was chosen.

        Where `opened`, the ids of an `opening`, is given, the answer starts with it, whatever its length.
        """
        if opened:
            yield from forced(opened)
        else:
            yield from self._forced("<think>")
            ends = (" </think><answer>",)
            yield from self._free(self._prose_start, self._prose, self._reasoning_budget, ends, least=0)
        if (yield from self._choice({" The": "there", " No": "absent"})) == "absent":
            yield from self._free(self._words_start, self._words, self._category_budget, (" is visible. </answer>",))
        else:
            located = (" is located at [[", " are located at [[")
            yield from self._free(self._words_start, self._words, self._category_budget, located)
            yield from self._boxes(*frame_wh)
            yield from self._forced(SEG_TOKEN)
            yield from self._forced(". </answer>")
        while True:
            yield np.array([self._tokenizer.eos_token_id])

    def _boxes(self, width: int, height: int) -> Walk:
        """One to eight boxes inside the frame, each with area, up to the text before the mask marker."""
        for number in range(1, MAX_BOXES + 1):
            x1 = yield from self._number(0, width - 1, (", ",))
            y1 = yield from self._number(0, height - 1, (", ",))
            yield from self._number(x1 + 1, width, (", ",))
            ends = ("]]. The mask is ",) if number == MAX_BOXES else ("]]. The mask is ", "], [")
            last = yield from self._number(y1 + 1, height, ends, tell_end=True)
            if last == 0:
                return

    def _number(
        self, low: int, high: int, ends: tuple[str, ...], tell_end: bool = False
    ) -> Generator[Allowed, int, int]:
        """A number from `low` to `high` and the text after it; gives the number, or which end was taken."""
        options = {
            self._ids(str(n)) + self._ids(end): (which if tell_end else n)
            for n in range(low, high + 1)
            for which, end in enumerate(ends)
        }
        return (yield from self._pick(options))

    def _choice(self, texts: Mapping[str, str]) -> Generator[Allowed, int, str]:
        return (yield from self._pick({self._ids(text): meaning for text, meaning in texts.items()}))

    def _forced(self, text: str) -> Walk:
        yield from forced(self._ids(text))

    def _pick(self, options: Mapping[tuple[int, ...], Meaning]) -> Generator[Allowed, int, Meaning]:
        """One of several id sequences, none a prefix of another, chosen token by token; gives its meaning."""
        position, left = 0, dict(options)
        while True:
            token = yield np.unique([ids[position] for ids in left])
            left = {ids: meaning for ids, meaning in left.items() if ids[position] == token}
            position += 1
            if len(left) == 1 and len(next(iter(left))) == position:
                return next(iter(left.values()))

    def _free(
        self, start: Int[np.ndarray, " start"], ids: Allowed, budget: int, ends: tuple[str, ...], least: int = 1
    ) -> Walk:
        """From `least` (0 or 1) to `budget` tokens of free text, then one of `ends`, whose first token is the end."""
        endings = [self._ids(end) for end in ends]
        first = np.array([ending[0] for ending in endings])
        inside = np.union1d(ids, first)
        token = yield np.setdiff1d(start, first) if least else np.union1d(start, first)
        written = 1
        while token not in first:
            token = yield inside if written < budget else first
            written += 1
        ending = endings[int(np.flatnonzero(first == token)[0])]
        yield from forced(ending[1:])

    def _ids(self, text: str) -> tuple[int, ...]:
        if text not in self._cached:
            self._cached[text] = tuple(encode(self._tokenizer, [Piece(text)]))
        return self._cached[text]
