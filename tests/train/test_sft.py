"""Stage 1 on tiny models: what trains, what stays, and that a run can be stopped, split and resumed."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coreseg.config import SftConfig
from coreseg.data.store import LesionSet, copy_rows, new_set, write_set
from coreseg.errors import ConfigError, DataError, ModelError
from coreseg.imaging import write_mask
from coreseg.model.assemble import load_parts
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import CoreSegProcessor
from coreseg.nano.vision import NanoVisionModel
from coreseg.sam2 import any_lesion_prompt
from coreseg.segmenter import Segmenter
from coreseg.testing import write_phantom_set
from coreseg.train import trainer as stages
from coreseg.train.collate import Draws, Examples
from coreseg.train.sft import (
    USUAL_TOKENS,
    Collator,
    NearNumbers,
    SftTrainer,
    own_prompts,
    read_kind_prompts,
    text_loss,
    train_sft,
)
from coreseg.train.trainer import prepare, save_checkpoint
from coreseg.types import Answer


def settings(model: Path, data: Path, out: Path, **changes: Any) -> SftConfig:
    values: dict[str, Any] = {
        "steps": 3, "batch_size": 2, "warmup_steps": 0, "lora_rank": 2, "eval_samples": 0, "save_every": 100,
        "learning_rate": 1e-3, "head_learning_rate": 1e-3, "absent_share": 0.0,
    }  # fmt: skip
    return SftConfig(**values | {"model": str(model), "data": (str(data),), "out": str(out)} | changes)


def trained(config: SftConfig) -> tuple[dict[str, torch.Tensor], CoreSeg, CoreSegProcessor]:
    """The state before training, and the model after it."""
    torch.manual_seed(0)
    model, processor = load_parts(config.model)
    prepare(model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    SftTrainer(
        model=model,
        settings=config,
        processor=processor,
        train_dataset=Examples.open(config, "train"),
        data_collator=Collator(processor),
    ).train()
    return before, model, processor


def test_frozen_parts_and_buffers_stay(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    before, model, _ = trained(settings(nano, phantoms, tmp_path))
    trainable = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    assert any("running_mean" in name for name in before), "there is batch normalisation to keep still"
    for name, tensor in model.state_dict().items():
        if name not in trainable:
            assert torch.equal(tensor, before[name]), name
    moved = {name.split(".")[0] for name in trainable if not torch.equal(model.state_dict()[name], before[name])}
    assert moved == {"reasoner", "adapter", "segmenter"}


def test_only_the_marker_rows_of_the_embeddings_move(qwen: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(qwen, phantoms, tmp_path / "run", steps=1)
    start, _ = load_parts(qwen)
    _, model, processor = trained(config)
    save_checkpoint(model, processor, tmp_path / "saved")
    end, _ = load_parts(tmp_path / "saved")
    seg = end.config.seg_token_id
    for now, then in (
        (end.reasoner.get_input_embeddings(), start.reasoner.get_input_embeddings()),
        (end.reasoner.get_output_embeddings(), start.reasoner.get_output_embeddings()),
    ):
        assert now.weight.shape == then.weight.shape, "embeddings never shrink"
        assert (now.weight != then.weight).any(dim=1).nonzero()[:, 0].tolist() == [seg]


def test_a_merged_checkpoint_answers_as_the_trained_model(qwen: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(qwen, phantoms, tmp_path / "run", learning_rate=1e-2)
    _, model, processor = trained(config)
    save_checkpoint(model, processor, tmp_path / "saved")
    again, _ = load_parts(tmp_path / "saved")
    batch = Collator(processor)([Examples.open(config, "train")[(0, 0)]])["batch"]
    inputs = (batch.input_ids, batch.attention_mask, batch.reasoner_inputs, batch.segmenter_pixels)
    with torch.no_grad():
        ours, theirs = model.eval()(*inputs), again.eval()(*inputs)
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.mask_logits, ours.mask_logits, atol=1e-4, rtol=1e-4)


def _plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, betas, weight_decay: torch.optim.SGD(groups))


def test_four_times_two_equals_eight(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One optimiser step: the gradient may not depend on how a batch is cut."""
    # Adam's first step has the size of the learning rate whatever the gradient's; plain descent shows the gradient.
    _plain_descent(monkeypatch)
    plain: dict[str, Any] = {"steps": 1, "learning_rate": 1.0, "head_learning_rate": 1.0}
    _, whole, _ = trained(settings(nano, phantoms, tmp_path / "a", batch_size=8, **plain))
    _, cut, _ = trained(settings(nano, phantoms, tmp_path / "b", batch_size=2, accumulation=4, **plain))
    for (name, one), (_, other) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4, msg=name)


def test_what_is_kept_of_pictures_trains_as_pixels_do(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plain_descent(monkeypatch)
    config = settings(nano, phantoms, tmp_path / "a", remeasure=True, versions=1, keep_maps=True, steps=6, batch_size=6)
    towers: list[int] = []
    encoders: list[int] = []
    look, encode = NanoVisionModel.look, stages.encode_image
    monkeypatch.setattr(NanoVisionModel, "look", lambda self, pixels: towers.append(len(pixels)) or look(self, pixels))
    monkeypatch.setattr(
        stages, "encode_image", lambda model, pixels: encoders.append(len(pixels)) or encode(model, pixels)
    )
    _, kept, _ = trained(config)
    pictures = sum(towers)
    assert pictures < 36 and encoders == towers
    monkeypatch.setattr(SftTrainer, "looked", lambda self, model, inputs, pictures: inputs)
    _, fresh, _ = trained(replace(config, out=str(tmp_path / "b"), keep_maps=False))
    assert sum(towers) == pictures + 36 and sum(encoders) == pictures
    for (name, one), (_, other) in zip(kept.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-3, msg=name)


def test_the_adapter_is_told_the_decoders_own_prompts(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """A box for one of several, "any lesion" for every one, a kind's own; rows that ask none of these say nothing."""
    model, processor = load_parts(nano)
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    box, side = (8, 4, 40, 30), model.config.segmenter_size_px
    answer = Answer("cyst", (box,), "", found=True)
    batch = processor([image] * 4, ["Where?"] * 4, [answer] * 4)
    prompts = model.segmenter.prompt_encoder
    learned = torch.randn(3, prompts.not_a_point_embed.weight.shape[1])
    told = own_prompts(model, batch, ["every", None, "one", "cyst"], {"cyst": learned})
    as_box, _ = prompts(
        input_points=None, input_labels=None, input_boxes=side / 64 * torch.tensor([[box]]).float(), input_masks=None
    )
    assert torch.equal(told, torch.stack([prompts.not_a_point_embed.weight.expand(3, -1), as_box[0, 0], learned]))


def test_only_kinds_with_a_learned_prompt_are_told_one(nano: Path, tmp_path: Path) -> None:
    pairs = write_phantom_set(tmp_path / "pairs", 12, seed=0, size_wh=(48, 40), two_kinds=1.0)
    rows = Examples.open(settings(nano, pairs, tmp_path / "run", attribute_share=0.0), "train")
    _, processor = load_parts(nano)
    drawn = [example for row in range(len(rows)) if (example := rows[(row, 0)]).answer.found]
    assert {(example.asks, example.answer.category) for example in drawn} == {("kind", "cyst"), ("kind", "nodule")}
    learned = {"cyst": torch.zeros(3, 8)}
    for example, asks in zip(drawn, Collator(processor, learned)(drawn)["asks"], strict=True):
        assert asks == ("cyst" if example.answer.category == "cyst" else None)


@pytest.mark.parametrize(("fewer_tokens", "fewer_channels"), [(1, 0), (0, 1)])
def test_prompts_of_another_shape_are_refused(
    nano: Path, tmp_path: Path, fewer_tokens: int, fewer_channels: int
) -> None:
    segmenter = load_parts(nano)[0].segmenter
    tokens, channels = any_lesion_prompt(segmenter, 1)[0, 0].shape
    shape = (tokens - fewer_tokens, channels - fewer_channels)
    save_file({"cyst": torch.zeros(shape)}, tmp_path / "prompts.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"'cyst' has the shape {shape}; expected {(tokens, channels)}")):
        read_kind_prompts(tmp_path / "prompts.safetensors", segmenter)


def test_a_file_without_prompts_is_refused(nano: Path, tmp_path: Path) -> None:
    segmenter = load_parts(nano)[0].segmenter
    (tmp_path / "prompts.safetensors").write_text("no tensors")
    for name in ("prompts.safetensors", "nowhere"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_kind_prompts(tmp_path / name, segmenter)


def test_prompts_that_no_loss_uses_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kind_prompts is 'learned'; expected a prompt_weight above 0"):
        SftConfig(model="nano", data=("lesions",), out="run", kind_prompts="learned")


def test_a_prompt_loss_alone_teaches_the_adapter(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(nano, phantoms, tmp_path, mask_weight=0.0, prompt_weight=1.0, lora_rank=0)
    before, model, _ = trained(config)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("adapter.") for name in moved)
    assert not any(name.startswith("segmenter.") for name in moved)


def test_numbers_weigh_what_the_setting_says(nano: Path) -> None:
    processor = CoreSegProcessor.from_pretrained(nano)
    answers = [Answer("cyst", ((1, 2, 9, 8), (3, 4, 9, 9)), "Two of 10.", True), Answer("cyst", (), "None.", False)]
    batch = processor([np.zeros((64, 72, 3), np.uint8)] * 2, ["Where?"] * 2, answers)
    marked = processor.tokenizer.batch_decode([row[of] for row, of in zip(batch.labels, batch.of_boxes, strict=True)])
    frame = processor.boxes_to_frame(answers[0].boxes, (72, 64), batch.frames_wh[0])
    assert "".join(marked[0].split()) == "".join(str(edge) for box in frame for edge in box) and marked[1] == ""
    logits = torch.randn((*batch.labels.shape, 300), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.pad(logits, (0, int(batch.labels.max())))
    losses = [text_loss(logits, batch, weight) for weight in (1.0, 3.0)]
    by_hand = []
    for weight in (1.0, 3.0):
        rows = []
        for row in range(2):
            pairs = [
                (-logits[row, place - 1].log_softmax(-1)[label], weight if batch.of_boxes[row, place] else 1.0)
                for place, label in enumerate(batch.labels[row])
                if label != -100
            ]
            rows.append(sum(loss * w for loss, w in pairs) / USUAL_TOKENS)
        by_hand.append(torch.stack(rows).mean())
    torch.testing.assert_close(torch.stack(losses), torch.stack(by_hand))
    assert losses[0] != losses[1]


class Numbered:
    """A tokenizer that writes numbers up to 40 as one token each, not in order, and larger ones as two."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        number = int(text)
        return {"input_ids": [5 + (number * 7) % 41] if number <= 40 else [1, 2]}


def test_a_bias_of_words_goes_where_weights_are_trained(nano: Path, tmp_path: Path) -> None:
    model, _ = load_parts(nano)
    model.config.word_bias = {3: 1.0}
    prepare(model, settings(nano, tmp_path, tmp_path))
    assert model.config.word_bias == {}


def test_nearly_right_numbers_are_nearly_as_good() -> None:
    near = NearNumbers.of(Numbered(), 40, spread=2.0)
    right = Numbered()("20", False)["input_ids"]

    def loss(number: int) -> float:
        logits = torch.zeros(1, 60)
        logits[0, Numbered()(str(number), False)["input_ids"]] = 9.0
        return float(near.loss(logits, torch.tensor(right)))

    assert loss(20) < loss(21) < loss(22) < loss(26) and loss(19) == pytest.approx(loss(21))
    assert loss(39) == pytest.approx(loss(2), rel=0.02), "far off is far off"
    sharp, logits = NearNumbers.of(Numbered(), 40, spread=0.01), torch.randn(3, 60)
    targets = torch.tensor([right[0], 5, 12])
    torch.testing.assert_close(
        sharp.loss(logits, targets), torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    with pytest.raises(ConfigError, match="writes 41 in several tokens"):
        NearNumbers.of(Numbered(), 64, spread=2.0)
    with pytest.raises(ConfigError, match="writes 0 in several tokens"):
        NearNumbers.of(lambda text, add_special_tokens: {"input_ids": [7, 9]}, 8, spread=2.0)


def test_only_a_boxs_numbers_have_near_ones(nano: Path) -> None:
    processor = CoreSegProcessor.from_pretrained(nano)
    batch = processor(
        [np.zeros((64, 64, 3), np.uint8)], ["Where?"], [Answer("cyst", ((1, 2, 9, 8),), "One of 10.", True)]
    )
    logits = torch.randn((*batch.labels.shape, 400), generator=torch.Generator().manual_seed(0))
    numbers = batch.of_boxes[:, 1:]
    known = torch.unique(batch.labels[batch.of_boxes])
    plain, soft = text_loss(logits, batch), text_loss(logits, batch, near=NearNumbers(known, 1.0))
    expected = NearNumbers(known, 1.0).loss(logits[:, :-1][numbers], batch.labels[:, 1:][numbers]).sum()
    hard = torch.nn.functional.cross_entropy(logits[:, :-1][numbers], batch.labels[:, 1:][numbers], reduction="sum")
    torch.testing.assert_close(soft - plain, (expected - hard) / USUAL_TOKENS)
    unknown = NearNumbers(torch.tensor([398, 399]), 1.0)
    torch.testing.assert_close(text_loss(logits, batch, near=unknown), plain)


def weights_after(config: SftConfig) -> dict[str, torch.Tensor]:
    train_sft(config)
    last = max(Path(config.out).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(last / "model.safetensors")


def test_a_fresh_adapter_says_any_lesion_of_the_states_it_will_see(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """Whatever the old adapter had become: one that answers nothing but NaN is gone."""
    config = settings(nano, phantoms, tmp_path / "run", fresh_adapter=True, batch_size=4)
    model, processor = load_parts(config.model)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.fill_(torch.nan)
    prepare(model, config)
    examples = Examples.open(config, "train")
    SftTrainer(
        model=model, settings=config, processor=processor, train_dataset=examples, data_collator=Collator(processor),
    ).start_adapter()  # fmt: skip
    drawn = [examples[each] for each in Draws(examples.weights, 8, config.seed)]
    batch = Collator(processor)(drawn)["batch"]
    with torch.no_grad():
        prompts = model.adapter(*model.probe_states(batch.input_ids, batch.attention_mask, batch.reasoner_inputs))
    any_lesion = model.segmenter.prompt_encoder.not_a_point_embed.weight.expand_as(prompts)
    assert torch.cosine_similarity(prompts, any_lesion, dim=-1).min() > 0.6
    assert torch.cdist(prompts.flatten(1), prompts.flatten(1)).max() > 0.05, "it listens from the first step on"


@pytest.mark.parametrize("changes", [{"lora_rank": 0}, {"lora_rank": 2, "fresh_adapter": True}], ids=str)
def test_a_resumed_run_goes_on_as_if_never_stopped(
    nano: Path, phantoms: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    import shutil

    config = settings(nano, phantoms, tmp_path / "run", steps=4, save_every=2, remeasure=True, **changes)
    uninterrupted = weights_after(config)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = weights_after(config)
    assert uninterrupted.keys() == resumed.keys()
    for name, tensor in uninterrupted.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_a_run_leaves_a_checkpoint_that_opens(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    run = train_sft(settings(nano, phantoms, tmp_path / "run", eval_every=3, eval_samples=2))
    assert (run / "best" / "config.json").is_file()
    assert [path.name for path in (run / "overlays").iterdir()] == ["step-000003.png"]
    (line,) = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    figures = json.loads(line)
    assert figures["score"] == pytest.approx((figures["dice"] + figures["detect"]) / 2) and figures["step"] == 3
    assert 0 <= figures["valid"] <= 1
    example = Examples.open(settings(nano, phantoms, run), "val").fixed(1, 0)[0]
    result = Segmenter.from_pretrained(run, device="cpu").segment(example.image, example.question)
    assert result.valid and result.mask.shape == example.mask.shape


def test_a_run_that_validates_nothing_opens_too(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    run = train_sft(settings(nano, phantoms, tmp_path / "run", steps=1, eval_samples=0))
    with pytest.raises(ModelError, match="give the run's folder"):
        load_parts(run / "checkpoint-1")
    assert Segmenter.from_pretrained(run, device="cpu").model.config.seg_token_id is not None


def test_a_run_killed_while_it_writes_its_result_writes_it_again(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(nano, phantoms, tmp_path / "run", steps=1)

    class Killed(BaseException):
        pass

    def half(model: CoreSeg, processor: CoreSegProcessor, path: Path) -> None:
        model.config.save_pretrained(path)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stages, "save_checkpoint", half)
        with pytest.raises(Killed):
            train_sft(config)
    load_parts(train_sft(config))


def test_the_gpu_can_be_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = settings(tmp_path, tmp_path, tmp_path / "run")
    assert not stages.training_arguments(config).use_cpu
    assert stages.training_arguments(replace(config, use_cpu=True)).use_cpu


def test_a_folder_of_another_run_is_refused(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(nano, phantoms, tmp_path / "run", steps=1)
    train_sft(config)
    train_sft(copy.copy(config))
    with pytest.raises(ConfigError, match=r"other settings \(steps was 1, is 5\)"):
        train_sft(replace(config, steps=5))


def test_a_slip_does_not_claim_the_folder(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(nano, phantoms, tmp_path / "run")
    with pytest.raises(DataError):
        train_sft(replace(config, data=(str(tmp_path / "nowhere"),)))
    with pytest.raises(ModelError):
        train_sft(replace(config, model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_half_a_checkpoint_is_passed_over(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(nano, phantoms, tmp_path / "run", steps=2, save_every=1)
    train_sft(config)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    assert train_sft(config) == tmp_path / "run"
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists()


def test_a_checkpoint_of_another_model_is_refused(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(nano, phantoms, tmp_path / "run", steps=2, save_every=1)
    train_sft(config)
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    file = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    tensors = load_file(file)
    tensors["adapter.renamed"] = tensors.pop("adapter.pool.queries")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit the model .adapter\.pool\.queries, for one"):
        train_sft(config)


def without_lesions(phantoms: Path, out: Path, split: str) -> Path:
    """The phantoms with empty masks in one split."""
    lesions = LesionSet.open(phantoms)
    with new_set(out) as root:
        copy_rows(lesions, lesions.samples, root)
        for sample in lesions.split(split):
            mask = root / sample.mask_file_name
            empty = np.zeros_like(lesions.mask(sample))
            mask.unlink()  # a hard link to the other set's
            write_mask(mask, empty)
        write_set(root, [replace(s, boxes=()) if s.split == split else s for s in lesions.samples])
    return out


def test_validation_rows_without_a_lesion_choose_nothing(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    data = without_lesions(phantoms, tmp_path / "data", "val")
    run = train_sft(settings(nano, data, tmp_path / "run", steps=2, eval_every=1, eval_samples=2))
    looks = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [set(look) for look in looks] == [{"step", "cpu_minutes", "valid"}] * 2
    best, last = (load_file(run / name / "model.safetensors") for name in ("best", "checkpoint-2"))
    assert all(torch.equal(best[name], tensor) for name, tensor in last.items() if name in best), (
        "the last state is kept"
    )


def test_a_fresh_adapter_wants_lesions(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    data = without_lesions(phantoms, tmp_path / "data", "train")
    with pytest.raises(DataError, match="fresh adapter"):
        train_sft(settings(nano, data, tmp_path / "run", steps=1, fresh_adapter=True))


def test_rows_that_are_never_drawn_are_refused(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    sources = {sample.source: 0.0 for sample in LesionSet.open(phantoms).samples}
    with pytest.raises(DataError, match="source_weights"):
        train_sft(settings(nano, phantoms, tmp_path / "run", source_weights=sources))


def test_rows_with_several_lesions_come_as_often_as_wanted(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    plain = Examples.open(settings(nano, phantoms, tmp_path / "run"), "train")
    weighed = Examples.open(settings(nano, phantoms, tmp_path / "run", several_weight=3.0), "train")
    several = [len(sample.boxes) > 1 for _, sample in plain.rows]
    assert any(several) and not all(several)
    assert np.array_equal(weighed.weights / plain.weights, np.where(several, 3.0, 1.0))


def test_a_set_without_training_rows_is_refused(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    rows = (phantoms / "metadata.jsonl").read_text(encoding="utf-8").replace('"train"', '"val"')
    for folder in ("images", "masks"):
        (tmp_path / folder).symlink_to(phantoms / folder)
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(DataError, match="train"):
        Examples.open(settings(nano, tmp_path, tmp_path / "run"), "train")
