"""The one writer of imported pictures, whatever form they came in."""

import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from coreseg.data.lookalikes import Fingerprint, fingerprint
from coreseg.data.pictures import Picture, Refusal
from coreseg.errors import InputError
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


class SetWriter:
    """Writes pictures and masks into a new folder and gives their rows.

    refused: what could not be read. prints: the fingerprints of the pictures by the names of their files, where asked
    for.
    """

    def __init__(self, root: Path, seed: int, describe: Describe, *, with_prints: bool) -> None:
        self._root, self._seed, self._describe, self._with_prints = root, seed, describe, with_prints
        for folder in ("images", "masks"):
            (root / folder).mkdir()
        self.refused: list[Refusal] = []
        self.prints: dict[str, Fingerprint] = {}
        self._names: Counter[str] = Counter()

    def write(self, picture: Picture) -> list[Sample]:
        """The rows of one picture, one a category, as yet without a split; none where it cannot be read."""
        try:
            image = read_image(picture.image)
        except InputError as error:
            self.refused.append(Refusal(picture.origin, str(error)))
            return []
        masks = {
            category: mask
            for category, parts in picture.masks.items()
            if (mask := self._joined(parts, image, picture.origin, picture.image)) is not None
        }
        if not masks:
            return []
        stem = self._unused(f"{_file_safe(picture.folder.name)}_{_file_safe(picture.name)}")
        file_name = self._copy(picture.image, image, stem)
        if self._with_prints:
            self.prints[file_name] = fingerprint(image)
        return [self._row(picture, image, mask, category, file_name, stem) for category, mask in masks.items()]

    def _joined(
        self,
        parts: tuple[Path | Bool[np.ndarray, "_ _"], ...],
        image: UInt8[np.ndarray, "height width 3"],
        origin: Path,
        picture: Path | UInt8[np.ndarray, "_ _ *channels"],
    ) -> Bool[np.ndarray, "height width"] | None:
        height, width = image.shape[:2]
        joined = np.zeros((height, width), dtype=bool)
        for part in parts:
            path = part if isinstance(part, Path) else origin
            try:
                mask = read_mask(part, binary=True) if isinstance(part, Path) else part
                if isinstance(part, Path) and isinstance(picture, Path):
                    _refuse_turned(picture, part)
            except InputError as error:
                self.refused.append(Refusal(path, str(error)))
                return None
            if mask.shape != (height, width):
                reason = (
                    f"the mask is {mask.shape[1]}x{mask.shape[0]} px, its image {origin.name} {width}x{height} px. "
                    "Expected one size: export the mask at the image's size."
                )
                self.refused.append(Refusal(path, reason))
                return None
            joined |= mask
        return joined

    def _unused(self, stem: str) -> str:
        self._names[stem] += 1
        return stem if self._names[stem] == 1 else self._unused(f"{stem}-{self._names[stem]}")

    def _copy(
        self,
        original: Path | UInt8[np.ndarray, "height width *channels"],
        image: UInt8[np.ndarray, "height width 3"],
        stem: str,
    ) -> str:
        if isinstance(original, Path):
            header = read_header(original)
            suffix = _SUFFIX_OF_COPIED_FORMAT.get(header.format)
            if suffix is not None and header.orientation == 1:
                shutil.copyfile(original, self._root / "images" / f"{stem}{suffix}")
                return f"images/{stem}{suffix}"
            original = image
        Image.fromarray(original).save(self._root / "images" / f"{stem}.png")
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


def _refuse_turned(picture: Path, mask: Path) -> None:
    """Raises InputError where a picture is turned on reading, its mask is not, and sizes do not tell their frame."""
    header = read_header(picture)
    width, height = header.size_wh
    told_by_size = header.orientation >= 5 and width != height
    if header.orientation not in (1, read_header(mask).orientation) and not told_by_size:
        raise InputError(
            f"its image {picture.name} is turned on reading (EXIF orientation {header.orientation}), the mask is not, "
            "so whether they lie on each other cannot be known. Save the image upright, and its mask to match."
        )


def _file_safe(text: str) -> str:
    safe = re.sub(r"[^\w.-]+", "-", text)
    return re.sub(rf"(?<![^\W_\d])({_SPLIT_WORDS})(?![^\W_\d])", lambda word: word[1].upper(), safe)
