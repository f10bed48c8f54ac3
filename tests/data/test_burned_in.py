"""Text burned into pictures: found as people and machines write it, and not seen in what only resembles it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from coreseg.data.burned_in import find_text
from coreseg.testing import HELD_OUT_LOOKS, LOOKS, phantom

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
EVERY_LOOK = (*LOOKS, *HELD_OUT_LOOKS)


def ground(look: str, size_wh: tuple[int, int] = (384, 288), strip: RGB | None = (0, 0, 0)) -> Image.Image:
    """A phantom, with a strip of one colour along its top as on many machines' screens."""
    picture = Image.fromarray(phantom(3, look, size_wh=size_wh).image)
    if strip:
        picture.paste(strip, (0, 0, size_wh[0], size_wh[1] // 6))
    return picture


def written(picture: Image.Image, text: str, at: tuple[int, int], size: float = 14, fill: RGB = WHITE) -> np.ndarray:
    ImageDraw.Draw(picture).text(at, text, fill=fill, font=ImageFont.load_default(size))
    return np.asarray(picture)


def middle_is_in(found: Sequence[tuple[int, int, int, int]], x: int, y: int) -> bool:
    return any(x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in found)


@pytest.mark.parametrize("look", EVERY_LOOK)
@pytest.mark.parametrize("text", ["Doe, Jane 12.03.1961", "ID 40017", "MÜLLER ANNA"])
def test_text_in_a_margin_is_found(look: str, text: str) -> None:
    image = written(ground(look), text, (12, 14))
    found = find_text(image)
    assert middle_is_in(found, 12 + 20, 14 + 10), found
    assert all(y2 <= 48 for _, _, _, y2 in found), "and nothing else"


@pytest.mark.parametrize(
    ("strip", "fill"),
    [(WHITE, (0, 0, 0)), ((0, 0, 0), (255, 230, 0)), ((150, 110, 100), (250, 140, 0)), ((0, 0, 90), (120, 255, 120))],
    ids=["black on white", "yellow on black", "orange on skin", "green on blue"],
)
def test_colours(strip: RGB, fill: RGB) -> None:
    assert middle_is_in(find_text(written(ground("ct", strip=strip), "Doe, Jane", (12, 14), fill=fill)), 30, 24)


@pytest.mark.parametrize(("size", "side"), [(10, 384), (24, 384), (40, 1200), (60, 3000)])
def test_sizes(size: int, side: int) -> None:
    picture = Image.new("RGB", (side, side // 2))
    found = find_text(written(picture, "DOE JANE 1961", (20, 20), size))
    assert middle_is_in(found, 20 + 2 * size, 20 + 2 * size // 3)
    assert all(0 <= x1 < x2 <= side and 0 <= y1 < y2 <= side // 2 for x1, y1, x2, y2 in found)


def test_mirrored_turned_and_after_jpeg(tmp_path: Path) -> None:
    image = written(ground("mri"), "W 1411 : L 705", (12, 14))
    assert find_text(image[:, ::-1].copy()) and find_text(image[::-1].copy())
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=70)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert find_text(np.asarray(stored))


@pytest.mark.parametrize("look", EVERY_LOOK)
def test_phantoms_say_nothing(look: str) -> None:
    for seed in range(12):
        assert find_text(phantom(seed, look, size_wh=(384, 288)).image) == (), seed


def hairs() -> np.ndarray:
    picture = ground("dermoscopy", strip=None)
    rng = np.random.default_rng(0)
    for _ in range(25):
        (x, y), (dx, dy) = rng.integers(0, (384, 288)), rng.integers(-120, 120, 2)
        ImageDraw.Draw(picture).arc((x, y, x + abs(dx) + 20, y + abs(dy) + 20), 0, 150, fill=(30, 20, 15), width=2)
    return np.asarray(picture)


def gradient() -> np.ndarray:
    across = np.linspace(0, 255, 384)
    return np.repeat(np.tile(across, (288, 1))[..., np.newaxis], 3, axis=2).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (288, 384, 3), dtype=np.uint8)


def spots() -> np.ndarray:
    """Highlights and exudates: small, bright, many, one beside the other."""
    picture = ground("endoscopy", strip=None)
    for x in range(60, 240, 11):
        ImageDraw.Draw(picture).ellipse((x, 140, x + 7, 148), fill=WHITE)
    return np.asarray(picture)


@pytest.mark.parametrize("make", [hairs, gradient, noise, spots])
def test_what_is_no_text(make: object) -> None:
    assert callable(make) and find_text(make()) == ()


def test_blank_and_tiny_pictures() -> None:
    for shape in ((8, 8, 3), (1, 700, 3), (3000, 20, 3)):
        assert find_text(np.zeros(shape, dtype=np.uint8)) == ()
