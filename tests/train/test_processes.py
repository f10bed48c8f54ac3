"""Several processes train as one does, in both stages, also where one of them has nothing that asks for a mask."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import plain_descent, step_all

from coreseg.model.assemble import load_parts


def stepped_by_two(nano: Path, phantoms: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after one step of four rows over two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).parent / "one_step.py"), str(nano), str(phantoms), str(out), "2"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    weights: dict[str, dict[str, torch.Tensor]] = torch.load(out / "weights.pt", weights_only=True)
    return weights


def test_two_processes_equal_one(nano: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first two rows without a mask, one of two processes has none at all."""
    monkeypatch.setattr(torch.optim, "AdamW", plain_descent)
    start = load_parts(nano)[0].state_dict()
    ones = step_all(str(nano), str(phantoms), str(tmp_path), rows=4)
    twos = stepped_by_two(nano, phantoms, tmp_path)
    assert list(ones) == list(twos) == ["sft-0", "sft-2", "grpo-0", "grpo-2"]
    for run, one in ones.items():
        assert any(not torch.equal(one[name], start[name]) for name in one)
        for name, tensor in one.items():
            torch.testing.assert_close(twos[run][name], tensor, atol=1e-5, rtol=1e-4, msg=f"{run}: {name}")
    for stage in ("grpo", "sft"):
        with_all, with_some = ones[f"{stage}-0"], ones[f"{stage}-2"]
        assert any(not torch.equal(with_all[name], tensor) for name, tensor in with_some.items())
