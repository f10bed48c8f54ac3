"""Masks and boxes: components, the box convention, and the ways between frames.

A mask is a boolean array, true on the lesion. Boxes are half-open integer pixels `x1, y1, x2, y2`, origin top-left.
Pure NumPy and SciPy; nothing here reads a file.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage, sparse

from coreseg.errors import InputError
from coreseg.types import MAX_BOXES, Box

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def smallest_lesion_px(image_px: int) -> float:
    """Area from which a component counts as a lesion in an image of so many pixels. Our choice."""
    return max(4.0, 0.0002 * image_px)


def label_lesions(
    mask: Bool[np.ndarray, "height width"],
) -> tuple[Int[np.ndarray, "height width"], Int[np.ndarray, " labels"]]:
    """The 8-connected components as a picture of labels from 1, and their areas by label (0 for the background)."""
    labels, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    areas_px = np.bincount(labels.ravel(), minlength=1)
    areas_px[0] = 0
    return labels, areas_px


def tight_box(mask: Bool[np.ndarray, "height width"]) -> Box | None:
    """The smallest box around all of the foreground, or None where the mask is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_to_boxes(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "lesions 4"]:
    """One box per lesion, in the mask's own pixels, in reading order; no rows where the mask is empty.

    A lesion is an 8-connected component. Those under max(4 px, 0.02 % of the image) get no box, except that the
    largest always has one; of more than eight the eight largest are kept (on a tie, the first in scan order).
    Reading order: by upper edge, then by left edge.

    Our choice: the public text of CORE-Seg names no rule.
    """
    return np.array([box for box, _ in _lesions(mask)], dtype=np.int64).reshape(-1, 4)


def lesion_masks(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "lesions height width"]:
    """The lesions that `mask_to_boxes` gives boxes to, each as a mask of its own, in the same order."""
    lesions = _lesions(mask)
    parts = np.zeros((len(lesions), *mask.shape), dtype=bool)
    for part, ((left, top, right, bottom), pixels) in zip(parts, lesions, strict=True):
        part[top:bottom, left:right] = pixels
    return parts


def _lesions(mask: Bool[np.ndarray, "height width"]) -> list[tuple[Box, Bool[np.ndarray, "_ _"]]]:
    """Box and pixels within it of each lesion."""
    outer = tight_box(mask)
    if outer is None:
        return []
    # A lesion fills a small part of a large picture: labelling only its surroundings saves most of the time.
    left, top, right, bottom = outer
    labels, areas_px = label_lesions(mask[top:bottom, left:right])
    areas = areas_px[1:]
    smallest_px = smallest_lesion_px(mask.size)
    largest_first = np.argsort(-areas, kind="stable")[:MAX_BOXES]
    kept = [index for rank, index in enumerate(largest_first) if rank == 0 or areas[index] >= smallest_px]
    slices = ndimage.find_objects(labels)
    lesions = []
    for index in kept:
        rows, columns = slices[index]
        box = (columns.start + left, rows.start + top, columns.stop + left, rows.stop + top)
        lesions.append((box, labels[rows, columns] == index + 1))
    return sorted(lesions, key=lambda lesion: (lesion[0][1], lesion[0][0], lesion[0][3], lesion[0][2]))


def box_tuples(boxes: Int[np.ndarray, "lesions 4"]) -> tuple[Box, ...]:
    """The boxes as samples and answers hold them."""
    return tuple((int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in boxes)


def map_boxes(
    boxes: Int[np.ndarray, "lesions 4"], from_size_wh: tuple[int, int], to_size_wh: tuple[int, int]
) -> Int[np.ndarray, "lesions 4"]:
    """The same boxes in a frame of another size; both sizes are (width, height) in pixels.

    Each axis is scaled by itself and each edge rounded to the nearest pixel (halves up), in exact integer arithmetic:
    there and back through a larger frame changes nothing; through a smaller one, an edge moves by at most the
    scale, rounded up. Every box stays inside the frame and keeps at least one pixel a side: one that would vanish takes
    the pixel its centre falls in. Boxes that leave their own frame are clipped to it first.

    Our choice: the paper leaves the mapping to the processor.

    Raises InputError where a size is not positive.
    """
    if min(*from_size_wh, *to_size_wh) < 1:
        raise InputError(
            f"Boxes cannot be mapped from a {from_size_wh} to a {to_size_wh} frame: expected sizes (width, height) of "
            "at least 1 px. Check the size of the image."
        )
    mapped = np.empty(boxes.shape, dtype=np.int64)
    for axis in (0, 1):
        start, stop = _map_intervals(
            boxes[:, axis].astype(np.int64), boxes[:, axis + 2].astype(np.int64), from_size_wh[axis], to_size_wh[axis]
        )
        mapped[:, axis], mapped[:, axis + 2] = start, stop
    return mapped


def _map_intervals(
    start: Int[np.ndarray, " lesions"], stop: Int[np.ndarray, " lesions"], from_px: int, to_px: int
) -> tuple[Int[np.ndarray, " lesions"], Int[np.ndarray, " lesions"]]:
    start = np.clip(start, 0, from_px - 1)
    stop = np.clip(stop, start + 1, from_px)
    new_start = (2 * start * to_px + from_px) // (2 * from_px)
    new_stop = (2 * stop * to_px + from_px) // (2 * from_px)
    centre = (start + stop) * to_px // (2 * from_px)
    vanished = new_stop == new_start
    return np.where(vanished, centre, new_start), np.where(vanished, centre + 1, new_stop)


def resize_mask(
    mask: Bool[np.ndarray, "height width"], size_hw: tuple[int, int]
) -> Bool[np.ndarray, "height_out width_out"]:
    """The mask at another size (height, width), its area kept in proportion.

    A growing axis repeats pixels (nearest neighbour). On a shrinking one each new pixel first gets the share of it that
    the lesion covers; then every lesion, that is every connected patch of touched pixels, keeps its most covered
    pixels, as many as its area at the new size, and at least one. So small lesions do not vanish, as nearest
    neighbour would let them, nor swell, as "any touched pixel" would.

    Our choice.

    Raises InputError where the size is not positive.
    """
    if min(size_hw) < 1:
        raise InputError(f"A mask cannot be resized to {size_hw}: expected (height, width) of at least 1 px each.")
    (height, width), (new_height, new_width) = mask.shape, size_hw
    grown = mask
    if new_height > height:
        grown = grown[_nearest(height, new_height)]
    if new_width > width:
        grown = grown[:, _nearest(width, new_width)]
    if grown.shape == size_hw:
        return grown.copy() if grown is mask else grown
    share = area_shares(grown.shape[0], new_height) @ grown.astype(np.float32)
    share = (area_shares(grown.shape[1], new_width) @ share.T).T
    return _keep_area(share)


def _nearest(from_px: int, to_px: int) -> Int[np.ndarray, " to_px"]:
    return (2 * np.arange(to_px) + 1) * from_px // (2 * to_px)


@lru_cache
def area_shares(from_px: int, to_px: int) -> sparse.csr_array:
    """Row i: the share of new pixel i that each old pixel covers, along an axis that is stretched to `to_px`."""
    edges = np.union1d(np.arange(from_px + 1) * to_px, np.arange(to_px + 1) * from_px)
    starts, lengths = edges[:-1], np.diff(edges)
    weights = (lengths / from_px).astype(np.float32)
    return sparse.csr_array((weights, (starts // from_px, starts // to_px)), shape=(to_px, from_px))


def _keep_area(share: Float[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    labels, count = ndimage.label(share > 0, structure=_EIGHT_NEIGHBOURS)
    areas = np.bincount(labels.ravel(), weights=share.ravel(), minlength=count + 1)
    quota = np.maximum(1, np.floor(areas + 0.5)).astype(np.int64)
    touched = np.flatnonzero(labels)
    label, covered = labels.ravel()[touched], share.ravel()[touched]
    order = np.lexsort((-covered, label))
    label = label[order]
    rank = np.arange(label.size) - np.searchsorted(label, label)
    kept = np.zeros(share.shape, dtype=bool)
    kept.ravel()[touched[order][rank < quota[label]]] = True
    return kept
