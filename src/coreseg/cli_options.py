"""What commands share: options, and how a user's mistake is told."""

import errno
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from coreseg.errors import CoreSegError

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="'nano', 'nano-sft' (before stage 2), a checkpoint or run folder, or a hub name OWNER/NAME."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1…; default: a GPU if there is one.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU, else bfloat16.")
]

CasePatternOption = Annotated[
    str | None, typer.Option(help="Regular expression; its first group, in a file's name, is the patient.")
]
NameOption = Annotated[str | None, typer.Option(help="Name of the source.")]
LicenceOption = Annotated[str | None, typer.Option(help="Terms of the images.")]

ConfigArgument = Annotated[Path, typer.Argument(help="TOML file of settings (see recipes/).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting.")]


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake is one line on standard error and exit code 2; so is a full or read-only disk."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CoreSegError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.filename is not None:
                told = f"{error.filename}: {error.strerror}. Check the path and its permissions."
            elif error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                told = f"{error.strerror}. Free some space, or write elsewhere."
            else:
                raise
            typer.echo(f"error: {told}", err=True)
            raise typer.Exit(2) from error

    return guarded
