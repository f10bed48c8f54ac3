"""One plain gradient step of either stage; as a script, by one of several processes, of which the first saves.

python tests/train/one_step.py MODEL DATA OUT ROWS_A_PROCESS

Each stage twice from the same start: with every mask, and with nothing that has a `<seg>` in the first two draws.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from scripted import PartlySilent, settings, trainer_of

from coreseg.config import SftConfig
from coreseg.model.assemble import load_parts
from coreseg.train.collate import Example, Examples
from coreseg.train.sft import Collator, SftTrainer
from coreseg.train.trainer import StageTrainer, prepare
from coreseg.types import Answer


class PartlyMuted(Examples):
    muted = 0

    def __getitem__(self, drawn: tuple[int, int]) -> Example:
        example = super().__getitem__(drawn)
        if drawn[1] >= self.muted:
            return example
        answer = Answer(example.answer.category, (), "Nothing.", found=False)
        return replace(example, mask=np.zeros_like(example.mask), answer=answer)


def sft(model_path: str, data: str, out: str, rows: int) -> StageTrainer:
    config = SftConfig(
        model=model_path, data=(data,), out=out, steps=1, batch_size=rows, warmup_steps=0, lora_rank=0,
        learning_rate=1.0, head_learning_rate=1.0, eval_samples=0, save_every=100,
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = load_parts(config.model)
    prepare(model, config)
    return SftTrainer(
        model=model,
        settings=config,
        processor=processor,
        train_dataset=PartlyMuted.open(config, "train"),
        data_collator=Collator(processor),
    )


def grpo(model: str, data: str, out: str, rows: int) -> StageTrainer:
    return trainer_of(  # type: ignore[no-any-return]
        settings(
            model, data, out, steps=1, batch_size=4 * rows, group_size=4, lora_rank=0, learning_rate=1.0,
            head_learning_rate=1.0, loss_type="dapo",
        )
    )  # fmt: skip


def step_all(model: str, data: str, out: str, rows: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after a step of each stage, by stage and how many draws had no mask."""
    weights = {}
    for stage in (sft, grpo):
        for without_mask in (0, 2):
            PartlyMuted.muted = PartlySilent.silent = without_mask
            trainer = stage(model, data, out, rows)
            trainer.train()
            weights[f"{stage.__name__}-{without_mask}"] = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    PartlyMuted.muted = PartlySilent.silent = 0
    return weights


def plain_descent(groups: Any, betas: Any, weight_decay: Any) -> torch.optim.Optimizer:
    """Adam's first step has the size of the learning rate whatever the gradient's; this shows the gradient."""
    return torch.optim.SGD(groups)


if __name__ == "__main__":
    torch.optim.AdamW = plain_descent  # type: ignore[misc, assignment]
    weights = step_all(*sys.argv[1:4], rows=int(sys.argv[4]))
    if int(os.environ["RANK"]) == 0:
        torch.save(weights, Path(sys.argv[3]) / "weights.pt")
    PartialState().destroy_process_group()
    # DDP keeps gloo's threads beyond their group, and one that frees a tensor while Python ends aborts the process.
    os._exit(0)
