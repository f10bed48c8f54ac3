"""What a folder of images and masks holds, before anything is read or written.

A *set folder* holds `images/` and `masks/`, and at will `set.json` and `cases.csv`. A source is one set folder, or a
folder of several, which become one data set. Without `cases.csv` the names say what belongs together:

    images/<stem>.jpg
    masks/<stem>.png                      the category of set.json or of the flag; so is <stem>_mask.png
    masks/<stem>_<category words>.png     another category: scan7_hard_exudate.png is a "hard exudate" of scan7
    masks/<category>/<stem>.png           the same, with a folder a category

Several masks of one category in one image are joined. `set.json` may hold title, modality, anatomy, category,
source, licence and notes. `cases.csv` has a row a mask: image, mask, and at will split, case and category.

Our choice: the layout that most public sets come in.
"""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from coreseg.data.pictures import (
    Found,
    Picture,
    Refusal,
    SetFolder,
    compile_case_pattern,
    describe_folder,
    find_case,
)
from coreseg.data.store import SPLITS
from coreseg.errors import DataError

_PLAIN_MASK_WORDS = {"mask", "masks", "seg", "segmentation", "label", "gt", "groundtruth"}
_IGNORED_FILES = {"thumbs.db", "desktop.ini"}


def find_pictures(source: Path, facts: Mapping[str, str | None], name: str | None, case_pattern: str | None) -> Found:
    """What is in `source`, which is a set folder or holds several; names decide, no picture is opened.

    facts: modality, anatomy, category and licence, where set.json does not tell. name: instead of the folder's, where
    there is one. case_pattern: a regular expression whose first group, in an image's stem, is the patient.

    Raises DataError where the layout, set.json, cases.csv or the pattern is wrong, or a fact is given nowhere.
    """
    pattern = compile_case_pattern(case_pattern)
    folders = _set_folders(source, facts, name)
    parts = [_find_in(folder, pattern) for folder in folders]
    return Found(
        folders=tuple(folders),
        pictures=tuple(picture for part in parts for picture in part.pictures),
        refused=tuple(refusal for part in parts for refusal in part.refused),
        images_without_mask=tuple(path for part in parts for path in part.images_without_mask),
        masks_without_image=tuple(path for part in parts for path in part.masks_without_image),
    )


def _set_folders(source: Path, flags: Mapping[str, str | None], name: str | None) -> list[SetFolder]:
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. Expected one with images/ and masks/ in it: check the path.")
    if is_set_folder(source):
        return [describe_folder(source, flags, name or source.resolve().name)]
    inside = [path for path in sorted(source.iterdir()) if path.is_dir() and is_set_folder(path)]
    if not inside:
        raise DataError(
            f"{source}: neither images/ and masks/ in it, nor folders that have them. Put the pictures into images/ "
            "and their masks, with the same names, into masks/."
        )
    if name is not None:
        raise DataError(f"{source} holds {len(inside)} sets, which keep their folders' names: leave the name out.")
    return [describe_folder(path, flags, path.name) for path in inside]


def is_set_folder(path: Path) -> bool:
    """Whether a folder holds `images/` and `masks/`."""
    return (path / "images").is_dir() and (path / "masks").is_dir()


def _find_in(folder: SetFolder, pattern: re.Pattern[str] | None) -> Found:
    refused: list[Refusal] = []
    images = _files(folder.path / "images", refused)
    masks = _files(folder.path / "masks", refused, nested=True)
    table = folder.path / "cases.csv"
    pictures = _from_table(table, folder, refused) if table.is_file() else _from_names(folder, images, masks, refused)
    pictures = [replace(each, case=each.case or find_case(folder, each.name, pattern)) for each in pictures]
    taken = {picture.origin for picture in pictures} | {refusal.path for refusal in refused}
    used = {path for picture in pictures for paths in picture.masks.values() for path in paths}
    return Found(
        folders=(folder,),
        pictures=tuple(pictures),
        refused=tuple(refused),
        images_without_mask=tuple(path for path in images if path not in taken),
        masks_without_image=tuple(path for path in masks if path not in used),
    )


def _files(folder: Path, refused: list[Refusal], *, nested: bool = False) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _IGNORED_FILES:
            continue
        if not path.is_dir():
            found.append(path)
        elif nested:
            found += _files(path, refused)
        else:
            refused.append(Refusal(path, "a folder too deep down: its files are not looked at. Move them up."))
    return found


def _from_table(table: Path, folder: SetFolder, refused: list[Refusal]) -> list[Picture]:
    merged: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(_read_table(table), start=2):
        if row.get("split", "") not in ("", *SPLITS):
            raise DataError(
                f"{table} line {number}: its split is {row['split']!r}, expected {', '.join(SPLITS)} or nothing."
            )
        missing = [path for kind in ("image", "mask") if not (path := folder.path / f"{kind}s" / row[kind]).is_file()]
        if row["mask"] and not missing:
            merged.setdefault(row["image"], []).append(row)
        elif row["mask"]:
            refused.append(Refusal(missing[0], f"listed in {table} line {number}, but not there. Restore it."))
    return [_from_rows(folder, image, image_rows) for image, image_rows in merged.items()]


def _read_table(table: Path) -> list[dict[str, str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: no UTF-8 text ({error}). Save the table as UTF-8 CSV.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(
            f"{table}: no CSV as far as line {reader.line_num} ({error}). Close the quotes there."
        ) from error
    if not {"image", "mask"} <= set(reader.fieldnames or ()):
        raise DataError(
            f"{table}: its columns are {', '.join(reader.fieldnames or ())}, expected image and mask, and at will "
            "split, case and category. Name them in the first line, with commas between."
        )
    return [{key: (value or "").strip() for key, value in row.items() if key} for row in rows]


def _from_rows(folder: SetFolder, image: str, rows: list[dict[str, str]]) -> Picture:
    masks: dict[str, tuple[Path, ...]] = {}
    for row in rows:
        category = _category(row.get("category") or folder.category, folder)
        masks[category] = (*masks.get(category, ()), folder.path / "masks" / row["mask"])
    case, split = (next((row[key] for row in rows if row.get(key)), "") for key in ("case", "split"))
    path = folder.path / "images" / image
    return Picture(folder, path, path.stem, path, masks, case, split)


def _from_names(folder: SetFolder, images: list[Path], masks: list[Path], refused: list[Refusal]) -> list[Picture]:
    of_stem: dict[str, list[Path]] = {}
    for path in images:
        of_stem.setdefault(path.stem, []).append(path)
    by_stem = {stem: paths[0] for stem, paths in of_stem.items() if len(paths) == 1}
    for paths in of_stem.values():
        if len(paths) > 1:
            reason = f"{len(paths)} images have this stem, so whose a mask is cannot be told. Rename all but one."
            refused += [Refusal(path, reason) for path in paths]
    found: dict[str, dict[str, tuple[Path, ...]]] = {}
    for path in masks:
        stem, words = _split_stem(path.stem, by_stem)
        nested = path.parent.name if path.parent.parent == folder.path / "masks" else ""
        if not stem or (nested and words):
            continue
        category = _category(nested.replace("_", " ") or words or folder.category, folder)
        of_image = found.setdefault(stem, {})
        of_image[category] = (*of_image.get(category, ()), path)
    return [Picture(folder, path, stem, path, found[stem], "", "") for stem, path in by_stem.items() if stem in found]


def _split_stem(mask_stem: str, images: Mapping[str, Path]) -> tuple[str, str]:
    """The image a mask's name starts with, the longest that fits, and the category words after it, if any."""
    for end in range(len(mask_stem), 0, -1):
        whole = end == len(mask_stem)
        if mask_stem[:end] in images and (whole or mask_stem[end] in "_-"):
            words = re.split(r"[_\s]+", mask_stem[end + 1 :])
            while words and _says_nothing(words[-1]):
                words.pop()
            return mask_stem[:end], " ".join(words)
    return "", ""


def _says_nothing(word: str) -> bool:
    return not word or word.isdigit() or word.lower() in _PLAIN_MASK_WORDS


def _category(text: str, folder: SetFolder) -> str:
    category = " ".join(text.split())
    if not category:
        raise DataError(
            f"{folder.path}: the category of its masks is given nowhere. Give --category or write set.json."
        )
    return category
