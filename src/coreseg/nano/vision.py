"""Nano's vision tower: EfficientNet-Lite0 features with their absolute place written beside them.

It is the image encoder of nano's own segmenter (the same class, a copy of the trained weights), kept frozen. So the
reasoner looks at features that already tell lesion from tissue, and they can be cached.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

MERGE = 2
"""This many feature-map cells a side become one image token."""


class NanoVisionConfig(PreTrainedConfig):
    """`encoder_config` is the configuration of an image encoder of the SAM 2 family.

    `hidden_size` is what one image token holds: the merged cells' channels and `position_channels` for its place.
    """

    model_type = "coreseg_nano_vision"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        position_channels: int = 32,
        **kwargs: Any,
    ) -> None:
        given: Any = encoder_config
        self.encoder_config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
        self.position_channels = position_channels
        width = 0 if given is None else self.encoder_config.fpn_hidden_size
        self.hidden_size = MERGE**2 * width + position_channels
        kwargs.pop("hidden_size", None)
        super().__init__(**kwargs)


class NanoVisionModel(PreTrainedModel):
    """Pixels to image tokens, in reading order.

    `pixel_values` are either pictures, (batch, 3, height, width) with mean and deviation 0.5, or the encoder's
    coarsest maps computed before, (batch, channels, rows, columns).
    """

    config_class = NanoVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NanoVisionConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of our own to initialise; the encoder's class does it for itself."""

    def coarse_map(
        self, pixel_values: Float[torch.Tensor, "batch 3 height width"]
    ) -> Float[torch.Tensor, "batch channels rows columns"]:
        """The encoder's stride-16 map, the part worth caching."""
        maps = self.encoder(pixel_values.contiguous(memory_format=torch.channels_last), return_dict=True)
        coarse: torch.Tensor = maps.fpn_hidden_states[-1]
        return coarse

    def forward(
        self, pixel_values: Float[torch.Tensor, "batch planes height width"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """One token per merged cell: its features, then its place."""
        is_picture = pixel_values.shape[1] == 3
        coarse = self.coarse_map(pixel_values) if is_picture else pixel_values
        merged = nn.functional.pixel_unshuffle(coarse, MERGE).flatten(2).transpose(1, 2)
        # The maps' scale is the segmenter's own (some 15 here), and would drown the places.
        merged = nn.functional.layer_norm(merged, merged.shape[-1:])
        rows, columns = coarse.shape[-2] // MERGE, coarse.shape[-1] // MERGE
        places = positions(rows, columns, self.config.position_channels).to(merged)
        tokens = torch.cat([merged, places.expand(len(merged), -1, -1)], dim=-1)
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
