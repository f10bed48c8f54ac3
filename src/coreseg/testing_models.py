"""Tiny models of stock transformers classes with random weights, for tests and benchmarks that cannot download any.

Each builder writes one checkpoint folder (reasoners with processor and tokenizer) and gives it back; join two of them
with `coreseg.model.assemble.assemble`. They have learnt nothing. The same call gives the same weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

WIDTH = 32
SEGMENTER_SIZE_PX = 64
"""Side of the square that the tiny segmenters, and the tiny LLaVA and SmolVLM, see."""

_SENTENCES = (
    "The picture shows a lesion on the left, brighter than the tissue around it.",
    "Locate and segment the lesion. Where is the nodule? Is there a cyst in this image?",
    "is located at are located at is visible The mask is",
)
_CHAT = (
    "{{% for message in messages %}}{start}{{{{ message['role'] }}}}\n{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}{start}assistant\n{{% endif %}}"
)


def tiny_qwen_vl(folder: Path, tied: bool = False) -> Path:
    """A Qwen2.5-VL whose embeddings have spare rows, as the real one's; `tied` shares them with the output matrix."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pictures = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer([*markers, *pictures], pad="<|endoftext|>", eos="<|im_end|>")
    number = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=_text_settings(tokenizer, spare_rows=24)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    size = {"shortest_edge": 4 * 28**2, "longest_edge": 12 * 28**2}
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=_CHAT.format(start="<|im_start|>", image=picture, end="<|im_end|>"),
    )
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def tiny_smolvlm(folder: Path) -> Path:
    """A SmolVLM, whose processor would cut the picture into tiles and needs the package num2words."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    pictures = ["<image>", "<fake_token_around_image>", "<global-img>", "<video>"]
    tokenizer = _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", *pictures],
        pad="<|endoftext|>",
        eos="<end_of_utterance>",
    )
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text_settings(tokenizer)},
        vision_config=_vit_settings(patch_size_px=16),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    side = {"longest_edge": SEGMENTER_SIZE_PX}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=side, max_image_size=side),
        tokenizer,
        SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=_CHAT.format(start="<|im_start|>", image="<image>", end="<end_of_utterance>"),
    )
    return _save(folder, SmolVLMForConditionalGeneration, config, processor)


def tiny_llava(folder: Path, tower: Any = None, crops: bool = False, tied: bool = True) -> Path:
    """A LLaVA around a small CLIP, or around nano's vision tower where `tower` configures it.

    `crops` makes its processor cut pictures to their middle, as stock LLaVA checkpoints do.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from coreseg.nano.vision import GRID

    tokenizer = _tokenizer(["<pad>", "<eos>", "<image>", "<turn>"], pad="<pad>", eos="<eos>")
    cells = 4 if tower is None else GRID
    cell_px = SEGMENTER_SIZE_PX // cells
    # CLIP's one more is its own class token, which the "default" strategy drops again.
    more = 1 if tower is None else tower.tokens - cells**2
    select: Literal["default", "full"] = "default" if tower is None else "full"
    config = LlavaConfig(
        vision_config=tower or CLIPVisionConfig(**_vit_settings(cell_px), projection_dim=WIDTH),
        text_config={"model_type": "qwen2", **_text_settings(tokenizer), "tie_word_embeddings": tied},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=cells**2 if tower is None else tower.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
    )
    square = {"height": SEGMENTER_SIZE_PX, "width": SEGMENTER_SIZE_PX}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=square, crop_size=square, do_center_crop=crops),
        tokenizer,
        patch_size=cell_px,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=more,
        chat_template=_CHAT.format(start="<turn>", image="<image>", end=""),
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor)


def tiny_sam2(folder: Path) -> Path:
    """A SAM 2 with one or two blocks a stage."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig
    from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SEGMENTER_SIZE_PX, SEGMENTER_SIZE_PX],
        window_positional_embedding_background_size=[4, 4],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=_map_sizes(),
        fpn_hidden_size=WIDTH,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(**_PROMPTS),
        mask_decoder_config=Sam2MaskDecoderConfig(**_DECODER),
    )
    return _save(folder, Sam2Model, config)


def tiny_edgetam(folder: Path) -> Path:
    """An EdgeTAM on timm's smallest EfficientNet, batch normalisation included."""
    from transformers import EdgeTamConfig, EdgeTamModel, EdgeTamVisionConfig, TimmWrapperConfig
    from transformers.models.edgetam.configuration_edgetam import EdgeTamMaskDecoderConfig, EdgeTamPromptEncoderConfig

    import coreseg.sam2  # noqa: F401 (keeps transformers 5.17 from asking the hub)

    backbone = TimmWrapperConfig(
        architecture="test_efficientnet",
        model_args={"features_only": True, "in_chans": 3, "out_indices": [1, 2, 3, 4]},
    )
    vision = EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 48, 32, 24],
        backbone_feature_sizes=_map_sizes(),
        fpn_hidden_size=WIDTH,
    )
    config = EdgeTamConfig(
        vision_config=vision,
        prompt_encoder_config=EdgeTamPromptEncoderConfig(**_PROMPTS),
        mask_decoder_config=EdgeTamMaskDecoderConfig(**_DECODER),
    )
    return _save(folder, EdgeTamModel, config)


_PROMPTS: dict[str, Any] = {"hidden_size": WIDTH, "image_size": SEGMENTER_SIZE_PX}
_DECODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "mlp_dim": 2 * WIDTH,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": WIDTH,
}


def _map_sizes() -> list[list[int]]:
    return [[SEGMENTER_SIZE_PX // stride] * 2 for stride in (4, 8, 16)]


def _vit_settings(patch_size_px: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SEGMENTER_SIZE_PX,
        "patch_size": patch_size_px,
    }


def _text_settings(tokenizer: Any, spare_rows: int = 0) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tokenizer(markers: Sequence[str], pad: str, eos: str) -> Any:
    """A byte-level BPE learnt from a few sentences; `markers` become special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(markers),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        additional_special_tokens=[marker for marker in markers if marker not in (pad, eos)],
        clean_up_tokenization_spaces=False,
    )


def _save(folder: Path, kind: Any, config: Any, processor: Any = None) -> Path:
    """Fresh weights from a fixed seed, which leaves the caller's random numbers alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
