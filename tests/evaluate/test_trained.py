"""Trained baselines: they hear the category and nothing else, and a folder gives back what was saved in it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coreseg.data.store import LesionSet
from coreseg.errors import MissingExtraError, ModelError
from coreseg.evaluate.run import Predictor, evaluate
from coreseg.evaluate.trained import CategoryPrompt, TrainedBaseline, UNetBaseline, open_baseline
from coreseg.model.assemble import load_parts
from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image

CATEGORIES = ["cyst", "polyp"]
KINDS = ("unet", "plain unet", "category-embedding")
Build = Callable[[str], TrainedBaseline]


@pytest.fixture(scope="module")
def build(tiny_core_seg: Path) -> Build:
    """An untrained baseline by its name, whose masks differ by category."""
    frame = {"categories": CATEGORIES, "size_px": 64, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}

    def fresh(name: str) -> TrainedBaseline:
        torch.manual_seed(0)
        if name == "unet":
            pytest.importorskip("segmentation_models_pytorch")
            return UNetBaseline({**frame, "encoder": "test_efficientnet"}).eval()
        if name == "plain unet":
            return UNetBaseline({**frame, "encoder": None}).eval()
        baseline = CategoryPrompt.of(load_parts(tiny_core_seg)[0], CATEGORIES)
        for parameter in baseline.segmenter.mask_decoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        baseline.prompts.data += 3 * torch.randn_like(baseline.prompts)
        return baseline.eval()

    return fresh


def logits(baseline: TrainedBaseline, *numbers: int) -> torch.Tensor:
    """What a baseline says of one and the same picture, asked for each of these categories."""
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return baseline(picture.expand(len(numbers), -1, -1, -1), torch.tensor(numbers))


@pytest.mark.parametrize("name", KINDS)
def test_the_category_decides_and_the_question_does_not(build: Build, name: str, lesion_set: LesionSet) -> None:
    baseline = build(name)
    assert isinstance(baseline, Predictor) and baseline.name == name.removeprefix("plain ")
    apart = logits(baseline, 0, 1)
    assert (apart[0] - apart[1]).abs().max() > 1e-3
    sample = lesion_set.split("val")[0]
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    samples = [sample, sample, replace(sample, category="polyp")]
    first, again, other = baseline.predict(samples, [image] * 3, ["Where is the cyst?", "The largest one?", "Where?"])
    assert first.mask.shape == (30, 40) and np.array_equal(first.mask, again.mask)
    assert "cyst" in first.text and "polyp" in other.text and first.valid


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_gives_back_what_was_saved(build: Build, name: str, tmp_path: Path, lesion_set: LesionSet) -> None:
    baseline = build(name)
    baseline.save(tmp_path, {"steps": 3})
    opened = open_baseline(tmp_path)
    assert type(opened) is type(baseline) and not opened.training
    assert torch.equal(logits(opened, 0, 1, -1), logits(baseline, 0, 1, -1))
    assert opened.settings["steps"] == 3 and len(opened.settings["weights"]) == 16
    evaluation = evaluate(lesion_set, opened, progress=False)
    assert evaluation.name == baseline.name and json.dumps(evaluation.settings)
    next(opened.parameters()).data += 1
    opened.save(tmp_path, {"steps": 3})
    assert open_baseline(tmp_path).settings != evaluation.settings["model_settings"], "other weights, another model"


def test_an_unknown_category_gets_every_channel_of_the_unet(build: Build) -> None:
    asked = logits(build("unet"), 0, 1, -1)
    assert torch.equal(asked[2], torch.maximum(asked[0], asked[1])) and not torch.equal(asked[2], asked[0])


def test_an_unknown_category_gets_the_any_lesion_prompt(build: Build) -> None:
    baseline: Any = build("category-embedding")
    pixels = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - baseline.mean) / baseline.std
    with torch.no_grad():
        maps = encode_image(baseline.segmenter, pixels)
        expected = decode_masks(baseline.segmenter, maps, any_lesion_prompt(baseline.segmenter, 1))[:, 0]
    assert torch.allclose(logits(baseline, -1), expected, atol=1e-5)
    assert not torch.allclose(logits(baseline, 0), expected, atol=1e-3)


def test_the_segmenters_own_pixels_and_prompt_are_taken_over(tiny_core_seg: Path) -> None:
    model, processor = load_parts(tiny_core_seg)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    square = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        blind = model.question_blind(processor.segmenter_pixels(image))
        untrained = CategoryPrompt.of(model, CATEGORIES).eval()(square, torch.tensor([1]))
    assert torch.allclose(untrained, blind, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "frozen"), [("unet", "unet.encoder"), ("category-embedding", "segmenter.vision_encoder")]
)
def test_training_leaves_the_statistics_of_the_pretrained_part_alone(build: Build, name: str, frozen: str) -> None:
    baseline = build(name)
    baseline.train()
    before = {key: value.clone() for key, value in baseline.get_submodule(frozen).named_buffers()}
    baseline(torch.rand(2, 3, 64, 64), torch.tensor([0, 1])).mean().backward()
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(value, before[key]) for key, value in baseline.get_submodule(frozen).named_buffers())
    assert baseline.training, "the rest does train"
    encoder_learns = any(parameter.grad is not None for parameter in baseline.get_submodule(frozen).parameters())
    assert encoder_learns == (name == "unet")


def test_without_its_package_the_unet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    half = [0.5] * 3
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[baselines\]'"):
        UNetBaseline({"categories": CATEGORIES, "size_px": 64, "mean": half, "std": half, "encoder": "x"})
    monkeypatch.setitem(sys.modules, "monai.networks.nets.unet", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[build\]'"):
        UNetBaseline({"categories": CATEGORIES, "size_px": 64, "mean": half, "std": half, "encoder": None})


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"model_type": "core_seg"}', '{"baseline": "forest"}'])
def test_a_folder_that_holds_none_is_one_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"is no trained baseline: .*unet or category-embedding"):
        open_baseline(tmp_path)


def test_a_damaged_folder_is_one_error(build: Build, tmp_path: Path) -> None:
    build("category-embedding").save(tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "categories": ["one", "two", "three"]}))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*prompts[^\n]*$"):
        open_baseline(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "segmenter": {}}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_baseline(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_baseline(tmp_path)
