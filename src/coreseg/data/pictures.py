"""What every form of source hands to the one writer: pictures with their masks, and what was set aside."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from coreseg.errors import DataError


@dataclass(frozen=True)
class Refusal:
    """A file that was set aside, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        # What a reader of files says begins with the file.
        return self.reason if self.reason.startswith(f"{self.path}: ") else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Remark:
    """A file that was used, and what should be known of how."""

    path: Path
    text: str


@dataclass(frozen=True)
class SetFolder:
    """One source folder and what is known of all its pictures; `category` may be empty."""

    path: Path
    name: str
    title: str
    modality: str
    anatomy: str
    category: str
    licence: str
    source: str
    notes: str


@dataclass(frozen=True)
class Picture:
    """One picture to import and its masks by category, joined where there are several; an empty split is drawn later.

    An image is a file or the pixels of a slice, a mask a file or its pixels. origin: the file they came from; name:
    what the files that are written are called after.
    """

    folder: SetFolder
    origin: Path
    name: str
    image: Path | UInt8[np.ndarray, "_ _ *channels"]
    masks: Mapping[str, tuple[Path | Bool[np.ndarray, "_ _"], ...]]
    case: str
    split: str


@dataclass(frozen=True)
class Found:
    """All that a source holds: its set folders, the pictures to import, and what does not fit.

    `pictures` may be a generator that reads as it goes, so that one volume at a time is in memory; what it cannot use
    comes as a Refusal in its place.
    """

    folders: tuple[SetFolder, ...]
    pictures: Iterable[Picture | Refusal | Remark]
    refused: tuple[Refusal, ...] = ()
    images_without_mask: tuple[Path, ...] = ()
    masks_without_image: tuple[Path, ...] = ()


def describe_folder(
    path: Path, flags: Mapping[str, str | None], name: str, known: Mapping[str, str] | None = None
) -> SetFolder:
    """What is known of a source folder: by its set.json, else by the flags, else by what its own form tells (`known`).

    Raises DataError where set.json is no JSON object of texts, or modality or anatomy is given nowhere.
    """
    about = path / "set.json"
    told: object = {}
    if about.is_file():
        try:
            told = json.loads(about.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(
                f"{about}: not JSON ({error}). Expected an object with title, modality and so on."
            ) from error
    if not isinstance(told, dict):
        raise DataError(f"{about}: a JSON {type(told).__name__}, expected an object with title, modality and so on.")
    known = known or {}
    keys = ("modality", "anatomy", "category", "licence", "title", "source", "notes")
    for key in keys:
        if not isinstance(told.get(key), str | None):
            raise DataError(f"{about}: its {key} is {told[key]!r}, expected text. Correct the file.")
    facts = {key: str(told.get(key) or flags.get(key) or known.get(key) or "").strip() for key in keys}
    facts["licence"] = facts["licence"] or "unknown"
    for key in ("modality", "anatomy"):
        if not facts[key]:
            raise DataError(f"{path}: its {key} is given nowhere. Give --{key}, or write it into {about}.")
    return SetFolder(path=path, name=name, **facts)


def compile_case_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern whose first group is the patient; DataError where it is no regular expression or has no group."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"The case pattern {pattern!r} is no regular expression: {error}. Correct it.") from error
    if compiled.groups < 1:
        raise DataError(f"The case pattern {pattern!r} has no group. Put the patient's part in brackets: 'P(\\d+)_.*'.")
    return compiled


def find_case(folder: SetFolder, name: str, pattern: re.Pattern[str] | None) -> str:
    """The case that the pattern finds in a picture's name, or nothing."""
    match = pattern.search(name) if pattern else None
    # Patient 7 of one set is not patient 7 of another.
    return f"{folder.name}/{match[1]}" if match and match[1] else ""
