"""Further looks: where they look, what they add, and that they ask the same."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from coreseg.answer import parse
from coreseg.errors import ConfigError
from coreseg.evaluate.predictors import QuestionBlind
from coreseg.model.core_seg import CoreSegConfig
from coreseg.model.looks import LARGEST, MARGIN, all_looks, boxes_within, window_around
from coreseg.sam2 import encode_image
from coreseg.segmenter import Segmenter
from coreseg.types import Sample


def mask_of(box: tuple[int, int, int, int], width: int = 200, height: int = 100) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_the_window_has_the_pictures_shape_around_the_mask() -> None:
    assert window_around(mask_of((80, 40, 120, 50))) == (70, 30, 130, 60)  # a fifth of the width, a tenth of the height
    assert window_around(mask_of((100, 50, 101, 51))) == (80, 40, 120, 60), "no smaller than a fifth of a side"


@pytest.mark.parametrize("box", [(0, 0, 30, 10), (190, 95, 200, 100), (0, 60, 90, 100), (3, 0, 101, 2)])
def test_the_window_holds_the_mask_and_stays_inside(box: tuple[int, int, int, int]) -> None:
    x1, y1, x2, y2 = window_around(mask_of(box)) or (0, 0, 0, 0)
    assert 0 <= x1 <= box[0] and 0 <= y1 <= box[1] and box[2] <= x2 <= 200 and box[3] <= y2 <= 100
    assert (x2 - x1) / 200 == pytest.approx((y2 - y1) / 100, abs=0.01)


def test_no_second_look_at_nothing_or_at_most_of_the_picture() -> None:
    assert window_around(mask_of((0, 0, 0, 0))) is None
    widest = int(200 * LARGEST / MARGIN)
    assert window_around(mask_of((20, 40, 20 + widest, 50))) is not None
    assert window_around(mask_of((20, 40, 20 + widest + 2, 50))) is None


def test_boxes_are_cut_at_the_window() -> None:
    boxes = [(12, 21, 18, 25), (0, 0, 15, 22), (20, 20, 30, 30), (60, 0, 70, 9), (5, 5, 90, 90)]
    assert boxes_within(boxes, (10, 20, 20, 30)) == [(2, 1, 8, 5), (0, 0, 5, 2), (0, 0, 10, 10)]


def picture_and_first_look() -> tuple[np.ndarray, torch.Tensor]:
    """A picture, and logits that find something small in its middle."""
    logits = torch.full((10, 20), -1.0)
    logits[4:6, 9:11] = 3.0
    return np.zeros((100, 200, 3), dtype=np.uint8), logits


def test_the_looks_are_averaged_inside_the_window(nano: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, first = picture_and_first_look()
    asked = []

    def ask(part: np.ndarray, window: tuple[int, int, int, int], side_px: int) -> torch.Tensor:
        asked.append((part.shape, window, side_px))
        return torch.full((8, 8), -5.0)

    plain = all_looks(nano.processor, picture, "cyst", first, ask)
    assert not asked, "off by default"
    monkeypatch.setattr(nano.processor.config, "second_look", True)
    both = all_looks(nano.processor, picture, "cyst", first, ask)
    ((shape, (x1, y1, x2, y2), side_px),) = asked
    assert shape == (y2 - y1, x2 - x1, 3) and side_px == nano.model.config.segmenter_size_px
    expected = plain.clone()
    expected[y1:y2, x1:x2] = (plain[y1:y2, x1:x2] - 5) / 2
    torch.testing.assert_close(both, expected)
    assert (plain > 0).any() and not (both > 0).any()


def test_squares_are_averaged_before_the_second_look(nano: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, first = picture_and_first_look()
    asked = []

    def ask(part: np.ndarray, window: tuple[int, int, int, int], side_px: int) -> torch.Tensor:
        asked.append((window, side_px))
        return torch.full((side_px // 4, side_px // 4), {96: -9.0, 128: 3.0, 64: 0.5}[side_px])

    plain = all_looks(nano.processor, picture, "cyst", first, ask)
    monkeypatch.setattr(nano.processor.config, "looks_px", {"": [64, 96, 128], "nodule": [128]})
    larger = all_looks(nano.processor, picture, "cyst", first, ask)
    assert asked == [((0, 0, 200, 100), 96), ((0, 0, 200, 100), 128)]
    torch.testing.assert_close(larger, (plain - 9 + 3) / 3)
    nodule = all_looks(nano.processor, picture, "nodule", first, ask)
    torch.testing.assert_close(nodule, torch.full_like(plain, 3.0))
    monkeypatch.setattr(nano.processor.config, "second_look", True)
    assert torch.equal(all_looks(nano.processor, picture, "cyst", first, ask), larger), "nothing left to look at again"
    monkeypatch.setattr(nano.processor.config, "looks_px", {"nodule": [128]})
    asked.clear()
    all_looks(nano.processor, picture, "cyst", first, ask)
    assert [side for _, side in asked] == [64], "no sides for it: the own square, and the window"


def test_an_answer_asks_the_same_in_a_larger_square(nano: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the states of the first look decode the maps of the larger square."""
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    seen = []
    decode = nano.model.decode

    def decoding(states: torch.Tensor, present: torch.Tensor, maps: list[torch.Tensor], boxes: object) -> torch.Tensor:
        seen.append((states, present, decode(states, present, maps, boxes)))
        return seen[-1][-1]

    monkeypatch.setattr(nano.model, "decode", decoding)
    monkeypatch.setattr(nano.processor.config, "looks_px", {"": [64, 96]})
    (result,) = nano.segment_batch([picture], ["Where is the cyst?"], reasoning=["One is there."])
    (states, present, first), (_, _, larger) = seen
    with torch.no_grad():
        maps = encode_image(nano.model.segmenter, nano.processor.segmenter_pixels(picture, 96))
        torch.testing.assert_close(larger, decode(states, present, maps, None))
    assert larger.shape[-1] * 64 == first.shape[-1] * 96
    planes = [functional.interpolate(look[None], (96, 128), mode="bilinear")[0, 0] for look in (first, larger)]
    assert np.array_equal(result.mask, (planes[0] + planes[1] > 0).numpy())
    assert not torch.equal(planes[0] > 0, planes[0] + planes[1] > 0), "the comparison could not fail"
    named = parse(result.text)
    assert named
    monkeypatch.setattr(nano.processor.config, "looks_px", {"": [64], named.category: [96]})
    (result,) = nano.segment_batch([picture], ["Where is the cyst?"], reasoning=["One is there."])
    assert np.array_equal(result.mask, (planes[1] > 0).numpy())


@pytest.mark.parametrize("sides", [[300], [-32], [0], [320, 100], []])
def test_a_square_that_the_maps_do_not_fit_is_refused(sides: list[int]) -> None:
    with pytest.raises(ConfigError, match="multiples of 32"):
        CoreSegConfig(looks_px={"cyst": sides})


def test_an_answer_asks_the_same_of_the_part(nano: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the states of the first look decode the maps of the part that was cut out."""
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    question, reasoning = "Where is the cyst?", "One is there."
    seen = {}
    generate, decode = nano.model.generate, nano.model.decode

    def generating(**inputs: object) -> object:
        seen["first"] = generate(**inputs)
        small = torch.full_like(seen["first"].mask_logits[0], -1.0)
        small[3:5, 3:5] = 4.0
        seen["first"].mask_logits[0] = small
        return seen["first"]

    def decoding(states: torch.Tensor, present: torch.Tensor, maps: list[torch.Tensor], boxes: object) -> torch.Tensor:
        seen["again"] = (states, present, maps)
        return decode(states, present, maps, boxes)

    monkeypatch.setattr(nano.model, "generate", generating)
    plain = nano.segment_batch([picture], [question], reasoning=[reasoning])[0]
    assert plain.found and plain.mask.any()
    monkeypatch.setattr(nano.processor.config, "second_look", True)
    monkeypatch.setattr(nano.model, "decode", decoding)
    result = nano.segment_batch([picture], [question], reasoning=[reasoning])[0]
    states, present, maps = seen["again"]
    assert torch.equal(states[0], seen["first"].states[0]) and present.all()
    x1, y1, x2, y2 = window_around(plain.mask) or (0, 0, 0, 0)
    part = picture[y1:y2, x1:x2]
    with torch.no_grad():
        expected_maps = encode_image(nano.model.segmenter, nano.processor.segmenter_pixels(part))
        again = decode(states, present, expected_maps)[0]
    torch.testing.assert_close(maps, expected_maps)
    plane = functional.interpolate(seen["first"].mask_logits[0][None, None], (96, 128), mode="bilinear")[0, 0]
    plane[y1:y2, x1:x2] += functional.interpolate(again[None, None], part.shape[:2], mode="bilinear")[0, 0]
    expected = (plane > 0).numpy()
    outside = np.ones_like(expected)
    outside[y1:y2, x1:x2] = False
    assert np.array_equal(result.mask, expected) and not (result.mask & outside).any()
    assert not np.array_equal(result.mask, plain.mask), "the comparison could not fail"


def test_the_question_blind_prompt_takes_it_too(nano: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    sample = Sample("a.png", "m.png", "x-ray", "lung", "cyst", (), "Where?", "", "made", "", "", "val")
    monkeypatch.setattr(nano.model, "question_blind", small_find)
    (plain,) = QuestionBlind(nano, {}).predict([sample], [picture], ["Where?"])
    monkeypatch.setattr(nano.processor.config, "second_look", True)
    (looked,) = QuestionBlind(nano, {}).predict([sample], [picture], ["Where?"])
    assert plain.mask.sum() > looked.mask.sum() > 0


def small_find(pixels: torch.Tensor) -> torch.Tensor:
    logits = torch.full((len(pixels), 16, 16), -1.0)
    logits[:, 7:9, 7:9] = 1.0
    return logits
