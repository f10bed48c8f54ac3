"""The loop of small models over several processes."""

import socket
from pathlib import Path

import torch
from dealt import in_group, trained
from torch import multiprocessing


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
