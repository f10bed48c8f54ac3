"""The loop of small models: over several processes, and through a stop."""

import socket
from pathlib import Path

import pytest
import torch
from dealt import in_group, trained
from torch import multiprocessing

from coreseg.train import loop


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


def test_a_stopped_run_goes_on_with_both_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    trained(0, 1, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(0, 1, tmp_path / "stopped", stopped_at=3)
    trained(0, 1, tmp_path / "stopped")
    whole, stopped = (torch.load(tmp_path / run / "0 of 1.pt", weights_only=True) for run in ("whole", "stopped"))
    assert all(torch.equal(stopped[name], value) for name, value in whole.items())
