"""Scores against brute force, on gold, empty, both empty and malformed input."""

import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coreseg.metrics import (
    Interval,
    bootstrap_interval,
    box_iou,
    detect_score,
    dice,
    difference_interval,
    iou,
    is_failure,
    macro_bootstrap_interval,
    macro_mean,
)
from coreseg.types import Box

masks = hnp.arrays(bool, (4, 5))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """A box with area in an 8 x 8 frame."""
    x1, y1 = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    return x1, y1, draw(st.integers(x1 + 1, 8)), draw(st.integers(y1 + 1, 8))


def pixels(mask: np.ndarray) -> set[tuple[int, ...]]:
    """The foreground as a set of coordinates."""
    return {tuple(int(axis) for axis in place) for place in np.argwhere(mask)}


def painted(box: Box) -> np.ndarray:
    """The mask of a box in an 8 x 8 frame."""
    mask = np.zeros((8, 8), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


@given(masks, masks)
def test_dice_and_iou_equal_their_set_definitions(prediction: np.ndarray, reference: np.ndarray) -> None:
    a, b = pixels(prediction), pixels(reference)
    if not a and not b:
        assert dice(prediction, reference) == iou(prediction, reference) == 1.0
        return
    assert dice(prediction, reference) == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    assert iou(prediction, reference) == pytest.approx(len(a & b) / len(a | b))


def test_empty_masks() -> None:
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    for score in (dice, iou):
        assert score(empty, empty) == 1.0
        assert score(full, full) == 1.0
        assert score(empty, full) == score(full, empty) == 0.0


def test_masks_of_unlike_size_are_refused() -> None:
    # Where the suite enforces shapes the annotations refuse them first; broadcasting (1, 4) on (3, 4) must never score.
    for score in (dice, iou):
        with pytest.raises(Exception, match=r"frame|shape|hint|type"):
            score(np.ones((1, 4), bool), np.ones((3, 4), bool))


def test_failure_is_dice_zero_or_invalid_form() -> None:
    assert is_failure(0.0, valid=True)
    assert is_failure(0.9, valid=False)
    assert not is_failure(0.001, valid=True)


@given(st.lists(boxes(), max_size=3), st.lists(boxes(), max_size=3))
def test_box_iou_equals_mask_iou(first: list[Box], second: list[Box]) -> None:
    ious = box_iou(first, second)
    assert ious.shape == (len(first), len(second))
    for row, a in enumerate(first):
        for column, b in enumerate(second):
            assert ious[row, column] == pytest.approx(iou(painted(a), painted(b)))


def brute_force_detect(predicted: list[Box], reference: list[Box]) -> float:
    """Tries every one-to-one pairing and keeps the largest total IoU."""
    if not predicted or not reference:
        return float(not predicted and not reference)
    few, many = sorted((predicted, reference), key=len)
    ious = {(a, b): iou(painted(a), painted(b)) for a in few for b in many}
    pairings = ([ious[pair] for pair in zip(few, order, strict=True)] for order in permutations(many, len(few)))
    matched = [value for value in max(pairings, key=sum) if value > 0]
    if not matched:
        return 0.0
    precision, recall = len(matched) / len(predicted), len(matched) / len(reference)
    return sum(matched) / len(matched) * 2 * precision * recall / (precision + recall)


@given(st.lists(boxes(), max_size=3), st.lists(boxes(), max_size=4))
def test_detect_score_equals_brute_force(predicted: list[Box], reference: list[Box]) -> None:
    assert detect_score(predicted, reference) == pytest.approx(brute_force_detect(predicted, reference))


def test_detect_score_in_words() -> None:
    left, right, far = (0, 0, 4, 4), (10, 0, 14, 4), (90, 90, 95, 95)
    assert detect_score([left, right], [right, left]) == 1.0, "the order of the boxes does not count"
    assert detect_score([], []) == 1.0
    assert detect_score([left], []) == detect_score([], [left]) == 0.0
    assert detect_score([far], [left]) == 0.0, "a pair without overlap is no match"
    assert detect_score([left, far], [left]) == pytest.approx(2 / 3), "a false alarm costs precision"
    assert detect_score([left], [left, right]) == pytest.approx(2 / 3), "a missed lesion costs recall"
    assert detect_score([(0, 0, 4, 2)], [left]) == pytest.approx(0.5), "half the box, one match"
    assert detect_score([(4, 0, 8, 4)], [left]) == 0.0, "half-open boxes that touch do not overlap"


def test_detect_score_takes_arrays_and_tuples() -> None:
    array = np.array([[0, 0, 4, 4]])
    assert detect_score(array, [(0, 0, 4, 4)]) == 1.0
    assert detect_score(np.zeros((0, 4), int), ()) == 1.0
    assert detect_score(np.zeros((0, 4), int), array) == 0.0


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 400).tolist()
    interval = bootstrap_interval(values, [""] * 400)
    half_width = 1.96 * np.std(values) / 20
    assert interval.low == pytest.approx(np.mean(values) - half_width, abs=0.003)
    assert interval.high == pytest.approx(np.mean(values) + half_width, abs=0.003)


def test_bootstrap_draws_cases_not_images() -> None:
    values = [0.0] * 50 + [1.0] * 50
    two_patients = bootstrap_interval(values, ["a"] * 50 + ["b"] * 50)
    assert two_patients == Interval(0.0, 1.0), "two patients: a draw may hold one of them only"
    unknown = bootstrap_interval(values, [""] * 100)
    assert unknown.high - unknown.low < 0.25, "unknown cases are one case each"


def test_bootstrap_weighs_a_case_by_its_images() -> None:
    values, cases = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    means = {round(bootstrap_interval(values, cases, level=level).low, 3) for level in (0.4, 0.9)}
    assert means == {0.9, 0.0}, "one of each case drawn gives the image mean 0.9, not the case mean 0.5"


def test_bootstrap_is_deterministic_and_widens_with_the_level() -> None:
    values = np.random.default_rng(2).random(30).tolist()
    assert bootstrap_interval(values, [""] * 30, seed=3) == bootstrap_interval(values, [""] * 30, seed=3)
    assert bootstrap_interval(values, [""] * 30, seed=3) != bootstrap_interval(values, [""] * 30, seed=4)
    narrow, wide = (bootstrap_interval(values, [""] * 30, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < np.mean(values) < narrow.high < wide.high


def test_macro_mean_gives_every_set_the_same_weight() -> None:
    assert macro_mean([1.0, 1.0, 1.0, 0.0], ["big", "big", "big", "small"]) == 0.5


def test_macro_bootstrap_never_lets_a_set_vanish() -> None:
    values, sets = [1.0] * 9 + [0.0], ["big"] * 9 + ["small"]
    assert macro_bootstrap_interval(values, [""] * 10, sets) == Interval(0.5, 0.5)
    pooled = bootstrap_interval(values, [""] * 10)
    assert pooled.low < 0.9 < pooled.high, "pooled, the same values do vary"


def test_macro_bootstrap_of_one_set_is_the_pooled_one() -> None:
    values = np.random.default_rng(5).random(40).tolist()
    cases = [str(row // 3) for row in range(40)]
    assert macro_bootstrap_interval(values, cases, ["one"] * 40) == bootstrap_interval(values, cases)


def test_one_run_a_side_is_the_paired_bootstrap() -> None:
    gains = np.random.default_rng(5).normal(0, 1, 40)
    cases, sets = [str(row // 3) for row in range(40)], ["one", "two"] * 20
    one = gains[None, None]
    assert difference_interval(one, cases, [""] * 40) == bootstrap_interval(gains.tolist(), cases)
    assert difference_interval(one, cases, sets) == macro_bootstrap_interval(gains.tolist(), cases, sets)


def test_seeds_are_drawn_on_each_side() -> None:
    """Two rows alike, so cases bring no noise: what varies is which of A's two runs and of B's two are drawn."""
    a, b = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[10.0, 10.0], [30.0, 30.0]])
    names = ["x", "y"]
    interval = difference_interval(b[None] - a[:, None], names, ["", ""])
    assert interval == Interval(9.0, 30.0)
    assert difference_interval(b[None] - a[:1, None], names, ["", ""]) == Interval(10.0, 30.0)
    middle = difference_interval(b[None] - a[:, None], names, ["", ""], level=0.3)
    assert 19 <= middle.low <= middle.high <= 20, "half of the draws hold both of B's runs"


@pytest.mark.parametrize("names", [[], ["a"], ["a"] * 3])
def test_lists_of_unlike_length_are_refused(names: list[str]) -> None:
    values = [0.5, 0.6] if names else []
    for score in (bootstrap_interval, macro_mean):
        with pytest.raises(ValueError, match="expected as many"):
            score(values, names)
    with pytest.raises(ValueError, match="expected as many"):
        macro_bootstrap_interval(values, [""] * len(values), names)


def test_bootstrap_is_fast() -> None:
    values = np.random.default_rng(0).random(500).tolist()
    start = time.process_time()
    bootstrap_interval(values, [""] * 500)
    difference_interval(np.zeros((3, 3, 500)), [""] * 500, [""] * 500)
    macro_bootstrap_interval(values, [""] * 500, [str(row % 26) for row in range(500)])
    assert time.process_time() - start < 1.0
