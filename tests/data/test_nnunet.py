"""nnU-Net raw: masks on the right pixels whatever the orientation, both forms of dataset.json, and bad input."""

import gzip
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import ALL, DARK, WINDOW, Laid, contents, imported, lay, refusal, rows_of, write_nnunet

from coreseg.data.volumes import Slicing
from coreseg.errors import ConfigError, MissingExtraError

SHAPE = (14, 18, 12)


def assert_on_the_bright_pixels(image: np.ndarray, mask: np.ndarray) -> None:
    """The mask is what is bright; between two pixels an enlarged picture passes through grey, where both are right."""
    grey = image[..., 0].astype(int)
    assert mask.any() and grey[mask].min() >= 115 and grey[~mask].max() <= 160


# --- Orientation -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    axes=st.permutations((0, 1, 2)),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    spacing_mm=st.tuples(*[st.sampled_from((0.7, 1.0, 1.9, 4.3))] * 3),
    turn_deg=st.sampled_from((0.0, 0.0, 8.0, 20.0)),
    axis=st.sampled_from(("axial", "coronal", "sagittal")),
    ending=st.sampled_from((".nii", ".nii.gz")),
)
def test_masks_land_on_their_pixels_and_sides_on_theirs(
    axes: list[int], flips: tuple[bool, ...], spacing_mm: tuple[float, ...], turn_deg: float, axis: str, ending: str
) -> None:
    values, labels = contents(SHAPE)
    laid = lay(values, labels, spacing_mm, axes, flips, turn_deg)
    with tempfile.TemporaryDirectory() as folder:
        root = write_nnunet(Path(folder) / "set", {"case_00012": laid})
        if ending == ".nii":
            for path in root.rglob("*.nii.gz"):
                path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()
        slicing = Slicing(axis=axis, window=WINDOW, min_area_mm2=0.0, max_slices=99)
        report, lesion_set = imported(root, slicing=slicing, together=False)
        across = {"sagittal": 0, "coronal": 1, "axial": 2}[axis]
        rows = rows_of(lesion_set, "tumour")
        assert list(rows) == np.flatnonzero(labels.any(axis=tuple({0, 1, 2} - {across}))).tolist()
        assert set(rows_of(lesion_set, "core")) < set(rows)
        assert bool(report.remarks) == bool(turn_deg) and all("oblique" in each.text for each in report.remarks)
        column_mm, row_mm = np.delete(spacing_mm, across)
        for index, row in rows.items():
            image, mask = lesion_set.image(row), lesion_set.mask(row)
            assert_on_the_bright_pixels(image, mask)
            shown = np.take(labels > 0, index, axis=across).T
            # Square pixels: as fine as the finer axis, the other one longer.
            finer_mm = min(column_mm, row_mm)
            height, width = shown.shape
            assert mask.shape == (round(height * row_mm / finer_mm), round(width * column_mm / finer_mm))
            # The lesion lies near the patient's right, front and head: left and up in every view.
            down, right = (np.mean(at) / size for at, size in zip(np.nonzero(mask), mask.shape, strict=True))
            assert down < 0.5 and right < 0.5
            assert mask.sum() * finer_mm**2 == pytest.approx(shown.sum() * column_mm * row_mm, rel=0.3)
            if column_mm == row_mm:
                assert np.array_equal(mask, shown)


def test_an_axial_slice_equals_the_frame_it_was_made_in(tmp_path: Path) -> None:
    values, labels = contents(SHAPE)
    # As most CT sets store it: x to the patient's left, y to the back, z to the head.
    root = write_nnunet(tmp_path / "set", {"a": lay(values, labels, flips=(False, False, True))})
    _, lesion_set = imported(root)
    for index, row in rows_of(lesion_set, "tumour").items():
        expected = np.clip((values[:, :, index].T - (50 - 250)) / 500, 0, 1) * 255
        assert np.abs(lesion_set.image(row)[..., 0] - expected).max() <= 1
        assert np.array_equal(lesion_set.mask(row), (labels[:, :, index] > 0).T)


def test_a_lesion_of_one_voxel_survives_stretching(tmp_path: Path) -> None:
    values, labels = contents(SHAPE)
    labels[:] = 0
    labels[5, 6, 3] = 1
    root = write_nnunet(tmp_path / "set", {"a": lay(values, labels, (0.7, 0.7, 5.0))})
    for axis in ("axial", "coronal"):
        slicing = Slicing(axis=axis, window=WINDOW, min_area_mm2=0.0)
        _, lesion_set = imported(root, tmp_path / axis, slicing=slicing)
        (row,) = rows_of(lesion_set, "tumour").values()
        assert lesion_set.mask(row).sum() in {"axial": (1,), "coronal": (7, 8)}[axis]


# --- Slices, windows, labels, channels -------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two cases of one layout."""
    return write_nnunet(tmp_path / "set", {f"case_{number:05d}": lay(*contents(SHAPE, number)) for number in range(2)})


def test_the_rows_say_where_they_come_from(two: Path) -> None:
    (two / "set.json").write_text(json.dumps({"licence": "CC BY 4.0", "title": "Two"}), encoding="utf-8")
    report, lesion_set = imported(two, name="mine", together=False)
    assert {(row.source, row.licence, row.modality) for row in lesion_set.samples} == {("mine", "CC BY 4.0", "ct")}
    assert {row.case for row in lesion_set.samples} == {"mine/case_00000", "mine/case_00001"}
    assert report.unknown_case == 0 and report.refused == ()
    assert json.loads((lesion_set.root / "sources.json").read_text(encoding="utf-8"))["mine"]["title"] == "Two"
    split_of = {row.case: row.split for row in lesion_set.samples}
    assert sorted(split_of.values()) == ["train", "val"]
    assert all(split_of[row.case] == row.split for row in lesion_set.samples)


def test_a_pattern_tells_the_patient_of_several_scans(two: Path) -> None:
    _, lesion_set = imported(two, case_pattern=r"^(case)_")
    assert {row.case for row in lesion_set.samples} == {"set/case"}


def test_a_pattern_that_does_not_fit_is_told(two: Path) -> None:
    assert "finds a patient in no picture's name" in refusal(two, case_pattern=r"^(patient)_")
    report, lesion_set = imported(two, case_pattern=r"^case_(00000)")
    assert {row.case for row in lesion_set.samples} == {"set/00000", ""}
    (remark,) = report.remarks
    assert f"no patient for {report.unknown_case} rows, such as that of 'set_case_00001" in remark.text


def test_slices_by_area_number_and_with_empty_ones(two: Path) -> None:
    core_mm2 = 3.0 * 4
    only_large = Slicing(window=WINDOW, min_area_mm2=core_mm2 + 1, max_slices=99)
    _, lesion_set = imported(two, two.parent / "large", slicing=only_large)
    assert {row.category for row in lesion_set.samples} == {"tumour"}
    few = Slicing(window=WINDOW, max_slices=2, keep_empty=True)
    report, lesion_set = imported(two, two.parent / "few", slicing=few)
    tumour = rows_of(lesion_set, "tumour")
    assert list(tumour) == [2, 4, 6, 10]  # 1 to 5 hold the lesion, 0 and 6 to 11 do not; a case each
    assert [bool(row.boxes) for row in tumour.values()] == [True, True, False, False]
    assert report.images == 8 and report.negatives == 8  # two categories on two slices of two cases
    assert not any(lesion_set.mask(row).any() for row in lesion_set.samples if not row.boxes)


def test_a_table_chooses_and_joins_labels(two: Path) -> None:
    told = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "cancer"}}
    (two / "dataset.json").write_text(json.dumps(told), encoding="utf-8")
    table = two.parent / "labels.toml"
    for text, expected in (
        ('cancer = "liver tumor"', {"liver tumor"}),
        ('1 = "liver tumor"\nCancer = "liver tumor"', {"liver tumor"}),
        ('1 = "organ"\n2 = "liver  tumor"', {"organ", "liver tumor"}),
    ):
        table.write_text(text, encoding="utf-8")
        _, lesion_set = imported(two, two.parent / f"out{len(text)}", labels=table)
        assert {row.category for row in lesion_set.samples} == expected
        if '1 = "liver tumor"' in text:
            row = lesion_set.samples[0]
            assert_on_the_bright_pixels(lesion_set.image(row), lesion_set.mask(row))
    _, lesion_set = imported(two, two.parent / "named")
    assert {row.category for row in lesion_set.samples} == {"liver", "cancer"}
    table.write_text('spleen = "cyst"', encoding="utf-8")
    assert "'spleen', but it has 1 (liver), 2 (cancer)" in refusal(two, labels=table)
    assert "--labels" in refusal(two, category="liver tumor")
    for text in ("1 = 2", "1", "[a]\nb = 1", ""):
        table.write_text(text, encoding="utf-8")
        assert "label" in refusal(two, labels=table)
    assert "gone.json" in refusal(two, labels=two / "gone.json")


def test_the_one_label_takes_the_category_given(two: Path) -> None:
    told = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "ignore": 2, "lesion": 1}}
    (two / "dataset.json").write_text(json.dumps(told), encoding="utf-8")
    _, lesion_set = imported(two, category="liver tumor")
    assert {row.category for row in lesion_set.samples} == {"liver tumor"}


def test_windows_by_anatomy_and_percentiles_for_mri(two: Path) -> None:
    def greys(out: str, **options: Any) -> np.ndarray:
        slicing = Slicing(window=options.pop("window", ""), min_area_mm2=0.0)
        _, lesion_set = imported(two, two.parent / out, slicing=slicing, **options)
        return np.unique(lesion_set.image(lesion_set.samples[0]))

    assert set(greys("abdomen")) == {0, 255}  # -150 to 250 HU
    assert 0 not in greys("lung", anatomy="lung")  # -1350 to 150 HU
    assert set(greys("bone", window="bone")) - {0} and greys("bone2", window="400/1800").max() < 250
    assert np.array_equal(greys("percentile", window="percentile"), greys("mri", modality="mri"))
    assert greys("mri2", modality="mri").max() == 255
    assert "No usual CT window is known for 'toe'" in refusal(two, anatomy="toe", slicing=Slicing())
    for window in ("bones", "40", "40/0", "40/-3", "nan/80", "40/80/1"):
        with pytest.raises(ConfigError, match="window"):
            Slicing(window=window)
    assert "DICOM" in refusal(two, slicing=Slicing(window="file"))


def test_wrong_numbers_of_slices_and_axes() -> None:
    for wrong in ({"axis": "oblique"}, {"max_slices": 0}, {"min_area_mm2": -1.0}, {"min_area_mm2": float("nan")}):
        with pytest.raises(ConfigError):
            Slicing(**wrong)


def test_channels_in_files_and_in_a_fourth_axis(tmp_path: Path) -> None:
    values, labels = contents(SHAPE)
    told = {"modality": {"0": "T2", "1": "FLAIR"}, "labels": {"0": "background", "1": "edema", "2": "core"}}
    files = write_nnunet(tmp_path / "files", {"BraTS_001": lay(values, labels)}, told)
    shutil.move(files / "imagesTr" / "BraTS_001_0000.nii.gz", files / "imagesTr" / "BraTS_001_0001.nii.gz")
    deep = write_nnunet(tmp_path / "deep", {"BRATS_001": lay(values, labels)}, told)
    (deep / "imagesTr" / "BRATS_001_0000.nii.gz").unlink()
    laid = lay(values, labels)
    stacked = np.stack((np.full_like(laid.values, DARK), laid.values), axis=-1)
    nibabel.save(nibabel.Nifti1Image(stacked, laid.affine), deep / "imagesTr" / "BRATS_001.nii.gz")
    (deep / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"macOS")
    for root in (files, deep):
        for channel in ("1", "flair"):
            _, lesion_set = imported(root, tmp_path / f"{root.name}{channel}", channel=channel)
            assert {row.modality for row in lesion_set.samples} == {"mri"}
            assert {Path(row.case).name.upper() for row in lesion_set.samples} == {"BRATS_001"}
            row = next(iter(rows_of(lesion_set, "core").values()))
            assert lesion_set.image(row)[lesion_set.mask(row)].min() > 200
        assert "0 (T2), 1 (FLAIR)" in refusal(root, channel="T1")
    assert "no image has a mask" in refusal(tmp_path / "files", channel="0")
    assert "all one grey" in refusal(tmp_path / "deep", channel="0")
    told["modality"]["0"] = "PD"
    (tmp_path / "deep" / "dataset.json").write_text(json.dumps(told), encoding="utf-8")
    assert "--modality" in refusal(tmp_path / "deep", channel="0")


def test_a_volume_without_lesion_is_named(two: Path) -> None:
    values, labels = contents(SHAPE)
    write_nnunet(two, {"healthy": lay(values, np.zeros_like(labels))})
    report, _ = imported(two)
    (remark,) = report.remarks
    assert remark.path.name == "healthy_0000.nii.gz" and "no lesion" in remark.text
    report, _ = imported(two, two.parent / "few", slicing=Slicing(window=WINDOW, min_area_mm2=14.0))
    assert len(report.remarks) == 1
    assert "nothing in it was taken" in refusal(two, slicing=Slicing(window=WINDOW, min_area_mm2=9e9))


def test_memory_stays_flat_over_volumes(two: Path) -> None:
    """Each volume is read when its pictures are asked for, and no earlier."""
    from coreseg.data.nnunet import find_volumes

    found = find_volumes(two, {"anatomy": "abdomen"}, None, None, None, ALL, None)
    (two / "imagesTr" / "case_00001_0000.nii.gz").unlink()
    pictures = iter(found.pictures)
    first = list(itertools.islice(pictures, 5))
    assert {each.origin.name for each in first} == {"case_00000_0000.nii.gz"}
    assert "damaged" in next(pictures).reason


# --- Bad input -------------------------------------------------------------------------------------------------------


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def test_dataset_json_of_another_form(two: Path) -> None:
    path = two / "dataset.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    for broken, words in (
        (without(told, "labels"), "the key labels"),
        (without(told, "channel_names"), "the key channel_names"),
        ({**told, "labels": []}, "the key labels"),
        ({**told, "labels": {"background": 0}}, "no label besides the background"),
        ({**told, "labels": {"tumour": "one", "background": 0}}, "'one'"),
        ({**told, "channel_names": {"first": "CT"}}, "'first'"),
        ({**told, "file_ending": ".nrrd"}, "'.nrrd'"),
        ([], "the key channel_names"),
    ):
        path.write_text(json.dumps(broken), encoding="utf-8")
        assert words in refusal(two)
    path.write_text("{", encoding="utf-8")
    assert "not JSON" in refusal(two)
    path.unlink()
    assert "no dataset.json" in refusal(two)
    shutil.rmtree(two / "labelsTr")
    path.write_text(json.dumps(told), encoding="utf-8")
    assert "no labelsTr" in refusal(two)


def test_files_without_their_counterpart_are_named(two: Path) -> None:
    (two / "imagesTr" / "case_00000_0000.nii.gz").rename(two / "imagesTr" / "case_00009_0000.nii.gz")
    report, lesion_set = imported(two)
    assert [path.name for path in report.images_without_mask] == ["case_00009_0000.nii.gz"]
    assert [path.name for path in report.masks_without_image] == ["case_00000.nii.gz"]
    assert {row.case for row in lesion_set.samples} == {"set/case_00001"}


def spoilt(laid: Laid, how: str) -> Laid:
    labels, affine = laid.labels.copy(), laid.affine.copy()
    if how == "shape":
        labels = labels[:-1]
    elif how == "affine":
        affine[0, 0] *= -1
    elif how == "shift":
        affine[2, 3] += 0.8
    elif how == "fractions":
        labels = labels * np.float32(0.4)
    elif how == "colour":
        labels = np.stack([labels] * 3, axis=-1)
    elif how == "flat":
        affine[:3, 2] = 0
    return Laid(laid.values, labels, affine)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shape", "the labels have the shape (13, 18, 12)"),
        ("affine", "part corners by"),
        ("shift", "part corners by 0.8 mm"),
        ("fractions", "no whole numbers"),
        ("colour", "expected a volume"),
        ("cut off", "damaged"),
        ("text", "damaged"),
        ("empty", "damaged"),
    ],
)
def test_a_bad_volume_is_set_aside_and_the_others_imported(two: Path, how: str, words: str) -> None:
    laid = spoilt(lay(*contents(SHAPE)), how)
    path = two / "labelsTr" / "case_00000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(laid.labels, laid.affine), path)
    if how in ("cut off", "text", "empty"):
        path = two / "imagesTr" / "case_00000_0000.nii.gz"
        path.write_bytes({"cut off": path.read_bytes()[:900], "text": b"no volume", "empty": b""}[how])
    report, lesion_set = imported(two)
    (refused,) = report.refused
    assert refused.path.name == "case_00000.nii.gz" and words in refused.reason
    assert {row.case for row in lesion_set.samples} == {"set/case_00001"}


def test_headers_that_round_differently_are_one_place(two: Path) -> None:
    laid = lay(*contents(SHAPE))
    affine = laid.affine + np.array([0, 0, 0, 1e-3])
    affine[3] = (0, 0, 0, 1)
    nibabel.save(nibabel.Nifti1Image(laid.labels, affine), two / "labelsTr" / "case_00000.nii.gz")
    assert imported(two)[0].refused == ()


def test_a_file_that_does_not_say_how_it_lies(two: Path) -> None:
    for path in (two / "imagesTr" / "case_00000_0000.nii.gz", two / "labelsTr" / "case_00000.nii.gz"):
        header = nibabel.Nifti1Header()
        header["pixdim"][1:4] = 1
        image = nibabel.Nifti1Image(np.asanyarray(nibabel.load(path).dataobj), None, header)
        image.header["sform_code"] = image.header["qform_code"] = 0
        nibabel.save(image, path)
    report, _ = imported(two)
    assert [("left and right are a guess" in each.text) for each in report.remarks] == [True]


def test_names_in_any_script(tmp_path: Path) -> None:
    root = write_nnunet(tmp_path / "Läsionen", {"случай_1": lay(*contents(SHAPE)), "病例 2": lay(*contents(SHAPE, 1))})
    report, lesion_set = imported(root)
    assert report.refused == ()
    assert {row.case for row in lesion_set.samples} == {"Läsionen/случай_1", "Läsionen/病例 2"}
    for row in rows_of(lesion_set, "tumour").values():
        assert_on_the_bright_pixels(lesion_set.image(row), lesion_set.mask(row))


def test_without_nibabel(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coreseg.data import volumes

    monkeypatch.setattr(volumes, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"nibabel.*\[dicom\]"):
        imported(two)


def test_options_of_other_forms(two: Path) -> None:
    assert "--salt does nothing for the form nnunet" in refusal(two, salt="x")
    assert "expected folder, coco, nnunet, dicom" in refusal(two, form="dicoms")
