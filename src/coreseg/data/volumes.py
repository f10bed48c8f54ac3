"""From volumes to pictures: orientation, grey window, and which slices are worth having.

A slice is shown in the radiological convention: axial and coronal with the patient's right on the left of the picture,
sagittal with the front on the left; the head (in axial slices the front) is up. Pixels are square: the coarser of the
two axes is stretched to the finer one, the image by linear interpolation, the mask by repeating pixels, so that no
lesion vanishes.

Our choice throughout: the paper does not say how its slices were made.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image

from coreseg.data.pictures import Picture, Refusal, Remark, SetFolder
from coreseg.errors import ConfigError, InputError, MissingExtraError
from coreseg.masks import resize_mask

ACROSS: Mapping[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Of a volume's axes, the one that a slice is cut across."""

WINDOWS_HU: Mapping[str, tuple[float, float]] = {
    "brain": (40.0, 80.0),
    "stroke": (40.0, 40.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "abdomen": (50.0, 400.0),
    "liver": (30.0, 150.0),
    "bone": (400.0, 1800.0),
}
"""Centre and width of the usual CT windows. Source: Radiopaedia, "Windowing (CT)"; bone is its window of the spine."""

_WINDOW_OF_ANATOMY: Mapping[str, str] = {
    "head": "brain",
    "brain": "brain",
    "lung": "lung",
    "chest": "mediastinum",
    "mediastinum": "mediastinum",
    "heart": "mediastinum",
    "breast": "mediastinum",
    "neck": "mediastinum",
    "abdomen": "abdomen",
    "kidney": "abdomen",
    "pancreas": "abdomen",
    "colon": "abdomen",
    "pelvis": "abdomen",
    "liver": "liver",
    "bone": "bone",
    "spine": "bone",
}
_PERCENTILES = (0.5, 99.5)
_OBLIQUE_DEG = 1.0


@dataclass(frozen=True)
class Slicing:
    """Which slices of a volume become pictures, and in which greys.

    min_area_mm2: a category counts in a slice from this area on. In mm², because a number of pixels would mean another
    lesion on every scanner: 30 px are 5 mm² at 0.4 mm and 30 mm² at 1 mm.
    max_slices: of the slices that count, at most so many of a volume, evenly spread over them. Not the largest areas:
    those are neighbours that show one thing, and leave out the ends of a lesion, which are hard.
    window: a name in WINDOWS_HU, "CENTRE/WIDTH" in HU, "percentile", or "file" (what a DICOM file says). Empty: for
    CT by the anatomy, else the file's where it has one (not for MRI, where scanners differ), else "percentile".
    keep_empty: also at most max_slices slices without any lesion, evenly spread, as lesion-free samples.
    """

    axis: str = "axial"
    min_area_mm2: float = 10.0
    max_slices: int = 5
    window: str = ""
    keep_empty: bool = False

    def __post_init__(self) -> None:
        if self.axis not in ACROSS:
            raise ConfigError(f"The axis is {self.axis!r}, expected {', '.join(ACROSS)}.")
        if not (math.isfinite(self.min_area_mm2) and self.min_area_mm2 >= 0):
            raise ConfigError(f"The least area is {self.min_area_mm2} mm², expected 0 or more, such as 10.")
        if self.max_slices < 1:
            raise ConfigError(f"At most {self.max_slices} slices a volume leave nothing, expected 1 or more.")
        if self.window not in ("", "percentile", "file", *WINDOWS_HU):
            _centre_and_width(self.window)


def _centre_and_width(window: str) -> tuple[float, float]:
    centre, _, width = window.partition("/")
    try:
        numbers = float(centre), float(width)
    except ValueError:
        numbers = math.nan, math.nan
    if not (all(map(math.isfinite, numbers)) and numbers[1] > 0):
        raise ConfigError(
            f"The window is {window!r}, expected {', '.join(WINDOWS_HU)}, percentile, file, or centre and width in HU "
            "such as 40/80."
        )
    return numbers


def require(what: str, *libraries: str) -> None:
    """MissingExtraError where a library that a form needs is not installed."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{what} needs {' and '.join(missing)}; in a clone: pip install '.[dicom]'")


def fixed_limits(window: str, modality: str, anatomy: str) -> tuple[float, float] | None:
    """The values that become black and white, or None where each volume is to give its own.

    Raises ConfigError for a window of no known form, and for CT of an anatomy without a usual window.
    """
    if not window and modality.lower() == "ct":
        window = _WINDOW_OF_ANATOMY.get(anatomy.lower(), "")
        if not window:
            raise ConfigError(
                f"No usual CT window is known for {anatomy!r}. Give --window: {', '.join(WINDOWS_HU)}, or centre and "
                "width such as 40/80."
            )
    if window in ("", "percentile", "file"):
        return None
    return limits_of(*(WINDOWS_HU.get(window) or _centre_and_width(window)))


def limits_of(centre: float, width: float) -> tuple[float, float]:
    """The values that a window makes black and white."""
    return centre - width / 2, centre + width / 2


def percentile_limits(values: Shaped[np.ndarray, "..."]) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles of the values that are finite and not zero, which leaves out an empty background."""
    told = values[np.isfinite(values) & (values != 0)]
    if told.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(told, _PERCENTILES)
    return float(low), float(high)


@dataclass(frozen=True)
class Turn:
    """How an array lies in the patient: nibabel's orientation transform to the frame of Volume, spacing, and tilt.

    tilt_deg: the largest angle between an axis of the array and the axis of the patient that it is taken for.
    """

    transform: Float[np.ndarray, "3 2"]
    spacing_mm: tuple[float, float, float]
    tilt_deg: float

    def __call__(self, values: Shaped[np.ndarray, "i j k *channels"]) -> Shaped[np.ndarray, "x y z *channels"]:
        """A view of the array in the frame of Volume."""
        from nibabel.orientations import apply_orientation

        return np.asarray(apply_orientation(values, self.transform))

    @property
    def oblique(self) -> bool:
        """Whether the array lies askew in the patient by more than 1°."""
        return self.tilt_deg > _OBLIQUE_DEG

    def told(self, axis: str) -> str:
        """What a remark says of an oblique scan."""
        return f"an oblique scan ({self.tilt_deg:.0f}°): cut along its own planes, nearest {axis}."


def turn_of(affine: Float[np.ndarray, "4 4"]) -> Turn:
    """How an array lies whose affine takes indices to mm, x to the patient's right, y to the front, z to the head.

    Each axis goes to the nearest axis of the patient; nothing is resampled, so slices of an oblique scan stay its own.

    Raises InputError where the affine is no frame: spacing that is zero or not finite.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 1e-6 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise InputError(
            f"its voxels have the spacing {' x '.join(f'{mm:g}' for mm in lengths)} mm, expected a frame of three "
            "directions. Correct the header."
        )
    to_patient = io_orientation(affine)
    transform = ornt_transform(to_patient, axcodes2ornt(("L", "P", "I")))
    patient_axis = to_patient[:, 0].astype(int)
    cosines = np.abs(affine[patient_axis, np.arange(3)]) / lengths
    spacing = np.empty(3)
    spacing[patient_axis] = lengths
    tilt = np.degrees(np.arccos(np.clip(cosines.min(), 0, 1)))
    return Turn(transform, (float(spacing[0]), float(spacing[1]), float(spacing[2])), float(tilt))


@dataclass(frozen=True)
class Volume:
    """A scan with its masks. x runs to the patient's left, y to the back, z to the feet.

    limits: the values that become black and white; None keeps 8-bit values as they are. inverted: black and white
    change places after that. spacing_mm is of each axis; None where no size is known.
    """

    values: Shaped[np.ndarray, "x y z *channels"]
    masks: Mapping[str, Bool[np.ndarray, "x y z"]]
    spacing_mm: tuple[float, float, float] | None
    limits: tuple[float, float] | None
    inverted: bool = False


def cut(
    volume: Volume, slicing: Slicing, folder: SetFolder, origin: Path, name: str, case: str
) -> Iterator[Picture | Refusal | Remark]:
    """The slices of a volume that count, as pictures; a remark where there is none.

    Slices are numbered from 0 at the head, the front or the patient's right. A picture has the categories whose area
    counts in it; a lesion-free one all categories, each with an empty mask.
    """
    across = ACROSS[slicing.axis]
    pixel_mm2 = np.delete(volume.spacing_mm, across).prod() if volume.spacing_mm else math.inf
    other_axes = tuple(np.delete(np.arange(3), across))
    areas_px = {category: mask.sum(axis=other_axes) for category, mask in volume.masks.items()}
    touched = np.any([area_px > 0 for area_px in areas_px.values()], axis=0)
    counts = {
        category: (area_px > 0) & (np.where(area_px > 0, area_px, 1) * pixel_mm2 >= slicing.min_area_mm2)
        for category, area_px in areas_px.items()
    }
    with_lesion = np.flatnonzero(np.any(list(counts.values()), axis=0))
    if with_lesion.size == 0 and not slicing.keep_empty:
        why = f"in no slice a lesion of {slicing.min_area_mm2:g} mm²" if touched.any() else "no lesion in it"
        yield Remark(origin, f"{why}: nothing of it was taken.")
    chosen = _spread(with_lesion, slicing.max_slices)
    empty = _spread(np.flatnonzero(~touched), slicing.max_slices if slicing.keep_empty else 0)
    for index in sorted([*chosen.tolist(), *empty.tolist()]):
        image = _shown(volume, across, index)
        if image.min() == image.max():
            if index not in empty:
                yield Refusal(origin, f"slice {index} is all one grey in this window. Choose another --window.")
            continue
        masks = {
            category: (_shown_mask(volume, mask, across, index),)
            for category, mask in volume.masks.items()
            if index in empty or counts[category][index]
        }
        yield Picture(folder, origin, f"{name}_{index:03d}", image, masks, case, "")


def _spread(indices: Int[np.ndarray, " candidates"], count: int) -> Int[np.ndarray, " chosen"]:
    """So many of the indices, each from the middle of one of so many equal stretches of them."""
    if len(indices) <= count:
        return indices
    return np.asarray(indices[((np.arange(count) + 0.5) * len(indices) / count).astype(int)])


def _shown(volume: Volume, across: int, index: int) -> UInt8[np.ndarray, "height width *channels"]:
    plane = np.take(volume.values, index, axis=across).swapaxes(0, 1)
    if volume.limits is not None:
        low, high = volume.limits
        span = high - low or 1.0
        shares = (np.nan_to_num(plane.astype(np.float32), nan=low) - np.float32(low)) / np.float32(span)
        plane = np.clip(shares, 0, 1) * 255 + 0.5
    image = plane.astype(np.uint8)
    if volume.inverted:
        image = 255 - image
    height, width = _square_size(volume, across, image.shape[0], image.shape[1])
    if (height, width) == image.shape[:2]:
        return np.ascontiguousarray(image)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _shown_mask(
    volume: Volume, mask: Bool[np.ndarray, "x y z"], across: int, index: int
) -> Bool[np.ndarray, "height width"]:
    plane = np.take(mask, index, axis=across).T
    return resize_mask(plane, _square_size(volume, across, *plane.shape))


def _square_size(volume: Volume, across: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns once the pixels are square and as fine as the finer of the two axes was."""
    column_mm, row_mm = np.delete(volume.spacing_mm or (1.0, 1.0, 1.0), across)
    finer_mm = min(column_mm, row_mm)
    return round(height * row_mm / finer_mm), round(width * column_mm / finer_mm)
