"""Tables that fit, figures that agree with the records, and one call that does it all."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError
from coreseg.evaluate import BlindBaseline, evaluate, evaluate_and_report, print_table, write_summary
from coreseg.evaluate.report import gain
from coreseg.types import Result


def page() -> Console:
    """A console of 120 columns that prints into a string."""
    return Console(file=StringIO(), width=120)


def text_of(console: Console) -> str:
    """What was printed."""
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def row_of(text: str, label: str) -> list[str]:
    """The cells of the first table row that starts with `label`."""
    cells = ([cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines())
    return next(row[1:] for row in cells if row[0] == label.strip())


def test_tables_hold_model_and_blind_side_by_side(lesion_set: LesionSet, oracle: Any) -> None:
    console = page()
    blind = evaluate(lesion_set, BlindBaseline.fit(lesion_set), progress=False)
    print_table(evaluate(lesion_set, oracle, progress=False, attribute_questions=True), [blind], console)
    text = text_of(console)
    assert "4 rows with the lesion, 1 without" in " ".join(text.split())
    headline = row_of(text, "mDice")
    assert headline[0] == "100.0 [100.0, 100.0]"
    pooled = blind.summary["pooled"]["dice"]
    assert headline[1] == f"{pooled['mean']:.1f} [{pooled['low']:.1f}, {pooled['high']:.1f}]"
    assert row_of(text, "specificity") == ["100.0 [100.0, 100.0]", "0.0 [0.0, 0.0]"]
    assert row_of(text, "cysts")[:2] == ["3", "100.0 [100.0, 100.0]"]
    for label in ("head", "abdomen", "endoscopy", "polyp", "gain over that"):
        assert row_of(text, label)


def test_tables_fit_120_columns_with_long_names(lesion_set: LesionSet, oracle: Any) -> None:
    console = page()
    evaluations = [
        evaluate(lesion_set, replace(oracle, name=name), progress=False)
        for name in ("runs/nano-grpo-3/checkpoint-1200", "blind", "question-blind")
    ]
    print_table(evaluations[0], evaluations[1:], console)
    text = text_of(console)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text, "nothing is cut off"
    assert text.count("100.0 [100.0, 100.0]") > 20, "figures stay on one line"


def test_gain_is_paired(lesion_set: LesionSet, oracle: Any, scripted: Any, give: Callable[..., Result]) -> None:
    gold = evaluate(lesion_set, oracle, progress=False)
    whole = scripted(
        lambda sample, image, question: give(sample.category, np.ones(image.shape[:2], bool), [(0, 0, 40, 30)])
    )
    whole_image = evaluate(lesion_set, whole, progress=False)
    gains = gain(gold, whole_image)
    assert gains is not None
    for mean in ("pooled", "macro"):
        assert gains[mean]["mean"] == pytest.approx(100 - whole_image.summary[mean]["dice"]["mean"])
        assert gains[mean]["low"] <= gains[mean]["mean"] <= gains[mean]["high"]
    assert gain(gold, replace(gold, records=())) is None
    boxes = gain(gold, whole_image, "detect")
    assert boxes is not None
    assert boxes["pooled"]["mean"] == pytest.approx(100 - whole_image.summary["pooled"]["detect"]["mean"])


def test_summary_is_plain_json(lesion_set: LesionSet, oracle: Any, tmp_path: Path) -> None:
    evaluation = evaluate(lesion_set, oracle, progress=False)
    write_summary(tmp_path / "new" / "summary.json", evaluation, [evaluation])
    saved = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert saved["pooled"]["dice"] == {"mean": 100.0, "low": 100.0, "high": 100.0}
    assert saved["settings"]["model"] == "oracle"
    assert saved["baselines"]["oracle"]["gain"]["pooled"]["mean"] == 0.0


def test_one_call_evaluates_prints_and_writes(lesion_set: LesionSet, oracle: Any, tmp_path: Path) -> None:
    console = page()
    evaluation, beside = evaluate_and_report(lesion_set, oracle, out=tmp_path, console=console, progress=False)
    assert evaluation.summary["pooled"]["dice"]["mean"] == 100.0
    assert "blind" in text_of(console) and [each.name for each in beside] == ["blind"]
    assert {path.name for path in tmp_path.iterdir()} >= {"records.jsonl", "summary.json", "blind"}
    assert len((tmp_path / "blind" / "records.jsonl").read_text().splitlines()) == 6
    assert set(json.loads((tmp_path / "summary.json").read_text())["baselines"]) == {"blind"}


def test_a_set_without_a_train_split_has_no_blind_guess(lesion_set: LesionSet, oracle: Any, tmp_path: Path) -> None:
    metadata = lesion_set.root / "metadata.jsonl"
    lines = [line for line in metadata.read_text().splitlines() if json.loads(line)["split"] != "train"]
    metadata.write_text("\n".join(lines) + "\n")
    evaluate_and_report(LesionSet.open(lesion_set.root), oracle, out=tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["baselines"] == {}


def test_a_split_without_lesions_still_prints(lesion_set: LesionSet, oracle: Any) -> None:
    metadata = lesion_set.root / "metadata.jsonl"
    lines = [line for line in metadata.read_text().splitlines() if json.loads(line)["source"] == "clear"]
    metadata.write_text("\n".join(lines) + "\n")
    console = page()
    print_table(evaluate(LesionSet.open(lesion_set.root), oracle, progress=False), console=console)
    assert "Rows with the lesion" not in text_of(console)
    assert row_of(text_of(console), "specificity") == ["100.0 [100.0, 100.0]"]


def test_many_baselines_fit_120_columns_too(lesion_set: LesionSet, oracle: Any) -> None:
    """Their intervals stand below the means."""
    console = page()
    names = ("runs/nano-grpo-3/checkpoint-1200", "blind", "question-blind", "oracle box", "unet", "category-embedding")
    evaluations = [evaluate(lesion_set, replace(oracle, name=name), progress=False) for name in names]
    print_table(evaluations[0], evaluations[1:], console)
    text = text_of(console)
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    assert row_of(text, "mDice") == ["100.0"] * 6
    assert row_of(text, "mDice gained,") == ["", *["+0.0"] * 5]
    assert row_of(text, "cysts") == ["3", *["100.0"] * 6]
    assert text.count("[100.0, 100.0]") > 40


def test_two_baselines_of_one_name_are_refused(lesion_set: LesionSet, oracle: Any) -> None:
    with pytest.raises(ConfigError, match="two baselines are called 'oracle'"):
        evaluate_and_report(lesion_set, oracle, baselines=[oracle, oracle], progress=False)
