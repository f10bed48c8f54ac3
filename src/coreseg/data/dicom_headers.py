"""What DICOM headers say: how pictures lie in the patient, and which of them make up a volume."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from coreseg.data.pictures import Refusal

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES: Mapping[str, str] = {
    "CT": "ct",
    "MR": "mri",
    "US": "ultrasound",
    **dict.fromkeys(("CR", "DX", "MG", "RG"), "x-ray"),
    "PT": "pet",
    "OP": "fundus photography",
    "ES": "endoscopy",
    "DMS": "dermoscopy",
    "XC": "visible-light photography",
}
# Where an object of many frames keeps what a file of one frame has at its top.
_GROUP_OF: Mapping[str, str] = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "ReferencedSegmentNumber": "SegmentIdentificationSequence",
    "SourceImageSequence": "DerivationImageSequence",
}
_UNEVEN_SHARE = 0.1  # gaps between slices may differ by so much of the usual one
_PARALLEL_SHARE = 0.01  # the ways from pixel to pixel in two slices of a volume, by so much of their length


@dataclass(frozen=True)
class Plane:
    """How a picture lies in the patient, in mm, x to the patient's left, y to the back, z to the head.

    origin_mm: the centre of its first pixel; across_mm and down_mm: the way to the next column, and to the next row.
    """

    origin_mm: Float[np.ndarray, "3"]
    across_mm: Float[np.ndarray, "3"]
    down_mm: Float[np.ndarray, "3"]

    @property
    def normal(self) -> Float[np.ndarray, "3"]:
        """The direction across the picture, of length 1."""
        across = np.cross(self.across_mm, self.down_mm)
        return np.asarray(across / np.linalg.norm(across))


def value_of(dataset: "Dataset", frame: int, keyword: str) -> Any:
    """An attribute of one frame, from the top of the file or from its functional groups; None where there is none."""
    return dataset[keyword].value if keyword in dataset else value_in_groups(dataset, frame, keyword)


def value_in_groups(dataset: "Dataset", frame: int, keyword: str) -> Any:
    """An attribute of one frame from the functional groups alone; None where there is none."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(groups) or ()
        group = items[index].get(_GROUP_OF.get(keyword, "")) if index < len(items) else None
        if group and keyword in group[0]:
            return group[0][keyword].value
    return None


def plane_of(dataset: "Dataset", frame: int) -> Plane | None:
    """Where a frame lies in the patient, or None where the file does not say, or nothing that makes sense."""
    keywords = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    position, orientation, spacing = (value_of(dataset, frame, keyword) for keyword in keywords)
    if not position or not orientation or not spacing:
        return None
    origin, axes = np.array(position, dtype=np.float64), np.array(orientation, dtype=np.float64)
    row_mm, column_mm = (float(mm) for mm in spacing)
    plane = Plane(origin, axes[:3] * column_mm, axes[3:] * row_mm)
    area = np.linalg.norm(np.cross(plane.across_mm, plane.down_mm))
    return plane if np.isfinite(origin).all() and np.isfinite(area) and area > 0 else None


@dataclass(frozen=True)
class Frame:
    """One picture in a DICOM file: its place in the file, from 0, and in the patient, where it has one."""

    path: Path
    number: int
    uid: str
    plane: Plane | None


@dataclass(frozen=True)
class Stack:
    """Frames of one size: the slices of a volume in order, or the frames of one file that lie nowhere in the patient.

    gap_mm is the usual distance of two slices, uneven whether others differ from it.
    """

    frames: tuple[Frame, ...]
    size_wh: tuple[int, int]
    series: str
    patient: str
    modality: str
    frame_of_reference: str
    transfer_syntax: str
    burned_in: bool
    gap_mm: float = 1.0
    uneven: bool = False

    @property
    def planes(self) -> list[Plane]:
        """Where its slices lie; none where they lie nowhere."""
        return [frame.plane for frame in self.frames if frame.plane]


def frames_of(dataset: "Dataset", path: Path) -> Iterator[tuple[Stack, Frame]]:
    """The frames of a file, each with the stack of its kind, still empty."""
    stack = Stack(
        frames=(),
        size_wh=(int(dataset.Columns), int(dataset.Rows)),
        series=str(dataset.SeriesInstanceUID),
        patient=str(dataset.get("PatientID", "") or ""),
        modality=_MODALITIES.get(str(dataset.Modality), str(dataset.Modality).lower()),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "") or ""),
        transfer_syntax=str(dataset.file_meta.TransferSyntaxUID),
        burned_in=dataset.get("BurnedInAnnotation") == "YES",
    )
    for number in range(int(dataset.get("NumberOfFrames", 1) or 1)):
        yield stack, Frame(path, number, str(dataset.SOPInstanceUID), plane_of(dataset, number))


def stacks_of(frames: Iterable[tuple[Stack, Frame]], refused: list[Refusal]) -> list[Stack]:
    """The frames sorted into stacks: by series and size; then what is parallel, or what lies nowhere, by file."""
    groups: dict[tuple[object, ...], list[list[tuple[Stack, Frame]]]] = {}
    for stack, frame in frames:
        same_size = groups.setdefault((stack.series, stack.size_wh), [])
        for group in same_size:
            if _beside(group[0][1], frame):
                group.append((stack, frame))
                break
        else:
            same_size.append([(stack, frame)])
    found = (_in_order(group, refused) for same_size in groups.values() for group in same_size)
    return [stack for stack in found if stack is not None]


def _beside(one: Frame, other: Frame) -> bool:
    if one.plane is None or other.plane is None:
        return one.plane is other.plane and one.path == other.path
    ways = zip((one.plane.across_mm, one.plane.down_mm), (other.plane.across_mm, other.plane.down_mm), strict=True)
    return all(np.linalg.norm(a - b) <= _PARALLEL_SHARE * np.linalg.norm(a) for a, b in ways)


def _in_order(members: Sequence[tuple[Stack, Frame]], refused: list[Refusal]) -> Stack | None:
    stack, frames = members[0][0], [frame for _, frame in members]
    planes = [frame.plane for frame in frames if frame.plane]
    if not planes:
        return replace(stack, frames=tuple(frames))
    along_mm = np.array([float(planes[0].normal @ plane.origin_mm) for plane in planes])
    order = np.argsort(along_mm, kind="stable")
    gaps_mm = np.diff(along_mm[order])
    if gaps_mm.size and gaps_mm.min() < 1e-3:
        reason = "its series has several pictures in one place, perhaps phases. Export each phase as its own series."
        refused.append(Refusal(frames[0].path, reason))
        return None
    gap_mm = float(np.median(gaps_mm)) if gaps_mm.size else 1.0
    uneven = bool(gaps_mm.size and np.abs(gaps_mm - gap_mm).max() > _UNEVEN_SHARE * gap_mm)
    return replace(stack, frames=tuple(frames[index] for index in order), gap_mm=gap_mm, uneven=uneven)
