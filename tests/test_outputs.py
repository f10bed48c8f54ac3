"""What `coreseg segment` leaves on disk: a mask of the picture's size, an overlay, and a record that says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coreseg.outputs import write_result
from coreseg.types import Result


@pytest.fixture
def result() -> Result:
    mask = np.zeros((30, 40), bool)
    mask[5:9, 2:12] = True
    return Result(
        mask=mask,
        boxes=np.array([[2, 5, 12, 9]]),
        reasoning="It stands out.",
        answer="The tumor is located at [[2, 5, 12, 9]].",
        text="<think> raw",
        found=True,
        valid=True,
        seconds=0.12345,
        image=np.full((30, 40, 3), 90, np.uint8),
        warnings=("the picture looks like none",),
        confidence=0.70049,
    )


def write(result: Result, folder: Path) -> dict[str, Any]:
    return write_result(result, folder, "scan", image="in/scan.jpg", question="Wo ist der Größte?", model="nano")


def test_three_files_and_nothing_else(result: Result, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    record = write(result, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["scan.json", "scan.mask.png", "scan.overlay.png"]
    assert json.loads((folder / "scan.json").read_text(encoding="utf-8")) == record


def test_the_mask_has_the_pictures_pixels(result: Result, tmp_path: Path) -> None:
    record = write(result, tmp_path)
    with Image.open(record["mask"]) as mask:
        assert (mask.size, mask.mode) == ((40, 30), "L")
        assert np.array_equal(np.asarray(mask), result.mask * np.uint8(255))
    with Image.open(record["overlay"]) as overlay:
        assert overlay.size == (40, 30)
        assert np.asarray(overlay)[5, 2].tolist() != [90, 90, 90], "the outline is drawn"


def test_what_the_record_says(result: Result, tmp_path: Path) -> None:
    assert write(result, tmp_path) == {
        "schema_version": 1,
        "image": "in/scan.jpg",
        "width": 40,
        "height": 30,
        "question": "Wo ist der Größte?",
        "model": "nano",
        "found": True,
        "valid": True,
        "boxes": [[2, 5, 12, 9]],
        "reasoning": "It stands out.",
        "answer": "The tumor is located at [[2, 5, 12, 9]].",
        "text": "<think> raw",
        "warnings": ["the picture looks like none"],
        "confidence": 0.7,
        "mask": str(tmp_path / "scan.mask.png"),
        "overlay": str(tmp_path / "scan.overlay.png"),
        "mask_area_px": 40,
        "seconds": 0.123,
    }


def test_an_earlier_result_is_replaced(result: Result, tmp_path: Path) -> None:
    write(result, tmp_path)
    result.mask[:] = False
    assert write(result, tmp_path)["mask_area_px"] == 0
    with Image.open(tmp_path / "scan.mask.png") as mask:
        assert mask.getextrema() == (0, 0)


def test_a_file_in_the_folders_place_is_an_error(result: Result, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError):
        write(result, tmp_path / "out")
