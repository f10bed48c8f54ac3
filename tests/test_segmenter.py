"""The main path around the model: what goes in, and how ids and mask logits come back in the picture's own pixels."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreseg.answer import MAX_QUESTION_CHARACTERS, check_question, render
from coreseg.errors import InputError, ModelError
from coreseg.model.confidence import NAMES, Confidence
from coreseg.model.core_seg import CoreSeg, CoreSegConfig, Generation
from coreseg.model.processor import Batch, CoreSegProcessor
from coreseg.model.scope import Kind, Scope
from coreseg.segmenter import CONTRADICTION, Segmenter
from coreseg.types import Answer

FRAME_PX = 64
HALF = Answer("tumor", ((32, 0, 64, 64),), "The right half is bright.", found=True)
NOTHING = Answer("tumor", (), "Nothing stands out.", found=False)
RIGHT_HALF = torch.cat([torch.full((8, 4), -9.0), torch.full((8, 4), 9.0)], dim=1)


class Script:
    """What the fake model writes for each question, and its mask logits."""

    texts: dict[str, str] = {  # noqa: RUF012
        "half": render(HALF),
        "nothing": render(NOTHING),
        "mumble": "The tumor is <seg>",
        "outside": render(HALF).replace("64, 64]", "64, 65]"),
    }


class FakeProcessor(CoreSegProcessor):
    """Ids are the place of the question in the script; the way back to pixels is the real one."""

    def __init__(self) -> None:
        self.config = CoreSegConfig()
        self.config.segmenter_config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=4))
        self.tokenizer = SimpleNamespace(eos_token_id=99, pad_token_id=98)
        self.constraints: list[Any] = []

    @property
    def grammar(self) -> Any:
        return SimpleNamespace(max_tokens=lambda frame_wh: sum(frame_wh))

    def constraint(self, frames_wh: Sequence[tuple[int, int]], openings: Any = ()) -> Any:
        return ("the grammar of", list(frames_wh))

    def __call__(self, images: Any, questions: Any, answers: Any = None) -> Batch:
        ids = torch.tensor([[list(Script.texts).index(question)] for question in questions])
        return Batch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=ids,
            reasoner_inputs={"pixel_values": torch.zeros(len(images), 3, 4, 4), "grid": torch.ones(len(images)).int()},
            segmenter_pixels=torch.zeros(len(images), 3, 4, 4),
            of_boxes=torch.zeros((len(images), 1), dtype=torch.bool),
            segmenter_boxes=[torch.zeros(0, 4)] * len(images),
            frames_wh=[(FRAME_PX, FRAME_PX)] * len(images),
        )

    def decode(self, ids: Sequence[int]) -> str:
        return list(Script.texts.values())[ids[0]]


class FakeModel(CoreSeg):
    """Writes the prompt's id back; every row gets the mask of the right half."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.calls: list[dict[str, Any]] = []
        self.segmenter = SimpleNamespace(vision_encoder=self.encode)

    def encode(self, pixels: torch.Tensor, return_dict: bool) -> Any:
        return SimpleNamespace(fpn_hidden_states=[torch.zeros(len(pixels), 2, 4, 4)])

    def generate(self, **inputs: Any) -> Generation:
        self.calls.append(inputs)
        rows = inputs["input_ids"].tolist()
        logits = [RIGHT_HALF if row != [2] else None for row in rows]
        states = [None if row is None else torch.zeros(1, 2) for row in logits]
        return Generation(rows, logits, states, log_probabilities=[-0.25] * len(rows))


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(FakeModel(), FakeProcessor())


@pytest.fixture
def picture() -> np.ndarray:
    return np.zeros((30, 50, 3), np.uint8)


def test_mask_and_boxes_are_in_the_pictures_own_pixels(segmenter: Segmenter, picture: np.ndarray) -> None:
    result = segmenter.segment(picture, "half")
    assert result.mask.shape == (30, 50) and result.mask.dtype == bool
    assert result.mask[:, 26:].all() and not result.mask[:, :24].any()
    assert result.boxes.tolist() == [[25, 0, 50, 30]]
    assert result.answer == "The tumor is located at [[25, 0, 50, 30]]."
    assert result.text == render(HALF), "the raw text stays in the model's frame"
    assert (result.reasoning, result.found, result.valid) == (HALF.reasoning, True, True)
    assert np.array_equal(result.image, picture)
    assert result.overlay().size == (50, 30)
    assert result.seconds > 0


def test_an_absent_lesion_has_no_mask_whatever_the_logits(segmenter: Segmenter, picture: np.ndarray) -> None:
    result = segmenter.segment(picture, "nothing")
    assert (result.found, result.valid, result.answer) == (False, True, "No tumor is visible.")
    assert not result.mask.any() and result.boxes.shape == (0, 4)


@pytest.mark.parametrize("question", ["mumble", "outside"])
def test_a_malformed_answer_is_a_result(segmenter: Segmenter, picture: np.ndarray, question: str) -> None:
    result = segmenter.segment(picture, question)
    assert (result.found, result.valid, result.answer, result.reasoning) == (False, False, "", "")
    assert result.text == Script.texts[question]
    assert not result.mask.any() and result.boxes.shape == (0, 4)


def test_a_batch_keeps_order_and_sizes(segmenter: Segmenter, picture: np.ndarray) -> None:
    other = np.zeros((20, 10, 3), np.uint8)
    results = segmenter.segment_batch([picture, other, other], ["half", "mumble", "nothing"])
    assert [result.mask.shape for result in results] == [(30, 50), (20, 10), (20, 10)]
    assert [result.valid for result in results] == [True, False, True]
    assert results[0].seconds == results[1].seconds


def test_what_the_model_is_given(segmenter: Segmenter, picture: np.ndarray) -> None:
    segmenter.segment(picture, "half")
    segmenter.segment(picture, "half", constrained=False)
    constrained, free = segmenter.model.calls
    assert constrained["constraint"] == ("the grammar of", [(FRAME_PX, FRAME_PX)])
    assert free["constraint"] is None
    assert constrained["max_new_tokens"] == free["max_new_tokens"] == 2 * FRAME_PX
    assert [level.shape for level in constrained["segmenter_maps"]] == [(1, 2, 4, 4)], "encoded once, here"
    assert constrained["reasoner_inputs"]["pixel_values"].dtype == torch.bfloat16, "floats in the model's precision"
    assert constrained["reasoner_inputs"]["grid"].dtype == torch.int32, "whole numbers as they are"


def test_warnings_of_the_scope_stand_in_the_result(picture: np.ndarray) -> None:
    kind = Kind("mri", "head", ("stroke",))
    scope = Scope((kind,), torch.zeros(1, 2), torch.ones(2), torch.eye(2), limit=1.0)
    first, second = Segmenter(FakeModel(), FakeProcessor(), scope).segment_batch([picture] * 2, ["half", "mumble"])
    assert first.warnings == ("this model does not know tumor; it knows stroke",)
    assert second.warnings == (), "nothing to be said of no answer"


def test_what_was_done_to_the_picture_stands_in_the_result(segmenter: Segmenter, picture: np.ndarray) -> None:
    deep, plain = segmenter.segment_batch([picture.astype(np.uint16) * 16, picture], ["half"] * 2)
    assert len(deep.warnings) == 1
    assert "were stretched" in deep.warnings[0]
    assert plain.warnings == ()


def test_signs_and_the_confidence_told_from_them(segmenter: Segmenter, picture: np.ndarray) -> None:
    """The mask is the right half, as the box has it; where nothing is found there are no such signs."""
    found, nothing, mumbled = segmenter.segment_batch([picture] * 3, ["half", "nothing", "mumble"])
    assert found.confidence is None, "this model never learned how sure it may be"
    assert found.signs == {
        "found": 1.0,
        "sharp": pytest.approx(1.0, abs=1e-3),
        "boxes": 1.0,
        "size": pytest.approx(0.94, abs=0.01),
        "words": -0.25,
    }
    assert nothing.signs == mumbled.signs == {**dict.fromkeys(NAMES, 0.0), "words": -0.25}
    segmenter.confidence = Confidence(dict.fromkeys(NAMES, 0.0) | {"boxes": 2.0}, bias=-1.0)
    found, nothing, mumbled = segmenter.segment_batch([picture] * 3, ["half", "nothing", "mumble"])
    assert found.confidence == pytest.approx(1 / (1 + math.exp(-1)))
    assert nothing.confidence == pytest.approx(1 / (1 + math.exp(1)))
    assert mumbled.confidence == 0.0, "there is no mask to rely on"


def test_words_that_tell_of_a_lesion_beside_an_empty_mask_are_not_believed(
    segmenter: Segmenter, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter.confidence = Confidence(dict.fromkeys(NAMES, 0.0), bias=1.0)
    monkeypatch.setitem(globals(), "RIGHT_HALF", torch.full((8, 8), -9.0))
    told, nothing = segmenter.segment_batch([picture] * 2, ["half", "nothing"])
    assert told.found and not told.mask.any() and told.confidence == 0.0
    assert told.warnings == (CONTRADICTION,)
    assert nothing.warnings == () and nothing.confidence == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("question", ["", "  \n", "x" * (MAX_QUESTION_CHARACTERS + 1)])
def test_a_question_that_cannot_be_asked(segmenter: Segmenter, picture: np.ndarray, question: str) -> None:
    with pytest.raises(InputError, match="the question"):
        segmenter.segment(picture, question)


def test_the_longest_question_is_fine() -> None:
    check_question("x" * MAX_QUESTION_CHARACTERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_what_the_machine_lacks(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Segmenter.from_pretrained("nano", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nosuch", "./nosuch/model", "/nosuch/model", "a/b/c", ""])
def test_an_unknown_model(name: str) -> None:
    with pytest.raises(ModelError):
        Segmenter.from_pretrained(name)
