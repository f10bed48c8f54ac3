"""A data set on disk: one folder, one row of `metadata.jsonl` per (image, category).

    metadata.jsonl   one JSON object a line, the fields of `coreseg.types.Sample`
    images/          the pictures
    masks/           one 0/255 PNG per row, of the picture's size; all zero where the lesion is absent
    sources.json     optional: title, origin, licence and notes of each source

The image-folder loader of the `datasets` library opens the folder unchanged.

Source: our choice (the paper's metadata per sample, plus source, licence, case and split).
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from coreseg.errors import DataError
from coreseg.imaging import read_header, read_image, read_mask
from coreseg.types import Box, Sample

METADATA = "metadata.jsonl"
SOURCES = "sources.json"
SPLITS = ("train", "val", "test")

_FIELDS = tuple(field.name for field in fields(Sample))
_NEVER_EMPTY = ("file_name", "mask_file_name", "category", "source")


@dataclass(frozen=True)
class LesionSet:
    """An open data set: its folder and its rows, in file order. Pictures are read when asked for."""

    root: Path
    samples: tuple[Sample, ...]

    @classmethod
    def open(cls, path: str | Path) -> "LesionSet":
        """Read and validate every row; pictures are not touched (`coreseg.data.check` does that).

        Raises DataError naming the row and field where a row breaks the contract, and where there is no data set.
        """
        root = Path(path)
        metadata = root / METADATA
        if not metadata.is_file():
            raise DataError(
                f"{root}: no {METADATA} in it, so this is no data set. Expected a folder with {METADATA}, images/ and "
                "masks/: make one from images and masks with `coreseg data import`."
            )
        lines = _read_text(metadata).split("\n")
        rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not rows:
            raise DataError(
                f"{metadata}: the file has no rows. Expected one JSON object a line: import the data again."
            )
        samples = tuple(parse_row(line, f"{metadata} row {number}") for number, line in rows)
        _refuse_repeats(samples, [number for number, _ in rows], metadata)
        return cls(root, samples)

    def split(self, name: str) -> tuple[Sample, ...]:
        """The rows of one split, train, val or test; none where the set has no such rows.

        Raises DataError for another name.
        """
        if name not in SPLITS:
            raise DataError(f"There is no split {name!r}: expected one of {', '.join(SPLITS)}.")
        return tuple(sample for sample in self.samples if sample.split == name)

    def splits_there(self) -> str:
        """The splits that have rows, with their counts, in words."""
        counts = {name: len(self.split(name)) for name in SPLITS}
        return ", ".join(f"{count} in {name!r}" for name, count in counts.items() if count)

    def image(self, sample: Sample) -> UInt8[np.ndarray, "height width 3"]:
        """The picture of a row, upright RGB.

        Raises DataError where the file is missing, InputError where it cannot be read.
        """
        return read_image(self._file(sample.file_name))

    def mask(self, sample: Sample) -> Bool[np.ndarray, "height width"]:
        """The mask of a row, at its picture's size.

        Raises DataError where a file is missing or the sizes differ, InputError where a file cannot be read.
        """
        mask = read_mask(self._file(sample.mask_file_name))
        width, height = read_header(self._file(sample.file_name)).size_wh
        if mask.shape != (height, width):
            raise DataError(
                f"{self.root / sample.mask_file_name}: the mask is {mask.shape[1]}x{mask.shape[0]} px, its image "
                f"{sample.file_name} {width}x{height} px. Expected one size: import the two again."
            )
        return mask

    def _file(self, name: str) -> Path:
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{path}: listed in {METADATA}, but missing. Restore the file, or import the data again.")
        return path


def evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spaced, the first among them."""
    shown = min(count, len(rows))
    return [rows[number * len(rows) // shown] for number in range(shown)]


def require_empty(folder: Path) -> None:
    """Raises DataError where something is there already, other than an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already there and not empty; nothing in it is touched. Choose a new folder.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DataError where what is written inside, at `path`, meets a full disk or one that may not be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error}). Check space and permissions.") from error


@contextmanager
def new_set(destination: Path) -> Iterator[Path]:
    """A new folder to make a data set in, which takes the destination's place at the end.

    It lies beside the destination, so that a failure leaves nothing behind and a finished set is there at once or not
    at all.

    Raises DataError where the destination is not empty, where it cannot be written, or where another run is at it.
    """
    require_empty(destination)
    whole = destination.resolve()
    # Always the same, so that what a killed run has left is cleared away by the next.
    staging = whole.with_name(f".{whole.name}.partial")
    parents = [path for path in staging.parents if not path.exists()]
    try:
        with writing(destination):
            staging.mkdir(parents=True, exist_ok=True)
            with _locked(staging, destination):
                try:
                    for path in staging.iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    yield staging
                    if whole.exists():
                        whole.rmdir()
                    staging.rename(whole)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
    finally:
        for path in parents:
            with suppress(OSError):  # as it is not empty where all went well
                path.rmdir()


@contextmanager
def _locked(staging: Path, destination: Path) -> Iterator[None]:
    """Keep other runs out, where the system can; the lock of a killed run is gone with it."""
    try:
        import fcntl
    except ImportError:  # as on Windows
        yield
        return
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{destination}: another run is writing this set. Wait for it, or choose a new folder."
            ) from error
        except OSError:
            pass  # some network drives have no locks
        yield
    finally:
        os.close(descriptor)


def write_set(root: Path, samples: Sequence[Sample]) -> None:
    """Write `metadata.jsonl` for pictures that are already in `root`, replacing one that is there.

    Raises DataError where a row would not open again.
    """
    lines = [row_line(sample) for sample in samples]
    for number, line in enumerate(lines, start=1):
        parse_row(line, f"{root / METADATA} row {number}")
    _refuse_repeats(samples, range(1, len(samples) + 1), root / METADATA)
    (root / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def row_line(sample: Sample) -> str:
    """A row as `metadata.jsonl` holds it, without the line's end."""
    return json.dumps(asdict(sample), ensure_ascii=False)


def copy_rows(lesion_set: LesionSet, samples: Sequence[Sample], root: Path) -> None:
    """Write some rows of a set as a set of their own in `root`, with its `sources.json`.

    Raises DataError where a file is missing.
    """
    names = dict.fromkeys(name for sample in samples for name in (sample.file_name, sample.mask_file_name))
    if (lesion_set.root / SOURCES).is_file():
        names[SOURCES] = None
    for name in names:
        share_file(lesion_set._file(name), root / name)
    write_set(root, samples)


def share_file(source: Path, target: Path) -> None:
    """Put a file at another place too, by a hard link, which takes no room, or where there are none by a copy.

    Nothing in this package ever changes a picture in place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)  # a run may be killed at any moment


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read as UTF-8 text ({error}). Import the data again.") from error


def parse_row(line: str, where: str) -> Sample:
    """One line of `metadata.jsonl`; other fields than a row's are passed over. Raises DataError, beginning `where`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}). Expected one object a line: correct the row.") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a JSON {type(row).__name__}, expected an object with the fields {', '.join(_FIELDS)}."
        )
    for name in _FIELDS:
        if name not in row:
            raise DataError(f"{where}: the field {name!r} is missing. Every row has {', '.join(_FIELDS)}: add it.")
        if name != "boxes" and not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {row[name]!r}, expected text. Correct the row.")
        if name in _NEVER_EMPTY and not row[name].strip():
            raise DataError(f"{where}: {name!r} is empty. Fill it in.")
    if row["split"] not in SPLITS:
        raise DataError(f"{where}: 'split' is {row['split']!r}, expected one of {', '.join(SPLITS)}. Correct the row.")
    for name in ("file_name", "mask_file_name"):
        _refuse_outside(row[name], f"{where}: {name!r}")
    boxes = _parse_boxes(row["boxes"], where)
    return Sample(**{**{name: row[name] for name in _FIELDS}, "boxes": boxes})


def _refuse_outside(name: str, where: str) -> None:
    # A data set may come from anyone: a row must not make us read a file elsewhere. Both conventions, on any system.
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor != ""
    if absolute or ".." in PureWindowsPath(name).parts:
        raise DataError(f"{where} is {name!r}, expected a path inside the data set's folder. Correct the row.")


def _parse_boxes(value: object, where: str) -> tuple[Box, ...]:
    boxes: list[Any] = value if isinstance(value, list) else [value]
    for box in boxes:
        four = isinstance(box, list) and len(box) == 4 and all(type(edge) is int for edge in box)
        if not four or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise DataError(
                f"{where}: 'boxes' holds {box!r}, expected lists [x1, y1, x2, y2] of whole pixels with 0 <= x1 < x2 "
                "and 0 <= y1 < y2. Correct the row."
            )
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes)


def _refuse_repeats(samples: Sequence[Sample], numbers: Sequence[int], metadata: Path) -> None:
    seen: dict[tuple[str, str], int] = {}
    for sample, number in zip(samples, numbers, strict=True):
        first = seen.setdefault((sample.file_name, sample.category), number)
        if first != number:
            raise DataError(
                f"{metadata} row {number}: 'file_name' {sample.file_name!r} with 'category' {sample.category!r} stands "
                f"in row {first} already. One row is one image and one category: join the masks, or drop a row."
            )
