"""Nano's vision tower: what nano's segmenter sees in a picture, as tokens that know their place.

It is a copy of nano's own trained segmenter, kept frozen. A token holds the image encoder's features of its cell, the
segmenter's "any lesion" mask there, and the cell's place. So the reasoner looks at features that already tell lesion
from tissue; the question decides which of the lesions are meant. What the tower sees can be kept for later.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from coreseg.sam2 import any_lesion_prompt, decode_masks, encode_image

MERGE = 2
"""This many cells of the coarsest map a side become one image token."""


class NanoVisionConfig(PreTrainedConfig):
    """`segmenter_config` is the configuration of a segmenter of the SAM 2 family.

    `hidden_size` is what one image token holds: of each merged cell its features and its part of the mask, and
    `position_channels` for the place.
    """

    model_type = "coreseg_nano_vision"
    sub_configs = {"segmenter_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        segmenter_config: PreTrainedConfig | dict[str, Any] | None = None,
        position_channels: int = 32,
        **kwargs: Any,
    ) -> None:
        given: Any = segmenter_config
        self.segmenter_config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
        self.position_channels = position_channels
        kwargs.pop("hidden_size", None)
        self.hidden_size = 0 if given is None else MERGE**2 * sum(self.cell_channels) + position_channels
        super().__init__(**kwargs)

    @property
    def mask_pixels(self) -> int:
        """Pixels of the segmenter's mask along one cell of the coarsest map."""
        sizes = self.segmenter_config.vision_config.backbone_feature_sizes
        pixels: int = sizes[0][0] // sizes[-1][0]
        return pixels

    @property
    def cell_channels(self) -> tuple[int, int]:
        """How many features one cell has, and how many pixels of the mask."""
        return self.segmenter_config.vision_config.fpn_hidden_size, self.mask_pixels**2


class NanoVisionModel(PreTrainedModel):
    """Pixels to image tokens, in reading order.

    `pixel_values` are either pictures, (batch, 3, height, width) with mean and deviation 0.5, or what `look` saw in
    them before, (batch, channels, rows, columns).
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

    def look(
        self, pixel_values: Float[torch.Tensor, "batch 3 height width"]
    ) -> Float[torch.Tensor, "batch channels rows columns"]:
        """The coarsest map and, folded into its cells, the "any lesion" mask from -1 (surely not) to 1 (surely)."""
        maps = encode_image(self.segmenter, pixel_values.contiguous(memory_format=torch.channels_last))
        logits = decode_masks(self.segmenter, maps, any_lesion_prompt(self.segmenter, len(pixel_values)))
        return torch.cat([maps[-1], nn.functional.pixel_unshuffle(torch.tanh(logits / 2), self.config.mask_pixels)], 1)

    def forward(
        self, pixel_values: Float[torch.Tensor, "batch planes height width"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """One token per merged cell: its features, its part of the mask, its place."""
        looked = self.look(pixel_values) if pixel_values.shape[1] == 3 else pixel_values
        rows, columns = looked.shape[-2] // MERGE, looked.shape[-1] // MERGE
        features, mask = (
            nn.functional.pixel_unshuffle(part, MERGE).flatten(2).transpose(1, 2)
            for part in looked.split(self.config.cell_channels, dim=1)
        )
        # The maps' scale is the segmenter's own (some 15 here), and would drown the rest.
        features = nn.functional.layer_norm(features, features.shape[-1:])
        places = positions(rows, columns, self.config.position_channels).to(features)
        tokens = torch.cat([features, mask, places.expand(len(looked), -1, -1)], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def positions(rows: int, columns: int, channels: int) -> Float[torch.Tensor, "1 cells channels"]:
    """Sines and cosines of each cell's row and column: absolute, since rotary positions are only relative."""
    frequencies = torch.pi * 2.0 ** torch.arange(channels // 4)
    y = (torch.arange(rows) + 0.5)[:, None].expand(rows, columns).reshape(-1, 1) / rows
    x = (torch.arange(columns) + 0.5)[None].expand(rows, columns).reshape(-1, 1) / columns
    waves = [wave(place * frequencies) for place in (x, y) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=-1)[None]


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know the tower, so that stock image-text-to-text classes can hold it."""
    AutoConfig.register(NanoVisionConfig.model_type, NanoVisionConfig, exist_ok=True)
    AutoModel.register(NanoVisionConfig, NanoVisionModel, exist_ok=True)
