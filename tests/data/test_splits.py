"""Splits by patient, and pictures that look alike on one side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coreseg.data.check import check_set
from coreseg.data.lookalikes import fingerprint
from coreseg.data.sources import ImportReport, import_set
from coreseg.data.splits import with_splits
from coreseg.data.store import LesionSet
from coreseg.imaging import write_mask
from coreseg.testing import phantom
from coreseg.types import Sample


def row(number: int, case: str = "", split: str = "", source: str = "mine") -> Sample:
    return Sample(
        f"images/{number}.png", f"masks/{number}.png", "ct", "lung", "tumor", (), "", "", source, "", case, split
    )


PRINTS = {f"images/{number}.png": fingerprint(phantom(number, size_wh=(96, 80)).image) for number in range(30)}


def alike(*pairs: tuple[int, int]) -> dict[str, Any]:
    """Fingerprints of thirty different pictures, but for the pairs, which are one picture twice."""
    return {**PRINTS, **{f"images/{other}.png": PRINTS[f"images/{one}.png"] for one, other in pairs}}


def splits(rows: list[Sample], prints: dict[str, Any], share: float = 0.2, seed: int = 0) -> list[str]:
    return [sample.split for sample in with_splits(rows, prints, share, seed).samples]


def test_twins_share_a_split_whatever_the_seed() -> None:
    rows = [row(number) for number in range(30)]
    pairs = [(number, number + 15) for number in range(15)]
    for seed in range(8):
        drawn = with_splits(rows, alike(*pairs), 0.2, seed)
        got = [sample.split for sample in drawn.samples]
        assert got[:15] == got[15:] and got.count("val") == 6 and drawn.alike == 30
    apart = [splits(rows, {}, seed=seed) for seed in range(8)]
    assert any(got[:15] != got[15:] for got in apart)


def test_likeness_and_cases_chain() -> None:
    """Case a holds 0 and 1, 1 looks like 2, and 2 is of case b with 3: all four together."""
    rows = [row(number, {0: "a", 1: "a", 2: "b", 3: "b"}.get(number, "")) for number in range(12)]
    for seed in range(8):
        got = splits(rows, alike((1, 2)), 0.3, seed)
        assert len(set(got[:4])) == 1 and got.count("val") in (3, 4)
    assert with_splits(rows, alike((1, 2)), 0.3, 0).alike == 2
    assert with_splits(rows, alike((0, 1)), 0.3, 0).alike == 0  # of one case anyway


def test_a_picture_goes_where_its_like_was_put() -> None:
    rows = [row(0, split="test"), row(1), row(2, split="train"), row(3, split="val"), row(4), row(5)]
    got = splits(rows, alike((0, 1), (2, 3)))
    assert got[:4] == ["test", "test", "train", "val"]  # what is given stays, even where twins are parted


def test_one_large_group_does_not_fill_val() -> None:
    rows = [row(number, f"case {number}") for number in range(20)]
    pairs = [(0, number) for number in range(1, 14)]
    for seed in range(8):
        got = splits(rows, alike(*pairs), 0.2, seed)
        assert set(got[:14]) == {"train"} and got.count("val") == 4
    assert splits(rows[:14], alike(*pairs)) == ["train"] * 14
    two = [row(number, f"case {number // 3}") for number in range(6)]
    assert sorted(set(splits(two, {}))) == ["train", "val"]


def test_sources_are_drawn_apart_and_no_share_is_no_val() -> None:
    rows = [row(number, source="one" if number < 10 else "two") for number in range(20)]
    got = splits(rows, {})
    assert got[:10].count("val") == got[10:].count("val") == 2
    assert set(splits(rows, {}, 0.0)) == {"train"}
    assert (
        splits([row(0), replace(row(0), category="cyst", mask_file_name="masks/x.png"), row(1)], {}, 0.5)[0]
        == (splits([row(0), replace(row(0), category="cyst", mask_file_name="masks/x.png"), row(1)], {}, 0.5)[1])
    )


# --- The whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """Twelve pictures, and each a second time: in JPEG, brighter, under another name and patient."""
    folder = tmp_path / "doubled"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number in range(12):
        shown = phantom(number, size_wh=(160, 120))
        mask = next(iter(shown.masks.values()))
        Image.fromarray(shown.image).save(folder / "images" / f"P{number:02d}.png")
        write_mask(folder / "masks" / f"P{number:02d}.png", mask)
        copy = Image.fromarray((shown.image * 0.95 + 8).astype(np.uint8))
        copy.save(folder / "images" / f"Q{number:02d}.jpg", quality=90)
        write_mask(folder / "masks" / f"Q{number:02d}.png", mask)
    return folder


def imported(source: Path, out: str, **options: Any) -> tuple[ImportReport, LesionSet]:
    facts = {"modality": "ultrasound", "anatomy": "breast", "category": "breast tumor", "describe": lambda *_: ""}
    report = import_set(source, source.parent / out, progress=False, val_share=0.3, **{**facts, **options})
    return report, LesionSet.open(source.parent / out)


def test_planted_duplicates_never_cross_splits_and_are_found_where_they_do(doubled: Path) -> None:
    for pattern in (None, r"^(\w\d+)"):
        report, lesion_set = imported(doubled, f"together{pattern is None}", case_pattern=pattern)
        assert report.alike == 24
        assert "24 images look like another one" in "\n".join(report.made())
        assert check_set(lesion_set, progress=False).lookalikes == ()
        split_of = {Path(sample.file_name).stem: sample.split for sample in lesion_set.samples}
        assert all(split_of[f"doubled_P{n:02d}"] == split_of[f"doubled_Q{n:02d}"] for n in range(12))
        assert 0 < list(split_of.values()).count("val") <= 8
    report, lesion_set = imported(doubled, "apart", together=False)
    split_of = {Path(sample.file_name).stem: sample.split for sample in lesion_set.samples}
    crossing = {n for n in range(12) if split_of[f"doubled_P{n:02d}"] != split_of[f"doubled_Q{n:02d}"]}
    found = check_set(lesion_set, progress=False).lookalikes
    assert report.alike == 0 and crossing
    assert {int(Path(pair.first).stem[-2:]) for pair in found} == crossing


def test_planted_leakage_by_case_is_found(doubled: Path) -> None:
    lines = ["image,mask,split,case"]
    for number in range(12):
        lines.append(f"P{number:02d}.png,P{number:02d}.png,train,patient {number}")
        lines.append(f"Q{number:02d}.jpg,Q{number:02d}.png,{'val' if number == 4 else 'train'},patient {number}")
    (doubled / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    report, lesion_set = imported(doubled, "leak")
    assert report.split_cases == ("patient 4",)
    assert "case patient 4 stands in several splits" in report.to_mind()[0]
    checked = check_set(lesion_set, progress=False)
    assert [leak.case for leak in checked.case_leaks] == ["patient 4"]
    assert ("images/doubled_P04.png", "images/doubled_Q04.jpg") in {(p.first, p.second) for p in checked.lookalikes}
