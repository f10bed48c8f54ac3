"""Random changes of a picture together with its masks, for training.

Geometry moves image and masks alike; light changes the image only. Whatever is said about the picture (boxes,
reasoning) has to be measured again afterwards.
Our choice: the ranges, which are those usual for small medical sets.
"""

import math

import torch
from jaxtyping import Float
from torch.nn import functional

MAX_ROTATION_DEGREES = 12.0
SCALE_RANGE = (0.85, 1.25)
MAX_SHIFT_SHARE = 0.08
GAIN_RANGE = (0.8, 1.2)
GAMMA_RANGE = (0.8, 1.25)


def augment(
    images: Float[torch.Tensor, "batch 3 height width"],
    masks: Float[torch.Tensor, "batch masks height width"],
    generator: torch.Generator,
) -> tuple[Float[torch.Tensor, "batch 3 height width"], Float[torch.Tensor, "batch masks height width"]]:
    """Flip, rotate, scale and shift each picture with its masks, and change the picture's gain and gamma.

    `images` are in [0, 1]; `masks` are 0 or 1 and come back 0 or 1. Areas from outside the picture are black and free
    of lesions. The same generator state gives the same result.
    """
    batch = images.shape[0]

    def uniform(low: float, high: float) -> Float[torch.Tensor, " batch"]:
        return low + (high - low) * torch.rand(batch, generator=generator)

    angle = uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES) * (math.pi / 180)
    zoom = 1 / uniform(*SCALE_RANGE)
    flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    shift_x, shift_y = uniform(-MAX_SHIFT_SHARE, MAX_SHIFT_SHARE), uniform(-MAX_SHIFT_SHARE, MAX_SHIFT_SHARE)
    rows = [
        torch.stack([zoom * flip * angle.cos(), -zoom * angle.sin(), 2 * shift_x], dim=1),
        torch.stack([zoom * flip * angle.sin(), zoom * angle.cos(), 2 * shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(torch.cat([images, masks], dim=1), grid, align_corners=False)
    moved_images, moved_masks = moved[:, :3], (moved[:, 3:] > 0.5).to(masks.dtype)

    gain = uniform(*GAIN_RANGE)[:, None, None, None]
    gamma = uniform(*GAMMA_RANGE)[:, None, None, None]
    return (moved_images.clamp(min=0) * gain).clamp(0, 1) ** gamma, moved_masks
