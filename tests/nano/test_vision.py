"""Nano's tower: what its tokens hold is what is in the picture."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from coreseg.masks import lesion_masks, mask_to_boxes
from coreseg.nano.vision import (
    BUMPS,
    GRID,
    KIND_WEIGHT,
    MEASURES,
    PLACE_WEIGHT,
    SHOWN_AGAIN,
    STAND_OUTS,
    STATED,
    STATED_WEIGHT,
    NanoVisionConfig,
    NanoVisionModel,
    grid_tokens,
    measure,
    place_code,
    pool,
    region_tokens,
    stand_outs,
)
from coreseg.testing_models import tiny_edgetam
from coreseg.types import MAX_BOXES

SIDE = 64


def drawn(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def feature_maps(batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 8, SIDE // s, SIDE // s, generator=generator) for s in (4, 8, 16)]


def places(code: torch.Tensor) -> torch.Tensor:
    """The coordinate that each code is nearest to, on a grid of 1 px."""
    candidates = place_code(torch.arange(SIDE + 1)[:, None] / SIDE)
    return torch.cdist(code.reshape(-1, BUMPS), candidates).argmin(1).view(code.shape[:-1])


def test_a_place_code_tells_every_pixel_of_256_apart_and_near_ones_least() -> None:
    codes = place_code(torch.arange(257)[:, None] / 256)
    distances = torch.cdist(codes, codes)
    assert (distances + torch.eye(257) > 0.03).all()
    steps = distances[128, 128:160]
    assert (steps.diff() > 0).all()


def test_region_tokens_hold_the_boxes_in_the_order_of_answers() -> None:
    masks = [drawn((40, 30, 60, 50), (3, 5, 20, 13)), drawn((10, 10, 30, 40)), drawn()]
    pixels = torch.rand(3, 3, SIDE, SIDE)
    tokens = region_tokens(measure(pixels, feature_maps(3), [lesion_masks(mask) for mask in masks]))
    assert tokens.shape == (3, MAX_BOXES + 1, 4 * BUMPS + 2 * 8 + MEASURES + len(STATED))
    numbers = tokens[..., -len(STATED) - MAX_BOXES : -len(STATED)]
    for row, mask in enumerate(masks):
        boxes = mask_to_boxes(mask)
        code = tokens[row, : len(boxes), : 4 * BUMPS].reshape(len(boxes), 4, BUMPS) / PLACE_WEIGHT
        assert np.array_equal(places(code).numpy(), boxes)
        assert (tokens[row, len(boxes) : MAX_BOXES] == 0).all()
        assert torch.equal(numbers[row, : len(boxes)], torch.eye(MAX_BOXES)[: len(boxes)])
    around = places(tokens[:2, MAX_BOXES, : 4 * BUMPS].reshape(2, 4, BUMPS) / PLACE_WEIGHT)
    assert around.tolist() == [[3, 5, 60, 50], [10, 10, 30, 40]]
    assert (tokens[2] == 0).all() and (numbers[:, MAX_BOXES] == 0).all()


def test_a_token_states_what_is_measured_of_its_region_and_of_all_as_one() -> None:
    mask = drawn((4, 4, 16, 16), (40, 44, 60, 50))
    pixels = torch.full((1, 3, SIDE, SIDE), -1.0)
    pixels[0][:, torch.from_numpy(mask)] = 0.5
    stated = region_tokens(measure(pixels, feature_maps(1), [lesion_masks(mask)]))[0, :, -len(STATED) :]
    assert set(stated.unique().tolist()) == {0.0, STATED_WEIGHT}
    first, second, both = (
        {statement for statement, there in zip(STATED, stated[place], strict=True) if there}
        for place in (0, 1, MAX_BOXES)
    )
    assert {("count", "one"), ("side", "left"), ("place", "upper"), ("contrast", "brighter")} <= first
    assert {("count", "one"), ("side", "right"), ("place", "lower"), ("shape", "elongated")} <= second
    assert {("count", "two"), ("side", "both"), ("place", "spread")} <= both


def test_a_region_token_tells_bright_from_dark_and_large_from_small() -> None:
    masks = [drawn((8, 8, 24, 24)), drawn((30, 30, 34, 34))]
    pixels = torch.zeros(2, 3, SIDE, SIDE) + 0.01 * torch.rand(2, 3, SIDE, SIDE)
    pixels[0][:, masks[0]] += 0.5
    pixels[1][:, masks[1]] -= 0.5
    tokens = region_tokens(measure(pixels, feature_maps(2), [lesion_masks(mask) for mask in masks]))[:, 0]
    look = tokens[:, -len(STATED) - MEASURES : -len(STATED)]
    inside, around, (large, small) = look[:, :3], look[:, 6:9], look[:, 9]
    assert (inside[0] > around[0]).all() and (inside[1] < around[1]).all()
    assert large / small == 4.0
    assert torch.allclose(look[:, 10], torch.ones(2))


def test_pooling_is_the_mean_over_a_region() -> None:
    mask = drawn((16, 8, 48, 40))
    planes = torch.rand(1, 5, SIDE, SIDE)
    regions = torch.from_numpy(np.stack([mask, drawn()]))[None].float()
    means = pool(planes, regions)
    torch.testing.assert_close(means[0, 0], planes[0][:, torch.from_numpy(mask)].mean(1))
    assert (means[0, 1] == 0).all()
    coarse = torch.nn.functional.avg_pool2d(planes, 8)
    torch.testing.assert_close(pool(coarse, regions)[0, 0], means[0, 0])


def test_grid_tokens_know_their_cell() -> None:
    tokens = grid_tokens(feature_maps(1))
    assert tokens.shape == (1, GRID**2, 8 + 2 * BUMPS)
    centres = places(tokens[0, :, 8:].reshape(-1, 2, BUMPS) / PLACE_WEIGHT)
    assert centres[1].tolist() == [24, 8] and centres[GRID].tolist() == [8, 24]


def test_what_stands_out_is_named_by_size_place_and_light() -> None:
    mask = drawn((2, 4, 12, 10), (30, 20, 60, 40), (20, 50, 24, 54))
    pixels = torch.zeros(2, 3, SIDE, SIDE) + 0.01 * torch.rand(2, 3, SIDE, SIDE)
    for (x1, y1, x2, y2), light in (((2, 4, 12, 10), 0.5), ((30, 20, 60, 40), -0.5)):
        pixels[0, :, y1:y2, x1:x2] += light
    parts = [lesion_masks(mask), lesion_masks(drawn((2, 4, 12, 10)))]
    chosen, there = stand_outs(measure(pixels, feature_maps(2), parts))
    # In reading order: the first lies top left, the second right and is large, the third is small and lowest.
    expected = {
        "largest": 1, "smallest": 2, "left": 0, "right": 1, "upper": 0, "lower": 2, "brightest": 0, "darkest": 1
    }  # fmt: skip
    assert dict(zip(STAND_OUTS, chosen[0].tolist(), strict=True)) == expected
    assert there[0].all() and not there[1].any()


def test_a_tower_leaves_specks_out_and_shows_what_stands_out_again(tmp_path: Path) -> None:
    config = NanoVisionConfig(AutoConfig.from_pretrained(tiny_edgetam(tmp_path)), smallest_region=0.1)
    tower, channels = NanoVisionModel(config), config.segmenter_config.vision_config.fpn_hidden_size
    parts = tower.regions(drawn((2, 4, 12, 10), (30, 20, 60, 40), (20, 50, 24, 54)))
    assert len(parts) == 2 and len(tower.regions(drawn())) == 0
    pixels = torch.rand(1, 3, SIDE, SIDE)
    maps = [torch.randn(1, channels, SIDE // stride, SIDE // stride) for stride in (4, 8, 16)]
    tokens = tower.tokens(grid_tokens(maps), measure(pixels, maps, [parts]))
    assert tokens.shape == (1, config.tokens, config.hidden_size)
    regions, again = tokens[0, GRID**2 : GRID**2 + MAX_BOXES], tokens[0, GRID**2 + MAX_BOXES :]
    kinds, again = again[:, -len(SHOWN_AGAIN) :], again[:, : -len(SHOWN_AGAIN)]
    assert torch.equal(kinds, KIND_WEIGHT * torch.eye(len(SHOWN_AGAIN)))
    assert (regions[:, -len(SHOWN_AGAIN) :] == 0).all()
    regions = regions[:, : -len(SHOWN_AGAIN)]
    assert torch.equal(again[0], regions[1]) and torch.equal(again[1], regions[0])
    assert not torch.equal(again[-1], regions[0]) and not torch.equal(again[-1], regions[1])
    nothing = tower.tokens(grid_tokens(maps), measure(pixels, maps, [tower.regions(drawn())]))
    assert (nothing[0, GRID**2 :] == 0).all()
    assert tower.look(pixels).shape == tokens.shape
