"""A few steps of the loop on numbers dealt to its processes; a module of its own, for a launched process to import."""

from pathlib import Path

import torch
from torch import distributed, nn

from coreseg.train.loop import Budget, spend


def trained(rank: int, processes: int, out: Path) -> None:
    """Four steps on four fixed numbers a step, dealt to the processes."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        rows = torch.arange(12.0).view(4, 3) % (step + 2)
        loss: torch.Tensor = model(rows[rank::processes]).square().mean()
        return loss

    averaged, steps = spend(Budget(steps=4), model, [{"params": list(model.parameters()), "lr": 0.1}], loss_of, out)
    assert steps == 4
    torch.save(averaged.state_dict(), out / f"{rank} of {processes}.pt")


def in_group(rank: int, port: int, out: Path) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trained(rank, 2, out)
