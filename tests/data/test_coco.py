"""COCO: polygons and both run-length encodings give the pixels meant, and bad annotations are set aside."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scans
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from coreseg.data.coco import decode
from coreseg.data.volumes import Slicing
from coreseg.errors import InputError
from coreseg.testing import phantom

WIDTH, HEIGHT = 40, 32
FACTS: dict[str, Any] = {"modality": "ultrasound", "anatomy": "breast", "slicing": Slicing()}
imported, refusal = partial(scans.imported, **FACTS), partial(scans.refusal, **FACTS)
SQUARE = [4, 3, 14, 3, 14, 9, 4, 9]
"""The pixels of columns 4 to 13 and rows 3 to 8."""


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of background and lesion in turn, down the columns."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def compressed(lengths: list[int]) -> str:
    """The same as text: five bits a character, lowest first, signed, as differences from the fourth on."""
    text = ""
    for index, length in enumerate(lengths):
        value = length - lengths[index - 2] if index > 2 else length
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return text


def image_entry(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}


def annotation(number: int, image: int, segmentation: Any, category: int = 1) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0}


@pytest.fixture
def told() -> dict[str, Any]:
    return {
        "images": [image_entry(number, f"scan{number}.png") for number in range(4)],
        "categories": [{"id": 1, "name": "breast_tumor"}, {"id": 7, "name": "cyst"}],
        "annotations": [annotation(number, number, [SQUARE]) for number in range(3)],
    }


@pytest.fixture
def root(tmp_path: Path, told: dict[str, Any]) -> Path:
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        shown = phantom(number, size_wh=(WIDTH, HEIGHT))
        Image.fromarray(shown.image).save(folder / "images" / f"scan{number}.png")
    write(folder, told)
    return folder


def write(folder: Path, told: Any, name: str = "annotations.json") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(told), encoding="utf-8")


# --- Masks -----------------------------------------------------------------------------------------------------------


@given(arrays.arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    height, width = mask.shape
    for counts in (runs(mask), compressed(runs(mask))):
        assert np.array_equal(decode({"size": [height, width], "counts": counts}, height, width), mask)


def test_a_known_text() -> None:
    """A 5 x 4 picture with the 2 x 2 square in its middle, worked out by hand: runs 6, 2, 3, 2, 7."""
    mask = np.zeros((5, 4), dtype=bool)
    mask[1:3, 1:3] = True
    assert runs(mask) == [6, 2, 3, 2, 7]
    assert compressed([6, 2, 3, 2, 7]) == "62304"
    assert np.array_equal(decode({"size": [5, 4], "counts": "62304"}, 5, 4), mask)


@given(
    left=st.integers(-3, 38), top=st.integers(-3, 30), width=st.integers(1, 20), height=st.integers(1, 20),
    shift=st.floats(-0.49, 0.49),
)  # fmt: skip
def test_a_rectangle_fills_its_pixels(left: int, top: int, width: int, height: int, shift: float) -> None:
    x1, y1, x2, y2 = left + shift, top + shift, left + width + shift, top + height + shift
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
    polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
    if expected.any():
        assert np.array_equal(decode([polygon], HEIGHT, WIDTH), expected)


def test_polygons_of_other_shapes() -> None:
    middle = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = (np.array([20.3, 15.2]) + 9.7 * np.stack((np.cos(angles), np.sin(angles)), axis=-1)).ravel().tolist()
    disc = np.linalg.norm(middle - (20.3, 15.2), axis=-1)
    drawn = decode([circle], HEIGHT, WIDTH)
    assert drawn[disc < 9.6].all() and not drawn[disc > 9.7].any()
    assert np.array_equal(decode([[*circle]][::-1], HEIGHT, WIDTH), drawn)
    two = decode([SQUARE, [20, 20, 24, 20, 24, 24, 20, 24]], HEIGHT, WIDTH)
    assert two.sum() == 60 + 16
    speck = decode([[10.1, 10.1, 10.3, 10.1, 10.2, 10.3]], HEIGHT, WIDTH)
    assert np.argwhere(speck).tolist() == [[10, 10]]  # too small for any pixel's centre, and still there


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([], "perhaps only a box"),
        (None, "perhaps only a box"),
        ([[1, 2, 3, 4]], "three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three corners"),
        ([[50, 1, 60, 1, 60, 9]], "outside the image"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**63 - 1, 2**63 - 1, 2 + HEIGHT * WIDTH]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**70]}, "do not add up"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "its size is"),
    ],
)
def test_what_is_no_mask(segmentation: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        decode(segmentation, HEIGHT, WIDTH)


# --- Import ----------------------------------------------------------------------------------------------------------


def test_an_import(root: Path, told: dict[str, Any]) -> None:
    spot = np.zeros((HEIGHT, WIDTH), dtype=bool)
    spot[20:25, 30:36] = True
    told["annotations"] += [
        annotation(10, 0, {"size": [HEIGHT, WIDTH], "counts": compressed(runs(spot))}),
        annotation(11, 0, {"size": [HEIGHT, WIDTH], "counts": runs(spot)}, category=7),
    ]
    write(root, told)
    report, lesion_set = imported(root, licence="mine")
    assert "coco, for its annotations.json" in report.form
    assert (report.rows, report.images, report.unknown_case) == (4, 3, 4)
    assert {(row.category, row.source, row.licence, row.modality) for row in lesion_set.samples} == {
        ("breast tumor", "mine", "mine", "ultrasound"),
        ("cyst", "mine", "mine", "ultrasound"),
    }
    first = {row.category: row for row in lesion_set.samples if "scan0" in row.file_name}
    assert first["breast tumor"].boxes == ((4, 3, 14, 9), (30, 20, 36, 25))
    assert np.array_equal(lesion_set.mask(first["cyst"]), spot)
    copied = (lesion_set.root / first["cyst"].file_name).read_bytes()
    assert copied == (root / "images" / "scan0.png").read_bytes()
    assert report.images_without_mask == ()  # scan3 is listed, without a lesion


def test_images_without_annotation_are_kept_where_asked_for(root: Path) -> None:
    report, lesion_set = imported(root, slicing=Slicing(keep_empty=True))
    assert report.negatives == 2
    empty = [row for row in lesion_set.samples if not row.boxes]
    assert {row.category for row in empty} == {"breast tumor", "cyst"} and {row.file_name for row in empty} == {
        "images/mine_scan3.png"
    }


def test_an_empty_image_without_a_size_is_set_aside(root: Path, told: dict[str, Any]) -> None:
    del told["images"][3]["height"]
    write(root, told)
    report, lesion_set = imported(root, slicing=Slicing(keep_empty=True))
    assert len(lesion_set.samples) == 3
    (refused,) = report.refused
    assert refused.path.name == "scan3.png" and "height and width" in refused.reason


def test_splits_and_cases_by_name(root: Path, told: dict[str, Any]) -> None:
    (root / "annotations.json").unlink()
    for split, numbers in (("train2017", (0, 1)), ("valid", (2,)), ("test", (3,))):
        part = {**told, "images": [told["images"][number] for number in numbers]}
        part["annotations"] = [annotation(number, number, [SQUARE]) for number in numbers]
        for number in numbers:
            (root / split).mkdir(exist_ok=True)
            (root / "images" / f"scan{number}.png").rename(root / split / f"scan{number}.png")
        where = "annotations/instances_train2017.json" if split == "train2017" else f"{split}/_annotations.coco.json"
        write(root, part, where)
    _, lesion_set = imported(root, case_pattern=r"scan(\d)")
    assert [(row.case, row.split) for row in sorted(lesion_set.samples, key=lambda row: row.case)] == [
        ("mine/0", "train"),
        ("mine/1", "train"),
        ("mine/2", "val"),
        ("mine/3", "test"),
    ]


def test_a_table_of_categories(root: Path) -> None:
    table = root.parent / "labels.toml"
    table.write_text('Breast_Tumor = "breast cancer"', encoding="utf-8")
    _, lesion_set = imported(root, labels=table)
    assert {row.category for row in lesion_set.samples} == {"breast cancer"}
    table.write_text('cyst = "cyst"', encoding="utf-8")
    assert "no image has a mask" in refusal(root, labels=table)


def test_one_json_file_as_the_source(root: Path) -> None:
    write(root, {"images": [], "annotations": []}, "other.json")
    assert imported(root / "annotations.json")[0].rows == 3


def test_names_in_any_script_and_in_folders(root: Path, told: dict[str, Any]) -> None:
    (root / "images" / "病例").mkdir()
    (root / "images" / "scan0.png").rename(root / "images" / "病例" / "été 0.png")
    told["images"][0]["file_name"] = "病例/été 0.png"
    write(root, told)
    _, lesion_set = imported(root)
    assert "images/mine_病例-été-0.png" in {row.file_name for row in lesion_set.samples}


# --- Bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_set_aside(root: Path, told: dict[str, Any]) -> None:
    told["annotations"][0]["segmentation"] = []
    told["annotations"].append(annotation(20, 0, [SQUARE], category=7))
    (root / "images" / "scan1.png").unlink()
    told["images"][2]["width"] = WIDTH + 1
    (root / "images" / "extra.png").write_bytes((root / "images" / "scan3.png").read_bytes())
    write(root, told)
    report, lesion_set = imported(root)
    reasons = {refused.path.name: refused.reason for refused in report.refused}
    assert "annotation 0 of annotations.json cannot be drawn" in reasons["scan0.png"]
    assert "'scan1.png', which is not in" in reasons["annotations.json"]
    assert "41x32 px, its image scan2.png 40x32 px" in reasons["scan2.png"]
    assert [path.name for path in report.images_without_mask] == ["extra.png"]
    assert [row.category for row in lesion_set.samples] == ["cyst"]  # half a category would be a wrong mask


def test_files_outside_are_not_read(root: Path, told: dict[str, Any]) -> None:
    (root / "images" / "scan0.png").rename(root.parent / "secret.png")
    for name in ("../secret.png", "../../secret.png", str(root.parent / "secret.png")):
        told["images"][0]["file_name"] = name
        write(root, told)
        report, _ = imported(root, root.parent / f"out{len(name)}")
        assert "which is not in" in report.refused[0].reason


def test_json_of_another_form(root: Path, told: dict[str, Any]) -> None:
    write(root, {key: value for key, value in told.items() if key != "categories"})
    assert "'categories' is missing" in refusal(root)
    for broken in (
        {**told, "annotations": [annotation(0, 99, [SQUARE])]},
        {**told, "annotations": [annotation(0, 0, [SQUARE], category=99)]},
        {**told, "images": [{"id": 0}]},
        {**told, "images": [{"id": number, "file_name": 5} for number in range(4)]},
        {**told, "categories": "none"},
    ):
        write(root, broken)
        assert "annotations.json" in refusal(root)
    assert "--anatomy" in refusal_with(root, told, anatomy=None)
    assert "--labels" in refusal_with(root, told, category="breast tumor")
    assert "no label" in refusal_with(root, {**told, "categories": [], "annotations": []})
    (root / "annotations.json").write_text('{"images": [], "annotations": [', encoding="utf-8")
    assert "not in the form of COCO" in refusal(root)
    (root / "annotations.json").unlink()
    assert "no JSON file" in refusal(root, form="coco")


def refusal_with(root: Path, told: Any, **options: Any) -> str:
    write(root, told)
    return refusal(root, **options)
