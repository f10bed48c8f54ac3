"""Differences worked by hand, verdicts that must and must not be given, and runs that cannot be compared."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError, DataError
from coreseg.evaluate import Record, evaluate
from coreseg.evaluate.compare import (
    Pair,
    compare,
    differences,
    matched,
    print_comparison,
    read_side,
    training_noise,
    write_differences,
)
from coreseg.types import Result, Sample

Make = Callable[..., Record]


def pairs_of(made: Make, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], **fields: Any) -> list[Pair]:
    """Pairs with these Dices, one inner list a run; each image is its own case unless `case` names them."""
    cases = fields.pop("case", [f"p{row}" for row in range(len(a[0]))])

    def record(row: int, score: float) -> Record:
        return made(file_name=f"{row}.png", case=cases[row], dice=score, **fields)

    return [
        Pair(tuple(record(row, run[row]) for run in a), tuple(record(row, run[row]) for run in b))
        for row in range(len(a[0]))
    ]


def dice_of(pairs: Sequence[Pair], block: str = "pooled") -> dict[str, Any]:
    figure: dict[str, Any] = compare(pairs)[block]["dice"]
    return figure


def test_differences_worked_by_hand(made: Make) -> None:
    a = [made(source="s", dice=0.2, detect=0.1), made(source="s", dice=0.4, detect=0.1), made(source="t", dice=0.0)]
    b = [made(source="s", dice=0.5, detect=0.2), made(source="s", dice=0.5), made(source="t", dice=0.4, valid=False)]
    pairs = [
        Pair((replace(x, file_name=name),), (replace(y, file_name=name),))
        for x, y, name in zip(a, b, "xyz", strict=True)
    ]
    found = compare(pairs)
    assert (found["pooled"]["n"], found["pooled"]["cases"]) == (3, 3)
    dice = found["pooled"]["dice"]
    assert (dice["a"], dice["b"], dice["difference"]) == pytest.approx((20.0, 140 / 3, 80 / 3))
    assert found["macro"]["dice"]["difference"] == pytest.approx((20.0 + 40.0) / 2)
    assert found["pooled"]["detect"]["difference"] == pytest.approx((10 + 40 + 0) / 3)
    assert found["pooled"]["failure"]["difference"] == 0.0, "one failed by Dice 0 before, by its form after"
    assert found["pooled"]["invalid"]["difference"] == pytest.approx(100 / 3)
    assert found["lesion_free"] is found["attributes"] is None
    assert [row["file_name"] for row in found["gains"]] == ["z", "x", "y"] and found["losses"] == []


def test_attribute_questions_and_lesion_free_rows_stand_apart(made: Make) -> None:
    asked = {"attribute": "largest", "whole_dice": 0.8}
    rows = [
        (made(**asked, dice=0.5, plain_dice=0.5), made(**asked, dice=0.7, plain_dice=0.4)),
        (made(lesion_share=0.0, predicted_share=0.1), made(lesion_share=0.0, predicted_share=0.0, found=True)),
    ]
    found = compare([Pair((a,), (b,)) for a, b in rows])
    assert found["pooled"] is found["macro"] is None and found["gains"] == []
    assert found["attributes"]["dice"]["difference"] == pytest.approx(20.0)
    assert found["attributes"]["gain"]["a"] == 0.0 and found["attributes"]["gain"]["b"] == pytest.approx(30.0)
    assert found["lesion_free"]["specificity"]["difference"] == 100.0
    assert found["lesion_free"]["called_absent"]["difference"] == 0.0


@pytest.mark.parametrize("seeds", [(1, 1), (2, 3)])
def test_identical_runs_do_not_differ(made: Make, seeds: tuple[int, int]) -> None:
    dices = np.random.default_rng(0).random(40).tolist()
    found = compare(pairs_of(made, [dices] * seeds[0], [dices] * seeds[1]))
    for block in ("pooled", "macro"):
        for name in ("dice", "detect", "failure", "invalid"):
            figure = found[block][name]
            assert figure["difference"] == figure["low"] == figure["high"] == 0.0
            assert figure["verdict"] == "not distinguishable"
    assert found["gains"] == found["losses"] == []


def test_a_constant_gain_is_better_whichever_side_has_it(made: Make) -> None:
    worse, better = [0.0] * 20, [0.25] * 20
    figure = dice_of(pairs_of(made, [worse], [better]))
    assert (figure["low"], figure["high"], figure["verdict"]) == (25.0, 25.0, "B better")
    assert dice_of(pairs_of(made, [better], [worse]))["verdict"] == "A better"
    failures = compare(pairs_of(made, [worse], [better]))["pooled"]["failure"]
    assert (failures["difference"], failures["verdict"]) == (-100.0, "B better"), "fewer failures are better"


@pytest.mark.parametrize("block", ["pooled", "macro"])
def test_one_patient_with_many_images_decides_nothing(made: Make, block: str) -> None:
    a, b = [0.5] * 40, [0.5] * 20 + [0.9] * 20
    one = ["p"] * 40
    few = [f"p{row}" if row < 20 else "with the gain" for row in range(40)]
    assert dice_of(pairs_of(made, [a], [b], case=few), block)["verdict"] == "not distinguishable"
    assert dice_of(pairs_of(made, [a], [b]), block)["verdict"] == "B better"
    assert dice_of(pairs_of(made, [a], [b], case=one), block)["verdict"] == "not distinguishable", (
        "no width, no verdict"
    )


def test_seeds_that_differ_more_than_the_sides_decide_nothing(made: Make) -> None:
    rows = np.random.default_rng(0).uniform(0.4, 0.5, 60)
    noisy = {"a": [-0.2, 0.0, 0.2], "b": [-0.15, 0.05, 0.25]}
    a, b = ([(rows + shift).tolist() for shift in noisy[side]] for side in "ab")
    figure = dice_of(pairs_of(made, a, b))
    assert figure["difference"] == pytest.approx(5.0)
    assert figure["verdict"] == "not distinguishable"
    assert dice_of(pairs_of(made, a[1:2], b[1:2]))["verdict"] == "B better", "the same effect, one seed each"
    steady = [[(rows + shift + step).tolist() for step in (-0.001, 0.0, 0.001)] for shift in (0.0, 0.05)]
    assert dice_of(pairs_of(made, *steady))["verdict"] == "B better", "the same effect, steady seeds"


def test_what_is_said_about_training_noise() -> None:
    assert "say nothing about training noise" in training_noise(1, 5)
    assert "2 and 2 runs" in training_noise(2, 2) and "33 %" in training_noise(2, 2)
    assert "10 %" in training_noise(3, 3)


@pytest.fixture
def run(tmp_path: Path, lesion_set: LesionSet, oracle: Any) -> Callable[..., Path]:
    """Writes an evaluation of the oracle, or of what it is changed into, and gives its folder."""

    def write(name: str, weights: str = "", answer: Any = oracle.answer, **options: Any) -> Path:
        predictor = replace(oracle, name=name, settings={"weights": weights}, answer=answer)
        evaluate(lesion_set, predictor, out=tmp_path / name, progress=False, **options)
        return tmp_path / name

    return write


@pytest.fixture
def whole_image(give: Callable[..., Result]) -> Callable[[Sample, np.ndarray, str], Result]:
    """The answer that everything is lesion."""
    return lambda sample, image, question: give(sample.category, np.ones(image.shape[:2], bool), [(0, 0, 40, 30)])


def page() -> Console:
    return Console(file=StringIO(), width=120)


def test_folders_are_read_matched_and_printed(run: Callable[..., Path], whole_image: Any, tmp_path: Path) -> None:
    a = read_side("A", [run("worse", answer=whole_image)])
    b = read_side("B", [run("gold-0", "aa"), run("gold-1", "bb")])
    pairs = matched(a, b)
    comparison = compare(pairs)
    json.dumps(comparison, allow_nan=False)
    dices = [200 * area / (1200 + area) for area in (100, 100, 125, 16)]
    assert comparison["pooled"]["dice"]["difference"] == pytest.approx(100 - np.mean(dices))
    assert comparison["gains"][0]["file_name"] == "images/polyp_1.png"
    console = page()
    print_comparison(a, b, comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    assert "B better" in text and "gold-1" in text and "nothing about training noise" in " ".join(text.split())
    assert "Greatest gains" in text and "Greatest losses" not in text
    write_differences(tmp_path / "deep" / "rows.csv", pairs)
    with (tmp_path / "deep" / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(differences(pairs)) == 5
    assert {row["file_name"]: float(row["dice_difference"]) for row in rows}["images/polyp_1.png"] == pytest.approx(
        1 - dices[3] / 100
    )


def test_packed_records_are_the_same(run: Callable[..., Path]) -> None:
    (before,) = read_side("A", [run("a")])
    file = before.folder / "records.jsonl"
    (before.folder / "records.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert read_side("A", [before.folder]) == [before]


def test_other_words_for_the_same_lesions_pair_where_asked_for(run: Callable[..., Path]) -> None:
    a, b = read_side("A", [run("a")]), read_side("B", [run("b", held_out_questions=True)])
    pairs = matched(a, b, any_words=True)
    assert len(pairs) == len(a[0].records)
    assert all(x.mask_file_name == y.mask_file_name for x, y in ((*pair.a, *pair.b) for pair in pairs))
    c = read_side("C", [run("c", limit=3)])
    with pytest.raises(ConfigError, match="rows"):
        matched(a, c, any_words=True)


def test_attribute_questions_that_one_side_was_not_asked_are_left_out(run: Callable[..., Path]) -> None:
    a, b = read_side("A", [run("a")]), read_side("B", [run("b", attribute_questions=True)])
    assert len(b[0].records) > len(a[0].records) == 5
    for sides in ((a, b), (b, a)):
        pairs = matched(*sides)
        assert len(pairs) == 5 and not any(pair.asked.attribute for pair in pairs)
    assert len(matched(b, b)) == len(b[0].records), "where both were asked they count"
    console = page()
    print_comparison(a, b, compare(matched(a, b)), console)
    assert "5 questions to both" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 3}, "rows"),
        ({"split": "train"}, "split"),
        ({"seed": 1}, "seed"),
        ({"held_out_questions": True}, "held-out questions"),
        ({"own_words": {"cyst": ("cyst?",), "polyp": ("polyp?",)}}, "own words"),
    ],
)
def test_other_questions_are_refused(run: Callable[..., Path], options: dict[str, Any], said: str) -> None:
    a, b = read_side("A", [run("a")]), read_side("B", [run("b", **options)])
    with pytest.raises(ConfigError, match=said):
        matched(a, b)


def test_an_unfinished_run_is_named(run: Callable[..., Path]) -> None:
    a, b = run("a"), run("b")
    lines = (b / "records.jsonl").read_bytes().splitlines(keepends=True)
    (b / "records.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    for sides in ((a, b), (b, a)):
        with pytest.raises(DataError, match=r"b is unfinished: 4 answers where \S+a has 5"):
            matched(read_side("A", [sides[0]]), read_side("B", [sides[1]]))


def test_records_that_are_of_other_rows_are_refused(run: Callable[..., Path]) -> None:
    """The settings agree, and yet: somebody edited a file."""
    a, b = run("a"), run("b")
    records = (b / "records.jsonl").read_text()
    (b / "records.jsonl").write_text(records.replace("polyp_1", "polyp_7"))
    with pytest.raises(DataError, match="do not match"):
        matched(read_side("A", [a]), read_side("B", [b]))


@pytest.mark.parametrize("written", [None, "", '{"settings": {}}\n', '{"settings"'])
def test_a_folder_without_records_is_refused(tmp_path: Path, written: str | None) -> None:
    if written is not None:
        (tmp_path / "records.jsonl").write_text(written)
    with pytest.raises(DataError, match="no records in it"):
        read_side("A", [tmp_path])


@pytest.mark.parametrize("line", ["{}", "[]", "1", "not JSON", '{"file_name": "a.png", "boxes": []}'])
def test_lines_that_are_no_records_are_refused(run: Callable[..., Path], line: str) -> None:
    folder = run("a")
    for text in (f"{line}\n", (folder / "records.jsonl").read_text() + f"{line}\n"):
        (folder / "records.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"records.jsonl line \d is no line"):
            read_side("A", [folder])


def test_settings_of_another_version_are_refused(run: Callable[..., Path]) -> None:
    file = run("a") / "records.jsonl"
    file.write_text(file.read_text().replace('"split"', '"part"', 1))
    with pytest.raises(DataError, match="lack the settings split"):
        read_side("A", [file.parent])


def test_one_side_is_one_training_with_other_seeds(
    run: Callable[..., Path], lesion_set: LesionSet, oracle: Any
) -> None:
    folder = run("a", "aa")
    with pytest.raises(ConfigError, match="A names one folder twice"):
        read_side("A", [folder, folder.parent / "a" / ".." / "a"])
    other = folder.parent / "free"
    evaluate(lesion_set, replace(oracle, settings={"weights": "bb", "free": True}), out=other, progress=False)
    with pytest.raises(ConfigError, match="no further seed"):
        read_side("B", [folder, other])
