"""The data card says what there is, shows it, and lets no text of a data set into the page as code."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from coreseg.data.build.card import EXAMPLES, Rejected, Stage, counts, write_card
from coreseg.data.store import LesionSet, evenly, write_set
from coreseg.testing import write_phantom_set


@pytest.fixture
def lesions(tmp_path: Path) -> LesionSet:
    return LesionSet.open(write_phantom_set(tmp_path / "phantoms", count=16, seed=3, two_kinds=0.5))


def card_of(lesions: LesionSet, rejected: list[Rejected], tmp_path: Path) -> tuple[str, str]:
    stages = [Stage("filter", 40, 16, {"threshold": 0.16})]
    write_card(lesions, stages, rejected, tmp_path / "card.html", tmp_path / "card.md")
    return (tmp_path / "card.html").read_text(encoding="utf-8"), (tmp_path / "card.md").read_text(encoding="utf-8")


def test_it_counts_and_shows(lesions: LesionSet, tmp_path: Path) -> None:
    reason = "count: the text says two, the mask has one"
    page, text = card_of(lesions, [Rejected(lesions, lesions.samples[0], reason)], tmp_path)
    for words in (page, text):
        assert "filter" in words and "threshold 0.16" in words and reason in words
        for part in ("modality", "category"):
            for name, count in counts(lesions.samples, part):
                assert re.search(rf"{re.escape(name)}\D+{count}\b", words), name
    assert page.count("data:image/jpeg;base64,") == EXAMPLES + 1 and "base64" not in text


def test_text_of_a_data_set_is_no_code(lesions: LesionSet, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> | end'
    samples = [replace(s, reasoning=evil, licence=evil, query=evil, source=evil) for s in lesions.samples]
    write_set(lesions.root, samples)
    lesions = LesionSet.open(lesions.root)
    page, text = card_of(lesions, [Rejected(lesions, samples[0], evil)], tmp_path)
    assert "<script" not in page
    assert evil.replace("|", "\\|") in text and evil not in text, "a bar would be a new column"


def test_evenly_spaced() -> None:
    assert evenly(list(range(10)), 3) == [0, 3, 6] and evenly([1, 2], 5) == [1, 2] and evenly([], 3) == []
