"""A data set without its pictures: what may be passed on where the images may not.

A manifest is a JSON line a row: the fields of `coreseg.types.Sample`, and the SHA-256 of the decoded picture and mask.
Whoever holds the sources imports them as `sources.json` says and gets the same data set back: splits, questions,
reasoning and all. Hashes are of pixels, so that a picture counts as the same after it was stored anew without loss.

Source: our choice; the paper's set can only be had with its images.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from coreseg.data.store import SOURCES, LesionSet, new_set, parse_row, write_set
from coreseg.errors import DataError
from coreseg.types import Sample

_HASHES = ("image_sha256", "mask_sha256")
_NAMED = 5


@dataclass(frozen=True)
class ManifestRow:
    """A row as the manifest has it; the hashes are hexadecimal."""

    sample: Sample
    image_sha256: str
    mask_sha256: str


@dataclass(frozen=True)
class RestoreReport:
    """How many rows came back, and which rows' picture or mask no source has."""

    root: Path
    rows: int
    missing: tuple[Sample, ...]


def pixel_hash(pixels: Shaped[np.ndarray, "..."]) -> str:
    """SHA-256 of an array's shape and values, hexadecimal."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def write_manifest(lesions: LesionSet, path: Path, *, progress: bool = False) -> None:
    """Write the manifest of a data set. Raises DataError where it cannot be written or a picture is missing."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for sample, image_hash, mask_hash in _hashed(lesions, progress):
                row = {**asdict(sample), **dict(zip(_HASHES, (image_hash, mask_hash), strict=True))}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be written ({error}). Check space and permissions.") from error
    finally:
        part.unlink(missing_ok=True)


def read_manifest(path: Path) -> list[ManifestRow]:
    """The rows of a manifest. Raises DataError where the file is none, naming the row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the manifest cannot be read ({error}).") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} row {number}"
            sample = parse_row(line, where)
            image_hash, mask_hash = (json.loads(line).get(name) for name in _HASHES)
            if not (isinstance(image_hash, str) and isinstance(mask_hash, str)):
                raise DataError(f"{where}: {' or '.join(_HASHES)} is missing; expected a line of `coreseg data build`.")
            rows.append(ManifestRow(sample, image_hash, mask_hash))
    if not rows:
        raise DataError(f"{path}: no rows in it; expected a manifest of `coreseg data build`.")
    return rows


def restore(
    manifest: Path, sources: Sequence[Path], destination: Path, *, partly: bool = False, progress: bool = True
) -> RestoreReport:
    """Make the data set of a manifest in `destination` from data sets that hold its pictures and masks.

    `sources` are folders that `coreseg data import` made, in whatever split and with whatever text. partly: leave out
    the rows that no source has, and report them.

    Raises DataError where rows are missing (unless partly) or all are, where the destination is not empty, and where
    the manifest or a source is broken; nothing is left behind then.
    """
    rows = read_manifest(manifest)
    entries = {name: entry for source in reversed(sources) for name, entry in read_sources(source).items()}
    images, masks = _where_pixels_are(sources, progress)
    there = [row for row in rows if row.image_sha256 in images and row.mask_sha256 in masks]
    missing = [row.sample for row in rows if row.image_sha256 not in images or row.mask_sha256 not in masks]
    if not there or (missing and not partly):
        raise DataError(_missing(manifest, missing, len(rows)))
    names = {row.sample.source for row in there}
    told = {name: entry for name, entry in entries.items() if name in names}
    with new_set(destination) as staging:
        for row in there:
            _copy(images[row.image_sha256], staging / row.sample.file_name)
            _copy(masks[row.mask_sha256], staging / row.sample.mask_file_name)
        write_set(staging, [row.sample for row in there])
        if told:
            text = json.dumps(told, ensure_ascii=False, indent=1)
            (staging / SOURCES).write_text(text + "\n", encoding="utf-8", newline="\n")
    return RestoreReport(destination, len(there), tuple(missing))


def read_sources(root: Path) -> dict[str, dict[str, Any]]:
    """What the `sources.json` of a data set says of each source; empty where there is none.

    Raises DataError where it is no JSON object of objects.
    """
    file = root / SOURCES
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}). Correct the file, or delete it.") from error
    if not isinstance(told, dict) or not all(isinstance(entry, dict) for entry in told.values()):
        raise DataError(
            f'{file}: expected {{"source": {{"title": "…"}}}} for each source. Correct the file, or delete it.'
        )
    return told


def _hashed(lesions: LesionSet, progress: bool) -> Iterator[tuple[Sample, str, str]]:
    image_hashes: dict[str, str] = {}
    for sample in tqdm(lesions.samples, desc=f"Hashing {lesions.root.name}", unit="row", disable=not progress):
        if sample.file_name not in image_hashes:
            image_hashes[sample.file_name] = pixel_hash(lesions.image(sample))
        yield sample, image_hashes[sample.file_name], pixel_hash(lesions.mask(sample))


def _where_pixels_are(sources: Sequence[Path], progress: bool) -> tuple[dict[str, Path], dict[str, Path]]:
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for source in sources:
        lesions = LesionSet.open(source)
        for sample, image_hash, mask_hash in _hashed(lesions, progress):
            images.setdefault(image_hash, lesions.root / sample.file_name)
            masks.setdefault(mask_hash, lesions.root / sample.mask_file_name)
    return images, masks


def _copy(found: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, name)


def _missing(manifest: Path, missing: Sequence[Sample], rows: int) -> str:
    by_source = ", ".join(f"{count} of {source}" for source, count in Counter(s.source for s in missing).most_common())
    named = ", ".join(sample.file_name for sample in missing[:_NAMED])
    return (
        f"{manifest}: {len(missing)} of its {rows} rows have a picture or a mask that no source given holds, pixel by "
        f"pixel: {by_source}. The first: {named}. Import those sources as its sources.json says and name the folders "
        "too; or leave the rows out with --partly."
    )
