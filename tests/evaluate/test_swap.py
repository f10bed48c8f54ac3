"""Replaced reasonings: what is given in their place, and movement that is known by hand."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coreseg.answer import answer_sentence, render
from coreseg.data.store import LesionSet
from coreseg.evaluate import Evaluation, evaluate
from coreseg.evaluate.predictors import ModelPredictor
from coreseg.evaluate.swap import VARIANTS, Swapped, centre_shift, print_swaps, summarise_swaps, swap_reasoning
from coreseg.segmenter import Segmenter
from coreseg.types import Answer, Box, Result

LEFT, RIGHT = (0, 0, 20, 30), (20, 0, 40, 30)
Listen = Callable[[str, str], tuple[Box, ...]]


@dataclass
class Listener(Segmenter):
    """Writes a reasoning per question, and answers by a function of question and reasoning; keeps what it was given."""

    reasons: Callable[[str], str]
    boxes: Listen
    given: list[str] = field(default_factory=list)

    def segment_batch(
        self, images: Any, questions: Any, *, constrained: bool = True, reasoning: Any = None
    ) -> list[Result]:
        self.given += reasoning or []
        texts = [self.reasons(question) for question in questions] if reasoning is None else reasoning
        return [self._one(*each) for each in zip(images, questions, texts, strict=True)]

    def _one(self, image: np.ndarray, question: str, reasoning: str) -> Result:
        boxes = self.boxes(question, reasoning)
        mask = np.zeros(image.shape[:2], bool)
        for x1, y1, x2, y2 in boxes:
            mask[y1:y2, x1:x2] = True
        answer = Answer(question.split()[-1].strip("."), boxes, reasoning, found=bool(boxes))
        valid = "mumble" not in reasoning
        text = render(answer) if valid else "<think> mumble"
        sentence = answer_sentence(answer) if valid else ""
        array = np.array(boxes, dtype=int).reshape(-1, 4)
        return Result(mask, array, reasoning if valid else "", sentence, text, bool(boxes), valid, 0.1, image)


def swapped(lesion_set: LesionSet, listener: Listener, **options: Any) -> tuple[Swapped, Evaluation]:
    predictor = ModelPredictor(listener, "listener", True, {})
    evaluation = evaluate(lesion_set, predictor, progress=False)
    return swap_reasoning(lesion_set, predictor, evaluation, progress=False, **options), evaluation


def says(question: str) -> str:
    return "A single polyp at mid height." if "polyp" in question else "A cyst on the left side of the image."


def by_reasoning(question: str, reasoning: str) -> tuple[Box, ...]:
    """Nothing without a reasoning, right where it says so, else left."""
    return ((RIGHT,) if "right" in reasoning else (LEFT,)) if reasoning else ()


def test_a_mask_that_does_not_listen_never_moves(lesion_set: LesionSet) -> None:
    deaf, _ = swapped(lesion_set, Listener(says, lambda question, reasoning: (LEFT,)))
    for variant in VARIANTS:
        figures = deaf.summary[variant]
        assert (figures["n"], figures["left_out"]) == (4, 0)
        assert figures["same_mask"] == figures["same_boxes"] == {"mean": 100.0, "low": 100.0, "high": 100.0}
        assert figures["shift_median"] == figures["dice_change"]["mean"] == figures["flipped"]["mean"] == 0.0


def test_one_that_listens_moves_by_what_it_hears(lesion_set: LesionSet, tmp_path: Path) -> None:
    heard, evaluation = swapped(lesion_set, Listener(says, by_reasoning), out=tmp_path / "swap", batch_size=3)
    own, empty, other, contradicted = (heard.summary[variant] for variant in VARIANTS)
    assert own["same_mask"]["mean"] == own["same_boxes"]["mean"] == 100.0
    assert own["dice"]["mean"] == pytest.approx(evaluation.summary["pooled"]["dice"]["mean"])
    assert empty["same_mask"]["mean"] == empty["dice"]["mean"] == 0.0 and empty["flipped"]["mean"] == 100.0
    assert empty["shift_median"] is None and empty["invalid"]["mean"] == 0.0
    assert other["same_mask"]["mean"] == 100.0, "neither reasoning says right"
    # The cysts jump from the left half to the right one; the polyp's has no side, and it stays.
    assert contradicted["same_mask"]["mean"] == contradicted["same_boxes"]["mean"] == 25.0
    assert contradicted["shift_median"] == pytest.approx(100 * 20 / 50)
    dices = {swap.file_name: (swap.own_dice, swap.dice) for swap in heard.swaps if swap.variant == "contradicted"}
    assert contradicted["dice_change"]["mean"] == pytest.approx(np.mean([100 * (b - a) for a, b in dices.values()]))
    assert contradicted["dice_change"]["low"] <= contradicted["dice_change"]["mean"] < 0
    header, *lines = (tmp_path / "swap" / "records.jsonl").read_text().splitlines()
    assert json.loads(header)["settings"]["model"] == "listener"
    assert len(lines) == len(heard.swaps) == 16 and json.loads(lines[0])["variant"] == "own"
    json.dumps(heard.summary, allow_nan=False)


def test_the_replacements(lesion_set: LesionSet) -> None:
    listener = Listener(says, by_reasoning)
    cyst, polyp = says("cyst"), says("polyp")
    swapped(lesion_set, listener)
    own, empty, other, contradicted = (listener.given[start : start + 4] for start in (0, 4, 8, 12))
    assert own == [cyst, cyst, cyst, polyp]
    assert empty == [""] * 4
    assert other == [polyp, polyp, polyp, cyst], "the next of another source, round the end"
    assert contradicted == [cyst.replace("left", "right")] * 3 + ["Four polyp in the upper part."]


def test_with_one_source_another_image_is_taken(lesion_set: LesionSet) -> None:
    numbers = iter(["One on the left.", "Dark.", "Two.", "Bright."] * 2)
    listener = Listener(lambda question: next(numbers), by_reasoning)
    cysts = LesionSet(lesion_set.root, tuple(row for row in lesion_set.samples if row.source == "cysts"))
    found, _ = swapped(cysts, listener)
    assert [swap.reasoning for swap in found.swaps if swap.variant == "other"] == ["Dark.", "Two.", "One on the left."]


def test_what_cannot_be_replaced_is_left_out_and_counted(lesion_set: LesionSet) -> None:
    mumbles = Listener(lambda question: "mumble" if "polyp" in question else "A dark cyst.", by_reasoning)
    found, _ = swapped(lesion_set, mumbles)
    counts = {variant: (found.summary[variant]["n"], found.summary[variant]["left_out"]) for variant in VARIANTS}
    assert counts == {"own": (3, 1), "empty": (3, 1), "other": (3, 1), "contradicted": (0, 4)}
    assert found.summary["contradicted"] == {"n": 0, "left_out": 4}, "no side, no place, no count"


def test_a_form_that_breaks_is_counted(lesion_set: LesionSet) -> None:
    def answer(question: str, reasoning: str) -> tuple[Box, ...]:
        return (LEFT,)

    listener = Listener(says, answer)
    given = listener._one
    listener._one = lambda image, question, reasoning: given(image, question, reasoning or "mumble")  # type: ignore
    found, _ = swapped(lesion_set, listener)
    empty = found.summary["empty"]
    assert empty["invalid"]["mean"] == empty["flipped"]["mean"] == 100.0 and empty["same_mask"]["mean"] == 0.0


def test_centre_shift() -> None:
    size_wh = (30, 40)  # a diagonal of 50
    assert centre_shift([], [LEFT], size_wh) is centre_shift([LEFT], [], size_wh) is None
    assert centre_shift([(0, 0, 4, 4)], [(3, 4, 7, 8)], size_wh) == pytest.approx(5 / 50)
    far, near = (20, 20, 24, 24), (0, 0, 4, 4)
    assert centre_shift([far, near], [near, far], size_wh) == 0.0, "the order of the boxes does not count"
    assert centre_shift([near], [far, near], size_wh) == 0.0, "a box left over has no partner"


@pytest.mark.parametrize("words", [says, lambda question: "Dark."])
def test_the_table_fits(lesion_set: LesionSet, words: Callable[[str], str]) -> None:
    console = Console(file=StringIO(), width=120)
    print_swaps(swapped(lesion_set, Listener(words, by_reasoning))[0].summary, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    for heading in VARIANTS.values():
        assert heading in text
    print_swaps(summarise_swaps([], 3), console)
