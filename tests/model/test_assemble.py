from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coreseg.answer import SEG_TOKEN
from coreseg.errors import InputError, ModelError
from coreseg.model import assemble as assemble_module
from coreseg.model.assemble import assemble, export, find_checkpoint, freeze_all_but_heads, load_parts
from coreseg.model.core_seg import CoreSeg, CoreSegConfig
from coreseg.model.processor import CoreSegProcessor
from coreseg.segmenter import Segmenter
from coreseg.types import Answer

Build = Callable[[str], Path]
ANSWER = Answer("cyst", ((3, 4, 20, 30),), "One, dark.", found=True)


@torch.no_grad()
def outputs(model: CoreSeg, processor: CoreSegProcessor, picture: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    batch = processor([picture], ["Where is the cyst?"], [ANSWER])
    output = model(batch.input_ids, batch.attention_mask, batch.reasoner_inputs, batch.segmenter_pixels)
    return output.logits, output.mask_logits


@pytest.mark.parametrize("pairing", ["qwen", "nano", "smolvlm", "qwen-tied"])
def test_a_saved_model_answers_as_before(
    parts: Build, tmp_path: Path, pictures: list[np.ndarray], pairing: str
) -> None:
    segmenter = parts("sam2" if pairing.startswith("qwen") else "edgetam")
    model = assemble(str(parts(pairing)), str(segmenter), tmp_path / "joined")
    logits, masks = outputs(model.eval(), CoreSegProcessor.from_pretrained(tmp_path / "joined"), pictures[0])
    model.save_pretrained(tmp_path / "again")
    again, processor = load_parts(tmp_path / "joined")
    assert {name for name, _ in again.named_children()} == {"reasoner", "adapter", "segmenter"}
    read_logits, read_masks = outputs(again.eval(), processor, pictures[0])
    assert torch.equal(read_logits, logits)
    # Convolutions sum in another order where memory lies otherwise.
    torch.testing.assert_close(read_masks, masks, rtol=1e-5, atol=1e-9)
    assert masks.abs().max() > 0


def test_the_reasoner_keeps_its_own_weights(parts: Build, qwen: Segmenter) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(parts("qwen")).state_dict()
    inside = qwen.model.reasoner.state_dict()
    assert stock.keys() == inside.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in stock.items())


def test_embeddings_never_shrink(parts: Build, joined: Build) -> None:
    """Qwen has spare rows, which the new token takes; LLaVA has none, so that its matrix grows by that one row."""
    for name, growth in (("qwen", 0), ("nano", 1)):
        stock = AutoModelForImageTextToText.from_pretrained(parts(name)).get_input_embeddings().weight
        model, _ = load_parts(joined(name))
        inside = model.get_input_embeddings().weight
        assert inside.shape[0] == stock.shape[0] + growth
        assert torch.equal(inside[: len(stock)], stock)
        assert model.config.seg_token_id < inside.shape[0]
        assert model.config.seg_token_id == len(AutoTokenizer.from_pretrained(parts(name)))
        assert model.reasoner.get_output_embeddings().weight.shape == inside.shape


def test_a_token_that_is_there_is_not_added_twice(parts: Build, joined: Build, tmp_path: Path) -> None:
    model, processor = load_parts(joined("nano"))
    model.reasoner.save_pretrained(tmp_path / "reasoner")
    processor.reasoner.save_pretrained(tmp_path / "reasoner")
    again = assemble(str(tmp_path / "reasoner"), str(parts("edgetam")), tmp_path / "again")
    assert again.config.seg_token_id == model.config.seg_token_id
    assert again.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape


def test_an_untrained_adapter_starts_at_the_any_lesion_prompt(parts: Build, tmp_path: Path) -> None:
    model = assemble(str(parts("nano")), str(parts("edgetam")), tmp_path)
    prompt = model.adapter(torch.randn(1, 1, 32), torch.ones(1, 1, dtype=torch.bool))
    token = model.segmenter.prompt_encoder.not_a_point_embed.weight
    assert torch.nn.functional.cosine_similarity(prompt, token[None], dim=-1).min() > 0.8


def test_loading_says_nothing(
    joined: Build, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a log line nor a word on the terminal: a user would take it for a fault."""
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        config = CoreSegConfig.from_pretrained(joined("nano"))
        CoreSegProcessor.from_pretrained(joined("nano"))
        load_parts(joined("qwen"))
    finally:
        logging.disable_propagation()
    assert isinstance(config, CoreSegConfig)
    assert caplog.messages == []
    shown = capfd.readouterr()
    assert "You are using a model of type" not in shown.out + shown.err


def test_a_configuration_comes_back_as_it_was(joined: Build, tmp_path: Path) -> None:
    config = CoreSegConfig.from_pretrained(joined("nano"))
    config.save_pretrained(tmp_path)
    assert CoreSegConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.segmenter_size_px == 64
    assert config.reasoner_config.vision_config.segmenter_config.model_type == "edgetam"


def test_missing_and_foreign_checkpoints_are_named(parts: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image-text-to-text"):
        assemble(str(tmp_path / "nowhere"), str(parts("sam2")), tmp_path / "out")
    with pytest.raises(ModelError, match="SAM 2"):
        assemble(str(parts("qwen")), str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(ModelError, match="image-text-to-text"):
        assemble(str(parts("sam2")), str(parts("sam2")), tmp_path / "out")
    with pytest.raises(ModelError, match="'qwen2_5_vl'; expected one of the SAM 2 family"):
        assemble(str(parts("qwen")), str(parts("qwen")), tmp_path / "out")


def test_a_reasoner_that_crops_is_refused(parts: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="crops"):
        assemble(str(parts("llava-that-crops")), str(parts("edgetam")), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing half made stays behind"


@pytest.mark.parametrize("name", ["nanoo", "./nowhere", "a/b/c", "/nowhere/at/all"])
def test_an_unknown_name_is_one_clear_error(name: str) -> None:
    with pytest.raises(ModelError, match="unknown model"):
        Segmenter.from_pretrained(name)


def test_a_name_that_may_be_a_missing_folder_or_one_at_a_hub_is_told_as_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="model runs/nothing: no folder here, and not to be had as a hub name: "):
        Segmenter.from_pretrained("runs/nothing")


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path, parts: Build) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_parts(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="JSON"):
        load_parts(tmp_path)
    with pytest.raises(ModelError, match=r"'sam2', not a CORE-Seg.*coreseg assemble"):
        load_parts(parts("sam2"))


def test_a_checkpoint_without_its_weights_is_one_clear_error(tmp_path: Path, joined: Build) -> None:
    CoreSegConfig.from_pretrained(joined("nano")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_parts(tmp_path)


def test_a_run_folder_gives_its_best_state(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}", encoding="utf-8")
    assert find_checkpoint(tmp_path) == tmp_path / "best"
    assert isinstance(find_checkpoint("owner/name"), str)
    assert find_checkpoint("nano") != Path("nano")


def test_nano_sft_is_nano_but_for_what_stage_2_trained() -> None:
    nano, before = (load_parts(name)[0].state_dict() for name in ("nano", "nano-sft"))
    moved = {name for name, tensor in nano.items() if not torch.equal(tensor, before[name])}
    assert moved and not any("vision" in name or name.startswith("segmenter.prompt_encoder") for name in moved)
    # The very state that the comparisons in docs/results.md start from.
    total = sum(float(tensor.double().abs().sum()) for tensor in before.values())
    assert total == pytest.approx(1607472.8933715266, rel=1e-9)


def test_damaged_differences_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    find = assemble_module.find_checkpoint
    monkeypatch.setattr(assemble_module, "find_checkpoint", lambda name: tmp_path if name == "nano-sft" else find(name))
    with pytest.raises(ModelError, match="nano-sft: cannot be loaded"):
        load_parts("nano-sft")


def test_devices_and_precisions_that_are_none_are_refused(joined: Build) -> None:
    with pytest.raises(InputError, match="dtype"):
        Segmenter.from_pretrained(joined("nano"), dtype="int8")
    with pytest.raises(InputError, match="device"):
        Segmenter.from_pretrained(joined("nano"), device="abacus")


def test_export_in_another_precision(joined: Build, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    export(joined("nano"), tmp_path / "half", dtype="bfloat16")
    half = Segmenter.from_pretrained(tmp_path / "half", device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.segment(pictures[0], "Where is the cyst?").valid
    with pytest.raises(ModelError, match="not empty"):
        export(joined("nano"), tmp_path / "half")
    with pytest.raises(ModelError, match="dtype"):
        export(joined("nano"), tmp_path / "new", dtype="int4")


def test_an_export_has_a_model_card_that_says_what_is_known(joined: Build, tmp_path: Path) -> None:
    fresh = (joined("nano") / "README.md").read_text()
    assert "were just joined" in fresh

    export(joined("nano"), tmp_path / "unknown", dtype="bfloat16")
    model, _ = load_parts(tmp_path / "unknown")
    unknown = (tmp_path / "unknown" / "README.md").read_text()
    assert ModelCard(unknown).data.library_name == "coreseg"
    assert "# unknown\n" in unknown and "In bfloat16" in unknown and "looks at squares of 64 px" in unknown
    millions = sum(parameter.numel() for parameter in model.segmenter.parameters()) / 1e6
    assert f"| segmenter | edgetam | {millions:.1f} M |" in unknown
    assert "--scope DATASET" in unknown and "--confidence FIGURES" in unknown and "were just joined" not in unknown
    assert str(tmp_path) not in unknown

    export("nano", tmp_path / "known")
    known = (tmp_path / "known" / "README.md").read_text()
    assert "| endoscopy of the abdomen | polyp |" in known and "It tells how good it expects each mask" in known


def test_only_the_heads_stay_trainable(joined: Build) -> None:
    model, _ = load_parts(joined("qwen"))
    freeze_all_but_heads(model)
    trainable = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"adapter.mlp", "adapter.pool", "segmenter.mask_decoder"}


def test_the_mask_marker_keeps_its_place_on_disk(joined: Build) -> None:
    for name in ("qwen", "nano", "smolvlm"):
        tokenizer = AutoTokenizer.from_pretrained(joined(name))
        assert tokenizer.convert_tokens_to_ids(SEG_TOKEN) == CoreSegConfig.from_pretrained(joined(name)).seg_token_id
