"""The how-to pages work: their settings load, and a reader who runs every command in order gets what they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coreseg.config import GrpoConfig, SftConfig, load
from coreseg.data.build.build import BuildConfig

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "howto" / "own_data.md"
FENCED = re.compile(
    r"(?:^`(?P<file>\S+)`[^\n]*\n)?^```(?P<kind>sh|toml|text)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="installed without the repository around it")


def blocks() -> list[re.Match[str]]:
    return list(FENCED.finditer(PAGE.read_text(encoding="utf-8")))


def test_settings_load(tmp_path: Path) -> None:
    kinds = {"build.toml": BuildConfig, "sft.toml": SftConfig, "grpo.toml": GrpoConfig}
    shown = {block["file"]: block["text"] for block in blocks() if block["kind"] == "toml"}
    assert shown.keys() == kinds.keys()
    loaded = {}
    for name, kind in kinds.items():
        (tmp_path / name).write_text(shown[name], encoding="utf-8")
        loaded[name] = load(kind, tmp_path / name)
    assert loaded["grpo.toml"].model == loaded["sft.toml"].out
    assert loaded["sft.toml"].data == loaded["grpo.toml"].data == (f"{loaded['build.toml'].out}/set",)


@pytest.mark.slow
def test_every_command_runs_in_order(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    said = ""
    for block in blocks():
        if block["kind"] == "toml":
            (tmp_path / block["file"]).write_text(block["text"], encoding="utf-8")
        elif block["kind"] == "text":
            assert [line for line in block["text"].splitlines() if line not in said] == []
        else:
            command = ["bash", "-euo", "pipefail", "-c", block["text"]]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block['text']}{done.stdout}{done.stderr}"
            said = done.stdout
    assert "mask: segmented/p00_1.mask.png" in said
    assert (tmp_path / "segmented" / "p00_1.overlay.png").is_file()
    assert (tmp_path / "grpo" / "samples").is_dir() and (tmp_path / "build" / "card.html").is_file()
