"""The loop of small models over several processes."""

import socket
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

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


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    trained(0, 1, tmp_path / "one")
    multiprocessing.spawn(in_group, (port, tmp_path / "two"), nprocs=2)
    alone = torch.load(tmp_path / "one/0 of 1.pt", weights_only=True)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"two/{rank} of 2.pt", weights_only=True), alone)
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 1, "the first process alone writes"
