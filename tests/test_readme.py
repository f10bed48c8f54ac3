"""The README and the pages under docs/ say what works: CI's commands, Python blocks, command lines, links."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
PAGES = [README, *sorted((REPO / "docs").rglob("*.md")), *sorted((REPO / "recipes").rglob("*.md"))]

pytestmark = pytest.mark.skipif(not README.exists(), reason="installed without the repository around it")


def ci_block(name: str) -> str:
    """One marked block of README.md, as .ci/run gets it."""
    done = subprocess.run([REPO / "scripts" / "readme-block", name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def calls(line: str) -> list[list[str]]:
    """The words of every coreseg call in one shell line, the program's name left out."""
    found: list[list[str]] = []
    expects_command, inside = True, False
    for word in shlex.split(line, comments=True):
        if word in ("&&", "||", "|", ";", ">"):
            expects_command, inside = True, False
        elif expects_command and Path(word).name == "coreseg":
            found.append([])
            expects_command, inside = False, True
        elif inside:
            found[-1].append(word)
        else:
            expects_command = expects_command and re.match(r"\w+=", word) is not None
    return found


def command_lines(page: Path) -> list[list[str]]:
    """The coreseg calls in a page's shell blocks, continuation lines joined."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [call for line in lines if re.search(r"\bcoreseg\s", line) for call in calls(line)]


@cache
def help_text(*subcommands: str) -> str:
    """What `coreseg SUBCOMMANDS --help` prints; the exit status must be 0."""
    code = f"import sys; sys.argv = ['coreseg', *{subcommands!r}, '--help']; from coreseg.cli import main; main()"
    env = {**os.environ, "COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, f"coreseg {' '.join(subcommands)} --help: {done.stderr}"
    return done.stdout


def unknown_parts(call: list[str]) -> list[str]:
    """The subcommand or the options of a call that `--help` does not know."""
    words = list(call)
    subcommands: list[str] = []
    while "COMMAND" in help_text(*subcommands) and words and not words[0].startswith("-"):
        if not re.search(rf"^\W*{re.escape(words[0])}\s", help_text(*subcommands), flags=re.MULTILINE):
            return [words[0]]
        subcommands.append(words.pop(0))
    options = [word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_text(*subcommands)))
    return [option for option in options if option not in known]


def test_the_first_command_segments_an_example_that_exists() -> None:
    block = ci_block("segment")
    call = re.search(r'\.venv/bin/coreseg segment (?P<image>\S+) "[^"]+\?"', block)
    assert call, f"no `.venv/bin/coreseg segment IMAGE QUESTION` in {block!r}"
    assert (REPO / call["image"]).is_file()


def test_the_second_command_runs_the_tests() -> None:
    assert ".venv/bin/pytest" in ci_block("test")


def test_a_missing_block_is_an_error() -> None:
    done = subprocess.run([REPO / "scripts" / "readme-block", "nosuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nosuch" in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_command_lines_are_known_to_the_command_line(page: Path) -> None:
    wrong = {" ".join(call): parts for call in command_lines(page) if (parts := unknown_parts(call))}
    assert not wrong


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("coreseg segment scan.png 'Where? --or not' --nonsense | cat", ["--nonsense"]),
        ("cd there && THREADS=1 .venv/bin/coreseg segmnet scan.png", ["segmnet"]),
        ("coreseg --help", []),
        ("pip install coreseg --upgrade  # coreseg it is", []),
    ],
)
def test_a_wrong_command_line_is_caught(line: str, unknown: list[str]) -> None:
    assert [part for call in calls(line) for part in unknown_parts(call)] == unknown


@pytest.mark.parametrize("number", range(len(blocks(README, "python")) if README.exists() else 0))
def test_python_blocks_of_the_readme_run(number: int, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPO / "examples")
    code = blocks(README, "python")[number]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []
