"""A few steps of the loop on numbers dealt to its processes; a module of its own, for a launched process to import."""

from pathlib import Path

import torch
from torch import distributed, nn

from coreseg.train.loop import Budget, spend


def trained(rank: int, processes: int, out: Path, stopped_at: int | None = None) -> None:
    """Four steps on four fixed numbers a step, dealt to the processes; two optimizers."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        if step == stopped_at:
            raise KeyboardInterrupt
        rows = torch.arange(12.0).view(4, 3) % (step + 2)
        loss: torch.Tensor = model(rows[rank::processes]).square().mean()
        return loss

    groups = [{"params": [model.bias], "lr": 0.1}, {"params": [model.weight], "lr": 0.1, "muon": True}]
    averaged, steps = spend(Budget(steps=4), model, groups, loss_of, out)
    assert steps == 4
    torch.save(averaged.state_dict(), out / f"{rank} of {processes}.pt")


def in_group(rank: int, port: int, out: Path) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trained(rank, 2, out)
