"""DICOM and DICOM-SEG: masks on the right pixels whatever the orientation, no identifier kept, and bad input."""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import scans
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLosslessSV1
from scans import WINDOW, Laid, contents, lay, picture, rows_of, save, segmentation, series

from coreseg.data.dicom import _scan
from coreseg.data.dicom_headers import frames_of
from coreseg.data.pictures import Refusal
from coreseg.data.store import LesionSet
from coreseg.data.volumes import Slicing
from coreseg.errors import MissingExtraError
from coreseg.types import Sample

SHAPE = (14, 18, 12)
NAMES = {1: "Tumour", 2: "Core_part"}
imported, refusal = partial(scans.imported, salt="pepper"), partial(scans.refusal, salt="pepper")


def frames(laid: Laid) -> np.ndarray:
    """The labels as DICOM-SEG takes them: slices x rows x columns."""
    return laid.labels.transpose(2, 1, 0)


def written(root: Path, laid: Laid, **options: Any) -> tuple[list[Dataset], Dataset]:
    """A series and its segmentation, in folders of their own below the root."""
    slices = series(laid, **options)
    drawn = segmentation(slices, frames(laid), NAMES)
    save(root / "Anna Müller" / "CT", slices)
    save(root / "SEG", [drawn])
    return slices, drawn


def assert_shown(lesion_set: LesionSet, labels: np.ndarray, axis: str) -> None:
    """Every slice with a lesion is there, and its masks lie where the labels do in the shown frame, at its size."""
    across = {"sagittal": 0, "coronal": 1, "axial": 2}[axis]
    for category, number in (("Tumour", 1), ("Core part", 2)):
        there = labels == number
        rows = rows_of(lesion_set, category)
        assert list(rows) == np.flatnonzero(there.any(axis=tuple({0, 1, 2} - {across}))).tolist()
        for index, row in rows.items():
            mask, shown = lesion_set.mask(row), np.take(there, index, axis=across).T
            nearest = [
                (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(mask.shape, shown.shape, strict=True)
            ]
            assert np.array_equal(mask, shown[np.ix_(*nearest)])
            bright = lesion_set.image(row)[..., 0] > 160
            assert not (mask & (lesion_set.image(row)[..., 0] < 115)).any()
            assert not (bright & ~np.take(labels > 0, index, axis=across).T[np.ix_(*nearest)]).any()


@settings(max_examples=15)
@given(
    axes=st.permutations((0, 1, 2)),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    spacing_mm=st.tuples(*[st.sampled_from((0.7, 1.0, 4.3))] * 3),
    turn_deg=st.sampled_from((0.0, 15.0)),
    axis=st.sampled_from(("axial", "coronal", "sagittal")),
)
def test_masks_land_on_their_pixels_and_sides_on_theirs(
    axes: list[int], flips: tuple[bool, ...], spacing_mm: tuple[float, ...], turn_deg: float, axis: str
) -> None:
    values, labels = contents(SHAPE)
    laid = lay(values, labels, spacing_mm, axes, flips, turn_deg)
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "study", laid)
        slicing = Slicing(axis=axis, window=WINDOW, min_area_mm2=0.0, max_slices=99)
        report, lesion_set = imported(Path(folder) / "study", slicing=slicing, together=False)
        assert report.refused == () and bool(report.remarks) == bool(turn_deg)
        # The lesion was made near the patient's right, front and head, and is compared in that frame: left and up.
        assert_shown(lesion_set, labels, axis)


@pytest.fixture
def laid() -> Laid:
    return lay(*contents(SHAPE), (0.9, 0.9, 2.5), flips=(False, False, True))


# --- What is kept, and what is not -----------------------------------------------------------------------------------


def test_cases_are_salted_hashes_and_no_identifier_is_left(tmp_path: Path, laid: Laid) -> None:
    slices, drawn = written(tmp_path / "study", laid)
    _, lesion_set = imported(tmp_path / "study")
    _, again = imported(tmp_path / "study", tmp_path / "again")
    _, other = imported(tmp_path / "study", tmp_path / "other", salt="sugar")
    _, unsalted = imported(tmp_path / "study", tmp_path / "unsalted", salt=None)
    (case,) = {row.case for row in lesion_set.samples}
    assert len(case) == 16 and int(case, 16)
    assert again.samples == lesion_set.samples
    assert len({case, other.samples[0].case, unsalted.samples[0].case}) == 3
    kept = b"".join(
        str(path.relative_to(tmp_path)).encode() + path.read_bytes()
        for path in sorted(lesion_set.root.rglob("*"))
        if path.is_file()
    )
    for told in ("Müller", "Anna", "IM00", *(str(each.SOPInstanceUID) for each in (*slices, drawn))):
        assert told.encode() not in kept
    assert str(slices[0].SeriesInstanceUID).encode() not in kept


def test_two_patients_several_series_and_what_is_no_picture(tmp_path: Path, laid: Laid) -> None:
    root = tmp_path / "study"
    written(root / "one", laid)
    written(root / "two", lay(*contents(SHAPE, 1), flips=(True, False, False)), patient="Nobody")
    save(root / "three", series(laid), "unsegmented")
    (root / "notes.txt").write_text("not DICOM")
    (root / "broken.dcm").write_bytes(b"not DICOM either")
    contours = picture(np.zeros((8, 8), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3")
    save(root / "four", [contours])
    report, lesion_set = imported(root)
    assert len({row.case for row in lesion_set.samples}) == 2
    assert len(report.images_without_mask) == 1 and "unsegmented" in report.images_without_mask[0].name
    assert {refused.path.name for refused in report.refused} == {"broken.dcm", "IM0000"}
    assert any("RTSTRUCT" in refused.reason for refused in report.refused)
    assert report.masks_without_image == ()


def test_a_table_names_the_segments(tmp_path: Path, laid: Laid) -> None:
    written(tmp_path / "study", laid)
    table = tmp_path / "labels.json"
    table.write_text(json.dumps({"core_part": "liver tumor", "Tumour": "liver tumor"}), encoding="utf-8")
    _, lesion_set = imported(tmp_path / "study", labels=table)
    assert {row.category for row in lesion_set.samples} == {"liver tumor"}
    index, row = next(iter(rows_of(lesion_set, "liver tumor").items()))
    there = contents(SHAPE)[1][:, :, index].T > 0
    assert np.array_equal(lesion_set.mask(row), there)


def test_a_segmentation_without_references_goes_by_position(tmp_path: Path, laid: Laid) -> None:
    slices, drawn = written(tmp_path / "study", laid)
    for group in drawn.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    save(tmp_path / "study" / "SEG", [drawn])
    _, by_series = imported(tmp_path / "study", tmp_path / "by-series")
    del drawn.ReferencedSeriesSequence
    save(tmp_path / "study" / "SEG", [drawn])
    _, by_frame_of_reference = imported(tmp_path / "study", tmp_path / "by-frame")
    for lesion_set in (by_series, by_frame_of_reference):
        assert_shown(lesion_set, contents(SHAPE)[1], "axial")
    # Two series in one frame of reference: whose it is cannot be told.
    save(tmp_path / "study" / "second", series(laid, FrameOfReferenceUID=slices[0].FrameOfReferenceUID))
    assert "no image has a mask" in refusal(tmp_path / "study")


def test_a_mirrored_segmentation_is_mirrored_back(tmp_path: Path, laid: Laid) -> None:
    """Tools that work in another frame write rows and columns the other way round, and say so."""
    slices = series(laid)
    flipped = frames(laid)[:, ::-1, ::-1]
    drawn = segmentation(slices, flipped, NAMES)
    spacing = np.array(slices[0].PixelSpacing, dtype=float)
    directions = np.array(slices[0].ImageOrientationPatient, dtype=float)
    shared = drawn.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [f"{-each:.9f}" for each in directions]
    corner = directions[:3] * spacing[1] * (slices[0].Columns - 1) + directions[3:] * spacing[0] * (slices[0].Rows - 1)
    move(drawn, corner)
    save(tmp_path / "study", [*slices, drawn])
    _, lesion_set = imported(tmp_path / "study")
    assert_shown(lesion_set, contents(SHAPE)[1], "axial")


def move(drawn: Dataset, shift_mm: Any) -> None:
    """Every frame of a segmentation elsewhere; frames of two segments may share the object that says where."""
    places = {
        id(group.PlanePositionSequence[0]): group.PlanePositionSequence[0]
        for group in drawn.PerFrameFunctionalGroupsSequence
    }
    for place in places.values():
        moved = np.array(place.ImagePositionPatient, dtype=float) + shift_mm
        place.ImagePositionPatient = [f"{mm:.5f}" for mm in moved]


def test_fractional_segments_count_from_half_on(tmp_path: Path, laid: Laid) -> None:
    slices = series(laid)
    shares = np.where(frames(laid) == 1, 0.6, 0.0) + np.where(frames(laid) == 2, 0.4, 0.0)
    drawn = segmentation(slices, np.where(shares > 0, 1, 0), {1: "Tumour"})
    fractional = segmentation(slices, np.where(shares > 0, 1, 0), {1: "Tumour"}, segmentation_type="FRACTIONAL")
    pixels = np.frombuffer(fractional.PixelData, np.uint8).copy()
    stored = pixels.reshape(-1, slices[0].Rows, slices[0].Columns)
    order = [
        [str(each.SOPInstanceUID) for each in slices].index(
            group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        )
        for group in fractional.PerFrameFunctionalGroupsSequence
    ]
    stored[:] = np.round(shares[order] * 255)
    fractional.PixelData = pixels.tobytes()
    assert drawn.SegmentationType == "BINARY"
    save(tmp_path / "study", [*slices, fractional])
    _, lesion_set = imported(tmp_path / "study")
    labels = contents(SHAPE)[1]
    for index, row in rows_of(lesion_set, "Tumour").items():
        assert np.array_equal(lesion_set.mask(row), labels[:, :, index].T == 1)


# --- Greys -----------------------------------------------------------------------------------------------------------


def shown(root: Path, datasets: list[Dataset], labels: np.ndarray, **options: Any) -> tuple[np.ndarray, Sample]:
    """The one picture that comes of the datasets, one frame each, and its row."""
    save(root / "study", [*datasets, segmentation(datasets, labels, {1: "Lesion"})])
    _, lesion_set = imported(root / "study", root / "out", **{"slicing": Slicing(), **options})
    (row,) = lesion_set.samples
    assert np.array_equal(lesion_set.mask(row), labels[0] == 1)
    return lesion_set.image(row), row


def ramp(rows: int = 12, columns: int = 16) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.arange(rows * columns).reshape(rows, columns)
    return pixels, np.repeat(pixels[np.newaxis] > 150, 1, axis=0).astype(np.uint8)


def test_an_x_ray_is_shown_in_its_own_window_and_inverted_where_it_says_so(tmp_path: Path) -> None:
    pixels, labels = ramp()
    told = {"Modality": "DX", "WindowCenter": "100", "WindowWidth": "200", "BurnedInAnnotation": "YES"}
    plain, row = shown(tmp_path / "a", [picture(pixels.astype(np.uint16), **told)], labels)
    assert row.modality == "x-ray" and row.case
    assert np.abs(plain[..., 0] - pixels / 200 * 255).max() <= 1
    inverted = picture(pixels.astype(np.uint16), PhotometricInterpretation="MONOCHROME1", **told)
    image, _ = shown(tmp_path / "b", [inverted], labels)
    assert np.array_equal(image, 255 - plain)
    own = Slicing(window="percentile")
    image, _ = shown(tmp_path / "c", [picture(pixels.astype(np.uint16), **told)], labels, slicing=own)
    assert np.abs(image.astype(int) - plain).max() > 2
    image, _ = shown(tmp_path / "d", [picture(pixels.astype(np.uint8), Modality="US")], labels)
    assert np.array_equal(image[..., 0], pixels)


def test_the_files_own_window_of_a_ct(tmp_path: Path, laid: Laid) -> None:
    written(tmp_path / "study", laid, WindowCenter=["500", "40"], WindowWidth=["2000", "400"])
    _, lesion_set = imported(tmp_path / "study", slicing=Slicing(window="file"))
    expected = (contents(SHAPE)[0][:, :, 1].T + 500) / 2000 * 255
    row = rows_of(lesion_set, "Tumour")[1]
    assert np.abs(lesion_set.image(row)[..., 0] - expected).max() <= 1


def test_colour_ultrasound_and_the_frames_of_a_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    _, labels = ramp()
    image, row = shown(tmp_path / "a", [picture(colour, Modality="US", PatientID="")], labels)
    assert np.array_equal(image, colour)
    assert (row.modality, row.case) == ("ultrasound", "")
    clip = picture(rng.integers(0, 255, (6, 12, 16, 3), dtype=np.uint8), Modality="US")
    save(tmp_path / "clip", [clip, clip_mask(clip, labels, 4)])
    _, lesion_set = imported(tmp_path / "clip", tmp_path / "clip-out")
    (row,) = lesion_set.samples
    assert np.array_equal(lesion_set.image(row), clip.pixel_array[3])
    assert np.array_equal(lesion_set.mask(row), labels[0] == 1)


def clip_mask(clip: Dataset, labels: np.ndarray, frame: int) -> Dataset:
    """A segmentation of one frame of a clip, which names it by number."""
    still = picture(clip.pixel_array[0], SOPInstanceUID=clip.SOPInstanceUID, SeriesInstanceUID=clip.SeriesInstanceUID)
    drawn = segmentation([still], labels, {1: "Lesion"})
    for group in drawn.PerFrameFunctionalGroupsSequence:
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = frame
    return drawn


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_no_segmentation_and_no_dicom(tmp_path: Path, laid: Laid) -> None:
    save(tmp_path / "study", series(laid))
    assert "no DICOM-SEG beside its 1 series" in refusal(tmp_path / "study")
    (tmp_path / "bare").mkdir()
    assert "no DICOM-SEG beside its 0 series" in refusal(tmp_path / "bare", form="dicom")
    assert "no such folder" in refusal(tmp_path / "gone", form="dicom")


def test_a_segmentation_whose_series_is_missing(tmp_path: Path, laid: Laid) -> None:
    root = tmp_path / "study"
    written(root, laid)
    stray = series(laid)
    save(root / "stray", [segmentation(stray, frames(laid), NAMES)], "stray")
    report, _ = imported(root)
    assert [path.name for path in report.masks_without_image] == ["stray0000"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("between slices", "mm from the nearest slice"),
        ("other grid", "not those of its series"),
        ("leaves", "leaves the picture"),
        ("cut off", "cannot be decoded"),
        ("no segment", "no usable DICOM-SEG"),
    ],
)
def test_a_bad_segmentation_is_set_aside(tmp_path: Path, laid: Laid, fault: str, words: str) -> None:
    root = tmp_path / "study"
    written(root, laid, patient="good")
    slices, drawn = written(tmp_path / "bad", laid)
    move(drawn, {"between slices": (0.0, 0.0, 1.2), "leaves": (9 * 0.9, 0.0, 0.0)}.get(fault, (0.0, 0.0, 0.0)))
    if fault == "other grid":
        drawn.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = ["0.8", "0.8"]
    if fault == "cut off":
        drawn.PixelData = drawn.PixelData[:40]
    if fault == "no segment":
        del drawn.SegmentSequence
    save(root / "bad", [*slices, drawn])
    report, lesion_set = imported(root)
    (refused,) = report.refused
    assert words in refused.reason
    assert len({row.case for row in lesion_set.samples}) == 1


def test_uneven_and_repeated_slices(tmp_path: Path, laid: Laid) -> None:
    slices = series(laid)
    drawn = segmentation(slices, frames(laid), NAMES)
    root = tmp_path / "gap"
    # The file's axis runs to the head: of the shown slices 0 to 11, number 10 holds no lesion and goes.
    save(root, [*slices[:1], *slices[2:], drawn])
    report, lesion_set = imported(root)
    assert "unevenly spaced" in report.remarks[0].text
    assert sorted(rows_of(lesion_set, "Tumour")) == np.flatnonzero((contents(SHAPE)[1] == 1).any(axis=(0, 1))).tolist()
    assert "unevenly spaced" in refusal(root, slicing=Slicing(axis="coronal", window=WINDOW))
    twice = series(laid, SeriesInstanceUID=slices[0].SeriesInstanceUID)
    save(tmp_path / "phases", [*slices, *twice, drawn])
    assert "several pictures in one place" in refusal(tmp_path / "phases")


def test_damaged_pixels_are_set_aside(tmp_path: Path, laid: Laid) -> None:
    slices, _ = written(tmp_path / "study", laid)
    slices[3].PixelData = slices[3].PixelData[:100]
    save(tmp_path / "study" / "Anna Müller" / "CT", slices)
    assert "cannot be decoded" in refusal(tmp_path / "study")


def test_of_a_file_whose_header_breaks_no_frame_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = picture(np.zeros((6, 12, 16, 3), dtype=np.uint8), Modality="US")
    save(tmp_path / "clip", [clip, clip_mask(clip, ramp()[1], 4)])

    def breaking(dataset: Dataset, path: Path) -> Iterator[object]:
        yield from frames_of(dataset, path)
        raise ValueError("no position")

    monkeypatch.setattr("coreseg.data.dicom.frames_of", breaking)
    refused: list[Refusal] = []
    stacks, _ = _scan(tmp_path / "clip", refused)
    assert stacks == [] and "no position" in refused[0].reason


def test_a_compression_that_needs_a_plugin_is_one_error(tmp_path: Path, laid: Laid) -> None:
    slices, _ = written(tmp_path / "study", laid)
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    save(tmp_path / "study" / "Anna Müller" / "CT", slices)
    said = refusal(tmp_path / "study")
    assert "JPEG Lossless" in said and "pip install pylibjpeg" in said


def test_facts_and_windows_that_are_missing(tmp_path: Path, laid: Laid) -> None:
    written(tmp_path / "study", laid)
    assert "--anatomy" in refusal(tmp_path / "study", anatomy=None)
    assert "No usual CT window is known for 'toe'" in refusal(tmp_path / "study", anatomy="toe", slicing=Slicing())
    assert "--channel does nothing" in refusal(tmp_path / "study", channel="1")


def test_without_pydicom(tmp_path: Path, laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    from coreseg.data import volumes

    written(tmp_path / "study", laid)
    monkeypatch.setattr(volumes, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pydicom and nibabel.*\[dicom\]"):
        imported(tmp_path / "study")
