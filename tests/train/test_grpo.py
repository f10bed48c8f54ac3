"""Stage 2 on tiny models: rollouts, advantages, the loss by hand, what trains, and that a run can be stopped."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import settings, trainer_of

from coreseg.config import GrpoConfig, RewardSettings
from coreseg.errors import ConfigError, DataError, ModelError, TrainingError
from coreseg.model import core_seg
from coreseg.model.assemble import load_parts
from coreseg.segmenter import Segmenter
from coreseg.train import grpo
from coreseg.train import trainer as stages
from coreseg.train.collate import Draws, Examples
from coreseg.train.grpo import (
    Collator,
    GrpoTrainer,
    Repeated,
    Rollout,
    group_advantages,
    policy_loss,
    sample,
    score,
    token_log_probs,
    train_grpo,
    with_completions,
)
from coreseg.train.rewards import Completion, Rewards
from coreseg.train.samples import figures

# --- Advantages and loss ---


def test_advantages_by_hand() -> None:
    advantages, has_spread = group_advantages(np.array([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0]), 4)
    deviation = np.sqrt(14 / 3)
    expected = [-2 / (deviation + 1e-4), -1 / (deviation + 1e-4), 0, 3 / (deviation + 1e-4), 0, 0, 0, 0]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6) and has_spread.tolist() == [True, False]


@given(st.lists(st.floats(-1, 5), min_size=2, max_size=6), st.floats(0.1, 5), st.floats(-3, 3))
def test_advantages_sum_to_nothing_and_know_no_scale(values: list[float], scale: float, shift: float) -> None:
    totals = np.array(values)
    advantages, has_spread = group_advantages(totals, len(values))
    assert torch.isfinite(advantages).all() and float(advantages.sum()) == pytest.approx(0, abs=1e-4)
    if not has_spread[0]:
        assert not advantages.any()
    elif totals.std() > 0.1:
        torch.testing.assert_close(
            group_advantages(scale * totals + shift, len(values))[0], advantages, atol=2e-2, rtol=0.02
        )


def rollout(counted: list[list[bool]], **changes: Any) -> Rollout:
    real = torch.tensor(counted)
    return Rollout(torch.zeros(real.shape, dtype=torch.long), real, real, torch.tensor([1.0, -2.0]), **changes)


CONFIG = GrpoConfig(model="m", data=("d",), out="o", beta=0.5, max_new_tokens=10)
COUNTED = [[True, True, True], [True, False, False]]


def test_the_loss_by_hand() -> None:
    old = torch.log(torch.tensor([[0.5, 0.5, 0.2], [0.4, 0.9, 0.9]]))
    new = torch.log(torch.tensor([[0.5, 0.7, 0.1], [0.3, 0.1, 0.1]]))
    reference = torch.log(torch.tensor([[0.25, 0.7, 0.1], [0.3, 0.5, 0.5]]))
    k3 = 0.5 - np.log(0.5) - 1
    # Ratios 1, 1.4 (held at 1.2), 0.5 with advantage 1; 0.75 (held at 0.8) with advantage -2.
    first, second = [-1 + 0.5 * k3, -1.2, -0.5], [1.6]
    made = rollout(COUNTED, old=old, reference=reference)
    for loss_type, expected in (
        ("grpo", (sum(first) / 3 + sum(second)) / 2),
        ("dr_grpo", (sum(first) + sum(second)) / (2 * 10)),
        ("dapo", (sum(first) + sum(second)) / 8),
    ):
        got = policy_loss(new, made, replace(CONFIG, loss_type=loss_type), 10, 8.0)
        assert float(got.loss) == pytest.approx(expected, rel=1e-5), loss_type
    assert float(got.kl) == pytest.approx(k3 / 4, rel=1e-5) and float(got.clipped) == pytest.approx(2 / 4)


def test_a_group_without_spread_moves_nothing_but_by_its_kl() -> None:
    new = torch.full((2, 3), -1.0, requires_grad=True)
    made = replace(rollout(COUNTED, reference=torch.full((2, 3), -1.5)), advantages=torch.zeros(2))
    policy_loss(new, made, replace(CONFIG, beta=0.0), 10, 4.0).loss.backward()
    assert new.grad is not None and not new.grad.any()
    policy_loss(new, made, CONFIG, 10, 4.0).loss.backward()
    assert new.grad.any() and torch.isfinite(new.grad).all()
    assert not new.grad[~torch.tensor(COUNTED)].any()


@pytest.mark.parametrize("far", [-500.0, 500.0])
def test_far_ratios_do_not_overflow(far: float) -> None:
    new = torch.full((2, 3), -1.0, requires_grad=True)
    made = rollout(COUNTED, old=torch.full((2, 3), far), reference=torch.full((2, 3), -far))
    loss = policy_loss(new, made, CONFIG, 10, 4.0).loss
    loss.backward()
    assert torch.isfinite(loss) and new.grad is not None and torch.isfinite(new.grad).all()


def test_nothing_counted_gives_no_loss() -> None:
    made = rollout([[False] * 3] * 2, reference=torch.zeros(2, 3))
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        assert float(policy_loss(torch.zeros(2, 3), made, replace(CONFIG, loss_type=loss_type), 10, 0.0).loss) == 0.0


def test_an_advantage_weight_of_nothing_silences_the_policy_alone() -> None:
    new = torch.full((2, 3), -1.0, requires_grad=True)
    policy_loss(new, rollout(COUNTED), replace(CONFIG, advantage_weight=0.0), 10, 4.0).loss.backward()
    assert new.grad is not None and not new.grad.any()


def test_log_probs_are_those_of_the_tempered_policy() -> None:
    logits, ids = torch.randn(2, 7, 11), torch.randint(11, (2, 3))
    got, entropy = token_log_probs(logits, ids, 2.0)
    for row in range(2):
        for place in range(3):
            spread = torch.softmax(logits[row, 3 + place] / 2.0, -1)
            torch.testing.assert_close(got[row, place], spread[ids[row, place]].log())
            torch.testing.assert_close(entropy[row, place], -(spread * spread.log()).sum())


def test_draws_repeat_by_optimiser_step() -> None:
    draws = Draws(np.ones(30), 10, seed=0)
    once, repeated = list(draws), list(Repeated(draws, rows_a_step=2, updates=3))
    assert repeated == [*once[:2], *once[:2], *once[:2], *once[2:4], *once[2:4]]


# --- Rollouts ---


def check_sampling(checkpoint: Path, phantoms: Path) -> None:
    """The mask kept while sampling is the mask of a pass over what was sampled."""
    config = settings(checkpoint, phantoms, "unused")
    model, processor = load_parts(config.model)
    model.eval()
    examples = Examples.open(config, "train")
    prompts = Collator(processor, 8)([examples[(0, 0)], examples[(1, 1)]])["batch"]
    seg, eos = processor.config.seg_token_id, processor.tokenizer.eos_token_id
    with torch.no_grad():
        maps = core_seg.encode_image(model.segmenter, prompts.segmenter_pixels)
        maps = [level.repeat_interleave(8, 0) for level in maps]
        # A random model hardly ever writes these two.
        head = model.reasoner.get_output_embeddings()
        likely = torch.zeros(len(head.weight)).index_fill(0, torch.tensor([seg, eos]), 3.0)
        head.register_forward_hook(lambda _module, _inputs, logits: logits + likely)
        torch.manual_seed(0)
        drawn = sample(model, processor, prompts, maps, temperature=1.0, max_new_tokens=12)
        whole = with_completions(prompts, Rollout(drawn.ids, drawn.real, drawn.real, torch.zeros(16)))
        output = model(**whole, segmenter_maps=maps)
    assert len({tuple(row) for row in drawn.ids.tolist()}) > 8, "completions are drawn one by one"
    masks = iter(output.mask_logits)
    both = 0
    for row, (ids, real, ended) in enumerate(zip(drawn.ids, drawn.real, drawn.ended, strict=True)):
        written = ids[real].tolist()
        assert ended == (written[-1] == eos) and (ended or len(written) == 12) and eos not in written[:-1]
        kept, recomputed = drawn.mask_logits[row], next(masks) if output.with_mask[row] else None
        assert (recomputed is not None) == (seg in written) and (kept is not None) == (seg in written[:-1])
        if kept is not None and recomputed is not None and written[-1] != seg:
            torch.testing.assert_close(kept, recomputed, atol=1e-4, rtol=1e-4)
            both += 1
    assert both and not drawn.ended.all() and drawn.ended.any()


def test_sampling(nano: Path, phantoms: Path) -> None:
    check_sampling(nano, phantoms)


def test_sampling_with_qwen(qwen: Path, phantoms: Path) -> None:
    check_sampling(qwen, phantoms)


def test_scores_are_in_the_pictures_own_pixels(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    trainer = trainer_of(settings(nano, phantoms, tmp_path))
    examples = [trainer.train_dataset[(row, row)] for row in range(2)]
    inputs = trainer.data_collator(examples)
    trainer.examples = examples
    maps = [
        level.repeat_interleave(4, 0)
        for level in core_seg.encode_image(trainer.model.segmenter, inputs["batch"].segmenter_pixels)
    ]
    completions = trainer.sample(trainer.model.eval(), inputs["batch"], maps)
    painted = [torch.where(torch.from_numpy(examples[row // 4].mask), 9.0, -9.0) for row in range(8)]
    perfect = replace(completions, mask_logits=list(painted))
    seen, got = score(perfect, examples, inputs["batch"], trainer.processor, trainer.settings)
    assert got.format.tolist() == [1, 1, 1, 0] * 2
    assert got.segment.tolist() == [3, 3, -1, -1] * 2, "masks count only where the answer calls for one"
    assert got.detect[0] > 0.7 and got.detect[4] > 0.7, "boxes come back from the reasoner's frame"
    assert got.detect[1] < got.detect[0] and got.detect[2] == got.detect[3] == 0
    assert [c.mask.any() for c in seen] == [True, True, False, False] * 2


@pytest.mark.parametrize("keep_maps", [True, False])
def test_the_image_is_encoded_once_whatever_the_group(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_maps: bool
) -> None:
    encoded: list[int] = []
    encode = grpo.encode_image
    for module in (grpo, core_seg, stages):
        monkeypatch.setattr(
            module, "encode_image", lambda model, pixels: encoded.append(len(pixels)) or encode(model, pixels)
        )
    config = settings(nano, phantoms, tmp_path, steps=1, remeasure=True, versions=1, keep_maps=keep_maps)
    trainer_of(config).train()
    assert 1 <= sum(encoded) <= 2, encoded


# --- Training ---


def weights(trainer: GrpoTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def logged(trainer: GrpoTrainer, name: str) -> float:
    return next(float(line[name]) for line in reversed(trainer.state.log_history) if name in line)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_first_step_starts_at_the_reference(nano: Path, phantoms: Path, tmp_path: Path, rank: int) -> None:
    """KL is 0 before anything has moved, with LoRA switched off and with a copy alike, and not after."""
    seen: list[float] = []
    first = trainer_of(settings(nano, phantoms, tmp_path / "run", lora_rank=rank, learning_rate=1e-2))
    note = first.note
    first.note = lambda **figures: (seen.extend([float(figures["kl"])] if "kl" in figures else []), note(**figures))[1]
    before = weights(first)
    first.train()
    assert seen[0] == pytest.approx(0, abs=1e-6) and seen[-1] > 1e-4
    moved = {
        name.split(".")[0] for name, tensor in first.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {"reasoner", "adapter", "segmenter"}
    assert not any(
        "vision_encoder" in name
        for name, tensor in first.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    )


def test_bf16_starts_at_the_reference_too(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    trainer = trainer_of(settings(nano, phantoms, tmp_path / "run", precision="bf16", steps=1))
    note = trainer.note
    trainer.note = lambda **f: (seen.extend([float(f["kl"])] if "kl" in f else []), note(**f))[1]
    before = weights(trainer)
    trainer.train()
    assert seen == [pytest.approx(0, abs=1e-6)]
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(torch.isfinite(trainer.model.state_dict()[name]).all() for name in moved)


def test_boxes_that_prompt_the_decoder_prompt_it_in_the_loss_too(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    model, processor = load_parts(nano)
    model.config.box_prompts = True
    stages.save_checkpoint(model, processor, tmp_path / "boxes")
    trainer = trainer_of(settings(tmp_path / "boxes", phantoms, tmp_path / "run", steps=1))
    asked: list[Any] = []
    decode = trainer.model.decode
    trainer.model.decode = lambda *args: asked.append(args[3]) or decode(*args)
    trainer.train()
    used = asked[-1]
    examples, frame = trainer.examples, trainer.processor.config.segmenter_size_px
    assert [len(boxes) for boxes in used[:3]] == [len(examples[0].answer.boxes), 1, 0], "absent lesions have no mask"
    assert used[1].tolist() == [[0.0, 0.0, frame, frame]], "a box around the whole picture, in the segmenter's square"


def check_reference(checkpoint: Path, phantoms: Path, out: Path) -> None:
    """After some steps it still is the model that training started from, the marker's rows included."""
    trainer = trainer_of(settings(checkpoint, phantoms, out, learning_rate=1e-2))
    trainer.train()
    batches = iter(trainer.get_train_dataloader())
    trainer.rollouts = []
    (inputs,), _ = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    rollout = inputs["rollout"]
    rows = with_completions(inputs["batch"], rollout)
    start, _ = load_parts(checkpoint)
    with torch.no_grad():
        expected, _ = token_log_probs(start.eval()(**rows).logits, rollout.ids, 1.0)
        now, _ = token_log_probs(trainer.model.eval()(**rows).logits, rollout.ids, 1.0)
    torch.testing.assert_close(rollout.reference[rollout.real], expected[rollout.real], atol=1e-5, rtol=1e-5)
    assert (now - expected)[rollout.real].abs().max() > 0.05


def test_the_reference_stays_where_training_started(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    check_reference(nano, phantoms, tmp_path)


def test_the_reference_of_qwen_stays_where_training_started(qwen: Path, phantoms: Path, tmp_path: Path) -> None:
    check_reference(qwen, phantoms, tmp_path)


def test_qwen_trains_too(qwen: Path, phantoms: Path, tmp_path: Path) -> None:
    trainer = trainer_of(settings(qwen, phantoms, tmp_path / "run", steps=1))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("lora_B" in name for name in moved) and any(name.startswith("adapter.") for name in moved)
    assert not any("visual" in name for name in moved)


def test_reinforced_completions_become_likelier(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(
        nano, phantoms, tmp_path, steps=6, lora_rank=0, mask_weight=0.0, beta=0.0, learning_rate=3e-3, batch_size=4,
        attribute_share=0.0,
    )  # fmt: skip
    trainer = trainer_of(config)
    rollouts: list[Rollout] = []
    roll = trainer._roll_out
    trainer._roll_out = lambda number, inputs: rollouts.append(roll(number, inputs)) or rollouts[-1]
    trainer.train()
    first, last = rollouts[0], rollouts[-1]
    assert first.old is not None and last.old is not None
    assert first.advantages[0] > 0 > first.advantages[3]

    def likelihood(made: Rollout, row: int) -> float:
        return float((made.old * made.real)[row].sum() / made.real[row].sum())  # type: ignore[operator]

    gained = [likelihood(last, row) - likelihood(first, row) for row in (0, 3)]
    assert gained[0] > 0.05 and gained[0] > gained[1]


def _plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, betas, weight_decay: torch.optim.SGD(groups))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_two_times_eight_equals_sixteen(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    _plain_descent(monkeypatch)
    plain: dict[str, Any] = {
        "steps": 1, "learning_rate": 1.0, "head_learning_rate": 1.0, "loss_type": loss_type, "lora_rank": 0
    }  # fmt: skip
    whole = trainer_of(settings(nano, phantoms, tmp_path / "a", batch_size=16, **plain))
    cut = trainer_of(settings(nano, phantoms, tmp_path / "b", batch_size=8, accumulation=2, **plain))
    before = weights(whole)
    whole.train()
    cut.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in whole.model.state_dict().items())
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_rollout_is_used_for_several_updates(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    trainer = trainer_of(settings(nano, phantoms, tmp_path, steps=5, updates=3, learning_rate=2e-2, lora_rank=0))
    rolled: list[int] = []
    clipped: list[float] = []
    roll, note = trainer._roll_out, trainer.note
    trainer._roll_out = lambda number, inputs: rolled.append(trainer.state.global_step) or roll(number, inputs)
    trainer.note = lambda **f: (clipped.extend([float(f["clipped"])] if "clipped" in f else []), note(**f))[1]
    trainer.train()
    assert rolled == [0, 3]
    assert clipped[0] == clipped[3] == 0.0 and max(clipped[1:3]) > 0.0


def test_truncated_completions_can_be_left_out(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    for masked in (False, True):
        trainer = trainer_of(
            settings(nano, phantoms, tmp_path / str(masked), steps=1, mask_truncated_completions=masked)
        )
        trainer.train()
        (made,) = trainer.rollouts
        assert made.counted[[0, 1, 2]].equal(made.real[[0, 1, 2]])
        assert made.counted[3].any() != masked, "the fourth completion has no end of text"


@pytest.mark.parametrize("changes", [{"mask_weight": 0.0}, {"advantage_weight": 0.0}], ids=str)
def test_the_ablations_train_what_they_say(
    nano: Path, phantoms: Path, tmp_path: Path, changes: dict[str, float]
) -> None:
    trainer = trainer_of(settings(nano, phantoms, tmp_path, steps=2, beta=0.0, **changes))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("reasoner.") for name in moved)
    assert any(name.startswith("adapter.") for name in moved) == ("mask_weight" not in changes)


def test_a_loss_that_is_no_number_stops_the_run(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    trainer = trainer_of(settings(nano, phantoms, tmp_path))
    with torch.no_grad():
        for parameter in trainer.model.reasoner.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        trainer.train()


def test_a_gradient_that_is_no_number_spoils_nothing(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    trainer = trainer_of(settings(nano, phantoms, tmp_path, save_every=1))
    step = trainer.training_step

    def spoilt(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 1:
            next(p for p in trainer.model.parameters() if p.grad is not None).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return loss

    trainer.training_step = spoilt
    with pytest.raises(TrainingError, match="step 2: the gradient's norm is"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# --- Runs ---


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_never_stopped(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """20 steps of real sampling, killed at a step drawn at random, and resumed in the middle of a rollout."""
    config = settings(
        nano, phantoms, tmp_path / "a", steps=20, save_every=2, max_new_tokens=8, batch_size=4, remeasure=True,
        lora_rank=0, updates=3, accumulation=2,
    )  # fmt: skip
    advantages: list[float] = []
    scored, compared = grpo.score, grpo.group_advantages

    def some_reward(completions: Any, *args: Any) -> Any:
        """Random completions are all malformed: some reward that only depends on what was written."""
        seen, got = scored(completions, *args)
        return seen, replace(got, total=np.array([sum(ids) % 7 for ids in completions.written], dtype=float))

    def noted(*args: Any) -> Any:
        found = compared(*args)
        advantages.extend(found[0].abs().tolist())
        return found

    step, kills = GrpoTrainer.training_step, []

    def killed(self: GrpoTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kills and self.state.global_step == kills[0]:
            kills.pop(0)
            raise Killed
        return step(self, *args, **kwargs)

    draws = np.random.default_rng()
    # Checkpoints after steps 2, 4, 6…, rollouts at 0, 3, 6…: a run killed in its 11th step goes on within a rollout.
    at = sorted({int(draws.integers(3, 20)), int(draws.choice([5, 11, 15, 17]))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "score", some_reward)
        patch.setattr(grpo, "group_advantages", noted)
        patch.setattr(GrpoTrainer, "training_step", killed)
        train_grpo(config)
        shutil.move(tmp_path / "a", tmp_path / "whole")
        kills += at
        for _ in at:
            with pytest.raises(Killed):
                train_grpo(config)
        train_grpo(config)
    assert max(advantages) > 0.5
    from safetensors.torch import load_file

    whole, resumed = (load_file(tmp_path / name / "checkpoint-20" / "model.safetensors") for name in ("whole", "a"))
    start = load_file(tmp_path / "whole" / "checkpoint-18" / "model.safetensors")
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=f"{name}, killed at {at}")


def test_a_resumed_run_tells_nothing_twice(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(
        nano, phantoms, tmp_path / "run", steps=4, save_every=2, eval_samples=1, eval_every=1, samples_every=1,
        max_new_tokens=4,
    )  # fmt: skip
    run = train_grpo(config)
    journals = [run / "validation.jsonl", run / "samples" / "samples.jsonl"]
    told = [[json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] for file in journals]
    assert told == [[1, 2, 3, 4], [0, 1, 2, 3]]
    shutil.rmtree(run / "checkpoint-4")
    with journals[0].open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "di')
    train_grpo(config)
    assert [[json.loads(line)["step"] for line in f.read_text(encoding="utf-8").splitlines()] for f in journals] == told


def test_samples_come_with_the_next_rollout(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(
        nano, phantoms, tmp_path / "run", steps=8, updates=2, samples_every=3, eval_samples=0, max_new_tokens=4
    )
    journal = train_grpo(config) / "samples" / "samples.jsonl"
    assert [json.loads(line)["step"] for line in journal.read_text(encoding="utf-8").splitlines()] == [0, 4, 6]


def test_the_spread_of_masks_is_that_of_their_weighted_rewards() -> None:
    nothing = np.zeros((4, 4), bool)
    got = Rewards(*(np.array([0.0, 0.03, 0.5, 0.5]) for _ in range(5)))
    seen = [Completion(None, nothing, [], nothing)] * 4
    spread = {
        weight: figures(
            seen, got, np.array([True, True]),
            settings("nano", "data", "out", group_size=2, reward=RewardSettings(segment_weight=weight)),
        )["mask_spread"]
        for weight in (1.0, 2.0)
    }  # fmt: skip
    assert spread == {1.0: 0.0, 2.0: 0.5}


def test_a_run_leaves_what_people_look_at(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    config = settings(
        nano, phantoms, tmp_path / "run", steps=2, eval_samples=2, eval_every=2, samples_every=1, max_new_tokens=12,
        reward=RewardSettings(faithfulness_weight=0.5),
    )  # fmt: skip
    run = train_grpo(config)
    assert (run / "best" / "config.json").is_file() and (run / "samples" / "step-000001.png").is_file()
    lines = (run / "samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    shown = json.loads(lines[0])
    assert [line["step"] for line in map(json.loads, lines)] == [0, 1]
    assert len(shown["completions"]) == len(shown["rewards"]) == 4
    page = (run / "samples" / "step-000000.md").read_text(encoding="utf-8")
    assert page.count("\n| ") == 5 and shown["question"] in page
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    figures = {name for line in state["log_history"] for name in line}
    assert {
        "reward", "reward_format", "reward_detect", "reward_segment", "reward_faithfulness", "valid", "zero_variance",
        "mask_spread", "kl", "entropy", "completion_tokens", "clipped", "eval_dice", "seconds_generate",
        "seconds_masks", "seconds_rewards", "seconds_reference", "seconds_policy", "seconds_backward",
    } <= figures  # fmt: skip
    example = Examples.open(config, "val").fixed(1, 0)[0]
    Segmenter.from_pretrained(run, device="cpu").segment(example.image, example.question)


def test_a_run_ends_when_its_time_is_up(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    # What a random model samples earns nothing; weight decay moves the weights even so.
    config = settings(
        nano, phantoms, tmp_path / "run", steps=10_000, cpu_minutes=0.05, max_new_tokens=4, lora_rank=0,
        weight_decay=0.1,
    )  # fmt: skip
    train_grpo(config)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    minutes = json.loads((checkpoint / "clock.json").read_text(encoding="utf-8"))["minutes"]
    assert 0.05 <= minutes < 1.0
    trained, _ = load_parts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    train_grpo(config)
    assert list((tmp_path / "run").glob("checkpoint-*")) == [checkpoint], "the time of a resumed run counts on"
    again, start = load_parts(tmp_path / "run")[0].state_dict(), load_parts(nano)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.state_dict().items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in again.items())


@pytest.mark.slow
def test_memory_does_not_grow(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """Over 300 steps with new pictures at every draw and several updates a rollout, nothing kept on purpose."""
    config = settings(
        nano, phantoms, tmp_path, steps=300, updates=2, batch_size=8, remeasure=True, max_new_tokens=24, save_every=100
    )
    trainer = trainer_of(config, GrpoTrainer)
    trainer.train()
    peaks = {line["step"]: line["memory_gb"] for line in trainer.state.log_history if "memory_gb" in line}
    assert peaks[300] < 1.02 * peaks[50], peaks


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"group_size": 1}, "group_size is 1; expected at least 2"),
        ({"batch_size": 6}, "batch_size is 6; expected a multiple of group_size, 4"),
        ({"beta": -0.1}, "beta is -0.1; expected 0 or more"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; expected grpo, dr_grpo or dapo"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"loss_type": "dr_grpo", "max_new_tokens": 0}, "max_new_tokens is 0; expected above 0: dr_grpo divides by it"),
    ],
    ids=str,
)
def test_bad_settings(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        settings("nano", "data", "out", **changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"beta": -1.0}, "reward.beta is -1.0; expected 0 or more"),
        ({"segment_weight": -1.0}, "reward.segment_weight is -1.0; expected 0 or more"),
        ({"format_weight": 0.0, "detect_weight": 0.0, "segment_weight": 0.0}, "expected at least one weight above 0"),
    ],
    ids=str,
)
def test_bad_rewards(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RewardSettings(**changes)


def test_what_the_machine_cannot_do_is_refused_before_anything_is_loaded(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(nano, phantoms, tmp_path / "run", steps=1, max_new_tokens=4)
    train_grpo(config)
    monkeypatch.setattr(core_seg.CoreSeg, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="precision is 'fp16', which needs a GPU"):
        train_grpo(replace(config, out=str(tmp_path / "other"), precision="fp16"))
    with pytest.raises(ConfigError, match="steps was 1, is 2"):
        train_grpo(replace(config, steps=2))
    monkeypatch.setattr(stages.TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ConfigError, match="one process sees 2 GPUs"):
        train_grpo(config)
    monkeypatch.setattr(stages.TrainingArguments, "n_gpu", property(lambda _: 1))
    monkeypatch.setattr(stages.TrainingArguments, "world_size", property(lambda _: 2))
    with pytest.raises(ConfigError, match="a run of 1 processes, here are 2"):
        train_grpo(config)
    with pytest.raises(ConfigError, match=r"cpu_minutes is 1\.0 with 2 processes"):
        train_grpo(replace(config, out=str(tmp_path / "other"), cpu_minutes=1.0))
    assert not (tmp_path / "other").exists()


def test_bad_checkpoints_and_sets_are_refused_before_anything_is_loaded(
    nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_seg.CoreSeg, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    rows = [json.loads(line) for line in (phantoms / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in ("images", "masks"):
        (empty / folder).symlink_to(phantoms / folder)
    lines = [json.dumps(row) for row in rows if not row["boxes"]]
    assert lines
    (empty / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="has a box"):
        train_grpo(settings(nano, empty, tmp_path / "run"))
    without = tmp_path / "without"
    shutil.copytree(nano, without)
    described = json.loads((without / "config.json").read_text(encoding="utf-8"))
    (without / "config.json").write_text(json.dumps(described | {"seg_token_id": 3}), encoding="utf-8")
    with pytest.raises(ModelError, match="<seg>"):
        train_grpo(settings(without, phantoms, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
