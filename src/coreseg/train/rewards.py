"""The rewards of stage 2: form, boxes, and the mask at two granularities.

    reward = format + detect + segment          (each times its weight)

A mask that misses the lesion altogether has a Dice of 0 wherever it lies, so a group of such masks would teach nothing.
Below a small Dice the reward is therefore how near the mask's box comes to the reference's: there is always a way up.

All rewards of one completion are computed in the reference's frame: boxes and mask in original pixels.
Source: CORE-Seg (arXiv 2603.05911), adaptive dual-granularity reward. Our choices: the weights, the 1 and 0 of the
form, what absent lesions earn, and that a malformed answer earns what an empty-handed one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torchvision.ops import generalized_box_iou

from coreseg.config import RewardSettings
from coreseg.masks import tight_box
from coreseg.metrics import Boxes, detect_score, dice
from coreseg.statements import holds
from coreseg.types import Answer, Box

NOTHING = -1.0
"""The segment reward of no mask where there is a lesion, or of a mask where there is none: the least GIoU."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion beside its reference.

    `answer` is None where the text has not the exact form; its boxes and `mask` share the frame of the reference. The
    mask is empty where the completion has none.
    """

    answer: Answer | None
    mask: Bool[np.ndarray, "height width"]
    reference_boxes: Boxes
    reference_mask: Bool[np.ndarray, "height width"]
    image: UInt8[np.ndarray, "height width 3"] | None = None


@dataclass(frozen=True)
class Rewards:
    """Each reward of each completion, unweighted, and their weighted sum."""

    format: Float[np.ndarray, " completions"]
    detect: Float[np.ndarray, " completions"]
    segment: Float[np.ndarray, " completions"]
    faithfulness: Float[np.ndarray, " completions"]
    total: Float[np.ndarray, " completions"]


def rewards(completions: Sequence[Completion], settings: RewardSettings | None = None) -> Rewards:
    """All rewards of a batch of completions. Raises ValueError where faithfulness is asked for without the images."""
    settings = settings or RewardSettings()
    of_form = np.array([format_reward(c.answer) for c in completions])
    of_boxes = np.array([detect_reward(c.answer, c.reference_boxes) for c in completions])
    of_masks = np.array([segment_reward(c.answer, c.mask, c.reference_mask, settings) for c in completions])
    of_words = np.zeros(len(completions))
    if settings.faithfulness_weight:
        of_words = np.array([faithfulness_reward(c.answer, c.image, c.mask) for c in completions])
    total = (
        settings.format_weight * of_form
        + settings.detect_weight * of_boxes
        + settings.segment_weight * of_masks
        + settings.faithfulness_weight * of_words
    )
    return Rewards(of_form, of_boxes, of_masks, of_words, total)


def format_reward(answer: Answer | None) -> float:
    """1 for the exact form, present or absent, else 0."""
    return float(answer is not None)


def detect_reward(answer: Answer | None, reference_boxes: Boxes) -> float:
    """The detect score of the written boxes in [0, 1] (see `coreseg.metrics.detect_score`); 0 for a malformed answer.

    Where the lesion is absent and the answer says so, 1.
    """
    return 0.0 if answer is None else detect_score(answer.boxes, reference_boxes)


def segment_reward(
    answer: Answer | None,
    mask: Bool[np.ndarray, "height width"],
    reference: Bool[np.ndarray, "height width"],
    settings: RewardSettings,
) -> float:
    """alpha + beta x Dice; below `dice_from`, the GIoU of the two tight boxes in (-1, 1].

    A malformed answer, or an empty mask on one side only, earns `NOTHING`; two empty masks agree, so Dice is 1. With
    `plain_dice`: Dice alone, a malformed answer 0.
    """
    if settings.plain_dice:
        return 0.0 if answer is None else dice(mask, reference)
    if answer is None or mask.any() != reference.any():
        return NOTHING
    overlap = dice(mask, reference)
    if overlap >= settings.dice_from:
        return settings.alpha + settings.beta * overlap
    predicted_box, reference_box = tight_box(mask), tight_box(reference)
    assert predicted_box and reference_box  # two empty masks have a Dice of 1
    return box_giou(predicted_box, reference_box)


def faithfulness_reward(
    answer: Answer | None, image: UInt8[np.ndarray, "height width 3"] | None, mask: Bool[np.ndarray, "height width"]
) -> float:
    """Share in [0, 1] of the reasoning's checkable statements that hold on the *predicted* mask; 0 if it states none.

    Our addition: whether the words are about what was segmented. Raises ValueError without the image.
    """
    if image is None:
        raise ValueError("faithfulness is measured on the picture; give `image` with every completion")
    return 0.0 if answer is None else holds(answer.reasoning, image, mask) or 0.0


def box_giou(first: Box, second: Box) -> float:
    """Generalised IoU of two boxes: IoU minus the share of their common hull that neither covers.

    Source: Rezatofighi et al. 2019 (arXiv 1902.09630); computed by torchvision.
    """
    pair = [torch.tensor([box], dtype=torch.float64) for box in (first, second)]
    return float(generalized_box_iou(*pair))
