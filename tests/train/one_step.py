"""One plain gradient step of stage 1, by as many processes as the launcher says; the first one saves the weights.

python tests/train/one_step.py MODEL DATA OUT ROWS_A_PROCESS
"""

import sys
from pathlib import Path

import torch

from coreseg.config import SftConfig
from coreseg.model.assemble import load_parts
from coreseg.train.collate import Examples
from coreseg.train.sft import Collator, SftTrainer, prepare, training_arguments

if __name__ == "__main__":
    model_path, data, out, rows = sys.argv[1:]
    torch.optim.AdamW = lambda groups, betas, weight_decay: torch.optim.SGD(groups)  # type: ignore[misc, assignment]
    config = SftConfig(
        model=model_path, data=(data,), out=out, steps=1, batch_size=int(rows), warmup_steps=0, lora_rank=0,
        learning_rate=1.0, head_learning_rate=1.0, eval_samples=0, save_every=100,
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = load_parts(config.model)
    prepare(model, config)
    trainer = SftTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=Examples.open(config, "train"),
        data_collator=Collator(processor),
        settings=config,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), Path(out) / "weights.pt")
