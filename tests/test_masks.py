"""Components, the box convention, boxes between frames, masks at another size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreseg.errors import InputError
from coreseg.masks import label_lesions, lesion_masks, map_boxes, mask_to_boxes, resize_mask, tight_box


def drawn(size_hw: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size_hw, dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def test_components_are_8_connected() -> None:
    labels, areas_px = label_lesions(drawn((20, 30), (2, 2, 4, 4), (4, 4, 6, 6), (10, 0, 20, 10)))
    assert sorted(areas_px) == [0, 8, 100]  # the two squares touch at a corner
    assert labels.shape == (20, 30)


def test_lesions_come_with_their_boxes() -> None:
    mask = drawn((40, 60), (5, 20, 25, 30), (1, 25, 4, 35), (30, 3, 40, 9), (59, 39, 60, 40))
    parts, boxes = lesion_masks(mask), mask_to_boxes(mask)
    assert [tight_box(part) for part in parts] == [tuple(box) for box in boxes] and len(parts) == 3
    assert np.array_equal(parts.any(axis=0) | drawn((40, 60), (59, 39, 60, 40)), mask)  # one pixel is no lesion here


def test_an_empty_mask_has_nothing() -> None:
    empty = np.zeros((7, 5), dtype=bool)
    assert lesion_masks(empty).shape == (0, 7, 5)
    assert tight_box(empty) is None
    boxes = mask_to_boxes(empty)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.int64


def test_boxes_are_half_open_and_reach_every_edge() -> None:
    assert mask_to_boxes(np.ones((11, 13), dtype=bool)).tolist() == [[0, 0, 13, 11]]
    assert mask_to_boxes(drawn((11, 13), (11, 9, 13, 11))).tolist() == [[11, 9, 13, 11]]
    assert tight_box(drawn((11, 13), (3, 4, 4, 5), (9, 8, 10, 9))) == (3, 4, 10, 9)


def test_small_components_get_no_box_unless_all_are_small() -> None:
    assert mask_to_boxes(drawn((50, 50), (0, 0, 3, 1), (10, 10, 12, 12))).tolist() == [[10, 10, 12, 12]]
    assert mask_to_boxes(drawn((50, 50), (0, 0, 3, 1), (10, 10, 12, 11))).tolist() == [[0, 0, 3, 1]]


def test_the_size_limit_grows_with_the_image() -> None:
    # 0.02 % of 500 x 500 is 50 px.
    assert len(mask_to_boxes(drawn((500, 500), (0, 0, 7, 7), (100, 100, 120, 120)))) == 1
    assert len(mask_to_boxes(drawn((500, 500), (0, 0, 10, 5), (100, 100, 120, 120)))) == 2


def test_at_most_eight_boxes_the_largest_in_reading_order() -> None:
    squares = [
        (20 * column, 20 * row, 20 * column + side, 20 * row + side)
        for row in range(3)
        for column in range(4)
        for side in [3 + row * 4 + column]
    ]
    boxes = mask_to_boxes(drawn((80, 90), *reversed(squares)))
    assert [tuple(box) for box in boxes.tolist()] == squares[4:]  # the four smallest stand in the first row


def test_a_far_offset_changes_nothing() -> None:
    near, far = drawn((400, 400), (3, 2, 9, 8)), drawn((400, 400), (303, 202, 309, 208))
    assert (mask_to_boxes(far) - mask_to_boxes(near)).tolist() == [[300, 200, 300, 200]]


sizes = st.integers(1, 700)


@st.composite
def framed_boxes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    width, height = draw(sizes), draw(sizes)
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    return np.array([[x1, y1, x2, y2]]), (width, height)


@given(framed_boxes(), sizes, sizes)
def test_boxes_stay_inside_the_frame_and_keep_area(boxed: tuple[np.ndarray, tuple[int, int]], w: int, h: int) -> None:
    boxes, size_wh = boxed
    ((x1, y1, x2, y2),) = map_boxes(boxes, size_wh, (w, h)).tolist()
    assert 0 <= x1 < x2 <= w
    assert 0 <= y1 < y2 <= h


@given(framed_boxes(), sizes, sizes)
def test_there_and_back_is_exact_in_a_larger_frame_and_within_the_scale_in_a_smaller_one(
    boxed: tuple[np.ndarray, tuple[int, int]], w: int, h: int
) -> None:
    boxes, size_wh = boxed
    back = map_boxes(map_boxes(boxes, size_wh, (w, h)), (w, h), size_wh)
    for axis, to_px in ((0, w), (1, h)):
        moved_px = np.abs(back - boxes)[:, axis::2].max()
        allowed_px = 0 if to_px >= size_wh[axis] else math.ceil(size_wh[axis] / to_px)
        assert moved_px <= allowed_px


def test_boxes_scale_each_axis_by_itself() -> None:
    mapped = map_boxes(np.array([[10, 10, 20, 20], [0, 0, 101, 51]]), (101, 51), (202, 102))
    assert mapped.tolist() == [[20, 20, 40, 40], [0, 0, 202, 102]]
    assert map_boxes(np.array([[10, 10, 20, 20]]), (100, 100), (50, 300)).tolist() == [[5, 30, 10, 60]]


def test_boxes_outside_their_frame_are_clipped_to_it() -> None:
    assert map_boxes(np.array([[-5, 90, 30, 130]]), (100, 100), (100, 100)).tolist() == [[0, 90, 30, 100]]


def test_no_boxes_stay_no_boxes() -> None:
    assert map_boxes(np.zeros((0, 4), dtype=np.int64), (10, 10), (20, 20)).shape == (0, 4)


def test_a_frame_without_size_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 px"):
        map_boxes(np.array([[0, 0, 1, 1]]), (10, 0), (20, 20))
    with pytest.raises(InputError, match="at least 1 px"):
        resize_mask(np.ones((4, 4), dtype=bool), (0, 4))


def test_resizing_to_the_same_size_is_a_copy() -> None:
    mask = drawn((9, 7), (1, 2, 4, 5))
    same = resize_mask(mask, (9, 7))
    assert np.array_equal(same, mask)
    same[:] = True
    assert not mask.all()


def test_growing_repeats_pixels() -> None:
    mask = drawn((3, 5), (1, 1, 3, 2))
    assert np.array_equal(resize_mask(mask, (6, 15)), np.repeat(np.repeat(mask, 2, axis=0), 3, axis=1))


@given(st.integers(0, 10_000), st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_area_is_kept_in_proportion(seed: int, size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2)
    mask = rng.random((height, width)) < rng.random()
    resized = resize_mask(mask, size_hw)
    assert resized.shape == size_hw
    assert resized.any() == mask.any()
    if size_hw[0] <= height and size_hw[1] <= width:
        patches = max(1, label_lesions(resized)[0].max(), label_lesions(mask)[0].max())
        expected = mask.sum() * size_hw[0] * size_hw[1] / (height * width)
        assert abs(resized.sum() - expected) <= patches


def test_a_lesion_of_one_pixel_survives_where_nearest_neighbour_loses_it() -> None:
    for x in range(64):
        mask = drawn((64, 64), (x, 33, x + 1, 34))
        small = resize_mask(mask, (8, 8))
        assert small.sum() == 1
        assert small[33 // 8, x // 8]


def test_a_large_lesion_keeps_its_outline() -> None:
    y, x = np.mgrid[:300, :400]
    disc = np.hypot(x - 210, y - 140) < 90
    small = resize_mask(disc, (75, 100))
    y, x = np.mgrid[:75, :100]
    expected = np.hypot(x + 0.5 - 52.625, y + 0.5 - 35.125) < 22.5
    assert (small ^ expected).sum() <= 0.03 * expected.sum()


def test_a_mask_can_shrink_on_one_axis_and_grow_on_the_other() -> None:
    assert tight_box(resize_mask(drawn((100, 10), (2, 50, 4, 100)), (10, 100))) == (20, 5, 40, 10)
