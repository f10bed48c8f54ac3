"""Reading whatever people bring, writing masks, and drawing."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coreseg.errors import InputError
from coreseg.imaging import overlay, read_header, read_image, read_image_and_changes, read_mask, write_mask
from coreseg.testing import phantom

WIDTH, HEIGHT = 40, 24


@pytest.fixture
def rgb() -> np.ndarray:
    """A smooth picture, so that JPEG keeps it, unlike in every corner, so that a turn shows."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 4], axis=2).astype(np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:12, 20:33] = True
    return mask


# --- What can be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_files_come_back_as_they_are(rgb: np.ndarray, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(rgb).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    for source in (path, str(path), Image.open(path), rgb):
        read = read_image(source)
        assert read.dtype == np.uint8
        assert np.array_equal(read, rgb)
        read[:] = 0  # callers may write into it


def test_jpeg_and_cmyk_come_back_nearly_so(rgb: np.ndarray, tmp_path: Path) -> None:
    for mode in ("RGB", "CMYK"):
        path = tmp_path / f"{mode}.jpg"
        Image.fromarray(rgb).convert(mode).save(path, quality=98)
        assert np.abs(read_image(path).astype(int) - rgb).mean() < 4


def test_grey_palette_and_black_and_white_become_rgb(rgb: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(rgb)
    for mode in ("L", "P", "1"):
        path = tmp_path / f"{mode}.png"
        picture.convert(mode).save(path)
        assert np.array_equal(read_image(path), np.asarray(picture.convert(mode).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(rgb: np.ndarray, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb, -1),
    }[orientation]
    for name in ("turned.png", "turned.tif"):
        path = tmp_path / name
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        assert np.array_equal(read_image(path), rgb)
        header = read_header(path)
        assert header.orientation == orientation
        assert header.stored_size_wh == stored.shape[1::-1]
        assert header.size_wh == (WIDTH, HEIGHT)


def test_transparency_shows_black(rgb: np.ndarray, tmp_path: Path) -> None:
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, :20] = 0
    expected = np.where(alpha[..., None] == 255, rgb, 0)
    with_alpha = np.dstack([rgb, alpha])
    Image.fromarray(with_alpha).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), expected)
    assert np.array_equal(read_image(with_alpha), expected)
    grey = Image.fromarray(with_alpha).convert("LA")
    grey.save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[:, :20].max() == 0
    assert np.array_equal(read_image(tmp_path / "la.png")[:, 20:, 0], np.asarray(grey)[:, 20:, 0])


def test_a_transparent_palette_entry_shows_black_without_a_warning(tmp_path: Path) -> None:
    indices = np.tile(np.array([0, 1], dtype=np.uint8), (10, 5))
    picture = Image.fromarray(indices, mode=None).convert("P")
    picture.putpalette([200, 10, 20, 30, 220, 40])
    picture.save(tmp_path / "p.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_image(tmp_path / "p.png")
    assert read[0, 0].tolist() == [0, 0, 0]
    assert read[0, 1].tolist() == [30, 220, 40]


def test_sixteen_bits_are_stretched(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(1000, 3000, 2, dtype=np.uint16), (10, 1))
    for suffix in (".png", ".tif"):
        path = tmp_path / f"deep{suffix}"
        Image.fromarray(ramp).save(path)
        for read in (read_image(path), read_image(ramp), read_image(ramp.astype(np.float32)), read_image(-1.0 * ramp)):
            assert read.min() == 0
            assert read.max() == 255
            assert abs(float(read.mean()) - 127.5) < 1
    assert read_image(ramp)[0, -1, 0] == 255
    assert read_image(-1.0 * ramp)[0, -1, 0] == 0


def test_what_was_done_to_the_values_is_told(rgb: np.ndarray, tmp_path: Path) -> None:
    """Of 1,001 values in a row, half a percent at either end is cut off."""
    deep = np.tile(np.arange(1000, 3002, 2, dtype=np.uint16), (10, 1))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for source in (deep, tmp_path / "deep.png", Image.fromarray(deep)):
        (told,) = read_image_and_changes(source)[1]
        assert told.startswith(
            "the picture's values, 1000 to 3000, were stretched so that 1010 is black and 2990 white"
        )
    quarter = np.dstack([rgb, np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    quarter[: HEIGHT // 2, : WIDTH // 2, 3] = 100
    Image.fromarray(quarter).save(tmp_path / "quarter.png")
    for source in (quarter, tmp_path / "quarter.png"):
        (told,) = read_image_and_changes(source)[1]
        assert told.startswith("25 % of the picture is transparent and was darkened or shown black")
    opaque = np.dstack([rgb, np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    for plain in (rgb, rgb / 255, rgb[..., 0] > 100, opaque):
        assert read_image_and_changes(plain)[1] == ()


def test_a_few_extreme_values_do_not_darken_the_rest() -> None:
    values = np.tile(np.arange(1000, dtype=np.uint16), (100, 1))
    values[0, :10] = 65535
    assert 120 < read_image(values)[50, 500, 0] < 135


def test_a_deep_picture_of_two_values_keeps_both() -> None:
    values = np.full((100, 100), 7, dtype=np.int32)
    values[0, 0] = 9
    assert read_image(values)[0, 0].tolist() == [255] * 3
    assert read_image(values)[1, 1].tolist() == [0] * 3
    assert read_image(np.full((9, 9), 7, dtype=np.int32)).max() == 0


def test_floats_in_zero_to_one_mean_what_eight_bits_mean(rgb: np.ndarray) -> None:
    dim = rgb // 2
    assert np.array_equal(read_image(dim / 255.0), dim)
    assert np.array_equal(read_image(dim.astype(np.float32) / 255), dim)


def test_values_that_are_not_finite_count_as_the_lowest() -> None:
    values = np.tile(np.linspace(0, 1, 20), (20, 1))
    values[3, 15] = np.nan
    values[4, 15] = np.inf
    assert read_image(values)[3:5, 15].max() == 0


def test_arrays_of_every_layout(rgb: np.ndarray, mask: np.ndarray) -> None:
    assert np.array_equal(read_image(rgb[..., 0]), np.repeat(rgb[..., :1], 3, axis=2))
    assert np.array_equal(read_image(rgb[..., :1]), np.repeat(rgb[..., :1], 3, axis=2))
    assert np.array_equal(read_image(mask), np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))


def test_the_array_given_is_never_the_array_returned(rgb: np.ndarray) -> None:
    before = rgb.copy()
    read_image(rgb)[:] = 0
    assert np.array_equal(rgb, before)


def test_one_frame_of_a_format_that_could_hold_more_is_fine(rgb: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(rgb).save(tmp_path / "one.gif")
    assert read_image(tmp_path / "one.gif").shape == rgb.shape


def test_a_large_picture_is_read_without_a_word_from_pillow(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    limit = Image.MAX_IMAGE_PIXELS
    Image.new("1", (12000, 9000), 1).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header(path).size_wh == (12000, 9000)
        assert read_image(path).shape == (9000, 12000, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


# --- What cannot -----------------------------------------------------------------------------------------------------


def refusal(source: object) -> str:
    with pytest.raises(InputError) as caught:
        read_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folder_empty_and_text(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "gone.png")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("Dear doctor, see the picture attached.")
    for message in (refusal(tmp_path / "text.png"), refusal(str(tmp_path / "text.png"))):
        assert "text.png" in message
        assert "PNG, JPEG" in message
        assert "convert" in message


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".gif", ".bmp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = tmp_path / f"whole{suffix}"
    Image.fromarray(noise).save(buffer)
    whole = buffer.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole[: int(kept * len(whole))])
    assert "cut" in refusal(cut)


def test_damage_inside_a_png(rgb: np.ndarray, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    damaged = bytearray(buffer.getvalue())
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.png").write_bytes(damaged)
    assert "damaged" in refusal(tmp_path / "damaged.png")


def test_several_frames_are_counted(rgb: np.ndarray, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(rgb, shift, axis=1)) for shift in range(3)]
    for suffix in (".gif", ".tif", ".webp", ".png"):
        path = tmp_path / f"many{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert "3 frames" in refusal(path)


def test_a_phone_picture_with_a_second_one_inside_is_its_first(rgb: np.ndarray, tmp_path: Path) -> None:
    first, second = Image.fromarray(rgb), Image.fromarray(255 - rgb)
    first.save(tmp_path / "phone.mpo", save_all=True, append_images=[second], quality=98)
    (tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg")
    assert np.abs(read_image(tmp_path / "phone.jpg").astype(int) - rgb).mean() < 4


def test_too_small_and_too_large(tmp_path: Path) -> None:
    assert "1x1" in refusal(np.zeros((1, 1, 3), dtype=np.uint8))
    assert "7x90" in refusal(Image.new("RGB", (7, 90)))
    assert read_image(np.zeros((8, 8), dtype=np.uint8)).shape == (8, 8, 3)
    header = struct.pack(">II5B", 20_000, 10_001, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(tmp_path / "huge.png")
    assert "20000x10001" in message
    assert "200 million" in message


def test_arrays_that_are_no_picture() -> None:
    assert "(3, 40, 50)" in refusal(np.zeros((3, 40, 50), dtype=np.uint8))
    assert "(40,)" in refusal(np.zeros(40))
    assert "(40, 50, 2)" in refusal(np.zeros((40, 50, 2)))
    assert "0x9" in refusal(np.zeros((9, 0)))
    assert "complex" in refusal(np.zeros((9, 9), dtype=complex))
    assert "finite" in refusal(np.full((9, 9), np.nan))


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_written_as_8_bit_png_and_read_back(mask: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    write_mask(path, mask)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "L"
        assert sorted(set(np.asarray(picture).ravel().tolist())) == [0, 255]
    assert np.array_equal(read_mask(path), mask)


def test_a_mask_is_written_to_png_only(mask: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png"):
        write_mask(tmp_path / "mask.jpg", mask)
    with pytest.raises(InputError, match="cannot be written"):
        write_mask(tmp_path / "gone" / "mask.png", mask)


@pytest.mark.parametrize("value", [1, 3, 255, 65535])
def test_any_value_but_zero_is_lesion(mask: np.ndarray, tmp_path: Path, value: int) -> None:
    Image.fromarray((mask * value).astype(np.uint16 if value > 255 else np.uint8)).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_masks_of_every_mode(mask: np.ndarray, tmp_path: Path, mode: str) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_an_empty_mask_of_every_mode(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        Image.new(mode, (30, 20)).save(tmp_path / "mask.png")
        assert not read_mask(tmp_path / "mask.png").any()


def test_a_jpeg_mask_is_cut_at_half(mask: np.ndarray, tmp_path: Path) -> None:
    for mode in ("L", "RGB"):
        Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(tmp_path / "mask.jpg", quality=60)
        assert np.array_equal(read_mask(tmp_path / "mask.jpg"), mask)


def test_transparent_pixels_are_background(mask: np.ndarray, tmp_path: Path) -> None:
    white = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    Image.fromarray(np.dstack([white, mask.astype(np.uint8) * 255])).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_one_colour_is_a_mask_and_several_are_not(mask: np.ndarray, tmp_path: Path) -> None:
    coloured = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    coloured[mask] = (128, 0, 0)
    Image.fromarray(coloured).save(tmp_path / "red.png")
    assert np.array_equal(read_mask(tmp_path / "red.png"), mask)
    coloured[20:, :5] = (0, 128, 0)
    for name in ("two.png", "two.jpg"):
        Image.fromarray(coloured).save(tmp_path / name)
        with pytest.raises(InputError, match="several colours"):
            read_mask(tmp_path / name)


# --- Drawing ---------------------------------------------------------------------------------------------------------


def test_the_overlay_outlines_tints_and_leaves_the_rest(mask: np.ndarray) -> None:
    grey = np.full((HEIGHT, WIDTH, 3), 120, dtype=np.uint8)
    drawn = np.asarray(overlay(grey, mask))
    assert drawn.shape == grey.shape
    assert drawn[5, 25].tolist() == drawn[11, 25].tolist() == drawn[8, 20].tolist() == drawn[8, 32].tolist()
    assert drawn[8, 26].tolist() not in ([120, 120, 120], drawn[5, 25].tolist())  # a tint inside
    untouched = np.ones((HEIGHT, WIDTH), dtype=bool)
    untouched[4:13, 19:34] = False
    assert (drawn[untouched] == 120).all()
    assert (grey == 120).all()


def test_the_overlay_draws_boxes_half_open_and_the_reference_in_another_colour(mask: np.ndarray) -> None:
    grey = np.full((HEIGHT, WIDTH, 3), 120, dtype=np.uint8)
    empty = np.zeros_like(mask)
    boxed = np.asarray(overlay(grey, empty, np.array([[20, 5, 33, 12]])))
    for y, x in ((5, 20), (5, 32), (11, 20), (11, 32)):
        assert boxed[y, x].tolist() == [255, 255, 255]
    assert boxed[12, 33].tolist() != [255, 255, 255]
    referenced = np.asarray(overlay(grey, empty, reference=mask))
    assert referenced[8, 26].tolist() == [120, 120, 120]
    assert referenced[5, 25].tolist() != np.asarray(overlay(grey, mask))[5, 25].tolist() != [120, 120, 120]


def test_lines_grow_with_the_picture() -> None:
    def rim_px(scale: int) -> int:
        mask = np.zeros((100 * scale, 100 * scale), dtype=bool)
        mask[20 * scale : 80 * scale, 20 * scale : 80 * scale] = True
        drawn = np.asarray(overlay(np.zeros((*mask.shape, 3), dtype=np.uint8), mask))
        column = drawn[:, 50 * scale]
        return int((column == column[20 * scale]).all(axis=1).sum()) // 2

    assert rim_px(1) == 1
    assert rim_px(12) == 4


def test_the_overlay_reaches_every_edge() -> None:
    for shape in ((9, 17), (200, 90)):
        full = np.ones(shape, dtype=bool)
        drawn = np.asarray(overlay(np.zeros((*shape, 3), dtype=np.uint8), full, np.array([[0, 0, shape[1], shape[0]]])))
        assert drawn.shape == (*shape, 3)
        assert drawn[0, 0].tolist() == drawn[-1, -1].tolist() == [255, 255, 255]


def test_the_overlay_refuses_a_mask_of_another_size(mask: np.ndarray) -> None:
    shown = phantom(0)
    with pytest.raises(InputError, match="40x24"):
        overlay(shown.image, mask)
    with pytest.raises(InputError, match="reference"):
        overlay(shown.image, np.zeros(shown.image.shape[:2], dtype=bool), reference=mask)
