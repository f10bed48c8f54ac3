"""Text burned into a picture, which may be a name, a date or a number of a patient: a heuristic on pixels, no reading.

Letters are thin strokes of one height, side by side on calmer ground, with clear air above and below. So a top-hat
keeps what is as thin as a stroke, what is left is joined to lines, and a line counts where strokes and gaps take turns
in it as often as in writing. Light on dark and dark on light; level lines of three letters or more, from 5 px on,
mirrored or upside down too. Upright and slanted lines, single letters, and letters smeared into one are not found.

Our choice throughout: the paper does not say. Limits were set by eye on the pictures that nano was trained on.
"""

from collections.abc import Iterator
from functools import reduce

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from coreseg.types import Box

_STROKE_PX = 5  # thicker things are no strokes
_HEIGHT_PX = (5, 32)
_LARGEST_PX, _SMALLEST_PX = 2048, 512
_HAT, _CONTRAST = 48, 60  # of 255: of a stroke's pixel above its surroundings, and of a line's strokes above its ground
_COLOUR = 32  # channels that differ by less are grey, but for a JPEG's noise


def find_text(image: UInt8[np.ndarray, "height width 3"]) -> tuple[Box, ...]:
    """Boxes around what looks like lines of text, in the picture's half-open pixels; they may overlap.

    Looked for in the darkest and in the lightest channel, so that coloured text counts, and at half sizes, so that
    large text does; pictures beyond 2048 px are halved first.
    """
    red, green, blue = np.moveaxis(image, 2, 0)
    darkest = np.minimum(np.minimum(red, green), blue)
    lightest = np.maximum(np.maximum(red, green), blue)
    coloured = int((lightest - darkest).max()) >= _COLOUR
    found = [
        (x1 * scale, y1 * scale, x2 * scale, y2 * scale)
        for channel in ((darkest, lightest) if coloured else (darkest,))
        for scale, level in _levels(channel)
        for grey in (level, 255 - level)
        for x1, y1, x2, y2 in _lines(grey)
    ]
    return tuple(dict.fromkeys(found))


def _levels(grey: UInt8[np.ndarray, "_ _"]) -> Iterator[tuple[int, UInt8[np.ndarray, "_ _"]]]:
    """The picture and its halves, quarters and so on, each with what its pixels measure in the picture's."""
    scale = 1
    if max(grey.shape) <= _LARGEST_PX:
        yield scale, grey
    while max(grey.shape) > _SMALLEST_PX and min(grey.shape) > 1:
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        blocks = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
        scale, grey = 2 * scale, blocks.mean(axis=(1, 3)).astype(np.uint8)
        if max(grey.shape) <= _LARGEST_PX:
            yield scale, grey


def _lines(grey: UInt8[np.ndarray, "height width"]) -> Iterator[Box]:
    """Lines of light text on dark ground."""
    strokes = grey - _opened(grey) >= _HAT
    labels, _ = ndimage.label(strokes, np.ones((3, 3)))
    places = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    parts = np.array(places, dtype=np.int64).reshape(-1, 4)
    heights = parts[:, 3] - parts[:, 1]
    for box, letters in _joined(parts[(heights >= _HEIGHT_PX[0]) & (heights <= _HEIGHT_PX[1])]):
        if letters >= 3 and _reads(grey, strokes, box):
            yield box


def _opened(grey: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Without what is bright and as narrow as a stroke: `scipy.ndimage.grey_opening`, in a tenth of its time."""
    for extreme in (np.minimum, np.maximum):
        for axis, length in enumerate(grey.shape):
            reach = [(_STROKE_PX // 2,) * 2 if each == axis else (0, 0) for each in range(2)]
            beyond = np.moveaxis(np.pad(grey, reach, mode="edge"), axis, 0)
            shifted = (beyond[start : start + length] for start in range(_STROKE_PX))
            grey = np.moveaxis(reduce(extreme, shifted), 0, axis)
    return grey


def _joined(parts: Int[np.ndarray, "parts 4"]) -> Iterator[tuple[Box, int]]:
    """Boxes of parts of like height that follow each other closely, and of how many parts each is made."""
    parts = parts[np.argsort(parts[:, 1] + parts[:, 3], kind="stable")]
    middles = (parts[:, 1] + parts[:, 3]) / 2
    # Parts that share most of their height have middles close by: only such pairs are looked at.
    ends = np.searchsorted(middles, middles + 0.3 * _HEIGHT_PX[1], side="right")
    ahead = ends - np.arange(len(parts)) - 1
    first = np.repeat(np.arange(len(parts)), ahead)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(ahead) - ahead, ahead)
    one, other = parts[first], parts[second]
    height = np.maximum(one[:, 3] - one[:, 1], other[:, 3] - other[:, 1])
    shared = np.minimum(one[:, 3], other[:, 3]) - np.maximum(one[:, 1], other[:, 1])
    gap = np.maximum(one[:, 0], other[:, 0]) - np.minimum(one[:, 2], other[:, 2])
    close = (shared >= 0.7 * height) & (gap <= height)
    graph = sparse.coo_array((np.ones(close.sum()), (first[close], second[close])), shape=(len(parts),) * 2)
    _, line_of = csgraph.connected_components(graph, directed=False)
    for line in np.flatnonzero(np.bincount(line_of) > 1):
        members = parts[line_of == line]
        (x1, y1), (x2, y2) = members[:, :2].min(axis=0).tolist(), members[:, 2:].max(axis=0).tolist()
        yield (x1, y1, x2, y2), len(members)


def _reads(grey: UInt8[np.ndarray, "height width"], strokes: Bool[np.ndarray, "height width"], box: Box) -> bool:
    """Whether a line looks like writing: even and bright strokes, as dense as letters are, and air around."""
    x1, y1, x2, y2 = box
    height, width = y2 - y1, x2 - x1
    inside, values = strokes[y1:y2, x1:x2], grey[y1:y2, x1:x2]
    margin = max(2, height // 4)
    air = np.concatenate((strokes[max(0, y1 - margin) : max(0, y1 - 1), x1:x2], strokes[y2 + 1 : y2 + margin, x1:x2]))
    turns_in_row = np.count_nonzero(inside[:, 1:] & ~inside[:, :-1]) / height
    ground = values[~ndimage.binary_dilation(inside, np.ones((3, 3), dtype=bool))]
    ground = ground if ground.size >= 5 else values[~inside]
    contrast = np.median(values[inside]) - np.median(ground)
    return bool(
        width >= 2 * height
        and turns_in_row >= max(3, width / height)
        and 0.25 <= inside.mean() <= 0.7
        and (not air.size or air.mean() <= 0.03)
        and contrast >= max(_CONTRAST, 3.5 * ground.std())
    )
