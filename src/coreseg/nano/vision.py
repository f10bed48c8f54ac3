"""Nano's vision tower: what nano's segmenter sees in a picture, as a coarse grid of tokens and one token per region.

It is a copy of nano's own trained segmenter, kept frozen. A grid token holds the image encoder's features of a large
cell: what kind of picture this is. A region token holds one connected part of the segmenter's "any lesion" mask: its
box, its colours, its features. So the reasoner is shown what could be a lesion and where, and has to say which of these
regions the question means, in words and in numbers. What the tower sees can be kept for later.

Source of the idea, regions as tokens that a language model refers to: Groma (arXiv 2404.13013). What a region token
holds is our choice.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from coreseg.masks import lesion_masks, tight_box
from coreseg.sam2 import FeatureMaps, any_lesion_prompt, decode_masks, encode_image
from coreseg.types import MAX_BOXES

GRID = 4
"""Grid tokens along each side."""
IMAGE_TOKENS = GRID**2 + MAX_BOXES
"""Tokens of one picture: the grid in reading order, then its regions in the order of boxes."""
BUMPS = 17
"""Channels that hold one coordinate, see `place_code`."""
PLACE_WEIGHT = 4.0
"""Of the coordinates beside all else that a token holds, whose parts have norms near one. Our choice: boxes are written
from them, and are learned many times faster where the rest does not drown them."""
MEASURES = 11 + MAX_BOXES
"""Of a region: colour inside, its deviation, colour around (3 each), area, share of its box; its number, one-hot."""


class NanoVisionConfig(PreTrainedConfig):
    """`segmenter_config` is the configuration of a segmenter of the SAM 2 family.

    `hidden_size` is what one image token holds. Grid and region tokens use different channels, the others are zero.
    """

    model_type = "coreseg_nano_vision"
    sub_configs = {"segmenter_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(self, segmenter_config: PreTrainedConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        given: Any = segmenter_config
        self.segmenter_config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
        kwargs.pop("hidden_size", None)
        self.hidden_size = 0 if given is None else sum(self.channels)
        super().__init__(**kwargs)

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels a grid token uses (features, place) and a region token (box, features, measures)."""
        features = self.segmenter_config.vision_config.fpn_hidden_size
        return features + 2 * BUMPS, 4 * BUMPS + 2 * features + MEASURES


class NanoVisionModel(PreTrainedModel):
    """Pixels to image tokens.

    `pixel_values` are either pictures, (batch, 3, height, width) with mean and deviation 0.5, or what `look` saw in
    them before, (batch, tokens, channels).
    """

    config_class = NanoVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NanoVisionConfig) -> None:
        super().__init__(config)
        self.segmenter = AutoModelForMaskGeneration.from_config(config.segmenter_config)
        self.segmenter.mask_decoder.dynamic_multimask_via_stability = False
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of our own to initialise; the segmenter's class does it for itself."""

    @torch.no_grad()
    def look(
        self, pixel_values: Float[torch.Tensor, "batch 3 height width"]
    ) -> Float[torch.Tensor, "batch tokens channels"]:
        """The tokens of pictures. Frozen: no gradient reaches the segmenter through them."""
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = encode_image(self.segmenter, pixels)
        logits = decode_masks(self.segmenter, maps, any_lesion_prompt(self.segmenter, len(pixels)))
        logits = functional.interpolate(logits.float(), pixels.shape[-2:], mode="bilinear", align_corners=False)
        parts = [lesion_masks(mask) for mask in (logits[:, 0] > 0).cpu().numpy()]
        # In half precision a coordinate would be off by a pixel.
        exact = [plane.float() for plane in maps]
        grid, regions = grid_tokens(exact), region_tokens(pixels.float(), exact, parts)
        grid = functional.pad(grid, (0, self.config.channels[1]))
        regions = functional.pad(regions, (self.config.channels[0], 0))
        return torch.cat([grid, regions], dim=1).to(pixel_values.dtype)

    def forward(
        self, pixel_values: Float[torch.Tensor, "batch *planes"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """The tokens, as a vision tower gives them."""
        tokens = self.look(pixel_values) if pixel_values.ndim == 4 else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def grid_tokens(maps: FeatureMaps) -> Float[torch.Tensor, "batch cells grid_channels"]:
    """The coarsest map's features, averaged over each of the grid's cells, and the cell's centre."""
    features = functional.adaptive_avg_pool2d(maps[-1], GRID).flatten(2).transpose(1, 2)
    ticks = (torch.arange(GRID, device=features.device) + 0.5) / GRID
    y, x = (places.flatten() for places in torch.meshgrid(ticks, ticks, indexing="ij"))
    places = place_code(torch.stack([x, y], dim=-1)).expand(len(features), -1, -1)
    return torch.cat([_unit(features), PLACE_WEIGHT * places.to(features)], dim=-1)


def region_tokens(
    pixels: Float[torch.Tensor, "batch 3 height width"], maps: FeatureMaps, parts: list[np.ndarray]
) -> Float[torch.Tensor, "batch regions region_channels"]:
    """One token for each of a picture's regions (`parts`: boolean, (regions, height, width) a picture), then zeros.

    Colours are relative to the picture's mean, in its deviations.
    """
    height, width = pixels.shape[-2:]
    inside = pixels.new_zeros(len(pixels), MAX_BOXES, height, width)
    boxes = pixels.new_zeros(len(pixels), MAX_BOXES, 4)
    for row, masks in enumerate(parts):
        for number, mask in enumerate(masks):
            inside[row, number] = torch.from_numpy(mask)
            boxes[row, number] = torch.tensor(tight_box(mask))
    there = inside.flatten(2).any(-1, keepdim=True).to(pixels)
    boxes = boxes / boxes.new_tensor([width, height, width, height])

    mean, deviation = pixels.mean((2, 3), keepdim=True), pixels.std((2, 3), keepdim=True).clamp(min=1e-3)
    colours = (pixels - mean) / deviation
    rows, columns = maps[0].shape[-2:]
    coarse_inside = functional.adaptive_avg_pool2d(inside, (rows, columns))
    around = functional.max_pool2d(coarse_inside, 9, 1, 4) - coarse_inside.sum(1, keepdim=True)
    colour = pool(colours, inside)
    spread = (pool(colours.square(), inside) - colour.square()).clamp(min=0).sqrt()
    area = inside.mean((2, 3))[..., None]
    box_area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]
    fill = area / box_area.clamp(min=1e-6)
    numbers = torch.eye(MAX_BOXES).to(pixels).expand(len(pixels), -1, -1)
    look = torch.cat([colour, spread, pool(colours, around.clamp(min=0))], dim=-1) / 3
    features = [_unit(pool(maps[-1], inside)), _unit(pool(maps[0], inside))]
    return there * torch.cat([PLACE_WEIGHT * place_code(boxes), *features, look, area.sqrt(), fill, numbers], dim=-1)


def pool(
    planes: Float[torch.Tensor, "batch channels _ _"], regions: Float[torch.Tensor, "batch regions _ _"]
) -> Float[torch.Tensor, "batch regions channels"]:
    """The mean of `planes` over each region, the coarser of the two sizes deciding; zero over an empty region."""
    height, width = min(planes.shape[-2:], regions.shape[-2:])
    planes, regions = (functional.adaptive_avg_pool2d(part, (height, width)) for part in (planes, regions))
    total = regions.sum((2, 3))[..., None].clamp(min=1e-6)
    return torch.einsum("brhw,bchw->brc", regions, planes) / total


def place_code(places: Float[torch.Tensor, "*shape axes"]) -> Float[torch.Tensor, "*shape channels"]:
    """Coordinates in [0, 1] as bumps: each of `BUMPS` channels stands for a place, and is 1 there and 0.6 one place on.

    Near coordinates look alike, and a linear map can read one off to a fraction of a place.
    """
    steps = places[..., None] * (BUMPS - 1) - torch.arange(BUMPS, device=places.device)
    return torch.exp(-0.5 * steps.square()).flatten(-2)


def _unit(features: Float[torch.Tensor, "*shape channels"]) -> Float[torch.Tensor, "*shape channels"]:
    """Centred, at norm one: the maps' scale is the segmenter's own (some 15 for nano's), and would drown the rest."""
    unit: torch.Tensor = functional.layer_norm(features, features.shape[-1:]) / features.shape[-1] ** 0.5
    return unit


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know the tower, so that stock image-text-to-text classes can hold it."""
    AutoConfig.register(NanoVisionConfig.model_type, NanoVisionConfig, exist_ok=True)
    AutoModel.register(NanoVisionConfig, NanoVisionModel, exist_ok=True)
