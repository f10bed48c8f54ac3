"""One plain gradient step of either stage, by as many processes as the launcher says; the first saves the weights.

python tests/train/one_step.py MODEL DATA OUT ROWS_A_PROCESS

Each stage twice from the same start: with every mask, and with nothing that has a `<seg>` in the first two draws.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
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


if __name__ == "__main__":
    torch.optim.AdamW = lambda groups, betas, weight_decay: torch.optim.SGD(groups)  # type: ignore[misc, assignment]
    out = Path(sys.argv[3])
    for stage in (sft, grpo):
        for without_mask in (0, 2):
            PartlyMuted.muted = PartlySilent.silent = without_mask
            trainer = stage(*sys.argv[1:4], rows=int(sys.argv[4]))
            trainer.train()
            if trainer.is_world_process_zero():
                weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
                torch.save(weights, out / f"{stage.__name__}-{without_mask}.pt")
