"""The data set on disk: what opens, what is refused and in which words."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coreseg.data.store import METADATA, LesionSet, new_set, write_set
from coreseg.errors import DataError
from coreseg.imaging import write_mask
from coreseg.masks import mask_to_boxes
from coreseg.testing import write_phantom_set


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_phantom_set(tmp_path / "phantoms", count=12, seed=3, two_kinds=0.6)


def rows_of(root: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (root / METADATA).read_text(encoding="utf-8").splitlines()]


def write_rows(root: Path, rows: list[dict[str, object]]) -> None:
    (root / METADATA).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        LesionSet.open(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_set_opens_and_its_rows_agree_with_its_files(root: Path) -> None:
    lesion_set = LesionSet.open(str(root))
    assert lesion_set.root == root
    assert {sample.split for sample in lesion_set.samples} == {"train", "val"}
    assert len(lesion_set.split("train")) + len(lesion_set.split("val")) == len(lesion_set.samples)
    assert lesion_set.split("test") == ()
    for sample in lesion_set.samples:
        image, mask = lesion_set.image(sample), lesion_set.mask(sample)
        assert image.shape == (96, 128, 3)
        assert mask.shape == (96, 128)
        assert [list(box) for box in sample.boxes] == mask_to_boxes(mask).tolist()


def test_writing_what_was_read_changes_nothing(root: Path) -> None:
    samples = LesionSet.open(root).samples
    before = (root / METADATA).read_bytes()
    write_set(root, samples)
    assert (root / METADATA).read_bytes() == before
    assert LesionSet.open(root).samples == samples


def test_text_in_any_language_survives(root: Path) -> None:
    samples = LesionSet.open(root).samples
    write_set(root, [replace(samples[0], query="Où est la lésion ? 病变在哪里", source="a\u2028b")])
    assert LesionSet.open(root).samples[0].query == "Où est la lésion ? 病变在哪里"
    assert LesionSet.open(root).samples[0].source == "a\u2028b"


def test_blank_lines_and_further_fields_do_no_harm(root: Path) -> None:
    rows = [{**row, "scanner": 7} for row in rows_of(root)]
    (root / METADATA).write_text("\n\n" + "\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    assert len(LesionSet.open(root).samples) == len(rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "validation"}, ["'split'", "validation", "train, val, test"]),
        ({"category": "  "}, ["'category'", "empty"]),
        ({"case": 7}, ["'case'", "7", "text"]),
        ({"query": None}, ["'query'", "None"]),
        ({"boxes": [[1, 2, 1, 4]]}, ["'boxes'", "[1, 2, 1, 4]"]),
        ({"boxes": [[1, 2, 3]]}, ["'boxes'", "[1, 2, 3]"]),
        ({"boxes": [[1, 2, 3, 4.5]]}, ["'boxes'", "4.5", "whole"]),
        ({"boxes": [[True, 2, 3, 4]]}, ["'boxes'", "True"]),
        ({"boxes": [[-1, 2, 3, 4]]}, ["'boxes'", "-1"]),
        ({"boxes": "none"}, ["'boxes'", "none"]),
        ({"file_name": "/etc/passwd"}, ["'file_name'", "/etc/passwd", "inside"]),
        ({"mask_file_name": "masks/../../x.png"}, ["'mask_file_name'", "inside"]),
        ({"mask_file_name": "C:\\x.png"}, ["'mask_file_name'", "inside"]),
    ],
)
def test_a_wrong_field_is_named_with_its_row(root: Path, change: dict[str, object], words: list[str]) -> None:
    rows = rows_of(root)
    rows[4] = {**rows[4], **change}
    write_rows(root, rows)
    message = refusal(root)
    for word in ["row 5", *words]:
        assert word in message


def test_every_field_must_be_there(root: Path) -> None:
    whole = rows_of(root)
    for name in whole[0]:
        write_rows(root, [whole[0], {key: value for key, value in whole[1].items() if key != name}])
        message = refusal(root)
        assert "row 2" in message
        assert repr(name) in message


def test_what_is_no_row(root: Path) -> None:
    good = json.dumps(rows_of(root)[0])
    (root / METADATA).write_text(f"{good}\n{{broken\n", encoding="utf-8")
    assert "row 2" in refusal(root)
    (root / METADATA).write_text(f"{good}\n[1, 2]\n", encoding="utf-8")
    assert "a JSON list" in refusal(root)
    (root / METADATA).write_text("\n", encoding="utf-8")
    assert "no rows" in refusal(root)
    (root / METADATA).write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(root)


def test_one_row_is_one_image_and_one_category(root: Path) -> None:
    rows = rows_of(root)
    write_rows(root, [*rows, rows[2]])
    message = refusal(root)
    assert f"row {len(rows) + 1}" in message
    assert "row 3" in message
    first = LesionSet.open(write_phantom_set(root.parent / "other", count=3, seed=0)).samples[0]
    with pytest.raises(DataError, match="row 2"):
        write_set(root, [first, first])


def test_a_folder_that_is_no_set_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        message = refusal(folder)
        assert METADATA in message
        assert "coreseg data import" in message


def test_an_unknown_split_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="train, val, test"):
        LesionSet.open(root).split("validation")


def test_missing_files_and_a_mask_of_another_size(root: Path) -> None:
    lesion_set = LesionSet.open(root)
    sample = lesion_set.samples[0]
    write_mask(root / sample.mask_file_name, np.ones((96, 127), dtype=bool))
    with pytest.raises(DataError, match=r"127x96 px, its image .* 128x96 px"):
        lesion_set.mask(sample)
    (root / sample.mask_file_name).unlink()
    with pytest.raises(DataError, match="missing"):
        lesion_set.mask(sample)
    (root / sample.file_name).unlink()
    with pytest.raises(DataError, match="missing"):
        lesion_set.image(sample)


def test_a_mask_fits_an_image_that_is_stored_turned(root: Path) -> None:
    lesion_set = LesionSet.open(root)
    sample = lesion_set.samples[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(lesion_set.image(sample).transpose(1, 0, 2)).save(root / sample.file_name, exif=exif)
    assert lesion_set.image(sample).shape[:2] == lesion_set.mask(sample).shape


def test_a_new_set_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(DataError, match="No space left"), new_set(out):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == [], "parents that were made are gone again"
    out.mkdir(parents=True)
    (out.parent / ".out.partial" / "images").mkdir(parents=True)
    (out.parent / ".out.partial" / "half").write_text("by a run that was killed")
    moved: list[Path] = []

    def rename(path: Path, target: Path) -> None:
        moved.append(path)
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with new_set(out) as staging:
        assert list(staging.iterdir()) == []
        for name in ("a", "b"):
            (staging / name).write_text("")
        with pytest.raises(DataError, match="another run is writing"), new_set(out):
            raise AssertionError
    assert len(moved) == 1, "a kill between several would leave half a set"
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    assert list(out.parent.iterdir()) == [out]


def test_the_image_folder_loader_of_datasets_opens_it_unchanged(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    rows = {(row["image"].filename, row["category"]): row for row in loaded["train"]}
    lesion_set = LesionSet.open(root)
    assert len(rows) == len(loaded["train"]) == len(lesion_set.samples)
    for sample in lesion_set.samples:
        row = rows[str(root / sample.file_name), sample.category]
        assert np.array_equal(np.asarray(row["image"]), lesion_set.image(sample))
        assert np.array_equal(np.asarray(row["mask"]) > 0, lesion_set.mask(sample))
        assert tuple(tuple(box) for box in row["boxes"]) == sample.boxes
        assert row["split"] == sample.split
