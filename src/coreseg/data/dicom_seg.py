"""DICOM-SEG: which segments an object holds, and the pixels of each frame on the picture that it was drawn on.

Source: DICOM PS3.3, sections A.51 and C.8.20 (https://dicom.nema.org/medical/dicom/current/output/html/part03.html).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, UInt

from coreseg.data.dicom_headers import Plane, plane_of, value_in_groups
from coreseg.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

_OFF_PLANE_SHARE = 0.25  # of the gap between slices: further off, a frame belongs to no slice
_OFF_GRID_PX = 0.25


@dataclass(frozen=True)
class SegmentFrame:
    """A frame of a segmentation: the segment it shows (None: any, by pixel value), the pictures it names, its place.

    references: identifier of a file, and number of a frame in it, from 0, where one is named.
    """

    segment: int | None
    references: tuple[tuple[str, int | None], ...]
    plane: Plane | None


@dataclass(frozen=True)
class Segmentation:
    """A DICOM-SEG without its pixels. labels: of each segment, by number. series: the ones it says it belongs to."""

    path: Path
    labels: Mapping[int, str]
    frames: tuple[SegmentFrame, ...]
    series: frozenset[str]
    frame_of_reference: str
    transfer_syntax: str
    kind: str
    maximum: int

    @property
    def references(self) -> frozenset[str]:
        """The pictures that its frames name."""
        return frozenset(uid for frame in self.frames for uid, _ in frame.references)


def read_segmentation(dataset: "Dataset", path: Path) -> Segmentation:
    """What a DICOM-SEG says of itself.

    Raises InputError where it names no segment, or a frame of it none.
    """
    kind = str(dataset.get("SegmentationType", "BINARY"))
    try:
        labels = {int(each.SegmentNumber): str(each.SegmentLabel) for each in dataset.SegmentSequence}
        frames = tuple(_segment_frame(dataset, index, kind) for index in range(int(dataset.NumberOfFrames)))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"no usable DICOM-SEG ({error}). Export it again.") from error
    return Segmentation(
        path=path,
        labels=labels,
        frames=frames,
        series=frozenset(str(each.SeriesInstanceUID) for each in dataset.get("ReferencedSeriesSequence") or ()),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "")),
        transfer_syntax=str(dataset.file_meta.TransferSyntaxUID),
        kind=kind,
        maximum=int(dataset.get("MaximumFractionalValue", 1)),
    )


def _segment_frame(dataset: "Dataset", index: int, kind: str) -> SegmentFrame:
    segment = None if kind == "LABELMAP" else int(value_in_groups(dataset, index, "ReferencedSegmentNumber"))
    # At the top of the file stand the pictures of all frames.
    sources = value_in_groups(dataset, index, "SourceImageSequence") or ()
    named = tuple((str(each.ReferencedSOPInstanceUID), _number(each.get("ReferencedFrameNumber"))) for each in sources)
    return SegmentFrame(segment, named, plane_of(dataset, index))


def _number(frame_numbers: Any) -> int | None:
    number = frame_numbers[0] if isinstance(frame_numbers, Sequence) else frame_numbers
    return int(number) - 1 if number else None


def read_masks(
    segmentation: Segmentation, numbers: Sequence[int]
) -> Iterator[tuple[int, SegmentFrame, Bool[np.ndarray, "rows columns"]]]:
    """Each frame of the segments in `numbers` with its segment's number and pixels.

    Fractional segments count from half on.

    Raises InputError where the pixels are damaged.
    """
    import pydicom

    try:
        dataset = pydicom.dcmread(segmentation.path)
        pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    except Exception as error:  # whatever damaged pixels make a decoder raise
        raise InputError(f"the pixels cannot be decoded ({error}). Copy or export it again.") from error
    for frame, values in zip(segmentation.frames, pixels, strict=True):
        for number in numbers:
            if frame.segment is None:
                yield number, frame, values == number
            elif frame.segment == number:
                yield number, frame, _at_least_half(values, segmentation)


def _at_least_half(values: UInt[np.ndarray, "rows columns"], segmentation: Segmentation) -> Bool[np.ndarray, "_ _"]:
    least = segmentation.maximum / 2 if segmentation.kind == "FRACTIONAL" else 1
    return np.asarray(values >= least)


def nearest_slice(plane: Plane, planes: Sequence[Plane], gap_mm: float) -> int:
    """The slice of `planes`, parallel and `gap_mm` apart, that a frame lies in.

    Raises InputError where it lies between them, or beyond.
    """
    normal = planes[0].normal
    off_mm = np.abs([float(normal @ (plane.origin_mm - each.origin_mm)) for each in planes])
    if off_mm.min() > _OFF_PLANE_SHARE * gap_mm:
        raise InputError(
            f"a frame lies {off_mm.min():.1f} mm from the nearest slice. Resample the segmentation to its series."
        )
    return int(off_mm.argmin())


def place(
    drawn: Bool[np.ndarray, "_ _"], plane: Plane | None, target: Plane | None, rows: int, columns: int
) -> Bool[np.ndarray, "rows columns"]:
    """The pixels of a frame on the picture it belongs to: mirrored, turned or cut out, where the two planes say so.

    Where either lies nowhere in the patient the two have one grid.

    Raises InputError where they are no such two, or a lesion leaves the picture.
    """
    if plane is None or target is None:
        if drawn.shape != (rows, columns):
            raise InputError(f"a frame is {drawn.shape[1]}x{drawn.shape[0]} px, its picture {columns}x{rows} px.")
        return drawn
    to_pixels = np.linalg.pinv(np.column_stack((target.across_mm, target.down_mm)))
    steps = to_pixels @ np.column_stack((plane.across_mm, plane.down_mm))
    start = to_pixels @ (plane.origin_mm - target.origin_mm)
    whole_steps, whole_start = np.round(steps).astype(int), np.round(start).astype(int)
    far = np.array([[drawn.shape[1] - 1], [drawn.shape[0] - 1]])
    off_px = np.abs([*(start - whole_start), *(start + (steps @ far)[:, 0] - whole_start - (whole_steps @ far)[:, 0])])
    if sorted(np.abs(whole_steps).ravel().tolist()) != [0, 0, 1, 1] or off_px.max() > _OFF_GRID_PX:
        raise InputError("its pixels are not those of its series. Resample the segmentation to the series.")
    down, across = np.nonzero(drawn)
    x, y = whole_start[:, np.newaxis] + whole_steps @ np.stack((across, down))
    if ((x < 0) | (x >= columns) | (y < 0) | (y >= rows)).any():
        raise InputError("a lesion of it leaves the picture. Draw it on the series again.")
    placed = np.zeros((rows, columns), dtype=bool)
    placed[y, x] = True
    return placed
