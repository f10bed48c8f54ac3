"""Importers: from the folders that people have to the one layout of `coreseg.data.store`.

Our choice: the layouts that most public sets come in (`coreseg.data.folders`).
"""

import json
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from tqdm import tqdm

from coreseg.data.check import case_leaks
from coreseg.data.folders import Found, Picture, Refusal, find_pictures, with_splits
from coreseg.data.store import SOURCES, SPLITS, LesionSet, new_set, write_set
from coreseg.errors import DataError, InputError
from coreseg.imaging import read_header, read_image, read_mask, write_mask
from coreseg.masks import box_tuples, mask_to_boxes
from coreseg.types import Sample

Describe = Callable[
    [UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"], str, str, str, int],
    str,
]
"""Image, mask, modality, anatomy, category, seed -> the reasoning text of one row."""

_SUFFIX_OF_COPIED_FORMAT = {"PNG": ".png", "JPEG": ".jpg"}
# The image-folder loader of `datasets` would take these words in a file name for splits.
_SPLIT_WORDS = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"


@dataclass(frozen=True)
class ImportReport:
    """What an import made, and what it left out.

    negatives counts rows whose mask is empty; splits counts rows; unknown_case counts rows whose patient is not
    known, so that no split can be proved clean for them. images_without_mask and masks_without_image were not
    imported, as were the files in refused. split_cases stand in several splits, because cases.csv says so.
    """

    root: Path
    rows: int
    images: int
    negatives: int
    splits: Mapping[str, int]
    unknown_case: int
    refused: tuple[Refusal, ...]
    images_without_mask: tuple[Path, ...]
    masks_without_image: tuple[Path, ...]
    split_cases: tuple[str, ...]


def import_folder(
    source: Path,
    destination: Path,
    *,
    modality: str | None = None,
    anatomy: str | None = None,
    category: str | None = None,
    name: str | None = None,
    licence: str = "unknown",
    val_share: float = 0.15,
    seed: int = 0,
    case_pattern: str | None = None,
    describe: Describe | None = None,
    progress: bool = True,
) -> ImportReport:
    """Make a data set in `destination` from images and masks in `source` (layouts: `coreseg.data.folders`).

    modality, anatomy, category and licence stand in where set.json does not tell. name replaces the folder's as the
    rows' `source`, where there is one set folder. case_pattern is a regular expression whose first group, in an
    image's file name without extension, is the patient; cases.csv goes first. Where no split is given, whole
    patients (single images where the patient is unknown) are drawn for `val`, a share val_share of each set, the same
    for the same seed. Reasoning comes from `describe`, by default the measured description.

    Upright PNG and JPEG files are copied byte for byte, other pictures become PNG. Files are named after set and
    image; a word such as "test" in them is set in capitals, as loaders take it for a split. A picture or mask that
    cannot be used is set aside and reported, the others are imported. Nothing is left behind when it fails.

    Raises DataError where the destination is not empty, the source has another layout, a fact is given neither by
    set.json nor by a flag, or nothing can be imported.
    """
    if not 0 <= val_share < 1:
        raise DataError(f"The share of val is {val_share}: expected from 0 to under 1, such as 0.15.")
    facts = {"modality": modality, "anatomy": anatomy, "category": category, "licence": licence}
    found = find_pictures(source, facts, name, case_pattern)
    pictures = with_splits(found.pictures, val_share, seed)
    with new_set(destination) as staging:
        writer = _Writer(staging, seed, describe or _measured_description())
        shown = tqdm(pictures, desc=f"Importing {source.name}", unit="image", disable=not progress)
        samples = [sample for picture in shown for sample in writer.write(picture)]
        refused = (*found.refused, *writer.refused)
        if not samples:
            raise DataError(_nothing_imported(source, found, refused))
        write_set(staging, samples)
        _write_sources(staging, found)
    return ImportReport(
        root=destination,
        rows=len(samples),
        images=len({sample.file_name for sample in samples}),
        negatives=sum(not sample.boxes for sample in samples),
        splits={split: count for split in SPLITS if (count := sum(sample.split == split for sample in samples))},
        unknown_case=sum(not sample.case for sample in samples),
        refused=refused,
        images_without_mask=found.images_without_mask,
        masks_without_image=found.masks_without_image,
        split_cases=tuple(leak.case for leak in case_leaks(LesionSet(destination, tuple(samples)))),
    )


def _nothing_imported(source: Path, found: Found, refused: tuple[Refusal, ...]) -> str:
    if refused:
        return f"{source}: none of its pictures can be used. The first: {refused[0].path}: {refused[0].reason}"
    return (
        f"{source}: no image has a mask ({len(found.images_without_mask)} images, {len(found.masks_without_image)} "
        "masks without one). Expected masks/<stem>.png for images/<stem>.jpg: rename them, or write a cases.csv."
    )


def _write_sources(root: Path, found: Found) -> None:
    texts = {
        folder.name: {key: value for key, value in asdict(folder).items() if key not in ("path", "name")}
        for folder in found.folders
    }
    (root / SOURCES).write_text(json.dumps(texts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def _measured_description() -> Describe:
    # Imported here because the builder lies above what most callers of this module need.
    from coreseg.data.build.describe import describe

    return describe


class _Writer:
    """Writes pictures and masks into a new folder and gives their rows."""

    def __init__(self, root: Path, seed: int, describe: Describe) -> None:
        self._root, self._seed, self._describe = root, seed, describe
        self.refused: list[Refusal] = []
        self._names: Counter[str] = Counter()

    def write(self, picture: Picture) -> list[Sample]:
        """The rows of one picture, one a category; none where it cannot be read."""
        try:
            image = read_image(picture.image)
        except InputError as error:
            self.refused.append(Refusal(picture.image, str(error)))
            return []
        masks = {
            category: mask
            for category, paths in picture.masks.items()
            if (mask := self._joined(paths, image, picture.image)) is not None
        }
        if not masks:
            return []
        stem = self._unused(f"{_file_safe(picture.folder.name)}_{_file_safe(picture.image.stem)}")
        file_name = self._copy(picture.image, image, stem)
        return [self._row(picture, image, mask, category, file_name, stem) for category, mask in masks.items()]

    def _joined(
        self, paths: tuple[Path, ...], image: UInt8[np.ndarray, "height width 3"], image_path: Path
    ) -> Bool[np.ndarray, "height width"] | None:
        height, width = image.shape[:2]
        joined = np.zeros((height, width), dtype=bool)
        for path in paths:
            try:
                mask = read_mask(path)
            except InputError as error:
                self.refused.append(Refusal(path, str(error)))
                return None
            if mask.shape != (height, width):
                reason = (
                    f"the mask is {mask.shape[1]}x{mask.shape[0]} px, its image {image_path.name} {width}x{height} px. "
                    "Expected one size: export the mask at the image's size."
                )
                self.refused.append(Refusal(path, reason))
                return None
            joined |= mask
        return joined

    def _unused(self, stem: str) -> str:
        self._names[stem] += 1
        return stem if self._names[stem] == 1 else self._unused(f"{stem}-{self._names[stem]}")

    def _copy(self, path: Path, image: UInt8[np.ndarray, "height width 3"], stem: str) -> str:
        header = read_header(path)
        suffix = _SUFFIX_OF_COPIED_FORMAT.get(header.format)
        if suffix is not None and header.orientation == 1:
            shutil.copyfile(path, self._root / "images" / f"{stem}{suffix}")
            return f"images/{stem}{suffix}"
        Image.fromarray(image).save(self._root / "images" / f"{stem}.png")
        return f"images/{stem}.png"

    def _row(
        self,
        picture: Picture,
        image: UInt8[np.ndarray, "height width 3"],
        mask: Bool[np.ndarray, "height width"],
        category: str,
        file_name: str,
        stem: str,
    ) -> Sample:
        from coreseg.questions import ask

        mask_file_name = f"masks/{self._unused(f'{stem}_{_file_safe(category)}')}.png"
        write_mask(self._root / mask_file_name, mask)
        folder = picture.folder
        # Text hangs on the row's own name, so that adding an image changes no other row.
        rng = np.random.default_rng([self._seed, zlib.crc32(mask_file_name.encode())])
        return Sample(
            file_name=file_name,
            mask_file_name=mask_file_name,
            modality=folder.modality,
            anatomy=folder.anatomy,
            category=category,
            boxes=box_tuples(mask_to_boxes(mask)),
            query=ask(category, rng),
            reasoning=self._describe(image, mask, folder.modality, folder.anatomy, category, int(rng.integers(2**32))),
            source=folder.name,
            licence=folder.licence,
            case=picture.case,
            split=picture.split,
        )


def _file_safe(text: str) -> str:
    safe = re.sub(r"[^\w.-]+", "-", text)
    return re.sub(rf"(?<![^\W_\d])({_SPLIT_WORDS})(?![^\W_\d])", lambda word: word[1].upper(), safe)
