"""One plain gradient step of stage 1, by as many processes as the launcher says; the first one saves the weights.

python tests/train/one_step.py MODEL DATA OUT ROWS_A_PROCESS

Twice from the same start: with every mask, and with answers without a `<seg>` in the first two draws.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from coreseg.config import SftConfig
from coreseg.model.assemble import load_parts
from coreseg.train.collate import Example, Examples
from coreseg.train.sft import Collator, SftTrainer, prepare, training_arguments
from coreseg.types import Answer


class PartlyMuted(Examples):
    muted = 0

    def __getitem__(self, drawn: tuple[int, int]) -> Example:
        example = super().__getitem__(drawn)
        if drawn[1] >= self.muted:
            return example
        answer = Answer(example.answer.category, (), "Nothing.", found=False)
        return replace(example, mask=np.zeros_like(example.mask), answer=answer)


def step(model_path: str, data: str, out: str, rows: int, muted: int) -> None:
    """One step from the checkpoint; the first process writes the weights after it."""
    PartlyMuted.muted = muted
    config = SftConfig(
        model=model_path, data=(data,), out=out, steps=1, batch_size=rows, warmup_steps=0, lora_rank=0,
        learning_rate=1.0, head_learning_rate=1.0, eval_samples=0, save_every=100,
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = load_parts(config.model)
    prepare(model, config)
    trainer = SftTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=PartlyMuted.open(config, "train"),
        data_collator=Collator(processor),
        settings=config,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), Path(out) / f"weights-{muted}.pt")


if __name__ == "__main__":
    torch.optim.AdamW = lambda groups, betas, weight_decay: torch.optim.SGD(groups)  # type: ignore[misc, assignment]
    for without_mask in (0, 2):
        step(*sys.argv[1:4], rows=int(sys.argv[4]), muted=without_mask)
