"""DICOM: a folder of series, nested at will, and the DICOM-SEG objects that were drawn on them.

What a file is says its header, not its name. A series is one volume, its slices in order along their common normal;
pictures that lie nowhere in the patient (ultrasound, photographs, most x-rays) stand for themselves and are shown as
stored, the frames of a clip as its slices. Only what is segmented is imported.

The case is a salted hash of the PatientID. No other identifier, and no file name, goes into the data set.

Source: DICOM PS3.3 (https://dicom.nema.org/medical/dicom/current/output/html/part03.html).
"""

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from coreseg.data.dicom_headers import Frame, Stack, frames_of, stacks_of, value_of
from coreseg.data.dicom_seg import (
    Segmentation,
    SegmentFrame,
    nearest_slice,
    place,
    read_masks,
    read_segmentation,
)
from coreseg.data.labels import categories_of
from coreseg.data.pictures import Found, Picture, Refusal, Remark, SetFolder, describe_folder
from coreseg.data.volumes import (
    ACROSS,
    Slicing,
    Volume,
    cut,
    fixed_limits,
    limits_of,
    percentile_limits,
    require,
    turn_of,
)
from coreseg.errors import DataError, InputError, MissingExtraError

if TYPE_CHECKING:
    from pydicom import Dataset

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"
_ENDINGS = {".dcm", ".dicom", ".ima"}


@dataclass(frozen=True)
class _Job:
    """A stack, what was drawn on it, and how it is to be shown."""

    stack: Stack
    drawn: tuple[Segmentation, ...]
    folder: SetFolder
    limits: tuple[float, float] | None
    case: str
    name: str


def find_series(
    source: Path,
    facts: Mapping[str, str | None],
    name: str | None,
    table: Mapping[str, str] | None,
    slicing: Slicing,
    salt: str | None,
) -> Found:
    """The segmented series below `source`; headers are read now, pixels when the pictures are asked for.

    facts: modality, anatomy, category and licence, where set.json does not tell; the headers give the modality of each
    series where nothing else does. table: segment label to category (`coreseg.data.labels`). salt: of the hashes; by
    default one is drawn and forgotten, so that nobody can try out patient numbers, and hashes differ between imports.

    Raises DataError where there is no DICOM-SEG, or a fact is given nowhere; ConfigError for a window that there is
    not; MissingExtraError without pydicom and nibabel, or what they need for these files.
    """
    require("DICOM", "pydicom", "nibabel")
    if not source.is_dir():
        raise DataError(f"{source}: no such folder. Expected one with DICOM files in it: check the path.")
    refused: list[Refusal] = []
    stacks, segmentations = _scan(source, refused)
    if not segmentations:
        raise DataError(f"{source}: no DICOM-SEG beside its {len(stacks)} series. Put the segmentations there.")
    if not stacks:
        told = f" The first: {refused[0]}" if refused else ""
        raise DataError(f"{source}: no series beside its DICOM-SEG that can be used.{told}")
    known = {"modality": ", ".join(sorted({stack.modality for stack in stacks}))}
    folder = describe_folder(source, facts, name or source.resolve().name, known)
    labels = {label: label for each in segmentations for label in each.labels.values()}
    wanted = categories_of(labels, table, folder.category, source)
    key = hashlib.blake2b((salt or secrets.token_hex(32)).encode()).digest()
    jobs = [
        _job(stack, drawn, folder, slicing, key, of_headers=folder.modality == known["modality"])
        for stack in stacks
        if (drawn := tuple(each for each in segmentations if _belongs(each, stack, stacks)))
    ]
    used = {each.path for job in jobs for each in job.drawn}
    _require_decoders({each.transfer_syntax: each.frames[0].path for each in (job.stack for job in jobs)})
    _require_decoders({each.transfer_syntax: each.path for each in segmentations})
    uids = frozenset(frame.uid for stack in stacks for frame in stack.frames)
    return Found(
        folders=(folder,),
        pictures=(picture for job in jobs for picture in _pictures(job, wanted, slicing, uids)),
        refused=tuple(refused),
        images_without_mask=tuple(
            stack.frames[0].path for stack in stacks if not any(stack is job.stack for job in jobs)
        ),
        masks_without_image=tuple(each.path for each in segmentations if each.path not in used),
    )


def _require_decoders(path_of_syntax: Mapping[str, Path]) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    for syntax, path in path_of_syntax.items():
        uid = UID(syntax)
        if not uid.is_compressed or uid.is_deflated:
            continue
        try:
            available = get_decoder(uid).is_available
        except NotImplementedError as error:
            raise DataError(f"{path}: stored as {uid.name}, which is not read. Convert the series first.") from error
        if not available:
            raise MissingExtraError(
                f"{path}: stored as {uid.name}, which pydicom decodes with a plugin only: "
                "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
            )


def _scan(source: Path, refused: list[Refusal]) -> tuple[list[Stack], list[Segmentation]]:
    import pydicom
    from pydicom.errors import InvalidDicomError

    segmentations: list[Segmentation] = []
    frames: list[tuple[Stack, Frame]] = []
    for path in sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith(".")):
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            kind = str(dataset.get("SOPClassUID", ""))
            if kind in _SEGMENTATIONS:
                segmentations.append(read_segmentation(dataset, path))
            elif kind == _CONTOURS:
                refused.append(Refusal(path, "contours (RTSTRUCT) are not read. Convert them to DICOM-SEG."))
            elif "Rows" in dataset:
                frames += list(frames_of(dataset, path))  # all of a file or none
        except InvalidDicomError:
            if path.suffix.lower() in _ENDINGS:
                refused.append(Refusal(path, "no DICOM, whatever its name says. Copy or export it again."))
        except Exception as error:  # whatever a damaged header makes pydicom raise
            refused.append(Refusal(path, f"a damaged DICOM file ({error}). Copy or export it again."))
    return stacks_of(frames, refused), segmentations


def _belongs(segmentation: Segmentation, stack: Stack, stacks: Iterable[Stack]) -> bool:
    if segmentation.references:
        return any(frame.uid in segmentation.references for frame in stack.frames)
    if segmentation.series:
        return stack.series in segmentation.series
    there = [each for each in stacks if each.frame_of_reference == segmentation.frame_of_reference != ""]
    return len(there) == 1 and there[0] is stack


def _job(
    stack: Stack, drawn: tuple[Segmentation, ...], folder: SetFolder, slicing: Slicing, key: bytes, *, of_headers: bool
) -> _Job:
    def hashed(text: str) -> str:
        return hashlib.blake2b(text.encode(), key=key, digest_size=8).hexdigest() if text else ""

    own = replace(folder, modality=stack.modality) if of_headers else folder
    limits = fixed_limits(slicing.window, own.modality, own.anatomy)
    # A series may hold several stacks: the first frame's own identifier tells them apart.
    name = f"{hashed(stack.patient)[:8]}-{hashed(stack.frames[0].uid)[:8]}".lstrip("-")
    return _Job(stack, drawn, own, limits, hashed(stack.patient), name)


def _pictures(
    job: _Job, wanted: Mapping[str, str], slicing: Slicing, uids: frozenset[str]
) -> Iterator[Picture | Refusal | Remark]:
    stack, origin = job.stack, job.stack.frames[0].path
    masks: dict[str, Bool[np.ndarray, "x y z"]] = {}
    spoilt: set[str] = set()
    for segmentation in job.drawn:
        categories = {number: wanted[label] for number, label in segmentation.labels.items() if label in wanted}
        try:
            _draw(segmentation, categories, stack, masks, uids)
        except InputError as error:
            # Part of a category's lesions would be a wrong mask.
            spoilt |= set(categories.values())
            yield Refusal(segmentation.path, str(error))
    masks = {category: mask for category, mask in masks.items() if category not in spoilt}
    if not masks:
        return
    try:
        volume, remarks = _volume(job, masks, slicing)
    except InputError as error:
        yield Refusal(origin, str(error))
        return
    yield from (Remark(origin, text) for text in remarks)
    if stack.planes:
        yield from cut(volume, slicing, job.folder, origin, f"{job.name}_{slicing.axis}", job.case)
    else:
        yield from cut(volume, replace(slicing, axis="axial"), job.folder, origin, job.name, job.case)


def _draw(
    segmentation: Segmentation,
    categories: Mapping[int, str],
    stack: Stack,
    masks: dict[str, Bool[np.ndarray, "x y z"]],
    uids: frozenset[str],
) -> None:
    """Joins the segments of one object to the masks of a stack."""
    columns, rows = stack.size_wh
    for category in categories.values():
        masks.setdefault(category, np.zeros((columns, rows, len(stack.frames)), dtype=bool))
    for number, frame, drawn in read_masks(segmentation, list(categories)):
        index = _slice_of(frame, stack, uids)
        if index is not None:
            placed = place(drawn, frame.plane, stack.frames[index].plane, rows, columns)
            masks[categories[number]][:, :, index] |= placed.T


def _slice_of(frame: SegmentFrame, stack: Stack, uids: frozenset[str]) -> int | None:
    """The slice that a frame was drawn on; None where it was drawn on another stack.

    By the picture it names; where it names none or several, by where it lies.
    """
    named = dict.fromkeys(frame.references)
    if named and not any(uid in uids for uid, _ in named):
        raise InputError("it was drawn on pictures that are not there. Put them beside it.")
    if named and not any(each.uid == uid for each in stack.frames for uid, _ in named):
        return None
    ours = [i for i, each in enumerate(stack.frames) if (each.uid, each.number) in named or (each.uid, None) in named]
    if len(ours) == 1:
        own = stack.frames[ours[0]].plane
        if frame.plane is not None and own is not None:
            nearest_slice(frame.plane, [own], stack.gap_mm)
        return ours[0]
    if frame.plane is None or not stack.planes:
        raise InputError("a frame of it neither names one picture nor says where it lies. Export it again.")
    return nearest_slice(frame.plane, stack.planes, stack.gap_mm)


def _volume(job: _Job, masks: Mapping[str, Bool[np.ndarray, "x y z"]], slicing: Slicing) -> tuple[Volume, list[str]]:
    stack = job.stack
    values, limits, inverted = _read(job, slicing)
    remarks = ["its header says that names are burned into the pictures."] if stack.burned_in else []
    if not stack.planes:
        return Volume(values, masks, None, limits, inverted), remarks
    turn = turn_of(_affine(stack))
    if stack.uneven:
        if int(turn.transform[2, 0]) != ACROSS[slicing.axis]:
            raise InputError(f"its slices are unevenly spaced, so no {slicing.axis} ones can be cut from them.")
        remarks.append("its slices are unevenly spaced, perhaps some are missing.")
    if turn.oblique:
        remarks.append(turn.told(slicing.axis))
    turned = {category: turn(mask) for category, mask in masks.items()}
    return Volume(turn(values), turned, turn.spacing_mm, limits, inverted), remarks


def _affine(stack: Stack) -> Float[np.ndarray, "4 4"]:
    """Indices (column, row, slice) to mm, x to the patient's right, y to the front, z to the head."""
    first, last = stack.planes[0], stack.planes[-1]
    steps = max(len(stack.frames) - 1, 1)
    through = (last.origin_mm - first.origin_mm) / steps if len(stack.frames) > 1 else first.normal
    affine = np.eye(4)
    affine[:3] = np.column_stack((first.across_mm, first.down_mm, through, first.origin_mm))
    return np.asarray(np.diag((-1.0, -1.0, 1.0, 1.0)) @ affine)


def _read(
    job: _Job, slicing: Slicing
) -> tuple[Shaped[np.ndarray, "x y z *channels"], tuple[float, float] | None, bool]:
    """The pixels of a stack, the values that become black and white, and whether these change places."""
    import pydicom

    slices: list[np.ndarray] = []
    opened: Any = None
    try:
        for frame in job.stack.frames:
            if opened is None or Path(opened.filename) != frame.path:
                opened = pydicom.dcmread(frame.path)
                pixels = _pixels(opened)
            slices.append(_rescaled(pixels[frame.number], opened, frame.number).swapaxes(0, 1))
        values = np.stack(slices, axis=2)
    except Exception as error:  # whatever damaged pixels make a decoder raise
        raise InputError(f"its pixels cannot be decoded ({error}). Copy or export it again.") from error
    return values, _limits(job, slicing, opened, values), opened.PhotometricInterpretation == "MONOCHROME1"


def _pixels(dataset: "Dataset") -> Shaped[np.ndarray, "frames rows columns *channels"]:
    from pydicom.pixels import apply_color_lut

    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        pixels = (pixels // (257 if pixels.dtype.itemsize > 1 else 1)).astype(np.uint8)
    return pixels if int(dataset.get("NumberOfFrames", 1) or 1) > 1 else pixels[np.newaxis]


def _rescaled(pixels: Shaped[np.ndarray, "rows columns *channels"], dataset: "Dataset", frame: int) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    if pixels.ndim == 3 or "ModalityLUTSequence" in dataset:
        return pixels if pixels.ndim == 3 else np.asarray(apply_modality_lut(pixels, dataset))
    slope, intercept = (value_of(dataset, frame, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None or intercept is None or (float(slope), float(intercept)) == (1.0, 0.0):
        return pixels
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _limits(
    job: _Job, slicing: Slicing, dataset: "Dataset", values: Shaped[np.ndarray, "x y z *channels"]
) -> tuple[float, float] | None:
    if values.ndim == 4:
        return None if values.dtype == np.uint8 else (0.0, float(2 ** int(dataset.BitsStored) - 1))
    if job.limits:
        return job.limits
    centre, width = (value_of(dataset, 0, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    if slicing.window == "file" or (slicing.window == "" and job.folder.modality != "mri"):
        if centre is not None and width is not None:
            first = [float(each[0] if isinstance(each, Sequence) else each) for each in (centre, width)]
            return limits_of(*first)
        if values.dtype == np.uint8:
            return None
    return percentile_limits(values)
