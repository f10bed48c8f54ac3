"""From pictures, questions and answers to the tensors CORE-Seg takes, and from its ids back to text and masks.

The reasoner's own processor (any of transformers') does the picture and the chat template. Three things are done here:
the user's words are tokenised without markers, answers are tokenised in the pieces of `coreseg.answer`, and boxes are
moved between the original image and the frame that the reasoner saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch.nn import functional
from transformers import AutoProcessor, LogitsProcessor

from coreseg.answer import INSTRUCTION, SEG_TOKEN, AnswerGrammar, Piece, Walk, encode, opening, parse, pieces
from coreseg.errors import ModelError
from coreseg.masks import box_tuples, map_boxes
from coreseg.model.core_seg import CoreSegConfig
from coreseg.types import Answer, Box

# Pictures of one batch have sizes of their own, so the dimensions go without names.
Picture = UInt8[np.ndarray, "_ _ 3"]
IGNORED = -100
"""Label of a token that carries no loss."""
_QUESTION_MARK = "QUESTION-GOES-HERE"


@dataclass(frozen=True)
class Batch:
    """Model inputs of several rows, padded on the left.

    `labels` are the answer's ids and IGNORED elsewhere; `of_boxes` marks those that are a box's numbers. `frames_wh`
    is the size at which the reasoner saw each picture; `segmenter_boxes` are the answers' boxes in the segmenter's
    square, none in a prompt.
    """

    input_ids: Int[torch.Tensor, "batch tokens"]
    attention_mask: Int[torch.Tensor, "batch tokens"]
    labels: Int[torch.Tensor, "batch tokens"]
    of_boxes: Bool[torch.Tensor, "batch tokens"]
    reasoner_inputs: dict[str, torch.Tensor]
    segmenter_pixels: Float[torch.Tensor, "pictures 3 side side"]
    frames_wh: list[tuple[int, int]]
    segmenter_boxes: list[Float[torch.Tensor, "_ 4"]]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """The batch on a device, its pictures in `dtype` where one is given."""

        def moved(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            attention_mask=moved(self.attention_mask),
            labels=moved(self.labels),
            of_boxes=moved(self.of_boxes),
            reasoner_inputs={key: moved(value) for key, value in self.reasoner_inputs.items()},
            segmenter_pixels=moved(self.segmenter_pixels),
            segmenter_boxes=[boxes.to(device) for boxes in self.segmenter_boxes],
        )


class CoreSegProcessor:
    """Holds the reasoner's processor and the segmenter's frame; saved beside the model in the same folder."""

    def __init__(self, reasoner: Any, config: CoreSegConfig) -> None:
        self.reasoner = reasoner
        self.tokenizer = reasoner.tokenizer
        self.config = config
        self._grammar: AnswerGrammar | None = None
        if self.tokenizer.convert_tokens_to_ids(SEG_TOKEN) != config.seg_token_id:
            raise ModelError(
                f"the tokenizer does not hold {SEG_TOKEN} at id {config.seg_token_id}, as the model expects: "
                "model and processor belong to different checkpoints"
            )
        images = reasoner.image_processor
        if getattr(images, "do_center_crop", False):
            raise ModelError("the reasoner's processor crops its pictures, so boxes at the border would be lost")
        if hasattr(images, "do_image_splitting"):
            # Tiles would give several frames; the whole picture stays in one.
            images.do_image_splitting = False

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "CoreSegProcessor":
        """Read the processor of a CORE-Seg checkpoint folder."""
        return cls(AutoProcessor.from_pretrained(path), CoreSegConfig.from_pretrained(path))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the reasoner's processor files; the rest is in the model's `config.json`."""
        self.reasoner.save_pretrained(path)

    @property
    def grammar(self) -> AnswerGrammar:
        """The answer grammar over this tokenizer, built at first use."""
        if self._grammar is None:
            self._grammar = AnswerGrammar(self.tokenizer, self.config.reasoning_budget)
        return self._grammar

    def __call__(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        answers: Sequence[Answer] | None = None,
        copies: int = 1,
    ) -> Batch:
        """Prompts for generation or, with `answers` (boxes in each image's own pixels), whole rows for training.

        `copies`: how many rows each prompt gets, side by side; the segmenter's pixels still come once a picture.
        """
        asked = [self._prompt(image, question) for image, question in zip(images, questions, strict=True)]
        prompts = [prompt for prompt in asked for _ in range(copies)]
        rows, labels, of_boxes = [], [], []
        for number, prompt in enumerate(prompts):
            parts: list[tuple[int, bool]] = []
            if answers is not None:
                height, width = images[number].shape[:2]
                boxes = self.boxes_to_frame(answers[number].boxes, (width, height), prompt.frame_wh)
                parts = self._answer_tokens(replace(answers[number], boxes=boxes))
            reply = [token for token, _ in parts]
            rows.append(prompt.ids + reply)
            labels.append([IGNORED] * len(prompt.ids) + reply)
            of_boxes.append([False] * len(prompt.ids) + [is_number for _, is_number in parts])
        longest = max(map(len, rows))
        extra = {key: torch.cat([p.inputs[key] for p in prompts]) for key in prompts[0].inputs}
        if prompts[0].token_types is not None:
            # The picture's places, which Qwen's positions need; zeros over everything added after the prompt.
            kinds = [
                _pad_left((p.token_types or []) + [0] * (len(row) - len(p.ids)), longest, 0)
                for p, row in zip(prompts, rows, strict=True)
            ]
            extra["mm_token_type_ids"] = torch.tensor(kinds)
        return Batch(
            input_ids=torch.tensor([_pad_left(row, longest, self.tokenizer.pad_token_id) for row in rows]),
            attention_mask=torch.tensor([_pad_left([1] * len(row), longest, 0) for row in rows]),
            labels=torch.tensor([_pad_left(row, longest, IGNORED) for row in labels]),
            of_boxes=torch.tensor([_pad_left(row, longest, False) for row in of_boxes]),
            reasoner_inputs=extra,
            segmenter_pixels=torch.cat([self.segmenter_pixels(image) for image in images]),
            frames_wh=[prompt.frame_wh for prompt in prompts],
            segmenter_boxes=[
                self.segmenter_boxes(answer.boxes, (image.shape[1], image.shape[0]))
                for image, answer in zip(images, answers or (), strict=answers is not None)
            ],
        )

    def encode_answer(self, answer: Answer) -> list[int]:
        """Token ids of an answer whose boxes are in the reasoner's frame, with the end of text."""
        return [token for token, _ in self._answer_tokens(answer)]

    def _answer_tokens(self, answer: Answer) -> list[tuple[int, bool]]:
        """The ids of `encode_answer`, each with whether it belongs to a box's number."""
        tokens = [
            (token, piece.text.isdigit() and not piece.free)
            for piece in pieces(answer)
            for token in encode(self.tokenizer, [piece])
        ]
        return [*tokens, (self.tokenizer.eos_token_id, False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The raw text of a completion, `<seg>` included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def read(self, text: str, frame_wh: tuple[int, int], size_wh: tuple[int, int]) -> Answer | None:
        """The answer in a text, its boxes in original pixels; None where the form is invalid."""
        answer = parse(text, frame_wh)
        return answer and replace(answer, boxes=self.boxes_to_frame(answer.boxes, frame_wh, size_wh))

    def read_boxes(
        self, completions: Sequence[Sequence[int]], frames_wh: Sequence[tuple[int, int]]
    ) -> list[Float[torch.Tensor, "_ 4"]]:
        """The boxes that completions write, in the segmenter's square; none where the form is invalid."""
        answers = [parse(self.decode(ids), frame) for ids, frame in zip(completions, frames_wh, strict=True)]
        return [
            self.segmenter_boxes(answer.boxes if answer else (), frame)
            for answer, frame in zip(answers, frames_wh, strict=True)
        ]

    def segmenter_boxes(self, boxes: Sequence[tuple[int, ...]], from_wh: tuple[int, int]) -> Float[torch.Tensor, "_ 4"]:
        """Boxes of a picture of that size in the segmenter's square, not rounded."""
        scale = self.config.segmenter_size_px / torch.tensor([*from_wh, *from_wh])
        return torch.tensor(boxes).reshape(-1, 4) * scale

    @staticmethod
    def boxes_to_frame(
        boxes: Sequence[tuple[int, ...]], from_wh: tuple[int, int], to_wh: tuple[int, int]
    ) -> tuple[Box, ...]:
        """Boxes moved from one size of the picture to another."""
        moved = map_boxes(np.array(boxes, dtype=np.int64).reshape(-1, 4), from_wh, to_wh)
        return box_tuples(moved)

    def segmenter_pixels(self, image: Picture, side_px: int | None = None) -> Float[torch.Tensor, "1 3 side side"]:
        """The picture stretched to the segmenter's square, or to one of `side_px`, and normalised."""
        mean = torch.tensor(self.config.segmenter_mean).view(1, 3, 1, 1)
        std = torch.tensor(self.config.segmenter_std).view(1, 3, 1, 1)
        return (stretch_image(image, side_px or self.config.segmenter_size_px) - mean) / std

    @staticmethod
    def in_pixels(
        logits: Float[torch.Tensor, "map_height map_width"], size_hw: tuple[int, int]
    ) -> Float[torch.Tensor, "height width"]:
        """Mask logits stretched back to the image's own pixels."""
        return functional.interpolate(logits[None, None].float(), size_hw, mode="bilinear", align_corners=False)[0, 0]

    @classmethod
    def mask_from_logits(
        cls, logits: Float[torch.Tensor, "map_height map_width"], size_hw: tuple[int, int]
    ) -> Bool[np.ndarray, "height width"]:
        """The mask in the image's own pixels: logits stretched back, then the threshold."""
        mask: Bool[np.ndarray, "height width"] = (cls.in_pixels(logits, size_hw) > 0).cpu().numpy()
        return mask

    def opening(self, reasoning: str) -> list[int]:
        """Token ids of an answer up to its think block's end, as `encode_answer` has them."""
        return encode(self.tokenizer, opening(reasoning))

    def constraint(
        self, frames_wh: Sequence[tuple[int, int]], openings: Sequence[Sequence[int]] = ()
    ) -> "AnswerConstraint":
        """The grammar as a logits processor for one batch; each row starts with its opening, where there are any."""
        opened = openings or [()] * len(frames_wh)
        return AnswerConstraint([self.grammar.walk(*each) for each in zip(frames_wh, opened, strict=True)])

    def _prompt(self, image: Picture, question: str) -> "_Prompt":
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION_MARK}]}
        template = self.reasoner.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        before, after = template.split(_QUESTION_MARK)
        seen = self.reasoner(text=[before], images=[Image.fromarray(image)], return_tensors="pt")
        ids = seen.pop("input_ids")[0].tolist()
        seen.pop("attention_mask", None)
        token_types = seen.pop("mm_token_type_ids", None)
        asked = encode(self.tokenizer, [Piece(f"{question.strip()} {INSTRUCTION}", free=True), Piece(after)])
        types = None if token_types is None else token_types[0].tolist() + [0] * len(asked)
        return _Prompt(ids + asked, types, dict(seen), self._frame(dict(seen)))

    def _frame(self, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
        """Width and height at which the reasoner saw the picture."""
        if "image_grid_thw" in inputs:
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            patch = self.reasoner.image_processor.patch_size
            return columns * patch, rows * patch
        if "pixel_attention_mask" in inputs and not bool(inputs["pixel_attention_mask"].all()):
            raise ModelError("the reasoner's processor pads its pictures, so boxes cannot be placed; use a square size")
        height, width = inputs["pixel_values"].shape[-2:]
        return width, height


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    token_types: list[int] | None
    inputs: dict[str, torch.Tensor]
    frame_wh: tuple[int, int]


class AnswerConstraint(LogitsProcessor):
    """Keeps every row of a batch on its walk, and leaves it free once that has ended; serves one call of `generate`."""

    def __init__(self, walks: Sequence[Walk]) -> None:
        self._walks = walks
        self._started = False

    def __call__(
        self, input_ids: Int[torch.Tensor, "batch tokens"], scores: Float[torch.Tensor, "batch vocabulary"]
    ) -> Float[torch.Tensor, "batch vocabulary"]:
        """Everything that a walk does not allow next gets minus infinity."""
        kept = torch.full_like(scores, -torch.inf)
        for row, walk in enumerate(self._walks):
            try:
                allowed = walk.send(int(input_ids[row, -1])) if self._started else next(walk)
            except StopIteration:
                kept[row] = scores[row]
                continue
            index = torch.from_numpy(allowed).to(scores.device)
            kept[row, index] = scores[row, index]
        self._started = True
        return kept


def stretch_image(image: Picture, side_px: int) -> Float[torch.Tensor, "1 3 side side"]:
    """The picture stretched to a square, in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    return functional.interpolate(pixels, (side_px, side_px), mode="bilinear", antialias=True)


def _pad_left(ids: Sequence[int], length: int, value: int) -> list[int]:
    return [value] * (length - len(ids)) + [*ids]
