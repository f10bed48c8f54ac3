"""Scans with known contents, laid into files in any orientation, for the tests of the importers.

Contents are made in the frame that pictures are shown in: x runs to the patient's left, y to the back, z to the feet.
The frames of the files are worked out here by hand, not by the code that is tested.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from coreseg.data.sources import ImportReport, import_set
from coreseg.data.store import LesionSet
from coreseg.data.volumes import Slicing
from coreseg.errors import CoreSegError
from coreseg.types import Sample

DARK, BRIGHT = -190, 300
WINDOW = "50/500"
"""In this window, dark is nearly black and bright is white."""
ALL = Slicing(window=WINDOW, min_area_mm2=0.0, max_slices=99)

MR_STORAGE, CT_STORAGE = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.2"


@dataclass(frozen=True)
class Laid:
    """An array as a file holds it, its labels, and its affine: indices to mm, right, front, head (as NIfTI has it)."""

    values: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


def contents(shape: Sequence[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values and labels in the shown frame: label 1 near the patient's right, front and head, label 2 inside it."""
    rng = np.random.default_rng(seed)
    values = rng.integers(DARK, DARK + 40, shape).astype(np.int16)
    labels = np.zeros(shape, dtype=np.uint8)
    x, y, z = shape
    labels[1 : x // 2 - 1, 1 : y // 2 - 2, 1 : z // 2] = 1
    labels[2 : x // 2 - 2, 2 : y // 2 - 3, 2 : z // 2 - 1] = 2
    labels[1 : x // 3, y // 2 - 2, 1 : z // 2] = 1  # no symmetry
    values[labels > 0] = rng.integers(BRIGHT, BRIGHT + 20, int((labels > 0).sum()))
    return values, labels


def lay(
    values: np.ndarray,
    labels: np.ndarray,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    axes: Sequence[int] = (0, 1, 2),
    flips: Sequence[bool] = (False, False, False),
    turn_deg: float = 0.0,
) -> Laid:
    """The contents as a file holds them whose axis i runs along the shown axis axes[i], backwards where flips[i]."""
    to_right_front_head = np.diag((-1.0, -1.0, -1.0))  # x to the left, y to the back, z to the feet
    affine = np.eye(4)
    for axis, (shown, flipped) in enumerate(zip(axes, flips, strict=True)):
        step = to_right_front_head[:, shown] * spacing_mm[shown]
        affine[:3, axis] = -step if flipped else step
        if flipped:
            affine[:3, 3] += step * (values.shape[shown] - 1)
    angle = np.radians(turn_deg)
    turn = np.eye(4)
    turn[:3, :3] = [
        [np.cos(angle), -np.sin(angle), 0],
        [np.sin(angle), np.cos(angle), 0],
        [0, 0, 1],
    ]
    tilt = turn[np.ix_((1, 2, 0, 3), (1, 2, 0, 3))]
    shift = np.eye(4)
    shift[:3, 3] = (12.5, -30.0, 7.25)
    backwards = tuple(slice(None, None, -1 if flipped else 1) for flipped in flips)
    return Laid(values.transpose(axes)[backwards], labels.transpose(axes)[backwards], shift @ turn @ tilt @ affine)


def imported(root: Path, out: Path | None = None, **options: Any) -> tuple[ImportReport, LesionSet]:
    """The import of a source with usual options, by default of volumes in all their slices."""
    destination = out or root.parent / "out"
    usual = {"anatomy": "abdomen", "slicing": ALL, "describe": lambda *_: "", "progress": False}
    report = import_set(root, destination, **{**usual, **options})
    return report, LesionSet.open(destination)


def refusal(root: Path, **options: Any) -> str:
    """The one clear line that an import ends with, which leaves nothing behind."""
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(CoreSegError) as caught:
        imported(root, root.parent / "refused", **options)
    assert sorted(root.parent.rglob("*")) == before
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def rows_of(lesion_set: LesionSet, category: str) -> dict[int, Sample]:
    """Rows of one category by the number of their slice."""
    return {
        int(Path(row.file_name).stem.rsplit("_", 1)[1]): row for row in lesion_set.samples if row.category == category
    }


def write_nnunet(root: Path, cases: Mapping[str, Laid], told: Mapping[str, Any] | None = None) -> Path:
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for case, laid in cases.items():
        nibabel.save(nibabel.Nifti1Image(laid.values, laid.affine), root / "imagesTr" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(laid.labels, laid.affine), root / "labelsTr" / f"{case}.nii.gz")
    about = told or {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "tumour": [1, 2], "core": 2},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return root


def series(laid: Laid, patient: str = "Müller^Anna", **more: Any) -> list[Dataset]:
    """The slices of a CT series, one along each index of the last axis; columns run along the first axis."""
    to_dicom = np.diag((-1.0, -1.0, 1.0, 1.0)) @ laid.affine
    column_mm, row_mm = (float(np.linalg.norm(to_dicom[:3, axis])) for axis in (0, 1))
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    slices = []
    for index in range(laid.values.shape[2]):
        pixels = (laid.values[:, :, index].T.astype(np.int32) + 1024).astype(np.uint16)
        dataset = picture(pixels, **uids)
        dataset.PatientID = patient
        dataset.ImagePositionPatient = [f"{mm:.6f}" for mm in (to_dicom @ (0, 0, index, 1))[:3]]
        directions = (*(to_dicom[:3, 0] / column_mm), *(to_dicom[:3, 1] / row_mm))
        dataset.ImageOrientationPatient = [f"{cosine:.9f}" for cosine in directions]
        dataset.PixelSpacing = [f"{row_mm:.6f}", f"{column_mm:.6f}"]
        dataset.SliceThickness = "1"
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        dataset.InstanceNumber = index + 1
        for keyword, value in more.items():
            setattr(dataset, keyword, value)
        slices.append(dataset)
    return slices


def picture(pixels: np.ndarray, **more: Any) -> Dataset:
    """A DICOM image of one frame, or of several where a first axis counts them; colour where a last has three."""
    colour = pixels.shape[-1] == 3
    frames = pixels.shape[0] if pixels.ndim == (4 if colour else 3) else 1
    rows, columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CT_STORAGE
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID = "Müller^Anna", "Müller^Anna"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(dataset, keyword, "")
    dataset.ReferringPhysicianName, dataset.SeriesNumber = "", 1
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    for keyword, value in more.items():
        setattr(dataset, keyword, value)
    return dataset


def segmentation(sources: Sequence[Dataset], labels: np.ndarray, names: Mapping[int, str], **more: Any) -> Dataset:
    """A DICOM-SEG on the sources. labels: slices x rows x columns, numbers as in `names`, one value a pixel."""
    import highdicom
    from pydicom.sr.codedict import codes

    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type="MANUAL",
        )
        for number, name in names.items()
    ]
    masks = np.stack([labels == number for number in names], axis=-1)
    return highdicom.seg.Segmentation(
        source_images=list(sources),
        pixel_array=masks.astype(np.uint8),
        segment_descriptions=descriptions,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="nobody",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
        **{"segmentation_type": "BINARY", **more},
    )


def save(folder: Path, datasets: Sequence[Dataset], prefix: str = "IM") -> None:
    """The datasets as files without an ending, in an order that says nothing of their places."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, dataset in enumerate(sorted(datasets, key=lambda each: str(each.SOPInstanceUID)[::-1])):
        pydicom.dcmwrite(folder / f"{prefix}{number:04d}", dataset, enforce_file_format=True)
