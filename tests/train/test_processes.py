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


def by_two(*command: str) -> list[str]:
    """What two gloo processes that run a command print, the first one's first; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    printed = []
    for process in running:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
        printed.append(output.decode())
    return printed


def stepped_by_two(nano: Path, phantoms: Path, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after one step of four rows over two processes."""
    by_two(sys.executable, str(Path(__file__).parent / "one_step.py"), str(nano), str(phantoms), str(out), "2")
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


def test_the_command_trains_by_two(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """As under torchrun; one model comes of it, and one process tells of it."""
    config = tmp_path / "sft.toml"
    config.write_text(f'model = "{nano}"\ndata = ["{phantoms}"]\nout = "{tmp_path / "run"}"\nlora_rank = 0\n')
    more = [f"--set={setting}" for setting in ("steps=2", "batch_size=2", "eval_samples=0", "save_every=2")]
    command = (sys.executable, "-c", "from coreseg.cli import main; main()")
    first, second = by_two(*command, "train", "sft", str(config), *more)
    assert "trained; try" in first
    assert "trained; try" not in second
    load_parts(tmp_path / "run")
