"""From the labels of a source to the lesion categories of rows, by a small table of the user's or by their names."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from coreseg.errors import DataError


def read_table(path: Path) -> dict[str, str]:
    """A table of labels and their categories, TOML or JSON by its ending: `2 = "liver tumor"`, `edema = "edema"`.

    Raises DataError where there is no such file, or it is anything but one flat table of texts.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table: object = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f'{path}: the table of labels cannot be read ({error}). Expected TOML lines such as 2 = "liver tumor", or '
            "a JSON object."
        ) from error
    flat = isinstance(table, dict) and all(isinstance(value, str) and value.strip() for value in table.values())
    if not isinstance(table, dict) or not flat or not table:
        raise DataError(f'{path}: expected one flat table, label = "category", such as 2 = "liver tumor".')
    return {key: " ".join(value.split()) for key, value in table.items()}


def categories_of(
    labels: Mapping[str, str], table: Mapping[str, str] | None, category: str, where: Path
) -> dict[str, str]:
    """The category of each label that counts. labels: what the source calls them, by number or other key.

    A line of the table names a label by its key or, in any case of letters, by what it is called; labels that no line
    names are left out. Without a table every label counts, under its own name, or as `category` where it is the only
    one.

    Raises DataError where the table names a label that is not there, where one category is given for several labels,
    and where there is no label.
    """
    shown = ", ".join(f"{key} ({name})" if key != name else key for key, name in labels.items()) or "none"
    if not labels:
        raise DataError(f"{where}: it names no label besides the background, so there is no lesion to import.")
    if table is None:
        if category and len(labels) > 1:
            raise DataError(
                f"{where}: one category, {category!r}, for several labels: {shown}. Say which counts as what by "
                "--labels TABLE.toml."
            )
        return {key: category or _words(name) for key, name in labels.items()}
    wanted: dict[str, str] = {}
    for label, meant in table.items():
        keys = [key for key, name in labels.items() if label == key or label.lower() == name.lower()]
        if not keys:
            raise DataError(f"{where}: the table names the label {label!r}, but it has {shown}. Correct the table.")
        wanted.update(dict.fromkeys(keys, meant))
    return wanted


def _words(name: str) -> str:
    return " ".join(re.split(r"[\s_]+", name.strip()))
