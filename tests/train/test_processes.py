"""Several processes train as one does, in both stages, also where one of them has nothing that asks for a mask."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from coreseg.model.assemble import load_parts


def stepped(nano: Path, phantoms: Path, out: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after one step of four rows over so many gloo processes, by stage and draws without a mask."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).parent / "one_step.py"), str(nano), str(phantoms), str(out)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    alone = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(4 // processes)],
            env=os.environ | alone | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    return {file.stem: torch.load(file, weights_only=True) for file in sorted(out.glob("*.pt"))}


def test_two_processes_equal_one(nano: Path, phantoms: Path, tmp_path: Path) -> None:
    """With the first two rows without a mask, one of two processes has none at all."""
    start = load_parts(nano)[0].state_dict()
    ones, twos = (stepped(nano, phantoms, tmp_path / str(number), number) for number in (1, 2))
    assert list(ones) == list(twos) == ["grpo-0", "grpo-2", "sft-0", "sft-2"]
    for run, one in ones.items():
        assert any(not torch.equal(one[name], start[name]) for name in one)
        for name, tensor in one.items():
            torch.testing.assert_close(twos[run][name], tensor, atol=1e-5, rtol=1e-4, msg=f"{run}: {name}")
    for stage in ("grpo", "sft"):
        with_all, with_some = ones[f"{stage}-0"], ones[f"{stage}-2"]
        assert any(not torch.equal(with_all[name], tensor) for name, tensor in with_some.items())
