from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coreseg.config import SftConfig
from coreseg.masks import mask_to_boxes
from coreseg.model.processor import CoreSegProcessor
from coreseg.testing import write_phantom_set
from coreseg.train.collate import Draws, Example, Examples
from coreseg.train.sft import Collator
from coreseg.types import Answer


def examples(phantoms: Path, **changes: float) -> Examples:
    return Examples.open(SftConfig(model="nano", data=(str(phantoms),), out="run", **changes), "train")  # type: ignore[arg-type]


def test_an_example_depends_on_row_and_draw_alone(phantoms: Path) -> None:
    rows, fresh = examples(phantoms, remeasure=True), examples(phantoms, remeasure=True)
    for _ in range(3):
        rows[(0, 1)]
    one, other = rows[(1, 7)], fresh[(1, 7)]
    assert np.array_equal(one.image, other.image) and one.question == other.question and one.answer == other.answer
    assert not np.array_equal(rows[(1, 8)].image, one.image)


def test_boxes_are_those_of_the_changed_mask(phantoms: Path) -> None:
    rows = examples(phantoms, remeasure=True, attribute_share=0.5)
    for draw in range(12):
        example = rows[(draw % len(rows), draw)]
        assert np.array_equal(np.array(example.answer.boxes).reshape(-1, 4), mask_to_boxes(example.mask))
        assert example.answer.found == bool(example.answer.boxes)


@pytest.mark.parametrize(("two_kinds", "asks"), [(0.0, {"one", "every", None}), (0.5, {"one", "kind", None})])
def test_an_example_tells_whether_one_or_every_lesion_is_asked_for(
    tmp_path: Path, two_kinds: float, asks: set[str | None]
) -> None:
    """Of what is not there and of "all but one" nothing; a category that shares some picture is a kind."""
    phantoms = write_phantom_set(tmp_path, 24, seed=0, size_wh=(96, 80), two_kinds=two_kinds)
    rows = examples(phantoms, attribute_share=0.5, absent_share=0.3)
    drawn = [rows[(row, draw)] for row in range(len(rows)) for draw in range(6)]
    for example in drawn:
        if example.asks == "one":
            assert len(example.answer.boxes) == 1
        if not example.answer.found:
            assert example.asks is None
        if example.asks in ("every", "kind"):
            assert example.answer.found
    assert {example.asks for example in drawn} == asks


def test_one_of_two_rows_of_a_category_is_not_every_lesion(tmp_path: Path) -> None:
    rows = examples(write_phantom_set(tmp_path, 12, seed=0, size_wh=(48, 40), two_kinds=1.0))
    alike = Examples([(lesions, replace(sample, category="cyst")) for lesions, sample in rows.rows], rows.config)
    assert "every" not in {alike[(row, 0)].asks for row in range(len(alike))}


def test_what_may_be_there_is_never_called_absent(tmp_path: Path) -> None:
    """Every anatomy of the phantoms knows both kinds, so a row of one must not deny the other."""
    phantoms = examples(write_phantom_set(tmp_path, 12, seed=0, size_wh=(48, 40), two_kinds=1.0), absent_share=1.0)
    for row, (_, sample) in enumerate(phantoms.rows):
        assert phantoms[(row, row)].answer.category == sample.category
    own = replace(phantoms.rows[0][1], category="cyst")
    others = [("thyroid", "thyroid cyst"), ("colon", "polyp")]
    known = [replace(own, anatomy=anatomy, category=category) for anatomy, category in others]
    mixed = Examples([(phantoms.rows[0][0], sample) for sample in (own, *known)], phantoms.config)
    assert {mixed[(0, draw)].answer.category for draw in range(8)} == {"polyp"}, "a thyroid cyst is a cyst"


def test_what_is_known_to_be_absent_is_asked_for_half_of_the_time(tmp_path: Path) -> None:
    known = {"cyst": ("stone", "scar"), "nodule": ("stone",)}
    phantoms = examples(write_phantom_set(tmp_path, 12, seed=0, size_wh=(48, 40)), absent_share=1.0, known_absent=known)
    (lesions, row), *_ = phantoms.rows
    far = replace(row, anatomy="colon", category="polyp")
    mixed = Examples([(lesions, replace(row, category="cyst")), (lesions, far)], phantoms.config)
    asked = Counter(mixed[(0, draw)].answer.category for draw in range(200))
    assert set(asked) == {"polyp", "stone", "scar"}
    assert 70 < asked["polyp"] < 130 and 30 < asked["stone"] < 75
    assert not mixed[(0, 0)].answer.found and "polyp" not in mixed[(1, 0)].question, "an unlisted category has far ones"


def test_questions_in_own_words_and_with_typing_errors(phantoms: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('cyst = ["Something watery?"]\nnodule = ["Anything solid?"]\n')
    own = examples(phantoms, remeasure=True, own_words=str(file), own_words_share=0.5)
    questions = [own[(row, draw)].question for row in range(4) for draw in range(50)]
    assert 70 < sum(question in ("Something watery?", "Anything solid?") for question in questions) < 130
    plain, typed = examples(phantoms, remeasure=True), examples(phantoms, remeasure=True, typo_share=1.0)
    pairs = [(plain[(0, draw)], typed[(0, draw)]) for draw in range(60)]
    assert 15 < sum(one.question != other.question for one, other in pairs) <= 55
    assert all(one.answer.boxes == other.answer.boxes for one, other in pairs)


def test_only_what_is_there_and_alone_is_asked_for_without_its_name(phantoms: Path, tmp_path: Path) -> None:
    rows = examples(phantoms, unnamed_share=1.0, absent_share=0.0, attribute_share=0.0)
    assert all(rows.rows[row][1].category in rows[(row, 0)].question.lower() for row in range(4)), "side by side"
    pictures = {sample.file_name: (lesions, sample) for lesions, sample in rows.rows}
    (lesions, first), (_, second), *_ = pictures.values()
    alone = [
        (lesions, replace(first, category="colon polyp")),
        (lesions, replace(second, category="scar", anatomy="skin")),
    ]
    unnamed = Examples(alone, replace(rows.config, unnamed_share=0.5))
    asked = [unnamed[(0, draw)] for draw in range(400)]
    assert all(example.answer.category == "colon polyp" for example in asked)
    assert 160 < sum("colon polyp" in example.question.lower() for example in asked) < 240

    own = tmp_path / "own.toml"
    own.write_text('scar = ["What is this mark?", "An old scar?"]\n')
    config = replace(rows.config, own_words=str(own), own_words_share=1.0)
    absent = Examples(alone, replace(config, absent_share=1.0))
    assert {absent[(0, draw)].question for draw in range(20)} == {"An old scar?"}, "the other may mean the polyp"
    there = Examples(alone, config)
    assert {there[(1, draw)].question for draw in range(20)} == {"What is this mark?", "An old scar?"}


def test_other_words_come_as_often_as_the_setting_says_and_change_nothing_else(phantoms: Path) -> None:
    plain, some = examples(phantoms, remeasure=True), examples(phantoms, remeasure=True, filler_share=0.5)
    pairs = [(plain[(0, draw)], some[(0, draw)]) for draw in range(60)]
    assert 20 < sum(one.question != other.question for one, other in pairs) < 40
    for one, other in pairs[:10]:
        assert np.array_equal(one.image, other.image) and one.answer.boxes == other.answer.boxes


def test_draws_follow_the_weights_and_the_seed() -> None:
    weights = np.array([1.0, 3.0, 0.0])
    drawn = list(Draws(weights, 4000, seed=0))
    assert [draw for _, draw in drawn] == list(range(4000))
    counts = Counter(row for row, _ in drawn)
    assert counts[2] == 0 and 0.22 < counts[0] / 4000 < 0.28
    assert drawn == list(Draws(weights, 4000, seed=0)) != list(Draws(weights, 4000, seed=1))


def test_a_version_of_a_picture_is_the_same_at_every_draw(phantoms: Path) -> None:
    rows = examples(phantoms, remeasure=True, versions=2)
    seen: dict[str, np.ndarray] = {}
    for draw in range(12):
        example = rows[(0, draw)]
        assert example.picture is not None
        assert np.array_equal(seen.setdefault(example.picture, example.image), example.image)
    assert len(seen) == 2
    assert examples(phantoms, remeasure=True)[(0, 0)].picture is None


def test_a_lesion_of_one_pixel_survives_the_shrinking(nano: Path) -> None:
    mask = np.zeros((300, 500), bool)
    mask[17, 401] = True
    example = Example(
        np.zeros((300, 500, 3), np.uint8), mask, "Where?", Answer("cyst", ((401, 17, 402, 18),), "", True)
    )
    small = Collator(CoreSegProcessor.from_pretrained(nano)).reference(example)
    assert small.shape == (64, 64) and small.sum() >= 1
    row, column = torch.nonzero(small)[0].tolist()
    assert abs(row - 17 * 64 / 300) <= 1 and abs(column - 401 * 64 / 500) <= 1
