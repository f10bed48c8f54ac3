"""Near-duplicates: pictures that are the same picture, re-encoded, brightened, resized or slightly cropped.

Three signs, each for what the others miss:

- *pixels*: the decoded pixels are equal.
- *hash*: of 256 bits, each saying whether brightness rises between two neighbouring cells of a 17 x 16 picture, at most
  12 differ (dHash). Stands re-encoding and resizing.
- *thumbnail*: high-passed 32 px thumbnails correlate above 0.9, with either picture also cropped by up to 6 % a side,
  and so does the fine detail at 128 px, above 0.55. The second half tells pictures that only share a layout (two
  healthy fundus photographs, two slices of two heads) from one picture in two versions.

Not found: mirrored or turned copies, stronger or lopsided crops, and different pictures of one patient.

Source: the first two and the 0.9 are how public lesion sets were split before; crops and detail are our choice. On some
3,000 real images the thumbnails alone, uncropped and unclipped, matched strangers' eyes by their round rim and missed
scans that were shifted by a few pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from PIL import Image
from scipy import ndimage

Sign = Literal["pixels", "hash", "thumbnail"]

MAX_DIFFERING_BITS = 12
MIN_CORRELATION = 0.9
MIN_DETAIL_CORRELATION = 0.55

_HASH_SIZE_WH = (17, 16)
_THUMBNAIL_PX = 32
_DETAIL_PX = 128
_THUMBNAIL_BLUR_PX = 3.0
_THUMBNAIL_CLIP = 0.75  # in standard deviations: a bright rim must not outvote all the rest
_DETAIL_BLUR_PX = 2.0
_DETAIL_FLOOR = 2.0  # grey levels: fainter detail is noise
_CHUNK = 2000

_Crop = tuple[float, float, float, float]
_WHOLE: _Crop = (0.0, 0.0, 1.0, 1.0)
_CENTRED: tuple[_Crop, ...] = tuple((m, m, 1 - m, 1 - m) for m in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06))
_ONE_SIDED: tuple[_Crop, ...] = tuple(
    crop
    for m in (0.02, 0.04)
    for crop in ((m, 0.0, 1.0, 1.0), (0.0, m, 1.0, 1.0), (0.0, 0.0, 1 - m, 1.0), (0.0, 0.0, 1.0, 1 - m))
)
# Left, top, right, bottom as shares of the picture; the first is the whole of it.
_CROPS = (_WHOLE, *_CENTRED, *_ONE_SIDED)


@dataclass(frozen=True)
class Fingerprint:
    """What of a picture is compared: a digest of its pixels, its 256 hash bits, and it in grey at 128 x 128 px."""

    pixels: bytes
    bits: Bool[np.ndarray, "256"]
    grey: UInt8[np.ndarray, "128 128"]


@dataclass(frozen=True)
class Match:
    """Two pictures that look like one, by index.

    score: 0 for equal pixels, the number of differing bits for a hash, the correlation for thumbnails.
    """

    first: int
    second: int
    sign: Sign
    score: float


def fingerprint(image: UInt8[np.ndarray, "height width 3"]) -> Fingerprint:
    """The fingerprint of a picture of any size."""
    digest = hashlib.blake2b(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()
    grey = Image.fromarray(image).convert("L")
    cells = np.asarray(grey.resize(_HASH_SIZE_WH, Image.Resampling.LANCZOS), dtype=np.int64)
    small = grey.resize((_DETAIL_PX, _DETAIL_PX), Image.Resampling.BOX)
    return Fingerprint(digest, (cells[:, 1:] > cells[:, :-1]).ravel(), np.array(small))


def find_matches(first: Sequence[Fingerprint], second: Sequence[Fingerprint]) -> list[Match]:
    """Every pair across the two lists that looks like one picture, once, by the surest sign that holds."""
    found: list[Match] = []
    if not second:
        return found
    for start in range(0, len(first), _CHUNK):
        chunk = first[start : start + _CHUNK]
        found += [
            Match(start + int(a), int(b), sign, score)
            for (a, b), (sign, score) in sorted(_matches_in_chunk(chunk, second).items())
        ]
    return found


def _matches_in_chunk(
    first: Sequence[Fingerprint], second: Sequence[Fingerprint]
) -> dict[tuple[int, int], tuple[Sign, float]]:
    found: dict[tuple[int, int], tuple[Sign, float]] = {}
    correlation, crop_of = _correlations([item.grey for item in first], [item.grey for item in second])
    detail = lru_cache(maxsize=2048)(_detail)
    for a, b in np.argwhere(correlation > MIN_CORRELATION).tolist():
        crop = int(crop_of[a, b])
        one = detail(first[a].grey.tobytes(), _CROPS[max(crop, 0)])
        other = detail(second[b].grey.tobytes(), _CROPS[max(-crop, 0)])
        if float(one @ other) > MIN_DETAIL_CORRELATION:
            found[a, b] = ("thumbnail", float(correlation[a, b]))
    differing = _differing_bits(np.stack([item.bits for item in first]), np.stack([item.bits for item in second]))
    for a, b in np.argwhere(differing <= MAX_DIFFERING_BITS).tolist():
        found[a, b] = ("hash", float(differing[a, b]))
    of_digest: dict[bytes, list[int]] = {}
    for b, item in enumerate(second):
        of_digest.setdefault(item.pixels, []).append(b)
    for a, item in enumerate(first):
        found.update({(a, b): ("pixels", 0.0) for b in of_digest.get(item.pixels, ())})
    return found


def _differing_bits(
    first: Bool[np.ndarray, "first 256"], second: Bool[np.ndarray, "second 256"]
) -> Int[np.ndarray, "first second"]:
    a, b = first.astype(np.float32), second.astype(np.float32)
    return np.asarray(a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - 2 * (a @ b.T), dtype=np.int64)


def _correlations(
    first: Sequence[UInt8[np.ndarray, "128 128"]], second: Sequence[UInt8[np.ndarray, "128 128"]]
) -> tuple[Float32[np.ndarray, "first second"], Int[np.ndarray, "first second"]]:
    """The best correlation of each pair, and at which crop: of the first (positive) or of the second (negative)."""
    whole_first, whole_second = _thumbnails(first, _WHOLE), _thumbnails(second, _WHOLE)
    best = whole_first @ whole_second.T
    crop_of = np.zeros(best.shape, dtype=np.int64)
    for index, crop in enumerate(_CROPS[1:], start=1):
        for sign, correlation in (
            (1, _thumbnails(first, crop) @ whole_second.T),
            (-1, whole_first @ _thumbnails(second, crop).T),
        ):
            better = correlation > best
            best[better] = correlation[better]
            crop_of[better] = sign * index
    return best, crop_of


def _thumbnails(greys: Sequence[UInt8[np.ndarray, "128 128"]], crop: _Crop) -> Float32[np.ndarray, "pictures 1024"]:
    """High-passed, clipped thumbnails as unit vectors; the zero vector for a flat picture."""
    size, box = (_THUMBNAIL_PX, _THUMBNAIL_PX), _in_pixels(crop)
    small = [Image.fromarray(grey).resize(size, Image.Resampling.BOX, box=box) for grey in greys]
    cells = np.stack([np.asarray(picture, dtype=np.float32) for picture in small])
    high = cells - ndimage.gaussian_filter(cells, (0, _THUMBNAIL_BLUR_PX, _THUMBNAIL_BLUR_PX))
    limit = _THUMBNAIL_CLIP * high.std(axis=(1, 2), keepdims=True)
    return _unit(np.clip(high, -limit, limit).reshape(len(cells), -1))


def _detail(grey: bytes, crop: _Crop) -> Float32[np.ndarray, " 16384"]:
    """Fine detail as one unit vector, evened out so that faint texture counts as much as a sharp rim."""
    picture = Image.frombytes("L", (_DETAIL_PX, _DETAIL_PX), grey)
    cells = np.asarray(picture.resize(picture.size, Image.Resampling.BILINEAR, box=_in_pixels(crop)), np.float32)
    high = cells - ndimage.gaussian_filter(cells, _DETAIL_BLUR_PX)
    strength = np.sqrt(ndimage.gaussian_filter(high**2, 2 * _DETAIL_BLUR_PX) + _DETAIL_FLOOR**2)
    return np.asarray(_unit((high / strength).reshape(1, -1))[0])


def _in_pixels(crop: _Crop) -> _Crop:
    left, top, right, bottom = crop
    return _DETAIL_PX * left, _DETAIL_PX * top, _DETAIL_PX * right, _DETAIL_PX * bottom


def _unit(vectors: Float[np.ndarray, "pictures values"]) -> Float32[np.ndarray, "pictures values"]:
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(np.where(lengths > 1e-3, centred / np.maximum(lengths, 1e-3), 0), dtype=np.float32)
