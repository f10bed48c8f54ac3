"""The command line as tests call it."""

from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from coreseg.cli import app


def run(*words: str | Path) -> Result:
    """The command in this process; a crash is raised."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def complaint(done: Result, code: int = 2) -> str:
    """The one line on standard error that a user's mistake gives."""
    assert done.exit_code == code, done.output
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr
