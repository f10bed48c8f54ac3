"""The mask loss of both stages."""

import torch
from jaxtyping import Float
from torch.nn import functional


def dice_ce(
    mask_logits: Float[torch.Tensor, "masks height width"],
    masks: Float[torch.Tensor, "masks reference_height reference_width"],
) -> Float[torch.Tensor, ""]:
    """Soft Dice loss plus binary cross-entropy, averaged over the masks: `L_DiceCE` of the paper.

    The logits are brought to the reference's size first, since a lesion of a few pixels would be lost the other way
    round. `masks` are 0 or 1; an empty one contributes its cross-entropy and the Dice term of MONAI's smoothing.

    Source: CORE-Seg (arXiv 2603.05911), loss of both stages; computed by MONAI's `DiceCELoss`.
    """
    from monai.losses.dice import DiceCELoss

    resized = functional.interpolate(
        mask_logits[:, None].float(), size=masks.shape[-2:], mode="bilinear", align_corners=False
    )
    loss: torch.Tensor = DiceCELoss(sigmoid=True)(resized, masks[:, None].float())
    return loss
