"""The untrained reasoner of nano: LLaVA's class around nano's vision tower and a small Qwen2, and its tokenizer."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    EdgeTamModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from coreseg.answer import SEG_TOKEN
from coreseg.nano.vision import MERGE, NanoVisionConfig, register

FRAME_PX = 256
STRIDE_PX = 16 * MERGE
MARKERS = [
    "<pad>",
    "<eos>",
    "<image>",
    "<user>",
    "<assistant>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    SEG_TOKEN,
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on our own text, in which every number a box can hold is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=MARKERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    # Numbers come as words of their own, often enough that each becomes one token.
    numbers = [str(n) for n in range(FRAME_PX + 1)] * 100
    tokenizer.train_from_iterator([*texts, *numbers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=MARKERS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures stretched to the tower's square, nothing cropped."""
    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": FRAME_PX, "width": FRAME_PX},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE_PX,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_reasoner(segmenter: EdgeTamModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A fresh reasoner that looks through a copy of the trained segmenter."""
    register()
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=NanoVisionConfig(segmenter.config),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(FRAME_PX // STRIDE_PX) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.segmenter.load_state_dict(segmenter.state_dict())
    write_numbers(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def write_numbers(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start the tokens of numbers as waves over their value, so that near numbers look alike, in and out.

    Our choice, not yet compared with 257 unrelated rows. They keep the deviation of all the others.
    """
    table = model.get_input_embeddings().weight
    spread = model.config.text_config.initializer_range
    frequencies = torch.pi * 2.0 ** torch.linspace(0, 7, table.shape[1] // 2)
    for number in range(FRAME_PX + 1):
        phases = number / FRAME_PX * frequencies
        row = tokenizer.convert_tokens_to_ids(str(number))
        table[row] = 2**0.5 * spread * torch.cat([phases.sin(), phases.cos()])


def trainable(model: torch.nn.Module) -> int:
    """How many parameters a model has in all, for the size limit."""
    return sum(parameter.numel() for parameter in model.parameters())
