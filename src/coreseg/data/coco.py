"""COCO: JSON files of annotations, and the images that they name.

    annotations/instances_val.json     images, annotations and categories; any name and place below the source
    <file_name>                        beside the JSON or above it, also in images/ or in the JSON's own folder name

An annotation is polygons, or a run-length encoding, plain or compressed. Where train, val or test stands in the name of
the JSON or of its folder, that is the split of its images.

Source: the COCO data format (https://cocodataset.org/#format-data).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from coreseg.data.labels import categories_of
from coreseg.data.pictures import (
    Found,
    Picture,
    Refusal,
    SetFolder,
    compile_case_pattern,
    describe_folder,
    find_case,
)
from coreseg.errors import DataError, InputError

_SPLIT_OF_WORD = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                  "dev": "val", "test": "test", "testing": "test"}  # fmt: skip
_PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(frozen=True)
class Annotations:
    """One JSON file: its images by id, the annotations of each, and what each category is called."""

    path: Path
    images: Mapping[int, Mapping[str, Any]]
    of_image: Mapping[int, tuple[Mapping[str, Any], ...]]
    categories: Mapping[int, str]
    split: str


def find_annotated(
    source: Path,
    facts: Mapping[str, str | None],
    name: str | None,
    case_pattern: str | None,
    table: Mapping[str, str] | None,
    keep_empty: bool,
) -> Found:
    """The annotated images of `source`, a folder or one JSON file; masks are drawn when the pictures are asked for.

    facts: modality, anatomy, category and licence, where set.json does not tell. table: category name to the
    category of the rows (`coreseg.data.labels`). case_pattern: its first group, in an image's name without extension,
    is the patient. keep_empty: images without any annotation are lesion-free samples of every category.

    Raises DataError where there is no such file, a JSON file has another form, or a fact is given nowhere.
    """
    pattern = compile_case_pattern(case_pattern)
    root = source.parent if source.is_file() else source
    files = [read_annotations(path, root) for path in annotation_files(source)]
    if not files:
        raise DataError(f"{source}: no JSON file with images and annotations in it. Expected one in the form of COCO.")
    folder = describe_folder(root, facts, name or root.resolve().name)
    # By name: several files may number their categories differently.
    labels = {called: called for file in files for called in file.categories.values()}
    wanted = categories_of(labels, table, folder.category, source)
    images = ((file, image) for file in files for image in file.images.values())
    located = [(file, image, _locate(root, file.path, image["file_name"])) for file, image in images]
    known = {path for _, _, path in located if path is not None}

    def pictures() -> Iterator[Picture | Refusal]:
        for file, image, path in located:
            if path is None:
                reason = f"it names {image['file_name']!r}, which is not in {root}. Put the images beside it."
                yield Refusal(file.path, reason)
                continue
            yield from _annotated(file, image, path, wanted, keep_empty, folder, pattern)

    everywhere = sorted(path for path in root.rglob("*") if path.suffix.lower() in _PICTURES)
    return Found(
        folders=(folder,),
        pictures=pictures(),
        images_without_mask=tuple(path for path in everywhere if path not in known and not _hidden(path)),
    )


def annotation_files(source: Path) -> list[Path]:
    """The JSON files in and below `source`, or itself, that have both images and annotations at their top."""
    candidates = [source] if source.is_file() else sorted(source.rglob("*.json"))
    return [path for path in candidates if not _hidden(path) and _is_annotations(path)]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _is_annotations(path: Path) -> bool:
    # The keys are looked for in the text: a file of annotations may hold hundreds of megabytes.
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '"images"' in text and '"annotations"' in text


def read_annotations(path: Path, root: Path) -> Annotations:
    """One file of annotations in or below the folder `root`, whose own name says nothing of a split.

    Raises DataError where it is no JSON, a part is missing, or an annotation belongs to no image or category.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        categories = {each["id"]: str(each["name"]) for each in told["categories"]}
        images = {each["id"]: each for each in told["images"] if each["file_name"]}
        for each in images.values():
            if not isinstance(each["file_name"], str):
                raise TypeError(f"the file_name {each['file_name']!r} is no text")
        of_image: dict[int, list[Mapping[str, Any]]] = {number: [] for number in images}
        for each in told["annotations"]:
            of_image[each["image_id"]].append(each)
            categories[each["category_id"]]
    except KeyError as error:
        raise DataError(
            f"{path}: {error} is missing, or no such id. Expected images (id, file_name), categories (id, name) "
            "and annotations (image_id, category_id, segmentation): mend the file, or name another as the source."
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not in the form of COCO ({error}). Export the annotations again.") from error
    above = "" if path.parent == root else path.parent.name
    words = re.split(r"[^a-z]+", f"{above} {path.stem}".lower())
    split = next((_SPLIT_OF_WORD[word] for word in reversed(words) if word in _SPLIT_OF_WORD), "")
    return Annotations(path, images, {key: tuple(each) for key, each in of_image.items()}, categories, split)


def _locate(root: Path, annotations: Path, file_name: str) -> Path | None:
    places = [annotations.parent, annotations.parent / "images", root, root / "images"]
    # instances_val2017.json of COCO itself goes with ../val2017.
    places += [root / word for word in re.split(r"[_\s]", annotations.stem)]
    inside = root.resolve()
    for place in places:
        path = place / file_name
        # A file of annotations may come from anyone: it must not make us read a picture elsewhere.
        if path.is_file() and path.resolve().is_relative_to(inside):
            return path
    return None


def _annotated(
    file: Annotations,
    image: Mapping[str, Any],
    path: Path,
    wanted: Mapping[str, str],
    keep_empty: bool,
    folder: SetFolder,
    pattern: re.Pattern[str] | None,
) -> Iterator[Picture | Refusal]:
    annotations = file.of_image[image["id"]]
    masks: dict[str, list[Bool[np.ndarray, "_ _"]]] = {}
    spoilt: set[str] = set()
    for annotation in annotations:
        category = wanted.get(file.categories[annotation["category_id"]])
        if category is None:
            continue
        try:
            mask = decode(annotation.get("segmentation"), int(image["height"]), int(image["width"]))
            masks.setdefault(category, []).append(mask)
        except (InputError, KeyError, ValueError, TypeError, OverflowError) as error:
            # Part of a category's lesions would be a wrong mask.
            spoilt.add(category)
            yield Refusal(path, f"annotation {annotation.get('id')} of {file.path.name} cannot be drawn: {error}")
    if not annotations and keep_empty:
        try:
            empty = np.zeros((int(image["height"]), int(image["width"])), dtype=bool)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            yield Refusal(path, f"{file.path.name} does not tell its height and width in pixels: {error}. Add them.")
            return
        masks = {category: [empty] for category in wanted.values()}
    drawn = {category: tuple(parts) for category, parts in masks.items() if category not in spoilt}
    if drawn:
        name = str(Path(image["file_name"]).with_suffix(""))
        yield Picture(folder, path, name, path, drawn, find_case(folder, name, pattern), file.split)


def decode(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The mask of one annotation: polygons as lists x, y, x, y…, or an object with size and counts.

    Raises InputError where it is anything else, or does not fit the image.
    """
    if isinstance(segmentation, Mapping):
        size, counts = segmentation["size"], segmentation["counts"]
        if list(size) != [height, width]:
            raise InputError(f"its size is {size}, the image's {[height, width]}.")
        return _from_runs(_inflate(counts) if isinstance(counts, str) else counts, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError("it has no outline, perhaps only a box. Expected polygons or a run-length encoding.")
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        corners = np.asarray(polygon, dtype=np.float64)
        if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
            raise InputError("a polygon of it has no three corners x, y.")
        mask |= _fill(corners.reshape(-1, 2), height, width)
    return mask


def _inflate(counts: str) -> list[int]:
    """Run lengths from COCO's text: five bits a character, and from the fourth on the change since the one before last.

    Source: the format that the COCO API writes (https://github.com/cocodataset/cocoapi).
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _from_runs(runs: Sequence[int], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    lengths = np.asarray(runs)
    # Whole numbers beyond 64 bits are left as objects, and would wrap round in a sum.
    fits = lengths.ndim == 1 and bool(((lengths >= 0) & (lengths <= height * width)).all())
    if not fits or lengths.astype(np.int64).sum() != height * width:
        raise InputError(f"its runs do not add up to the {height * width} pixels of the image.")
    # Background and lesion take turns, down one column after another.
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths.astype(np.int64))
    return np.ascontiguousarray(values.reshape(width, height).T)


def _fill(corners: Float[np.ndarray, "corners 2"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The pixels whose centres lie in the polygon, by the even-odd rule; where that is none, the one at its middle."""
    mask = np.zeros((height, width), dtype=bool)
    if (corners.max(axis=0) <= 0).any() or (corners.min(axis=0) >= (width, height)).any():
        raise InputError("a polygon of it lies outside the image.")
    starts, ends = corners, np.roll(corners, -1, axis=0)
    first, last = np.floor(corners[:, 1].min()), np.ceil(corners[:, 1].max())
    for row in range(max(0, int(first)), min(height, int(last))):
        middle = row + 0.5
        crossed = (starts[:, 1] <= middle) != (ends[:, 1] <= middle)
        a, b = starts[crossed], ends[crossed]
        edges = np.sort(a[:, 0] + (middle - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0]))
        columns = np.clip(np.ceil(edges - 0.5), 0, width).astype(int)
        for left, right in columns.reshape(-1, 2).tolist():
            mask[row, left:right] = True
    if not mask.any():
        x, y = corners.mean(axis=0)
        mask[int(np.clip(y, 0, height - 1)), int(np.clip(x, 0, width - 1))] = True
    return mask
