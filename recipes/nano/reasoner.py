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
from coreseg.nano.vision import GRID, NanoVisionConfig, place_code, register

FRAME_PX = 256
INPUT_SCALE = 0.02
SMALLEST_REGION = 0.1
"""Of the largest region: specks would be taken for lesions."""
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


def build_processor(tokenizer: PreTrainedTokenizerFast, tower: NanoVisionConfig) -> LlavaProcessor:
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
        patch_size=FRAME_PX // GRID,
        num_additional_image_tokens=tower.tokens - GRID**2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_reasoner(segmenter: EdgeTamModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A fresh reasoner that looks through a copy of the trained segmenter."""
    register()
    tower = NanoVisionConfig(segmenter.config, smallest_region=SMALLEST_REGION)
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # 1 / sqrt(width): the usual 0.02 is that of models ten times as wide, and leaves attention flat for long.
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=tower.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.segmenter.load_state_dict(segmenter.state_dict())
    start_inputs(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def start_inputs(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start words and image tokens at one small scale, and a number's token as the place it stands for.

    Its row is the tower's place code, turned into the model's width by a random rotation. So near numbers look alike,
    in and out, and a coordinate that the model looks at is already written in the letters of its answer. Our choice.
    """
    table, projector = model.get_input_embeddings().weight, model.model.multi_modal_projector
    torch.nn.init.normal_(table, std=INPUT_SCALE)
    codes = place_code(torch.arange(FRAME_PX + 1)[:, None] / FRAME_PX)
    turn = torch.linalg.qr(torch.randn(table.shape[1], codes.shape[1]))[0].T
    numbers = tokenizer.convert_tokens_to_ids([str(number) for number in range(FRAME_PX + 1)])
    table[numbers] = INPUT_SCALE * table.shape[1] ** 0.5 * torch.nn.functional.normalize(codes, dim=1) @ turn
    # A region's token has a norm of about 11.
    torch.nn.init.normal_(projector.linear_1.weight, std=0.1)
    torch.nn.init.normal_(projector.linear_2.weight, std=INPUT_SCALE * table.shape[1] ** -0.5)
    for layer in (projector.linear_1, projector.linear_2):
        torch.nn.init.zeros_(layer.bias)


def trainable(model: torch.nn.Module) -> int:
    """How many parameters a model has in all, for the size limit."""
    return sum(parameter.numel() for parameter in model.parameters())
