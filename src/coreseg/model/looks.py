"""More looks than one: a small lesion is a few pixels of the segmenter's square, and what is unsure averages out.

The whole picture may be seen in squares of several sides, larger ones where the answer names a category of small
lesions; the mean of the logits counts. Then a second look at what was found, enlarged: the window around that mask is
cut out of the picture and asked for the same; where both see, the mean of their logits counts. What the whole picture
did not show stays missed. Our choice throughout; the paper looks once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from coreseg.masks import tight_box
from coreseg.model.processor import CoreSegProcessor, Picture
from coreseg.types import Box

MARGIN = 1.5
"""Side of the window in sides of what was found."""
SMALLEST, LARGEST = 0.2, 0.75
"""Side of the window as a share of the picture's: not enlarged further, and not worth a look."""


def window_around(mask: Bool[np.ndarray, "height width"]) -> Box | None:
    """Where to look again: a window of the picture's shape, the mask in its middle as far as the border allows.

    None where nothing was found, or where it fills so much of the picture that nothing would be enlarged.
    """
    if not mask.any():
        return None
    size = np.array(mask.shape[::-1])
    box = np.array(tight_box(mask)).reshape(2, 2)
    share = max(SMALLEST, MARGIN * float(((box[1] - box[0]) / size).max()))
    if share > LARGEST:
        return None
    side = np.rint(share * size).astype(int)
    corner = np.clip((box.sum(0) - side) // 2, 0, size - side)
    x1, y1, x2, y2 = (int(edge) for edge in (*corner, *(corner + side)))
    return x1, y1, x2, y2


def boxes_within(boxes: Sequence[Box], window: Box) -> list[Box]:
    """Boxes in a window's own pixels, cut at its edges; those outside are left out."""
    x1, y1, x2, y2 = window
    cut = [(max(a, x1) - x1, max(b, y1) - y1, min(c, x2) - x1, min(d, y2) - y1) for a, b, c, d in boxes]
    return [(a, b, c, d) for a, b, c, d in cut if a < c and b < d]


def all_looks(
    processor: CoreSegProcessor,
    picture: Picture,
    category: str,
    logits: Float[torch.Tensor, "map_height map_width"],
    ask: Callable[[Picture, Box, int], Float[torch.Tensor, "look_height look_width"]],
) -> Float[torch.Tensor, "height width"]:
    """Mask logits in the picture's own pixels, of the looks that the configuration has (`looks_px`, `second_look`).

    `logits` are those in the segmenter's own square. `ask` gives the logits for a part of the picture, its place, and
    the side in px of the square to see it in. `category` is what the answer names, "" where nothing does.
    """
    config, size = processor.config, picture.shape[:2]
    whole, own_px = (0, 0, size[1], size[0]), config.segmenter_size_px
    sides = config.looks_px.get(category) or config.looks_px.get("") or [own_px]
    looks = [logits if side == own_px else ask(picture, whole, side) for side in sides]
    plane = torch.stack([processor.in_pixels(look, size) for look in looks]).mean(dim=0)
    window = window_around((plane > 0).cpu().numpy()) if config.second_look else None
    if window:
        x1, y1, x2, y2 = window
        part = picture[y1:y2, x1:x2]
        again = processor.in_pixels(ask(part, window, own_px), part.shape[:2])
        plane[y1:y2, x1:x2] = (plane[y1:y2, x1:x2] + again) / 2
    return plane
