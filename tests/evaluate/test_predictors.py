"""Models as the evaluation sees them: what they are asked, and what makes two of them differ."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coreseg.answer import parse
from coreseg.data.store import LesionSet
from coreseg.evaluate.predictors import ModelPredictor, OracleBox, QuestionBlind
from coreseg.evaluate.run import Predictor
from coreseg.model.core_seg import CoreSegConfig
from coreseg.segmenter import Segmenter


def test_the_model_is_asked_by_picture_and_question_alone(bright_segmenter: Any, lesion_set: LesionSet) -> None:
    samples = lesion_set.split("val")[:2]
    predictor = ModelPredictor(bright_segmenter(), "bright", True, {})
    images = [np.full((30, 40, 3), 250, np.uint8), np.zeros((30, 40, 3), np.uint8)]
    bright, dark = predictor.predict(samples, images, ["Where is it?", "Where is it?"])
    assert isinstance(predictor, Predictor)
    assert bright.mask.all() and not dark.mask.any()


def test_free_decoding_reaches_the_segmenter(bright_segmenter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def segment_batch(self: Any, images: Any, questions: Any, *, constrained: bool) -> list[Any]:
        asked.append(constrained)
        return []

    monkeypatch.setattr(bright_segmenter, "segment_batch", segment_batch)
    for constrained in (True, False):
        ModelPredictor(bright_segmenter(), "bright", constrained, {}).predict([], [], [])
    assert asked == [True, False]


def load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bright_segmenter: Any, constrained: bool = True, **changes: Any
) -> Any:
    model = SimpleNamespace(dtype=torch.float32, config=CoreSegConfig(**changes))
    monkeypatch.setattr(bright_segmenter, "model", model, raising=False)
    return ModelPredictor.load(str(folder), "cpu", "float32", constrained=constrained)


@pytest.mark.parametrize("change", [{"word_bias": {7: 1.5}}, {"looks_px": {"": [320]}}, {"second_look": True}])
def test_other_ways_to_answer_are_another_model(
    bright_segmenter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    first, other = (load(tmp_path, monkeypatch, bright_segmenter, **changes) for changes in ({}, change))
    assert json.loads(json.dumps(first.settings)) != json.loads(json.dumps(other.settings))


def test_other_weights_or_decoding_are_another_model(
    bright_segmenter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"first")
    first = load(tmp_path, monkeypatch, bright_segmenter)
    assert bright_segmenter.loaded == [(str(tmp_path), "cpu", "float32")]
    assert first.name == str(tmp_path)
    assert load(tmp_path, monkeypatch, bright_segmenter).settings == first.settings
    assert load(tmp_path, monkeypatch, bright_segmenter, constrained=False).settings != first.settings
    (tmp_path / "model.safetensors").write_bytes(b"second")
    assert load(tmp_path, monkeypatch, bright_segmenter).settings != first.settings


def test_the_question_blind_baseline(tiny_core_seg: Path, lesion_set: LesionSet) -> None:
    """Its mask is the "any lesion" prompt's, whatever the question; boxes and text follow from it."""
    samples = lesion_set.split("val")[:2]
    segmenter = Segmenter.from_pretrained(tiny_core_seg, "cpu")
    half = torch.cat([torch.full((8, 4), -9.0), torch.full((8, 4), 9.0)], dim=1)
    masks = torch.stack([half, -9 * torch.ones(8, 8)])
    segmenter.model.question_blind = lambda pixels: masks  # type: ignore[method-assign]
    predictor = QuestionBlind(segmenter, {"weights": "aa"})
    assert isinstance(predictor, Predictor)
    assert (predictor.name, predictor.settings) == ("question-blind", {"weights": "aa"})
    images = [np.zeros((30, 40, 3), np.uint8)] * 2
    found, empty = predictor.predict(samples, images, ["a", "b"])
    assert found.mask[:, 21:].all() and not found.mask[:, :19].any()
    assert (found.found, empty.found, empty.mask.any()) == (True, False, False)
    answer = parse(found.text, (40, 30))
    assert answer is not None and answer.category == samples[0].category
    assert np.array_equal(answer.boxes, found.boxes)
    assert parse(empty.text) is not None and empty.boxes.shape == (0, 4)


def test_the_oracle_is_prompted_by_the_boxes_of_the_asked_row(tiny_core_seg: Path, lesion_set: LesionSet) -> None:
    """In the segmenter's square of 64 px; no box, no mask."""
    segmenter = Segmenter.from_pretrained(tiny_core_seg, "cpu")
    prompted: list[Any] = []

    def in_boxes(pixels: Any, boxes: Any) -> torch.Tensor:
        prompted.append((pixels.shape, [row.tolist() for row in boxes]))
        return torch.stack([torch.full((16, 16), 1.0 if len(row) else -1.0) for row in boxes])

    segmenter.model.in_boxes = in_boxes  # type: ignore[method-assign]
    predictor = OracleBox(segmenter, {"weights": "aa"})
    assert isinstance(predictor, Predictor)
    assert (predictor.name, predictor.settings) == ("oracle box", {"weights": "aa"})
    rows = [lesion_set.split("val")[number] for number in (2, 4)]
    two, none = predictor.predict(rows, [lesion_set.image(row) for row in rows], ["The largest cyst?", "A polyp?"])
    across, down = 64 / 40, 64 / 30
    [(shape, [asked, empty])] = prompted
    assert shape == (2, 3, 64, 64) and empty == []
    expected = [[2 * across, 2 * down, 12 * across, 12 * down], [30 * across, 20 * down, 35 * across, 25 * down]]
    assert np.allclose(asked, expected)
    assert two.found and two.mask.all() and not none.found and not none.mask.any()
    absent = parse(none.text)
    assert absent is not None and absent.category == "polyp" and not absent.found
