"""nnU-Net raw: `dataset.json`, `imagesTr` and `labelsTr`, the form of MSD, AMOS and of many converted sets.

    dataset.json                   labels and channels, in the form of version 1 or of version 2
    imagesTr/<case>_0000.nii.gz    a file a channel; or <case>.nii.gz, where a fourth axis may hold the channels (MSD)
    labelsTr/<case>.nii.gz

Source: the dataset formats of nnU-Net, version 2 (https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md),
version 1, and of the Medical Segmentation Decathlon.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from coreseg.data.labels import categories_of
from coreseg.data.pictures import (
    Found,
    Picture,
    Refusal,
    Remark,
    SetFolder,
    compile_case_pattern,
    describe_folder,
    find_case,
)
from coreseg.data.volumes import Slicing, Volume, cut, fixed_limits, percentile_limits, require, turn_of
from coreseg.errors import ConfigError, DataError, InputError

_ENDINGS = (".nii.gz", ".nii")
_MODALITIES: Mapping[str, str] = {
    "ct": "ct",
    **dict.fromkeys(("mr", "mri", "flair", "t1", "t1w", "t1ce", "t1gd", "t1c", "t2", "t2w", "adc", "dwi"), "mri"),
}


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says: channel names in order, and each label's name and the values that belong to it."""

    channels: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]
    told: Mapping[str, str]


@dataclass(frozen=True)
class Scan:
    """The array of one file and where it lies: indices to mm, x to the patient's right, y to the front, z to the head.

    placed: whether the file says how it lies; where it does not, sides are a guess.
    """

    values: Shaped[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]
    placed: bool


def find_volumes(
    source: Path,
    facts: Mapping[str, str | None],
    name: str | None,
    case_pattern: str | None,
    table: Mapping[str, str] | None,
    slicing: Slicing,
    channel: str | None,
) -> Found:
    """The training cases of `source`; volumes are read one at a time, when the pictures are asked for.

    facts: modality, anatomy, category and licence, where set.json does not tell; dataset.json stands in for the rest.
    table: label to category (`coreseg.data.labels`). channel: number or name, by default the first. The case is the
    file's name without the channel, or what the first group of case_pattern finds in it.

    Raises DataError where the layout, dataset.json, the table or the pattern is wrong, or a fact is given nowhere;
    ConfigError for a channel or window that there is not; MissingExtraError without nibabel.
    """
    require("nnU-Net raw", "nibabel")
    pattern = compile_case_pattern(case_pattern)
    dataset = read_dataset(source)
    index = _channel_index(dataset, channel, source)
    known = {**dataset.told, "modality": _MODALITIES.get(dataset.channels[index].lower(), "")}
    folder = describe_folder(source, facts, name or source.resolve().name, known)
    values_of = dataset.labels
    names = {",".join(map(str, values)): label for label, values in values_of.items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for key, category in categories_of(names, table, folder.category, source / "dataset.json").items():
        wanted[category] = (*wanted.get(category, ()), *values_of[names[key]])
    if slicing.window == "file":
        raise ConfigError("--window file is for DICOM: a NIfTI file has no window. Name one, or leave it out.")
    limits = fixed_limits(slicing.window, folder.modality, folder.anatomy)
    labels, files = (_nifti_files(source / part) for part in ("labelsTr", "imagesTr"))
    found = {case_id: files.get(f"{case_id}_{index:04d}") or files.get(case_id) for case_id in labels}
    images = {case_id: path for case_id, path in found.items() if path is not None}

    def pictures() -> Iterator[Picture | Refusal | Remark]:
        for case_id, image in images.items():
            case = find_case(folder, case_id, pattern) if pattern else f"{folder.name}/{case_id}"
            yield from _slices(image, labels[case_id], index, wanted, limits, slicing, folder, case_id, case)

    return Found(
        folders=(folder,),
        pictures=pictures(),
        images_without_mask=tuple(path for stem, path in files.items() if not {stem, _id(stem)} & set(labels)),
        masks_without_image=tuple(path for case_id, path in labels.items() if case_id not in images),
    )


def read_dataset(source: Path) -> Dataset:
    """What dataset.json in `source` says.

    Raises DataError where the layout is another, or a key is missing or of another form.
    """
    path = source / "dataset.json"
    for needed in (path, source / "imagesTr", source / "labelsTr"):
        if not needed.exists():
            raise DataError(f"{source}: no {needed.name} in it. nnU-Net raw has dataset.json, imagesTr/ and labelsTr/.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Expected the dataset.json of nnU-Net.") from error
    told = told if isinstance(told, dict) else {}
    channels = _table(
        path, "channel_names (or, in version 1, modality)", told.get("channel_names", told.get("modality"))
    )
    labels = _table(path, "labels", told.get("labels"))
    ending = told.get("file_ending", _ENDINGS[0])
    if ending not in _ENDINGS:
        raise DataError(
            f"{path}: its files end in {ending!r}, expected {' or '.join(_ENDINGS)}. Convert the volumes to NIfTI; "
            "flat pictures go into images/ and masks/."
        )
    keys = {"name": "title", "reference": "source", "licence": "licence", "license": "licence", "description": "notes"}
    return Dataset(
        channels=tuple(str(channels[number]) for number in sorted(channels, key=_number(path))),
        labels=_labels(labels, path),
        told={ours: str(told[theirs]) for theirs, ours in keys.items() if told.get(theirs)},
    )


def _table(path: Path, key: str, value: object) -> Mapping[str, object]:
    if not value or not isinstance(value, dict):
        raise DataError(f"{path}: the key {key} is missing or no object. nnU-Net writes it: add it to the file.")
    return value


def _number(path: Path) -> Any:
    def number(text: object) -> int:
        if not re.fullmatch(r"\d+", str(text)):
            raise DataError(f"{path}: {text!r} stands where a whole number was expected. Correct the file.")
        return int(str(text))

    return number


def _labels(labels: Mapping[str, object], path: Path) -> dict[str, tuple[int, ...]]:
    number = _number(path)
    # Version 1 has number -> name; version 2 name -> number, or name -> the numbers that make up a region.
    if all(isinstance(value, str) and not value.isdigit() for value in labels.values()):
        by_name: dict[str, list[str]] = {}
        for key, value in labels.items():
            by_name.setdefault(str(value), []).append(key)
        labels = by_name
    found = {
        name: tuple(number(each) for each in (value if isinstance(value, list) else [value]))
        for name, value in labels.items()
    }
    return {name: values for name, values in found.items() if values != (0,) and name.lower() != "ignore"}


def _channel_index(dataset: Dataset, channel: str | None, source: Path) -> int:
    names = [name.lower() for name in dataset.channels]
    if channel is None:
        return 0
    if channel.lower() in names:
        return names.index(channel.lower())
    if channel.isdigit() and int(channel) < len(names):
        return int(channel)
    shown = ", ".join(f"{index} ({name})" for index, name in enumerate(dataset.channels))
    raise ConfigError(f"{source}: there is no channel {channel!r}, expected one of {shown}.")


def _nifti_files(folder: Path) -> dict[str, Path]:
    """NIfTI files by their names without the ending; hidden ones (macOS leaves such) do not count."""
    return {
        path.name.removesuffix(ending): path
        for path in sorted(folder.iterdir())
        for ending in _ENDINGS
        if path.name.endswith(ending) and not path.name.startswith(".")
    }


def _id(stem: str) -> str:
    return re.sub(r"_\d{4}$", "", stem)


def _slices(
    image: Path,
    label: Path,
    channel: int,
    wanted: Mapping[str, tuple[int, ...]],
    limits: tuple[float, float] | None,
    slicing: Slicing,
    folder: SetFolder,
    case_id: str,
    case: str,
) -> Iterator[Picture | Refusal | Remark]:
    try:
        scan, annotated = read_nifti(image, channel), read_nifti(label)
        _refuse_mismatch(scan, annotated, image)
        turn = turn_of(scan.affine)
    except InputError as error:
        yield Refusal(label, str(error))
        return
    if not scan.placed:
        yield Remark(image, "the file does not say how it lies in the patient: left and right are a guess.")
    if turn.oblique:
        yield Remark(image, turn.told(slicing.axis))
    volume = Volume(
        values=turn(scan.values),
        masks={category: turn(np.isin(annotated.values, values)) for category, values in wanted.items()},
        spacing_mm=turn.spacing_mm,
        limits=limits or percentile_limits(scan.values),
    )
    yield from cut(volume, slicing, folder, image, f"{case_id}_{slicing.axis}", case)


def read_nifti(path: Path, channel: int | None = None) -> Scan:
    """The volume of a NIfTI file, in the file's own axes; one channel of it, where a fourth axis holds them.

    Raises InputError where the file is damaged, or holds anything but a volume of plain numbers.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
        placed = bool(image.header["sform_code"] or image.header["qform_code"])
    except Exception as error:  # whatever a damaged header or a cut-off archive makes nibabel raise
        raise InputError(f"the NIfTI file {path.name} is damaged ({error}). Copy or convert it again.") from error
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 4 and channel is not None and channel < values.shape[3]:
        values = values[..., channel]
    if values.ndim != 3 or values.dtype.kind not in "iuf":
        raise InputError(
            f"{path.name} holds {values.dtype} of the shape {values.shape}, expected a volume of numbers. Convert it."
        )
    return Scan(values, affine, placed)


def _refuse_mismatch(scan: Scan, label: Scan, image: Path) -> None:
    if scan.values.shape != label.values.shape:
        raise InputError(
            f"the labels have the shape {label.values.shape}, their image {image.name} {scan.values.shape}. Expected "
            "one: resample the labels to the image."
        )
    ends = np.array([(*corner, 1) for corner in product(*((0, length - 1) for length in label.values.shape))])
    apart_mm = np.abs((scan.affine - label.affine)[:3] @ ends.T).max()
    finest_mm = np.linalg.norm(scan.affine[:3, :3], axis=0).min()
    if not apart_mm <= finest_mm / 2:
        raise InputError(
            f"the labels lie elsewhere than their image {image.name}: their affines part corners by {apart_mm:.1f} mm, "
            "expected less than half a voxel. If the voxels belong together nevertheless, give both the same header."
        )
    if label.values.dtype.kind == "f" and not (label.values == np.round(label.values)).all():
        raise InputError("the labels are no whole numbers, expected 0, 1, 2 and so on. Save the labels themselves.")
