"""Read and write pictures and masks; draw a mask on a picture.

Every picture becomes upright 8-bit RGB, every mask a boolean array; what cannot be read is one `InputError`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8
from PIL import ExifTags, Image, ImageDraw, ImageOps, TiffImagePlugin, UnidentifiedImageError
from scipy import ndimage

from coreseg.errors import InputError
from coreseg.masks import tight_box

MIN_SIDE_PX = 8
MAX_PIXELS = 200_000_000
READABLE = "PNG, JPEG, TIFF, BMP, WebP or another common image format"

# A JPEG smears a 0/255 mask: faint noise far from the lesion, and channels that differ a little.
_JPEG_MASK_THRESHOLD = 127
_JPEG_CHANNEL_SPREAD = 32
_JPEG_GREYS = (32, 223)  # neither black nor white; noise and edges are so in places, labels over whole areas
_STRETCH_PERCENTILES = (0.5, 99.5)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_DEEP_MODES = ("I", "F")  # and every "I;16…"
_MASK_RGB = (0, 214, 255)
_REFERENCE_RGB = (255, 196, 0)
_BOX_RGB = (255, 255, 255)
_SHADOW_RGB = (0, 0, 0)
_TINT = 0.25

_open_lock = threading.Lock()


def read_image(source: str | Path | np.ndarray | Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """A picture as upright 8-bit RGB, from a file, an array or a PIL image.

    - EXIF orientation is applied; palette, grey, CMYK and so on become RGB; transparency shows black.
    - Arrays are height x width, or height x width x 1, 3 or 4 (the fourth is alpha); booleans become black and white.
    - 8-bit values are kept. Floats that all lie in [0, 1] are multiplied by 255. Anything deeper (16 bits, integers,
      other floats) is stretched linearly so that its 0.5 and 99.5 percentiles, over all channels, become 0 and 255 (its
      minimum and maximum where the two are equal); values that are not finite count as the lowest. Pillow itself hands
      out 16-bit *colour* files as their upper 8 bits.
    - A file with several frames or pages is refused, except a phone's multi-picture JPEG, whose first is the photo.
    - From 8 px a side to 200 million pixels.

    Our choice throughout: the paper does not say.

    Raises InputError: what came, what was expected and what to do.
    """
    return read_image_and_changes(source)[0]


def read_image_and_changes(
    source: str | Path | np.ndarray | Image.Image,
) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, ...]]:
    """The same, and what was done to its values that its owner may not have meant: stretched, or shown black."""
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, "The array")
    if isinstance(source, Image.Image):
        name = "The PIL image"
        _check_size(source.size, name)
        with _decoding(name):
            return _pil_to_rgb(_upright(source, name), name)
    if isinstance(source, str | Path):
        name = str(source)
        with _opened(Path(source)) as picture, _decoding(name):
            return _pil_to_rgb(_upright(picture, name), name)
    raise InputError(
        f"An image cannot be a {type(source).__name__}: expected a path, a NumPy array (height x width x 3) or a "
        "PIL image. Convert it first."
    )


@dataclass(frozen=True)
class Header:
    """What an image file says of itself: Pillow's name of its format, its EXIF orientation, its size as stored.

    Orientation 1 is upright; 5 to 8 swap width and height.
    """

    format: str
    orientation: int
    stored_size_wh: tuple[int, int]

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels once the picture is upright, as `read_image` gives it."""
        width, height = self.stored_size_wh
        return (height, width) if self.orientation >= 5 else (width, height)


def read_header(path: str | Path) -> Header:
    """The header of an image file, without decoding its pixels.

    Raises InputError as `read_image` does, except for damage further inside the file.
    """
    with _opened(Path(path)) as picture, _decoding(str(path)):
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        # Pillow gives the size of a turned TIFF as it is upright.
        tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else None
        stored_size_wh = (tags[256], tags[257]) if tags else picture.size
        return Header(picture.format or "", orientation if orientation in range(1, 9) else 1, stored_size_wh)


def read_mask(path: str | Path, *, binary: bool = False) -> Bool[np.ndarray, "height width"]:
    """A mask file as booleans: every pixel that is not zero is lesion, be it 0/1, 0/255 or labelled 1, 2, 3.

    binary: refuse a mask with more than one value besides zero, which may be several classes or soft edges; and a JPEG
    with grey areas, or without white ones, whose values may be labels.

    A JPEG is cut at half intensity, because compression leaves noise around the lesion. Fully transparent pixels are
    background. A coloured mask counts if it has one colour besides black; more colours would be several classes, and
    which of them is meant cannot be known.

    Our choice.

    Raises InputError where the file is not an image, or has several colours, or values where `binary`.
    """
    name = str(path)
    with _opened(Path(path)) as picture, _decoding(name):
        lossy = picture.format in ("JPEG", "MPO")
        upright = _upright(picture, name)
        if _is_deep(upright) or upright.mode in ("1", "L"):
            values = np.asarray(upright)
            _refuse_values(name, values, binary, lossy=lossy)
            return np.asarray(values > _JPEG_MASK_THRESHOLD if lossy else values != 0)
        with_alpha = np.asarray(upright.convert("RGBA"))
    colour, alpha = with_alpha[..., :3], with_alpha[..., 3]
    if lossy:
        _refuse_colours(name, several=bool(np.ptp(colour, axis=2).max() > _JPEG_CHANNEL_SPREAD))
        _refuse_values(name, colour.max(axis=2), binary, lossy=True)
        return np.asarray(colour.max(axis=2) > _JPEG_MASK_THRESHOLD)
    lesion = colour.any(axis=2) & (alpha > 0)
    drawn = colour[lesion]
    grey = bool((drawn == drawn[:, :1]).all())
    _refuse_colours(name, several=not grey and bool((drawn != drawn[:1]).any()))
    _refuse_values(name, drawn, binary, lossy=False)
    return lesion


def write_mask(path: str | Path, mask: Bool[np.ndarray, "height width"]) -> None:
    """Write a mask as an 8-bit grey PNG, 255 on the lesion and 0 elsewhere.

    Raises InputError where the name does not end in .png (other formats would blur the mask), or the file cannot be
    written.
    """
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path}: masks are written as PNG, so that no pixel changes. Choose a name ending in .png.")
    try:
        Image.fromarray(mask.astype(np.uint8) * 255).save(path, format="PNG")
    except OSError as error:
        raise InputError(
            f"{path}: the mask cannot be written ({error.strerror or error}). Check the folder."
        ) from error


def overlay(
    image: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "mask_height mask_width"],
    boxes: Int[np.ndarray, "lesions 4"] | None = None,
    reference: Bool[np.ndarray, "reference_height reference_width"] | None = None,
) -> Image.Image:
    """The picture with the mask outlined and lightly tinted in cyan, boxes in white, the reference outlined in amber.

    At the picture's own size; lines grow with it, from one pixel. Outlines run inside the mask, so they show its
    exact edge, on a dark line just outside it that keeps them visible on bright ground.

    Raises InputError where a mask has another size than the picture.
    """
    for what, drawn in (("mask", mask), ("reference", reference)):
        if drawn is not None and drawn.shape != image.shape[:2]:
            raise InputError(
                f"A {what} of {drawn.shape[1]}x{drawn.shape[0]} px does not fit an image of {image.shape[1]}x"
                f"{image.shape[0]} px. Give the mask of this image, at its own size."
            )
    line_px = max(1, round(max(image.shape[:2]) / 300))
    canvas = image.copy()
    canvas[mask] = ((1 - _TINT) * canvas[mask] + _TINT * np.array(_MASK_RGB)).astype(np.uint8)
    if reference is not None:
        _draw_outline(canvas, reference, _REFERENCE_RGB, line_px)
    _draw_outline(canvas, mask, _MASK_RGB, line_px)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for x1, y1, x2, y2 in [] if boxes is None else boxes.tolist():
        pen.rectangle((x1 - 1, y1 - 1, x2, y2), outline=_SHADOW_RGB)
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_BOX_RGB, width=line_px)
    return picture


def _draw_outline(
    canvas: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
    colour: tuple[int, int, int],
    line_px: int,
) -> None:
    box = tight_box(mask)
    if box is None:
        return
    left, top, right, bottom = box
    # One pixel of background around it, so that a lesion at the picture's edge is closed there too.
    inside = np.pad(mask[top:bottom, left:right], 1)
    rim = inside & (ndimage.distance_transform_cdt(inside, metric="chessboard") <= line_px)
    shadow = ndimage.binary_dilation(inside, structure=np.ones((3, 3), dtype=bool)) & ~inside
    height, width = mask.shape
    # The padded crop, cut back to the picture where the lesion touches its edge.
    rows = slice(1 - min(top, 1), inside.shape[0] - (bottom == height))
    columns = slice(1 - min(left, 1), inside.shape[1] - (right == width))
    region = canvas[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1]
    shade = shadow[rows, columns]
    region[shade] = region[shade] // 2
    region[rim[rows, columns]] = colour


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open picture of acceptable size; only its header has been read."""
    if not path.exists():
        raise InputError(f"{path}: no such file. Expected an image: check the path.")
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, expected one image file. Name a file inside it.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes). Expected {READABLE}: copy or download it again.")
    try:
        picture = _open_unlimited(path)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path}: this is not an image that can be read, whatever its name says. Expected {READABLE}: convert it."
        ) from error
    except Exception as error:
        raise InputError(f"{path}: the file cannot be opened ({error}). Expected {READABLE}: check it.") from error
    with picture:
        _check_size(picture.size, str(path))
        yield picture


def _open_unlimited(path: Path) -> Image.Image:
    # Pillow warns from 89 megapixels and refuses from 179, by a global of its own. Ours is the limit that counts, and
    # opening reads only the header.
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on damaged data (it may be anything) into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name}: the image is cut off or damaged ({error}). Expected {READABLE}: copy or convert it again."
        ) from error


def _check_size(size_wh: tuple[int, int], name: str) -> None:
    width, height = size_wh
    if min(size_wh) < MIN_SIDE_PX:
        raise InputError(
            f"{name}: the image is {width}x{height} px, expected at least {MIN_SIDE_PX} px a side. Nothing can be seen "
            "in less: give the original picture."
        )
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: the image is {width}x{height} px, expected at most {MAX_PIXELS // 1_000_000} million pixels. "
            "Shrink it, or cut out the part in question."
        )


def _upright(picture: Image.Image, name: str) -> Image.Image:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":
        raise InputError(
            f"{name}: the file holds {frames} frames or pages, expected one picture. Save the frame in question as a "
            "PNG and give that."
        )
    picture.load()
    return ImageOps.exif_transpose(picture)


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode in _DEEP_MODES or picture.mode.startswith("I;16")


def _pil_to_rgb(picture: Image.Image, name: str) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, ...]]:
    if _is_deep(picture):
        return _array_to_rgb(np.asarray(picture), name)
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        return _array_to_rgb(np.asarray(picture.convert("RGBA")), name)
    return np.array(picture.convert("RGB")), ()


def _array_to_rgb(values: np.ndarray, name: str) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, ...]]:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"{name}: its shape is {values.shape}, expected height x width, or height x width x 1, 3 or 4 channels. "
            "Give one picture, channels last."
        )
    _check_size((values.shape[1], values.shape[0]), name)
    if values.dtype.kind not in "buif":
        raise InputError(f"{name}: its values are {values.dtype}, expected numbers such as uint8. Convert it first.")
    channels = values[..., np.newaxis] if values.ndim == 2 else values
    colour, changes = _to_8_bit(channels[..., :3], name)
    if channels.shape[2] == 4:
        alpha = channels[..., 3:]
        opaque = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "ui" else 1
        if alpha.dtype.itemsize > 2 and alpha.dtype.kind in "ui":  # 8 or 16 bits kept in a wider type
            opaque = 255 if alpha.max() <= 255 else 65535
        shown = np.clip(alpha / opaque, 0, 1)
        colour = (colour * shown + 0.5).astype(np.uint8)
        if transparent := 100 * float((shown < 1).mean()):
            changes = (
                *changes,
                f"{transparent:.2g} % of the picture is transparent and was darkened or shown black; if it has "
                "something to see, save it without transparency",
            )
    return np.array(np.broadcast_to(colour, (*colour.shape[:2], 3))), changes


def _to_8_bit(
    values: Shaped[np.ndarray, "height width channels"], name: str
) -> tuple[UInt8[np.ndarray, "height width channels"], tuple[str, ...]]:
    if values.dtype == np.uint8:
        return values, ()
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255), ()
    finite = np.isfinite(values)
    if not finite.any():
        raise InputError(f"{name}: no value in it is finite, expected intensities. Check how it was made.")
    lowest, highest = float(values[finite].min()), float(values[finite].max())
    changes: tuple[str, ...] = ()
    if values.dtype.kind == "f" and lowest >= 0 and highest <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = (float(value) for value in np.percentile(values[finite], _STRETCH_PERCENTILES))
        if low == high:
            low, high = lowest, highest
        changes = (
            f"the picture's values, {lowest:g} to {highest:g}, were stretched so that {low:g} is black and {high:g} "
            "white; to choose these yourself, save it with 8 bits",
        )
    span = high - low or 1.0
    shares = (np.where(finite, values, lowest).astype(np.float32) - np.float32(low)) / np.float32(span)
    return np.asarray(np.clip(shares, 0, 1) * 255 + 0.5, dtype=np.uint8), changes


def _refuse_colours(name: str, *, several: bool) -> None:
    if several:
        raise InputError(
            f"{name}: the mask has several colours, expected one (black background, lesion in white). Save one mask "
            "per lesion category."
        )


def _refuse_values(name: str, values: Shaped[np.ndarray, "..."], binary: bool, *, lossy: bool) -> None:
    if not binary or not values.any():
        return
    if lossy:
        low, high = _JPEG_GREYS
        grey = ndimage.binary_erosion((values >= low) & (values <= high), np.ones((5, 5), dtype=bool)).any()
        several = bool(grey or values.max() <= _JPEG_MASK_THRESHOLD)
        found, expected = "grey areas" if grey else f"nothing brighter than {values.max()}", "black and white"
    else:
        drawn = np.unique(values[values != 0])
        several = len(drawn) > 1
        shown = ", ".join(str(value) for value in drawn[:3])
        found, expected = f"{len(drawn)} values besides black ({shown}{', …' if len(drawn) > 3 else ''})", "one"
    if several:
        raise InputError(
            f"{name}: the mask has {found}, expected {expected}. If the values are labels, save one mask per lesion "
            "category and leave organs out; cut soft edges at half intensity."
        )
