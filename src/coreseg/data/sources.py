"""Importers: from the forms that people have to the one layout of `coreseg.data.store`.

    folder   images/ and masks/                              `coreseg.data.folders`
    coco     JSON annotations and images                     `coreseg.data.coco`
    nnunet   dataset.json, imagesTr/ and labelsTr/           `coreseg.data.nnunet`
    dicom    DICOM series and DICOM-SEG, nested at will      `coreseg.data.dicom`

Each of these finds pictures; here they are written, and their splits drawn.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from coreseg.config import require
from coreseg.data.check import case_leaks
from coreseg.data.coco import annotation_files, find_annotated
from coreseg.data.dicom import find_series
from coreseg.data.folders import find_pictures, is_set_folder
from coreseg.data.labels import read_table
from coreseg.data.nnunet import find_volumes
from coreseg.data.pictures import Found, Refusal, Remark
from coreseg.data.splits import with_splits
from coreseg.data.store import SOURCES, SPLITS, LesionSet, new_set, require_empty, write_set
from coreseg.data.volumes import Slicing
from coreseg.data.writer import Describe, SetWriter
from coreseg.errors import ConfigError, DataError
from coreseg.types import Sample

_SLICES = Slicing()
_SLICING = frozenset(asdict(_SLICES))
# What each form understands besides what all of them do.
_OPTIONS: Mapping[str, frozenset[str]] = {
    "folder": frozenset({"case_pattern"}),
    "coco": frozenset({"case_pattern", "labels", "keep_empty"}),
    "nnunet": frozenset({"case_pattern", "labels", "channel"}) | _SLICING,
    "dicom": frozenset({"labels", "salt"}) | _SLICING,
}


@dataclass(frozen=True)
class ImportReport:
    """What an import made, and what it left out.

    form: as what the source was read, in words; negatives counts rows whose mask is empty; splits counts rows;
    unknown_case counts rows whose patient is not known, so that no split can be proved clean for them; alike counts
    pictures that share a split with one that looks like them and shows no known patient of theirs. images_without_mask
    and masks_without_image were not imported, as were the files in refused. split_cases stand in several splits,
    because the source says so.
    """

    root: Path
    form: str
    rows: int
    images: int
    negatives: int
    splits: Mapping[str, int]
    unknown_case: int
    alike: int
    remarks: tuple[Remark, ...]
    refused: tuple[Refusal, ...]
    images_without_mask: tuple[Path, ...]
    masks_without_image: tuple[Path, ...]
    split_cases: tuple[str, ...]

    def made(self) -> list[str]:
        """What there is now, in words: a line each."""
        splits = ", ".join(f"{count} {split}" for split, count in self.splits.items())
        lines = [
            f"{self.root}: {self.rows} rows of {self.images} images ({splits}), {self.negatives} lesion-free",
            f"read as {self.form}",
        ]
        if self.alike:
            lines.append(f"{self.alike} images look like another one: each is in the split of its like")
        if self.unknown_case:
            lines.append(f"{self.unknown_case} rows have no case: pictures of one patient may sit in two splits")
        return lines

    def to_mind(self) -> list[str]:
        """What to look at, in words: a line each."""
        return [
            *(
                f"case {case} stands in several splits, as given: figures on one will flatter the other"
                for case in self.split_cases
            ),
            *(f"note: {remark.path}: {remark.text}" for remark in self.remarks),
            *(f"no mask for {path}" for path in self.images_without_mask),
            *(f"no image for {path}" for path in self.masks_without_image),
            *(f"set aside: {refusal}" for refusal in self.refused),
        ]


def recognise(source: Path) -> tuple[str, str]:
    """The form of what lies in `source`, the first that fits, and what it was known by, in words.

    Raises DataError where there is nothing, or nothing of a known form.
    """
    if not source.exists():
        raise DataError(f"{source}: no such folder. Expected one with images and masks in some form: check the path.")
    if source.is_dir():
        if any((source / part).exists() for part in ("imagesTr", "labelsTr")):
            return "nnunet", "imagesTr/ or labelsTr/"
        if is_set_folder(source) or any(is_set_folder(path) for path in source.iterdir()):
            return "folder", "images/ and masks/"
    annotations = annotation_files(source)
    if annotations:
        return "coco", annotations[0].name
    for path in sorted(source.rglob("*")):
        if path.is_file() and _is_dicom(path):
            return "dicom", path.name
    raise DataError(
        f"{source}: of no known form. Expected images/ and masks/ with the same names (folder); a JSON file with "
        "images and annotations (coco); dataset.json, imagesTr/ and labelsTr/ (nnunet); or DICOM series with DICOM-SEG "
        "(dicom)."
    )


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def import_set(
    source: Path,
    destination: Path,
    *,
    form: str | None = None,
    modality: str | None = None,
    anatomy: str | None = None,
    category: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    val_share: float = 0.15,
    seed: int = 0,
    together: bool = True,
    case_pattern: str | None = None,
    labels: Path | None = None,
    channel: str | None = None,
    slicing: Slicing = _SLICES,
    salt: str | None = None,
    describe: Describe | None = None,
    progress: bool = True,
) -> ImportReport:
    """Make a data set in `destination` from images and masks in `source`, of any form in this module's table.

    form: by default what `recognise` says. modality, anatomy, category and licence stand in where set.json does not
    tell. name replaces the folder's as the rows' `source`, where there is one set folder. case_pattern is a regular
    expression whose first group, in an image's file name without extension, is the patient; what the source says of
    cases goes first. labels: a table of labels and categories (`coreseg.data.labels`). channel, slicing and salt: see
    `coreseg.data.nnunet`, `coreseg.data.volumes` and `coreseg.data.dicom`. Reasoning comes from `describe`, by default
    the measured description.

    Where no split is given, whole patients (single images where the patient is unknown) are drawn for `val`, a share
    val_share of each set, the same for the same seed; `together` keeps pictures that look alike in one split too,
    whatever their cases.

    Upright PNG and JPEG files are copied byte for byte, other pictures and slices become PNG. Files are named after
    set and image; a word such as "test" in them is set in capitals, as loaders take it for a split. A picture or mask
    that cannot be used is set aside and reported, the others are imported. Nothing is left behind when it fails.

    Raises DataError where the destination is not empty, the source has another layout, a fact is given neither by
    set.json nor by a flag, or nothing can be imported; ConfigError for an option that the form does not have;
    MissingExtraError where a library that the form needs is not installed.
    """
    if not 0 <= val_share < 1:
        raise DataError(f"The share of val is {val_share}: expected from 0 to under 1, such as 0.15.")
    require_empty(destination)
    form, sign = (form, "") if form else recognise(source)
    if form not in _OPTIONS:
        raise ConfigError(f"The form is {form!r}, expected {', '.join(_OPTIONS)}.")
    given = {key for key in _SLICING if getattr(slicing, key) != getattr(_SLICES, key)}
    values = {"case_pattern": case_pattern, "labels": labels, "channel": channel, "salt": salt}
    given |= {key for key, value in values.items() if value is not None}
    for key in sorted(given - _OPTIONS[form]):
        raise ConfigError(f"--{key.replace('_', '-')} does nothing for the form {form}: leave it out.")
    facts = {"modality": modality, "anatomy": anatomy, "category": category, "licence": licence}
    table = read_table(labels) if labels else None
    match form:
        case "folder":
            found = find_pictures(source, facts, name, case_pattern)
        case "coco":
            found = find_annotated(source, facts, name, case_pattern, table, slicing.keep_empty)
        case "nnunet":
            found = find_volumes(source, facts, name, case_pattern, table, slicing, channel)
        case _:
            found = find_series(source, facts, name, table, slicing, salt)
    read_as = f"{form}, for its {sign}; --form says otherwise" if sign else form
    describe = describe or _measured_description()
    return _import(source, destination, read_as, found, val_share, seed, together, case_pattern, describe, progress)


@dataclass(frozen=True, kw_only=True)
class ImportSettings(Slicing):
    """All that `import_set` may be told but the salt, in the words of `coreseg data import`, as a TOML file holds it.

    The salt is a secret, and files of settings are passed on.
    """

    source: str
    form: str | None = None
    modality: str | None = None
    anatomy: str | None = None
    category: str | None = None
    labels: str | None = None
    name: str | None = None
    licence: str | None = None
    val_share: float = 0.15
    seed: int = 0
    together: bool = True
    case_pattern: str | None = None
    channel: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    def run(self, destination: Path, *, salt: str | None = None, progress: bool = True) -> ImportReport:
        """`import_set` with these settings, which raises what it raises."""
        others = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _SLICING}
        source, labels = Path(others.pop("source")), others.pop("labels")
        return import_set(
            source, destination, labels=labels and Path(labels), slicing=self, salt=salt, progress=progress, **others
        )


def _import(
    source: Path,
    destination: Path,
    form: str,
    found: Found,
    val_share: float,
    seed: int,
    together: bool,
    case_pattern: str | None,
    describe: Describe,
    progress: bool,
) -> ImportReport:
    refused, remarks, written = list(found.refused), list[Remark](), list[Sample]()
    with new_set(destination) as staging:
        writer = SetWriter(staging, seed, describe, with_prints=together)
        for item in tqdm(found.pictures, desc=f"Importing {source.name}", unit="image", disable=not progress):
            match item:
                case Refusal():
                    refused.append(item)
                case Remark():
                    remarks.append(item)
                case _:
                    written += writer.write(item)
        refused += writer.refused
        if not written:
            raise DataError(_nothing_imported(source, found, refused, remarks))
        caseless = [Path(sample.file_name).stem for sample in written if not sample.case] if case_pattern else []
        if caseless and len(caseless) == len(written):
            raise ConfigError(
                f"The case pattern {case_pattern!r} finds a patient in no picture's name, such as "
                f"{caseless[0]!r} (which has the set's name in front). Correct it, or leave it out."
            )
        if caseless:
            text = f"the case pattern finds no patient for {len(caseless)} rows, such as that of {caseless[0]!r}."
            remarks.append(Remark(source, text))
        drawn = with_splits(written, writer.prints, val_share, seed)
        write_set(staging, drawn.samples)
        _write_sources(staging, found)
    samples = drawn.samples
    return ImportReport(
        root=destination,
        form=form,
        rows=len(samples),
        images=len({sample.file_name for sample in samples}),
        negatives=sum(not sample.boxes for sample in samples),
        splits={split: count for split in SPLITS if (count := sum(sample.split == split for sample in samples))},
        unknown_case=sum(not sample.case for sample in samples),
        alike=drawn.alike,
        remarks=tuple(remarks),
        refused=tuple(refused),
        images_without_mask=found.images_without_mask,
        masks_without_image=found.masks_without_image,
        split_cases=tuple(leak.case for leak in case_leaks(LesionSet(destination, samples))),
    )


def _nothing_imported(source: Path, found: Found, refused: list[Refusal], remarks: list[Remark]) -> str:
    if refused:
        return f"{source}: none of its pictures can be used. The first: {refused[0]}"
    if remarks:
        return f"{source}: nothing in it was taken. The first: {remarks[0].path}: {remarks[0].text}"
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
