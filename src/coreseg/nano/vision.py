"""Nano's vision tower: what nano's segmenter sees in a picture, as a coarse grid of tokens and one token per region.

It is a copy of nano's own trained segmenter, kept frozen. A grid token holds the image encoder's features of a large
cell: what kind of picture this is. A region token holds one connected part of the segmenter's "any lesion" mask: its
box, its colours, its features. So the reasoner is shown what could be a lesion and where, and has to say which of these
regions the question means, in words and in numbers. The regions that stand out, the largest, the leftmost and so on,
and all of them as one are shown once more, in a token of its own each. Each token also tells what can be stated of its
region (`coreseg.statements`), measured in the tower's own mask. What it sees can be kept for later.

Source of the idea, regions as tokens that a language model refers to: Groma (arXiv 2404.13013). What a region token
holds is our choice; so are the tokens of what stands out, and what is measured: a model of nano's size learns neither
to compare regions nor to sum them up, but soon learns which token answers to which word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from coreseg.masks import lesion_masks, tight_box
from coreseg.sam2 import FeatureMaps, any_lesion_prompt, decode_masks, encode_image
from coreseg.sentences import VALUES
from coreseg.statements import measure_all
from coreseg.types import MAX_BOXES

GRID = 4
"""Grid tokens along each side."""
STAND_OUTS = ("largest", "smallest", "left", "right", "upper", "lower", "brightest", "darkest")
"""What may set one of several regions apart, in the words of `coreseg.questions`."""
SHOWN_AGAIN = (*STAND_OUTS, "all")
"""What has a token of its own beside the regions: each that stands out, and all of them as one."""
STATED = tuple((kind, value) for kind, values in VALUES.items() for value in values)
"""What may be stated of a region, a channel each."""
BUMPS = 17
"""Channels that hold one coordinate, see `place_code`."""
PLACE_WEIGHT = 4.0
"""Of the coordinates beside all else that a token holds, whose parts have norms near one. Our choice: boxes are written
from them, and are learned many times faster where the rest does not drown them."""
KIND_WEIGHT = 8.0
"""Of what a region that is shown once more stands out by, likewise. Our choice: at a weight of 1 a question finds its
kind some two times later."""
STATED_WEIGHT = 2.0
"""Of what can be stated of a region, likewise."""
GRID_WEIGHT = 8.0
"""Of a grid token's features, of which what tells one kind of picture from another is about half. Our choice: at a
weight of 1 places drown it, and it is not learned."""
MEASURES = 11 + MAX_BOXES
"""Of a region: colour inside, its deviation, colour around (3 each), area, share of its box; its number, one-hot."""


class NanoVisionConfig(PreTrainedConfig):
    """`segmenter_config` is the configuration of a segmenter of the SAM 2 family.

    smallest_region: connected parts below this share of the largest one's area are specks and no regions.
    `hidden_size` is what one image token holds. The kinds of token use channels of their own, the others are zero.
    """

    model_type = "coreseg_nano_vision"
    sub_configs = {"segmenter_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        segmenter_config: PreTrainedConfig | dict[str, Any] | None = None,
        smallest_region: float = 0.0,
        **kwargs: Any,
    ) -> None:
        given: Any = segmenter_config
        self.segmenter_config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
        self.smallest_region = smallest_region
        kwargs.pop("hidden_size", None)
        self.hidden_size = 0 if given is None else sum(self.channels)
        super().__init__(**kwargs)

    @property
    def channels(self) -> tuple[int, int, int]:
        """How many channels a grid token uses (features, place), a region token (box, features, measures, statements),
        and what is shown once more beside those of its region (its kind)."""
        features = self.segmenter_config.vision_config.fpn_hidden_size
        return features + 2 * BUMPS, 4 * BUMPS + 2 * features + MEASURES + len(STATED), len(SHOWN_AGAIN)

    @property
    def tokens(self) -> int:
        """Tokens of one picture: the grid in reading order, its regions in the order of boxes, what is shown again."""
        return GRID**2 + MAX_BOXES + len(SHOWN_AGAIN)


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
        parts = [self.regions(mask) for mask in (logits[:, 0] > 0).cpu().numpy()]
        # In half precision a coordinate would be off by a pixel.
        exact = [plane.float() for plane in maps]
        tokens = self.tokens(grid_tokens(exact), measure(pixels.float(), exact, parts))
        return tokens.to(pixel_values.dtype)

    def regions(self, mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "regions height width"]:
        """The connected parts of a mask that the reasoner is shown, in the order of boxes."""
        parts = lesion_masks(mask)
        areas = parts.sum((1, 2))
        kept: Bool[np.ndarray, "regions height width"] = parts[
            areas >= self.config.smallest_region * areas.max(initial=0)
        ]
        return kept

    def tokens(
        self, grid: Float[torch.Tensor, "batch cells grid_channels"], regions: "Regions"
    ) -> Float[torch.Tensor, "batch tokens channels"]:
        """A picture's tokens, from those of its grid and from its regions."""
        of_grid, of_region, kinds = self.config.channels
        shown = region_tokens(regions)
        each, as_one = shown[:, :MAX_BOXES], shown[:, MAX_BOXES:]
        chosen, there = stand_outs(regions)
        again = there * torch.gather(each, 1, chosen[..., None].expand(-1, -1, of_region))
        again, there = torch.cat([again, as_one], dim=1), torch.cat([there, regions.there[:, MAX_BOXES:]], dim=1)
        named = KIND_WEIGHT * there * torch.eye(kinds).to(shown).expand(len(shown), -1, -1)
        again = torch.cat([functional.pad(again, (of_grid, 0)), named], dim=-1)
        return torch.cat(
            [functional.pad(grid, (0, of_region + kinds)), functional.pad(each, (of_grid, kinds)), again], dim=1
        )

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
    return torch.cat([GRID_WEIGHT * _unit(features), PLACE_WEIGHT * places.to(features)], dim=-1)


@dataclass(frozen=True)
class Regions:
    """What is measured of a picture's regions: `MAX_BOXES` of them and all as one, those that are not `there` zero.

    boxes: of [0, 1], x1, y1, x2, y2. colours: inside, their deviation, around (3 each), relative to the picture's mean,
    in its deviations. features: of the coarsest and the finest map. area: as a share of the picture. stated: 1 for
    those of `STATED` that are true.
    """

    there: Bool[torch.Tensor, "batch regions 1"]
    boxes: Float[torch.Tensor, "batch regions 4"]
    colours: Float[torch.Tensor, "batch regions 9"]
    features: Float[torch.Tensor, "batch regions features"]
    area: Float[torch.Tensor, "batch regions 1"]
    stated: Float[torch.Tensor, "batch regions statements"]


def measure(pixels: Float[torch.Tensor, "batch 3 height width"], maps: FeatureMaps, parts: list[np.ndarray]) -> Regions:
    """The regions of pictures, `parts`: boolean, (regions, height, width) a picture."""
    height, width = pixels.shape[-2:]
    inside = pixels.new_zeros(len(pixels), MAX_BOXES + 1, height, width)
    boxes = pixels.new_zeros(len(pixels), MAX_BOXES + 1, 4)
    stated = pixels.new_zeros(len(pixels), MAX_BOXES + 1, len(STATED))
    pictures = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for row, masks in enumerate(parts):
        for number, mask in [*enumerate(masks), (MAX_BOXES, masks.any(0))]:
            if not mask.any():
                continue
            inside[row, number] = torch.from_numpy(mask)
            boxes[row, number] = torch.tensor(tight_box(mask))
            stated[row, number] = torch.tensor(stated_code(measure_all(pictures[row], mask)))
    mean, deviation = pixels.mean((2, 3), keepdim=True), pixels.std((2, 3), keepdim=True).clamp(min=1e-3)
    colours = (pixels - mean) / deviation
    rows, columns = maps[0].shape[-2:]
    coarse_inside = functional.adaptive_avg_pool2d(inside, (rows, columns))
    around = functional.max_pool2d(coarse_inside, 9, 1, 4) - coarse_inside[:, :MAX_BOXES].sum(1, keepdim=True)
    colour = pool(colours, inside)
    spread = (pool(colours.square(), inside) - colour.square()).clamp(min=0).sqrt()
    return Regions(
        there=inside.flatten(2).any(-1, keepdim=True),
        boxes=boxes / boxes.new_tensor([width, height, width, height]),
        colours=torch.cat([colour, spread, pool(colours, around.clamp(min=0))], dim=-1),
        features=torch.cat([_unit(pool(maps[-1], inside)), _unit(pool(maps[0], inside))], dim=-1),
        area=inside.mean((2, 3))[..., None],
        stated=stated,
    )


def stated_code(values: Mapping[str, str]) -> list[float]:
    """1 for those of `STATED` that are true, by the value of each kind that has one."""
    return [float(statement in values.items()) for statement in STATED]


def region_tokens(regions: Regions) -> Float[torch.Tensor, "batch regions region_channels"]:
    """One token for each region and one for all, zeros for those that are not there."""
    boxes, area = regions.boxes, regions.area
    box_area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]
    numbers = torch.eye(MAX_BOXES + 1, MAX_BOXES).to(boxes).expand(len(boxes), -1, -1)
    look = [regions.colours / 3, area.sqrt(), area / box_area.clamp(min=1e-6), numbers, STATED_WEIGHT * regions.stated]
    return regions.there * torch.cat([PLACE_WEIGHT * place_code(boxes), regions.features, *look], dim=-1)


def stand_outs(regions: Regions) -> tuple[Int[torch.Tensor, "batch kinds"], Bool[torch.Tensor, "batch kinds 1"]]:
    """Which region stands out, for each of `STAND_OUTS`, and whether any does: a single region never."""
    boxes, colours = regions.boxes[:, :MAX_BOXES], regions.colours[:, :MAX_BOXES]
    x, y = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    area, light = regions.area[:, :MAX_BOXES, 0], colours[..., :3].mean(-1)
    least = torch.stack([-area, area, x, -x, y, -y, -light, light], dim=1)
    there = regions.there[:, :MAX_BOXES, 0]
    chosen = least.masked_fill(~there[:, None], torch.inf).argmin(-1)
    several = (there.sum(1) > 1)[:, None, None]
    return chosen, several.expand(-1, len(STAND_OUTS), -1)


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
