"""Importing folders: layouts, splits, what is set aside, and that nothing is lost without a word."""

import csv
import errno
import json
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from coreseg.cli import app
from coreseg.data.sources import ImportReport, import_set, recognise
from coreseg.data.store import LesionSet
from coreseg.data.volumes import Slicing
from coreseg.errors import CoreSegError
from coreseg.imaging import read_image, read_mask, write_mask
from coreseg.testing import phantom

FLAGS = {"modality": "ultrasound", "anatomy": "breast", "category": "breast tumor"}
SIZE_WH = (40, 32)


def add(folder: Path, stem: str, *masks: str, suffix: str = ".png", lesions: int = 1) -> None:
    """A picture and any number of masks, by their names below masks/."""
    seed = zlib.crc32(stem.encode())
    shown = phantom(seed, size_wh=SIZE_WH, lesions=lesions)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(shown.image).save(folder / "images" / f"{stem}{suffix}")
    for name in masks:
        (folder / "masks" / name).parent.mkdir(exist_ok=True)
        write_mask(folder / "masks" / name, next(iter(shown.masks.values())))


def write_table(folder: Path, *rows: dict[str, str]) -> None:
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def imported(source: Path, **flags: object) -> tuple[ImportReport, LesionSet]:
    destination = source.parent / f"out-{source.name}"
    report = import_set(source, destination, progress=False, **{**FLAGS, **flags})  # type: ignore[arg-type]
    return report, LesionSet.open(destination)


def files_under(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for index in range(10):
        add(tmp_path / "mine", f"scan{index}", f"scan{index}.png")
    return tmp_path / "mine"


# --- Layouts ---------------------------------------------------------------------------------------------------------


def test_a_plain_folder(plain: Path) -> None:
    report, lesion_set = imported(plain, licence="CC BY 4.0")
    assert report.root == lesion_set.root
    assert (report.rows, report.images, report.negatives, report.unknown_case) == (10, 10, 0, 10)
    assert report.splits == {"train": 8, "val": 2}
    assert report.refused == report.images_without_mask == report.masks_without_image == ()
    for sample in lesion_set.samples:
        stem = sample.file_name.removeprefix("images/mine_").removesuffix(".png")
        assert (lesion_set.root / sample.file_name).read_bytes() == (plain / "images" / f"{stem}.png").read_bytes()
        assert np.array_equal(lesion_set.mask(sample), read_mask(plain / "masks" / f"{stem}.png"))
        assert (sample.modality, sample.anatomy, sample.category) == ("ultrasound", "breast", "breast tumor")
        assert (sample.source, sample.licence, sample.case) == ("mine", "CC BY 4.0", "")
        assert len(sample.boxes) == 1
        assert sample.query
        assert "breast" in sample.reasoning
        assert not re.search(r"\d", sample.reasoning)


def test_categories_by_name_and_by_folder(tmp_path: Path) -> None:
    folder = tmp_path / "eyes"
    add(folder, "a", "a.png", "a_hard_exudate.png", "retinal_haemorrhage/a.png", "ground-glass opacity/a_mask.png")
    add(folder, "a_b", "a_b_mask.png", "a_b_drusen_1.png", "a_b_drusen_2.png")
    report, lesion_set = imported(folder, category="cyst")
    assert report.rows == 6
    assert report.images == 2
    assert {(sample.file_name, sample.category) for sample in lesion_set.samples} == {
        ("images/eyes_a.png", "cyst"),
        ("images/eyes_a.png", "hard exudate"),
        ("images/eyes_a.png", "retinal haemorrhage"),
        ("images/eyes_a.png", "ground-glass opacity"),
        ("images/eyes_a_b.png", "cyst"),
        ("images/eyes_a_b.png", "drusen"),
    }
    assert len({sample.split for sample in lesion_set.samples if sample.file_name == "images/eyes_a.png"}) == 1


def test_a_category_flag_is_not_needed_where_every_mask_names_its_own(tmp_path: Path) -> None:
    add(tmp_path / "eyes", "a", "drusen/a.png")
    report, _ = imported(tmp_path / "eyes", category=None)
    assert report.rows == 1


def test_several_masks_of_one_category_are_joined(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    add(folder, "a")
    left, right = np.zeros((2, SIZE_WH[1], SIZE_WH[0]), dtype=bool)
    left[4:9, 2:9] = True
    right[20:26, 30:38] = True
    write_mask(folder / "masks" / "a_mask.png", left)
    write_mask(folder / "masks" / "a_mask_1.png", right)
    _, lesion_set = imported(folder)
    assert np.array_equal(lesion_set.mask(lesion_set.samples[0]), left | right)
    assert lesion_set.samples[0].boxes == ((2, 4, 9, 9), (30, 20, 38, 26))


def test_an_empty_mask_is_a_negative(tmp_path: Path) -> None:
    add(tmp_path / "mine", "healthy", "healthy.png", lesions=0)
    report, lesion_set = imported(tmp_path / "mine")
    assert report.negatives == 1
    assert lesion_set.samples[0].boxes == ()
    assert not lesion_set.mask(lesion_set.samples[0]).any()
    assert lesion_set.samples[0].reasoning


def test_set_json_goes_before_the_flags(plain: Path) -> None:
    about = {"title": "My scans", "modality": "ct", "category": "cyst", "source": "ward 3", "licence": "mine alone"}
    (plain / "set.json").write_text(json.dumps(about), encoding="utf-8")
    _, lesion_set = imported(plain, name="ward3")
    sample = lesion_set.samples[0]
    assert (sample.modality, sample.anatomy, sample.category) == ("ct", "breast", "cyst")
    assert (sample.source, sample.licence) == ("ward3", "mine alone")
    told = json.loads((lesion_set.root / "sources.json").read_text(encoding="utf-8"))
    assert told["ward3"]["title"] == "My scans"
    assert told["ward3"]["source"] == "ward 3"
    assert told["ward3"]["licence"] == "mine alone"


def test_a_folder_of_sets_becomes_one_set_in_which_names_do_not_collide(tmp_path: Path) -> None:
    for name in ("first", "second"):
        add(tmp_path / "sets" / name, "scan1", "scan1.png")
        about = {"modality": "ct", "anatomy": "lung", "category": f"{name} lesion"}
        (tmp_path / "sets" / name / "set.json").write_text(json.dumps(about), encoding="utf-8")
    report, lesion_set = imported(tmp_path / "sets", modality=None, anatomy=None, category=None)
    assert report.rows == report.images == 2
    assert [(sample.source, sample.category) for sample in lesion_set.samples] == [
        ("first", "first lesion"),
        ("second", "second lesion"),
    ]
    assert set(json.loads((lesion_set.root / "sources.json").read_text(encoding="utf-8"))) == {"first", "second"}


def test_names_that_would_collide_do_not(tmp_path: Path) -> None:
    add(tmp_path / "sets" / "a", "b_c", "b_c.png")
    add(tmp_path / "sets" / "a_b", "c", "c.png")
    _, lesion_set = imported(tmp_path / "sets")
    assert len({sample.file_name for sample in lesion_set.samples}) == 2
    assert len({sample.mask_file_name for sample in lesion_set.samples}) == 2
    for sample in lesion_set.samples:
        lesion_set.mask(sample)


def test_cases_csv_decides_pairs_splits_cases_and_categories(tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    for stem in ("x", "y", "z", "unlisted"):
        add(folder, stem, f"m_{stem}.png")
    write_table(
        folder,
        {"image": "x.png", "mask": "m_x.png", "split": "test", "case": "P1", "category": "cyst", "class": "benign"},
        {"image": "x.png", "mask": "m_y.png", "split": "test", "case": "P1", "category": "nodule", "class": ""},
        {"image": "y.png", "mask": "m_y.png", "split": "val", "case": "P2", "category": "", "class": ""},
        {"image": "z.png", "mask": "", "split": "", "case": "", "category": "", "class": ""},
    )
    report, lesion_set = imported(folder)
    assert [(sample.file_name, sample.category, sample.split, sample.case) for sample in lesion_set.samples] == [
        ("images/listed_x.png", "cyst", "test", "P1"),
        ("images/listed_x.png", "nodule", "test", "P1"),
        ("images/listed_y.png", "breast tumor", "val", "P2"),
    ]
    assert report.splits == {"val": 1, "test": 2}
    assert [path.name for path in report.images_without_mask] == ["unlisted.png", "z.png"]
    assert [path.name for path in report.masks_without_image] == ["m_unlisted.png", "m_z.png"]


# --- Pictures and names ----------------------------------------------------------------------------------------------


def test_jpeg_is_copied_byte_for_byte_and_other_formats_become_png(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    add(folder, "jpeg", "jpeg.png", suffix=".JPEG")
    add(folder, "bitmap", "bitmap.png", suffix=".bmp")
    _, lesion_set = imported(folder)
    files = files_under(lesion_set.root / "images")
    assert files["mine_jpeg.jpg"] == (folder / "images" / "jpeg.JPEG").read_bytes()
    assert np.array_equal(
        read_image(lesion_set.root / "images" / "mine_bitmap.png"), read_image(folder / "images" / "bitmap.bmp")
    )


def test_a_turned_jpeg_is_stored_upright(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    add(folder, "a", "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = read_image(folder / "images" / "a.png")
    (folder / "images" / "a.png").unlink()
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(folder / "images" / "a.jpg", exif=exif, quality=98)
    _, lesion_set = imported(folder)
    assert lesion_set.samples[0].file_name == "images/mine_a.png"
    with Image.open(lesion_set.root / lesion_set.samples[0].file_name) as stored:
        assert stored.size == SIZE_WH
        assert 0x0112 not in stored.getexif()
    assert np.abs(lesion_set.image(lesion_set.samples[0]).astype(int) - upright).mean() < 10


@pytest.mark.parametrize("mask_turned", [False, True])
def test_a_mask_beside_a_turned_picture_must_be_turned_alike(tmp_path: Path, mask_turned: bool) -> None:
    folder = tmp_path / "mine"
    add(folder, "a", "a.png")
    add(folder, "b", "b.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    for part in ("images", "masks")[: 1 + mask_turned]:
        with Image.open(folder / part / "a.png") as picture:
            picture.save(folder / part / "a.png", exif=exif)
    report, lesion_set = imported(folder)
    assert len(lesion_set.samples) == 1 + mask_turned
    reasons = [refused.reason for refused in report.refused if refused.path == folder / "masks" / "a.png"]
    assert len(reasons) == (not mask_turned) and all("EXIF orientation 3" in reason for reason in reasons)


def test_masks_become_0_and_255(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    add(folder, "a")
    values = np.zeros((SIZE_WH[1], SIZE_WH[0]), dtype=np.uint8)
    values[3:9, 5:11] = 1
    Image.fromarray(values).save(folder / "masks" / "a.png")
    _, lesion_set = imported(folder)
    with Image.open(lesion_set.root / lesion_set.samples[0].mask_file_name) as written:
        assert np.array_equal(np.asarray(written), values * 255)


def test_words_that_loaders_take_for_splits_do_not_split_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem in ("train_1", "test.2", "x-val-3", "1validation", "trained", "testis"):
        add(tmp_path / "test_data", stem, f"{stem}.png")
    _, lesion_set = imported(tmp_path / "test_data")
    stems = {Path(sample.file_name).stem.removeprefix("TEST_data_") for sample in lesion_set.samples}
    assert stems == {"TRAIN_1", "TEST.2", "x-VAL-3", "1VALIDATION", "trained", "testis"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(lesion_set.root), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6}


# --- Splits and text -------------------------------------------------------------------------------------------------


def test_patients_never_cross_splits_and_the_seed_decides(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for patient in range(12):
        for view in range(1 + patient % 3):
            add(folder, f"P{patient:02d}_{view}", f"P{patient:02d}_{view}.png")
    split_by_seed = []
    for seed in (0, 0, 1):
        destination = tmp_path / f"out{len(split_by_seed)}"
        report = import_set(folder, destination, case_pattern=r"^P(\d+)_", seed=seed, val_share=0.25, progress=False,
                               **FLAGS)  # fmt: skip
        assert report.unknown_case == 0
        samples = LesionSet.open(destination).samples
        split_of = {sample.case: sample.split for sample in samples}
        assert all(split_of[sample.case] == sample.split for sample in samples)
        assert len(split_of) == 12
        assert list(split_of.values()).count("val") == 3
        assert set(split_of) == {f"mine/{patient:02d}" for patient in range(12)}
        split_by_seed.append(split_of)
    assert split_by_seed[0] == split_by_seed[1] != split_by_seed[2]
    assert files_under(tmp_path / "out0") == files_under(tmp_path / "out1")


def test_an_image_whose_patient_has_a_split_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    rows = []
    for index in range(8):
        add(folder, f"s{index}", f"s{index}.png")
        rows.append({"image": f"s{index}.png", "mask": f"s{index}.png", "case": "P1", "split": ""})
    rows[3]["split"] = "test"
    write_table(folder, *rows)
    assert imported(folder)[0].splits == {"test": 8}


def test_no_share_no_val_and_one_image_is_for_training(plain: Path, tmp_path: Path) -> None:
    assert imported(plain, val_share=0.0)[0].splits == {"train": 10}
    add(tmp_path / "one", "a", "a.png")
    assert imported(tmp_path / "one", val_share=0.4)[0].splits == {"train": 1}
    add(tmp_path / "one2", "a", "a.png")
    add(tmp_path / "one2", "b", "b.png")
    assert imported(tmp_path / "one2", val_share=0.01)[0].splits == {"train": 1, "val": 1}


def test_reasoning_comes_from_whoever_is_asked(plain: Path) -> None:
    calls = []

    def describe(image: np.ndarray, mask: np.ndarray, modality: str, anatomy: str, category: str, seed: int) -> str:
        calls.append((image.shape, mask.shape, modality, anatomy, category))
        return f"seed {seed}"

    _, lesion_set = imported(plain, describe=describe)
    assert calls == [((32, 40, 3), (32, 40), "ultrasound", "breast", "breast tumor")] * 10
    assert len({sample.reasoning for sample in lesion_set.samples}) == 10


def test_one_more_image_changes_no_other_row_text(plain: Path) -> None:
    _, before = imported(plain)
    add(plain, "scan00", "scan00.png")
    import_set(plain, plain.parent / "again", progress=False, **FLAGS)
    after = {sample.file_name: sample for sample in LesionSet.open(plain.parent / "again").samples}
    assert len(after) == 11
    for sample in before.samples:
        assert after[sample.file_name].query == sample.query
        assert after[sample.file_name].reasoning == sample.reasoning


# --- What is set aside -----------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_reported_and_the_rest_imported(plain: Path) -> None:
    write_mask(plain / "masks" / "scan3.png", np.ones((32, 41), dtype=bool))
    (plain / "images" / "scan4.png").write_bytes(b"")
    (plain / "masks" / "scan5.png").write_text("no mask")
    (plain / "masks" / "scan6.png").unlink()
    (plain / "images" / "scan7.png").unlink()
    (plain / "images" / "Thumbs.db").write_bytes(b"x")
    (plain / "images" / ".DS_Store").write_bytes(b"x")
    (plain / "images" / "deeper").mkdir()
    Image.new("RGB", SIZE_WH).save(plain / "images" / "scan8.bmp")
    report, lesion_set = imported(plain)
    refused = {refusal.path.name: refusal.reason for refusal in report.refused}
    assert set(refused) == {"scan3.png", "scan4.png", "scan5.png", "deeper", "scan8.png", "scan8.bmp"}
    assert "41x32 px, its image scan3.png 40x32 px" in refused["scan3.png"]
    assert "0 bytes" in refused["scan4.png"]
    assert "this stem" in refused["scan8.png"] == refused["scan8.bmp"]
    assert [path.name for path in report.images_without_mask] == ["scan6.png"]
    assert [path.name for path in report.masks_without_image] == ["scan7.png", "scan8.png"]
    assert len(lesion_set.samples) == report.rows == 4
    assert {Path(name).parent.name for name in files_under(lesion_set.root)} == {"", "images", "masks"}
    assert len(files_under(lesion_set.root / "images")) == len(files_under(lesion_set.root / "masks")) == 4


def test_a_mask_of_another_size_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    add(tmp_path / "mine", "a", "cyst/a.png", "nodule/a.png")
    write_mask(tmp_path / "mine" / "masks" / "cyst" / "a.png", np.ones((5, 5), dtype=bool))
    report, lesion_set = imported(tmp_path / "mine")
    assert [sample.category for sample in lesion_set.samples] == ["nodule"]
    assert len(report.refused) == 1


def test_a_listed_file_that_is_missing_is_reported(tmp_path: Path) -> None:
    add(tmp_path / "mine", "a", "a.png")
    write_table(
        tmp_path / "mine",
        {"image": "a.png", "mask": "a.png"},
        {"image": "b.png", "mask": "a.png"},
        {"image": "a.png", "mask": "c.png"},
    )
    report, _ = imported(tmp_path / "mine")
    assert [refusal.path.name for refusal in report.refused] == ["b.png", "c.png"]
    assert "line 3" in report.refused[0].reason


def test_a_case_in_two_splits_is_kept_as_given_and_named(tmp_path: Path) -> None:
    rows = [("a", "train", "c1"), ("b", "val", "c2"), ("c", "train", "c2")]
    for stem, _, _ in rows:
        add(tmp_path / "mine", stem, f"{stem}.png")
    write_table(
        tmp_path / "mine",
        *({"image": f"{s}.png", "mask": f"{s}.png", "split": split, "case": case} for s, split, case in rows),
    )
    report, lesion_set = imported(tmp_path / "mine")
    assert report.split_cases == ("c2",) and report.splits == {"train": 2, "val": 1}
    assert lesion_set.splits_there() == "2 in 'train', 1 in 'val'"


def refusal(source: Path, destination: Path | None = None, **flags: object) -> str:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(CoreSegError) as caught:
        import_set(source, destination or source.parent / "out", progress=False, **{**FLAGS, **flags})  # type: ignore[arg-type]
    assert sorted(source.parent.rglob("*")) == before  # nothing left behind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_destination_with_something_in_it_is_never_touched(plain: Path) -> None:
    taken = plain.parent / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert "not empty" in refusal(plain, taken)
    assert "not empty" in refusal(plain, taken / "thesis.txt")
    (plain.parent / "free").mkdir()
    assert import_set(plain, plain.parent / "free", progress=False, **FLAGS).rows == 10


def test_wrong_layouts_and_missing_facts(plain: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "gone")
    (tmp_path / "bare").mkdir()
    assert "images/" in refusal(tmp_path / "bare")
    assert "--modality" in refusal(plain, modality=None)
    assert "--anatomy" in refusal(plain, anatomy=None)
    assert "--category" in refusal(plain, category=None)
    assert "from 0 to under 1" in refusal(plain, val_share=1.5)
    assert "group" in refusal(plain, case_pattern="P.*")
    assert "regular expression" in refusal(plain, case_pattern="P(")
    assert "no picture's name" in refusal(plain, case_pattern=r"^patient(\d)"), "or patients would cross splits unseen"
    (plain / "set.json").write_text("{")
    assert "not JSON" in refusal(plain)
    (plain / "set.json").unlink()
    write_table(plain, {"picture": "scan1.png", "mask": "scan1.png"})
    assert "picture, mask" in refusal(plain)
    write_table(plain, {"image": "scan1.png", "mask": "scan1.png", "split": "dev"})
    assert "line 2" in refusal(plain)
    (plain / "cases.csv").write_bytes(b"image,mask\n\xe9.png,\xe9.png\n")
    assert "UTF-8" in refusal(plain)
    (plain / "cases.csv").write_text('image,mask\n"scan0.png,scan0.png\nscan1.png,scan1.png\n')
    assert "Close the quotes" in refusal(plain)
    (plain / "cases.csv").unlink()
    (plain / "set.json").write_text('{"category": ["a"]}')
    assert "its category is ['a'], expected text" in refusal(plain)


def test_nothing_to_import(tmp_path: Path) -> None:
    add(tmp_path / "mine", "a", "other.png")
    assert "no image has a mask (1 images, 1 masks" in refusal(tmp_path / "mine")
    add(tmp_path / "broken", "a", "a.png")
    (tmp_path / "broken" / "images" / "a.png").write_bytes(b"x")
    assert "none of its pictures can be used" in refusal(tmp_path / "broken")


# --- Forms, and places that cannot be written ----------------------------------------------------------------------


def test_what_lies_there_is_recognised(plain: Path, tmp_path: Path) -> None:
    assert recognise(plain) == ("folder", "images/ and masks/")
    assert recognise(plain.parent)[0] == "folder"
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    assert recognise(tmp_path / "raw")[0] == "nnunet"
    (tmp_path / "annotated").mkdir()
    (tmp_path / "annotated" / "a.json").write_text('{"images": [], "annotations": []}')
    assert recognise(tmp_path / "annotated") == recognise(tmp_path / "annotated" / "a.json") == ("coco", "a.json")
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    (tmp_path / "scans" / "deep" / "I1").write_bytes(bytes(128) + b"DICM")
    assert recognise(tmp_path / "scans") == ("dicom", "I1")
    (tmp_path / "bare").mkdir()
    assert "(folder)" in refusal(tmp_path / "bare") and "(dicom)" in refusal(tmp_path / "bare")
    report, _ = imported(plain)
    assert report.made()[1] == "read as folder, for its images/ and masks/; --form says otherwise"
    assert "--axis does nothing for the form folder" in refusal(plain, slicing=Slicing(axis="coronal"))
    assert "--labels does nothing for the form folder" in refusal(plain, labels=plain / "labels.toml")


def test_names_in_any_script(tmp_path: Path) -> None:
    folder = tmp_path / "Läsionen"
    add(folder, "été 1", "été 1.png")
    add(folder, "病例_2", "病例_2_опухоль.png")
    report, lesion_set = imported(folder)
    assert report.refused == ()
    assert {(sample.file_name, sample.category) for sample in lesion_set.samples} == {
        ("images/Läsionen_été-1.png", "breast tumor"),
        ("images/Läsionen_病例_2.png", "опухоль"),
    }


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in the folder, where the test may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("options", "words"), [("size=32k", "No space left"), ("ro", "Read-only")])
def test_a_disk_that_is_full_or_read_only(plain: Path, options: str, words: str) -> None:
    with mounted(plain.parent / "disk", options) as disk:
        said = refusal(plain, disk / "out")
        assert words in said and "Check" in said
        facts = [word for key, value in FLAGS.items() for word in (f"--{key}", value)]
        done = CliRunner().invoke(app, ["data", "import", str(plain), "--out", str(disk / "new" / "out"), *facts])
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and words in done.stderr
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("full_from", [0, 3, 4, 19])
def test_a_disk_that_fills_up_while_writing(plain: Path, monkeypatch: pytest.MonkeyPatch, full_from: int) -> None:
    """The same where nothing may be mounted: images are copied and masks saved, and the write after some fails."""
    written = []

    def failing(write: Callable[..., object]) -> Callable[..., object]:
        def writing(*args: Any, **kwargs: Any) -> object:
            if len(written) == full_from:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(args)
            return write(*args, **kwargs)

        return writing

    monkeypatch.setattr(shutil, "copyfile", failing(shutil.copyfile))
    monkeypatch.setattr(Image.Image, "save", failing(Image.Image.save))
    before = sorted(plain.parent.rglob("*"))
    with pytest.raises(CoreSegError, match="No space left"):
        imported(plain)
    assert sorted(plain.parent.rglob("*")) == before


def test_masks_of_several_values_are_set_aside(plain: Path) -> None:
    """They may be several classes or soft edges, and which is not known; noise of a JPEG is neither."""
    classes = np.zeros((SIZE_WH[1], SIZE_WH[0]), dtype=np.uint8)
    classes[4:10, 4:10], classes[12:20, 12:20] = 1, 2
    Image.fromarray(classes).save(plain / "masks" / "scan1.png")
    Image.fromarray(classes * 100).convert("RGB").save(plain / "masks" / "scan2.png")
    Image.fromarray((classes > 0).astype(np.uint8) * 255).save(plain / "masks" / "scan3.png")
    (plain / "masks" / "scan4.png").unlink()
    Image.fromarray((classes > 0).astype(np.uint8) * 255).save(plain / "masks" / "scan4.jpg")
    report, lesion_set = imported(plain)
    refused = {refusal.path.name: refusal.reason for refusal in report.refused}
    assert set(refused) == {"scan1.png", "scan2.png"}
    assert "2 values besides black (1, 2), expected one" in refused["scan1.png"]
    assert "(100, 200)" in refused["scan2.png"]
    assert report.rows == 8
    by_stem = {Path(sample.file_name).stem: sample for sample in lesion_set.samples}
    assert lesion_set.mask(by_stem["mine_scan3"]).sum() == lesion_set.mask(by_stem["mine_scan4"]).sum() == 100


# --- The real images -------------------------------------------------------------------------------------------------


def test_real_sets_import_as_their_tables_say(shared_lesions: Path, tmp_path: Path) -> None:
    for name in ("idrid_hard_exudates", "idrid_haemorrhages", "breast_lesions_usg", "busi_normal"):
        report = import_set(shared_lesions / name, tmp_path / name, progress=False)
        assert report.refused == report.images_without_mask == report.masks_without_image == ()
        table = (shared_lesions / name / "cases.csv").read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(table))
        assert report.rows == len(rows)
        assert report.splits == {split: sum(row["split"] == split for row in rows) for split in ("train", "val")}
        assert report.negatives == (len(rows) if name == "busi_normal" else 0)


@pytest.mark.slow
def test_all_real_sets_import_in_under_two_minutes(shared_lesions: Path, tmp_path: Path) -> None:
    started = time.process_time()
    report = import_set(shared_lesions, tmp_path / "all", progress=False)
    assert time.process_time() - started < 120
    assert (report.rows, report.negatives, report.splits) == (3159, 244, {"train": 2621, "val": 538})
    assert report.refused == report.images_without_mask == report.masks_without_image == ()
