"""The three things that travel between modules: a data-set row, a parsed answer, a result.

Boxes are half-open integer pixels `x1, y1, x2, y2`, origin top-left, x right, y down, `0 <= x1 < x2 <= width`.
Their frame is the original image unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]

MAX_BOXES = 8
"""At most this many boxes are measured, written or accepted for one question. Our choice."""


@dataclass(frozen=True)
class Sample:
    """One row of a data set: one image, one lesion category, one mask.

    Paths are relative to the data set's folder. `boxes` are in original pixels, one per lesion, and empty where
    the lesion is absent. `source` is the short name of the set the image came from. An empty `case` means that the
    patient is unknown.
    """

    file_name: str
    mask_file_name: str
    modality: str
    anatomy: str
    category: str
    boxes: tuple[Box, ...]
    query: str
    reasoning: str
    source: str
    licence: str
    case: str
    split: str


@dataclass(frozen=True)
class Answer:
    """The content of one well-formed answer.

    `boxes` are in the frame of the text they were read from, at most eight, in the order written. An answer that
    says the lesion is absent has `found` false and no boxes.
    """

    category: str
    boxes: tuple[Box, ...]
    reasoning: str
    found: bool


@dataclass(frozen=True)
class Result:
    """What one question about one image gave.

    mask: the segmentation at the image's own size; all false where nothing was found or the answer is malformed.
    boxes: the boxes the model wrote, in original pixels.
    reasoning: the text of the think block.
    answer: the answer sentence, its boxes in original pixels; empty where the form is invalid.
    text: the model's raw output, its boxes in the model's own frame.
    found: whether the model says that the lesion is there.
    valid: whether the raw text has the required form (see `coreseg.answer`).
    seconds: wall time of this image; in a batch, the batch's time divided by its size.
    image: the picture the mask lies on, upright RGB.
    warnings: why not to rely on it: values that were stretched, transparency, words that tell of a lesion beside an
    empty mask, and a picture or question unlike what the model was trained on, if it has a record of that
    (`coreseg merge --scope`).
    confidence: the Dice that the model expects of its mask, in [0, 1]; of an empty one, the probability that nothing is
    there. 0 where the form is invalid, and where the words tell of a lesion beside an empty mask. None for a model that
    never learned how sure it may be (`coreseg merge --confidence`).
    signs: what the confidence is told from, see `coreseg.model.confidence.Signs`.
    """

    mask: Bool[np.ndarray, "height width"]
    boxes: Int[np.ndarray, "lesions 4"]
    reasoning: str
    answer: str
    text: str
    found: bool
    valid: bool
    seconds: float
    image: UInt8[np.ndarray, "height width 3"]
    warnings: tuple[str, ...] = ()
    confidence: float | None = None
    signs: Mapping[str, float] | None = None

    def overlay(self) -> "Image":
        """The image with mask outline and boxes drawn on it, at the image's own size."""
        from coreseg.imaging import overlay

        return overlay(self.image, self.mask, self.boxes)
