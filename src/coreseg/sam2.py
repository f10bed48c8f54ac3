"""What is asked of a segmenter of the SAM 2 family: feature maps from pixels, mask logits from sparse prompts.

Works on `Sam2Model` and `EdgeTamModel` of transformers alike. Their own `get_image_embeddings` and
`get_prompt_embeddings` run without gradients, and `get_image_features` already mixes in trainable convolutions; so
that the frozen encoder's maps can be cached and everything trainable gets its gradient, the steps are spelled out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from transformers import EdgeTamConfig, EdgeTamVisionConfig

# transformers 5.17 asks the model hub for their default backbone, were it only to print or to check a configuration
# that has its own; told that there are no defaults it does not. Later versions know neither.
for _config in (EdgeTamConfig, EdgeTamVisionConfig):
    setattr(_config, "has_no_defaults_at_init", True)  # noqa: B010

SegmenterModel = Any
"""A `Sam2Model` or `EdgeTamModel`; their submodules have no types to check against."""

FeatureMaps = list[Float[torch.Tensor, "batch channels _ _"]]
"""The FPN's maps, fine to coarse (strides 4, 8 and 16 in SAM 2)."""


def encode_image(segmenter: SegmenterModel, pixel_values: Float[torch.Tensor, "batch 3 side side"]) -> FeatureMaps:
    """The image encoder's FPN maps; they depend on the image alone, so they are computed once an image."""
    return list(segmenter.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states)


def texture(maps: FeatureMaps) -> Float[torch.Tensor, "batch textures"]:
    """How much each channel of each map varies over the picture."""
    return torch.cat([level.float().std((2, 3)) for level in maps], dim=1)


def decode_masks(
    segmenter: SegmenterModel,
    maps: FeatureMaps,
    sparse_prompts: Float[torch.Tensor, "batch prompts tokens channels"],
) -> Float[torch.Tensor, "batch prompts map_height map_width"]:
    """One mask (logits, at the finest map's size) for each sparse prompt of each image.

    The maps may be of a larger or smaller square than the configuration's: a prompt's places are shares of it. The
    dense prompt is SAM's "no mask" embedding, and one mask comes out, never the multimask set.
    """
    decoder = segmenter.mask_decoder
    finest, finer, coarse = maps
    height, width = coarse.shape[-2:]
    along = [(torch.arange(n, device=coarse.device) + 0.5) / n for n in (width, height)]
    places = torch.stack(torch.meshgrid(along, indexing="xy"), dim=-1)
    positions = segmenter.shared_image_embedding(places)
    no_mask = segmenter.prompt_encoder.no_mask_embed.weight
    masks, *_ = decoder(
        image_embeddings=coarse + segmenter.no_memory_embedding.view(1, -1, 1, 1),
        image_positional_embeddings=positions.permute(2, 0, 1).expand(len(coarse), -1, -1, -1),
        sparse_prompt_embeddings=sparse_prompts,
        dense_prompt_embeddings=no_mask.view(1, -1, 1, 1).expand(len(coarse), -1, height, width),
        multimask_output=False,
        high_resolution_features=[decoder.conv_s0(finest), decoder.conv_s1(finer)],
    )
    logits: torch.Tensor = masks[:, :, 0]
    return logits


def any_lesion_prompt(segmenter: SegmenterModel, batch: int) -> Float[torch.Tensor, "batch 1 3 channels"]:
    """The class-agnostic prompt that knows nothing of the question: SAM's own "not a point", three times.

    Three tokens, since a box prompt has three; a segmenter trained here learns to answer it with every lesion it sees.
    Our choice, so that being blind to the question costs no parameter.
    """
    token = segmenter.prompt_encoder.not_a_point_embed.weight
    prompt: torch.Tensor = token.expand(batch, 1, 3, -1)
    return prompt


def box_prompts(
    segmenter: SegmenterModel, boxes: Sequence[Float[torch.Tensor, "_ 4"]]
) -> Float[torch.Tensor, "batch 1 tokens channels"]:
    """Each row's boxes (pixels of the segmenter's square, xyxy) as one sparse prompt for one mask.

    Rows with fewer boxes are filled up with "not a point", which a row without boxes consists of.
    """
    rows = []
    nothing = segmenter.prompt_encoder.not_a_point_embed.weight
    for row in boxes:
        tokens = nothing
        if len(row):
            tokens, _ = segmenter.prompt_encoder(
                input_points=None, input_labels=None, input_boxes=row[None].to(nothing), input_masks=None
            )
            tokens = tokens.flatten(0, 2)
        rows.append(tokens)
    longest = max(map(len, rows))
    filled = [torch.cat([tokens, nothing.expand(longest - len(tokens), -1)]) for tokens in rows]
    return torch.stack(filled)[:, None]
