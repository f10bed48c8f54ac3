"""Our loss is TRL's: on a tiny Qwen2.5-VL with LoRA, the same completions give the same loss and gradients.

The policy, the policy that sampled and the reference all differ, completions differ in length, and some ratios are
clipped: a fresh LoRA would have ratios of 1 and a KL of 0, and prove nothing.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import settings, trainer_of

from coreseg.train.grpo import GrpoTrainer, Rollout, with_completions

ACCUMULATION = 2
LONGEST = 160


def shaken(trainer: GrpoTrainer, seed: int, by: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.reasoner.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def trl_trainer(ours: GrpoTrainer, out: Path) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = ours.settings
    arguments = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=ACCUMULATION,
        num_generations=settings.group_size,
        max_completion_length=LONGEST,
        temperature=settings.temperature,
        beta=settings.beta,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        loss_type=settings.loss_type,
        use_bias_correction_kl=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    model = copy.deepcopy(ours.model.reasoner)
    model.get_output_embeddings().bias = (
        None  # asked of PEFT's wrapper around the trainable row, which has none to show
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["Where?"] * 16}),
        processing_class=ours.processor.reasoner,
    )


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_and_gradients_equal_trl(qwen: Path, phantoms: Path, tmp_path: Path, loss_type: str, beta: float) -> None:
    config = settings(
        qwen, phantoms, tmp_path / "ours", loss_type=loss_type, beta=beta, mask_weight=0.0, temperature=0.8,
        clip_low=0.1, clip_high=0.15, max_new_tokens=LONGEST, accumulation=ACCUMULATION,
    )  # fmt: skip
    ours = trainer_of(config)
    ours.current_gradient_accumulation_steps = ACCUMULATION
    shaken(ours, 0, 0.02)
    (inputs, _), tokens = ours.get_batch_samples(iter(ours.get_train_dataloader()), ACCUMULATION, torch.device("cpu"))
    rollout: Rollout = inputs["rollout"]
    ours.model.train()
    ours.compute_loss(ours.model, inputs, num_items_in_batch=tokens)  # this pass gives the old probabilities
    assert rollout.old is not None
    shaken(ours, 1, 0.02)

    theirs = trl_trainer(ours, tmp_path / "theirs")
    theirs.current_gradient_accumulation_steps = ACCUMULATION
    prompts = inputs["batch"]
    rows = with_completions(prompts, rollout)
    width = prompts.input_ids.shape[1]
    theirs.model.train()
    their_loss = theirs._compute_loss(
        theirs.model,
        {
            "prompt_ids": prompts.input_ids,
            "prompt_mask": prompts.attention_mask,
            "completion_ids": rollout.ids,
            "completion_mask": rollout.real.long(),
            "advantages": rollout.advantages,
            "old_per_token_logps": rollout.old,
            "ref_per_token_logps": rollout.reference,
            "num_items_in_batch": tokens,
            "num_images": [1] * len(rollout.ids),
            "pixel_values": rows["reasoner_inputs"]["pixel_values"],
            "image_grid_thw": rows["reasoner_inputs"]["image_grid_thw"],
            "mm_token_type_ids": rows["reasoner_inputs"]["mm_token_type_ids"],
        },
    )
    their_loss.backward()
    our_loss = ours.compute_loss(ours.model, inputs, num_items_in_batch=tokens) / ACCUMULATION
    our_loss.backward()

    lengths = rollout.real.sum(1)
    clipped, kl = ours._noted["clipped"][-1], ours._noted["kl"][-1]
    assert lengths.unique().numel() > 2 and width and 0 < clipped < 1 and (kl > 1e-4) == (beta > 0)
    torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=1e-5)
    our_gradients = {n: p.grad for n, p in ours.model.reasoner.named_parameters() if p.requires_grad}
    their_gradients = {n: p.grad for n, p in theirs.model.named_parameters() if p.requires_grad}
    assert our_gradients.keys() == their_gradients.keys() and len(our_gradients) > 10
    largest = max(float(gradient.abs().max()) for gradient in our_gradients.values() if gradient is not None)
    assert largest > 1e-4
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5, rtol=1e-4, msg=name)
    mine, expected = (
        torch.cat([each.flatten() for each in gradients.values() if each is not None])
        for gradients in (our_gradients, their_gradients)
    )
    assert (mine - expected).norm() <= 1e-5 * expected.norm()
