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
MAX_TINT = 0.1
"""Share by which a colour gains or loses at most, from a strength of 2 on."""


def augment(
    images: Float[torch.Tensor, "batch 3 height width"],
    masks: Float[torch.Tensor, "batch masks height width"],
    generator: torch.Generator,
    strength: float = 1.0,
) -> tuple[Float[torch.Tensor, "batch 3 height width"], Float[torch.Tensor, "batch masks height width"]]:
    """Flip, rotate, scale and shift each picture with its masks, and change the picture's gain and gamma.

    `images` are in [0, 1]; `masks` hold 0 and whatever numbers stand for lesions, and come back with no others. Areas
    from outside the picture are black and free of lesions. `strength` widens all ranges; above 1 pictures are turned
    upside down and tinted too. The same generator state gives the same result.
    """
    batch, device = images.shape[0], images.device
    beyond = min(max(strength - 1, 0.0), 1.0)

    def uniform(low: float, high: float, *more: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(batch, *more, generator=generator, device=generator.device)).to(device)

    def between(low: float, high: float) -> Float[torch.Tensor, " batch"]:
        return uniform(low**strength, high**strength)

    angle = strength * uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES) * (math.pi / 180)
    zoom = 1 / between(*SCALE_RANGE)
    flip = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    shift_x, shift_y = (strength * uniform(-MAX_SHIFT_SHARE, MAX_SHIFT_SHARE) for _ in "xy")
    gain, gamma = between(*GAIN_RANGE), between(*GAMMA_RANGE)
    tumble = torch.where(uniform(0.0, 1.0) < 0.5 * beyond, -1.0, 1.0)
    tint = 1 + beyond * uniform(-MAX_TINT, MAX_TINT, 3)

    rows = [
        torch.stack([zoom * flip * angle.cos(), -zoom * tumble * angle.sin(), 2 * shift_x], dim=1),
        torch.stack([zoom * flip * angle.sin(), zoom * tumble * angle.cos(), 2 * shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved_images = functional.grid_sample(images, grid, align_corners=False)
    moved_masks = functional.grid_sample(masks, grid, mode="nearest", align_corners=False)
    lit = moved_images.clamp(min=0) * (gain[:, None] * tint)[..., None, None]
    return lit.clamp(0, 1) ** gamma[:, None, None, None], moved_masks
