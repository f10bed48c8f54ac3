"""The check finds what was planted, and finds nothing where nothing is."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from coreseg.data.check import check_set
from coreseg.data.lookalikes import find_matches, fingerprint
from coreseg.data.sources import import_set
from coreseg.data.store import LesionSet, write_set
from coreseg.imaging import write_mask
from coreseg.testing import HELD_OUT_LOOKS, LOOKS, phantom, write_phantom_set
from coreseg.types import Sample


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_phantom_set(tmp_path / "phantoms", count=24, seed=5, size_wh=(160, 120), two_kinds=0.5)


def with_copy(root: Path, change: Callable[[Image.Image], Image.Image], split: str = "val", **save: int) -> Sample:
    """Adds a changed copy of a training picture to another split, as another case, and gives its row."""
    lesion_set = LesionSet.open(root)
    original = next(sample for sample in lesion_set.split("train") if "phantom_ct" not in sample.source)
    changed = change(Image.fromarray(lesion_set.image(original)))
    suffix = ".jpg" if save else ".png"
    copy = replace(
        original,
        file_name=f"images/copy{suffix}",
        mask_file_name="masks/copy.png",
        boxes=(),
        case="another",
        split=split,
    )
    changed.save(root / copy.file_name, **save)
    write_mask(root / copy.mask_file_name, np.zeros((changed.height, changed.width), dtype=bool))
    write_set(root, [*lesion_set.samples, copy])
    return original


def test_phantoms_are_clean(root: Path) -> None:
    lesion_set = LesionSet.open(root)
    report = check_set(lesion_set, progress=False)
    assert report.clean
    assert report.problems == report.case_leaks == report.lookalikes == ()
    assert report.rows == len(lesion_set.samples) > report.images == 24  # two rows on one image are no leak
    assert report.negatives == sum(not sample.boxes for sample in lesion_set.samples)
    assert report.unknown_case == 0
    assert sum(count for by_split in report.counts.values() for count in by_split.values()) == report.rows
    for source, by_split in report.counts.items():
        for split, count in by_split.items():
            assert count == sum(sample.source == source for sample in lesion_set.split(split))
    assert "Every row names its case" in report.text()


def test_different_phantoms_of_one_look_are_no_lookalikes() -> None:
    for look in (*LOOKS, *HELD_OUT_LOOKS):
        prints = [fingerprint(phantom(seed, look, size_wh=(160, 120)).image) for seed in range(24)]
        assert find_matches(prints[:12], prints[12:]) == [], look


def test_a_known_case_in_two_splits_is_a_leak(root: Path) -> None:
    samples = list(LesionSet.open(root).samples)
    train = next(index for index, sample in enumerate(samples) if sample.split == "train")
    val = next(index for index, sample in enumerate(samples) if sample.split == "val")
    for index in (train, val):
        for same in range(len(samples)):
            if samples[same].file_name == samples[index].file_name:
                samples[same] = replace(samples[same], case="patient 7")
    write_set(root, samples)
    report = check_set(LesionSet.open(root), progress=False)
    assert not report.clean
    (leak,) = report.case_leaks
    assert (leak.case, leak.splits) == ("patient 7", ("train", "val"))
    assert leak.rows == sum(sample.case == "patient 7" for sample in samples)
    assert "patient 7" in report.text()


def test_unknown_cases_are_no_leak_but_are_said(root: Path) -> None:
    write_set(root, [replace(sample, case="") for sample in LesionSet.open(root).samples])
    report = check_set(LesionSet.open(root), progress=False)
    assert report.clean
    assert report.unknown_case == report.rows
    assert f"Not proved: {report.rows} rows name no case" in report.text()


@pytest.mark.parametrize(
    ("change", "save", "sign"),
    [
        (lambda picture: picture, {}, "pixels"),
        (lambda picture: picture, {"quality": 60}, None),
        (lambda picture: ImageEnhance.Brightness(picture).enhance(1.2), {}, None),
        (lambda picture: ImageEnhance.Contrast(picture).enhance(0.8), {}, None),
        (lambda picture: picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)), {}, None),
        (lambda picture: picture.resize((picture.width * 2, picture.height * 2)), {"quality": 80}, None),
        (lambda picture: picture.crop((3, 2, picture.width - 3, picture.height - 2)), {}, "thumbnail"),
        (lambda picture: picture.crop((8, 6, picture.width - 8, picture.height - 6)), {}, "thumbnail"),
        (lambda picture: picture.crop((0, 5, picture.width, picture.height)), {}, "thumbnail"),
        (lambda picture: picture.convert("L").convert("RGB"), {}, None),
    ],
    ids=["exact", "jpeg", "brighter", "flatter", "smaller", "larger", "crop2", "crop5", "top cut off", "grey"],
)
def test_a_near_duplicate_across_splits_is_found(
    root: Path, change: Callable[[Image.Image], Image.Image], save: dict[str, int], sign: str | None
) -> None:
    original = with_copy(root, change, **save)
    report = check_set(LesionSet.open(root), progress=False)
    (pair,) = report.lookalikes
    assert pair.first == original.file_name
    assert pair.second.startswith("images/copy")
    assert pair.splits == ("train", "val")
    assert sign is None or pair.sign == sign
    assert not report.clean
    assert "copy" in report.text()


def test_a_duplicate_within_a_split_is_no_leak(root: Path) -> None:
    with_copy(root, lambda picture: picture, split="train")
    assert check_set(LesionSet.open(root), progress=False).clean


def test_a_duplicate_is_found_between_val_and_test_too(root: Path) -> None:
    with_copy(root, lambda picture: picture, split="test")
    samples = [replace(s, split="val") if s.split == "train" else s for s in LesionSet.open(root).samples]
    write_set(root, samples)
    (pair,) = check_set(LesionSet.open(root), progress=False).lookalikes
    assert pair.splits == ("val", "test")


def test_one_image_with_rows_in_two_splits_is_a_leak(root: Path) -> None:
    samples = list(LesionSet.open(root).samples)
    names = [sample.file_name for sample in samples]
    twice = next(index for index, name in enumerate(names) if names.count(name) == 2)
    samples[twice] = replace(samples[twice], split="test", case="")
    write_set(root, samples)
    report = check_set(LesionSet.open(root), progress=False)
    (pair,) = report.lookalikes
    assert pair.first == pair.second == samples[twice].file_name
    assert pair.sign == "pixels"
    assert "has rows in" in report.text()


def test_faults_of_files_and_rows_are_all_listed(root: Path) -> None:
    samples = list(LesionSet.open(root).samples)
    solo = [sample for sample in samples if sample.boxes][:5]
    (root / solo[0].mask_file_name).unlink()
    write_mask(root / solo[1].mask_file_name, np.ones((120, 161), dtype=bool))
    (root / solo[2].mask_file_name).write_bytes(b"")
    samples[samples.index(solo[3])] = replace(solo[3], boxes=((1, 1, 2, 2),))
    samples[samples.index(solo[4])] = replace(solo[4], boxes=((1, 1, 161, 2),))
    write_set(root, samples)
    report = check_set(LesionSet.open(root), progress=False)
    assert len(report.problems) == 5
    for sample, words in zip(solo, ["missing", "161x120", "0 bytes", "its mask", "leaves the image"], strict=True):
        (line,) = (line for line in report.problems if sample.mask_file_name in line)
        assert words in line
        assert line in report.text()


def test_a_missing_image_is_a_fault_and_the_rest_is_still_compared(root: Path) -> None:
    with_copy(root, lambda picture: picture)
    gone = LesionSet.open(root).split("val")[0]
    (root / gone.file_name).unlink()
    report = check_set(LesionSet.open(root), progress=False)
    assert all(gone.file_name in problem and "missing" in problem for problem in report.problems)
    assert report.problems
    assert len(report.lookalikes) == 1


def test_text_in_pictures_is_pointed_out_and_no_fault(root: Path) -> None:
    lesion_set = LesionSet.open(root)
    assert "No pictures with what looks like text" in check_set(lesion_set, progress=False).text()
    names = sorted({sample.file_name for sample in lesion_set.samples})[:12]
    for name in names:
        with Image.open(root / name) as stored:
            picture = stored.convert("RGB")
        picture.paste((0, 0, 0), (0, 0, 160, 30))
        ImageDraw.Draw(picture).text((8, 6), f"DOE JANE {name[-6:-4]}", fill=(255, 255, 255))
        picture.save(root / name)
    report = check_set(lesion_set, progress=False)
    assert sorted(report.burned_in) == names and all(
        box[3] <= 30 for boxes in report.burned_in.values() for box in boxes
    )
    # The black strips make neighbours look alike; that they do is not what is tested here.
    assert replace(report, lookalikes=()).clean
    assert "12 pictures with what looks like text" in report.text() and "and 2 more (--all names them)" in report.text()
    everything = report.text(everything=True)
    assert all(name in everything for name in names) and "more (" not in everything


def test_flat_pictures_correlate_with_nothing() -> None:
    black = fingerprint(np.zeros((40, 40, 3), dtype=np.uint8))
    grey = fingerprint(np.full((50, 40, 3), 90, dtype=np.uint8))
    others = [fingerprint(phantom(seed).image) for seed in range(5)]
    assert find_matches([black], others) == []
    assert [match.sign for match in find_matches([black], [black])] == ["pixels"]
    assert {match.sign for match in find_matches([black], [grey])} <= {"hash"}
    assert find_matches([], others) == find_matches(others, []) == []


@pytest.mark.slow
def test_the_real_sets_have_no_leak_but_three_shifted_copies(shared_lesions: Path, tmp_path: Path) -> None:
    import_set(shared_lesions, tmp_path / "all", progress=False)
    started = time.process_time()
    report = check_set(LesionSet.open(tmp_path / "all"), progress=False)
    assert time.process_time() - started < 60
    assert report.problems == report.case_leaks == ()
    assert report.unknown_case == 2174
    pairs = {frozenset(Path(name).stem for name in (pair.first, pair.second)) for pair in report.lookalikes}
    assert pairs == {
        frozenset({"br35h_brain_mri_TRAIN_y262", "br35h_brain_mri_TRAIN_y250"}),
        frozenset({"busi_breast_us_benign_207", "busi_breast_us_benign_256"}),
        frozenset({"busi_breast_us_benign_244", "busi_breast_us_benign_251"}),
    }
