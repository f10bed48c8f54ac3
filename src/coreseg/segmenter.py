"""The main path: a picture and a question in; reasoning, boxes and a mask out."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from coreseg.answer import answer_sentence, check_question, check_reasoning, forced
from coreseg.errors import InputError
from coreseg.imaging import read_image_and_changes
from coreseg.model.assemble import DTYPES, EMBEDDED, confidence_of, load_parts, scope_of
from coreseg.model.confidence import Confidence, Signs
from coreseg.model.core_seg import CoreSeg
from coreseg.model.looks import all_looks, boxes_within
from coreseg.model.processor import AnswerConstraint, CoreSegProcessor
from coreseg.model.scope import Scope
from coreseg.sam2 import encode_image, texture
from coreseg.types import Answer, Box, Result

Source = str | Path | np.ndarray | Image.Image

CONTRADICTION = "the words tell of a lesion and the mask is empty: rely on neither"


class Segmenter:
    """A CORE-Seg ready for questions.

    >>> from coreseg import Segmenter
    >>> result = Segmenter.from_pretrained().segment("scan.png", "Where is the foot ulcer?")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: CoreSeg,
        processor: CoreSegProcessor,
        scope: Scope | None = None,
        confidence: Confidence | None = None,
    ) -> None:
        self.model: CoreSeg = model.eval()  # type: ignore[no-untyped-call]
        self.processor = processor
        self.scope = scope
        self.confidence = confidence

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path = EMBEDDED, device: str | None = None, dtype: str | None = None
    ) -> "Segmenter":
        """The embedded default, a checkpoint folder, a training run's folder, or a hub name.

        device: "cpu", "cuda", "cuda:1"…; by default the GPU where there is one.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU, bfloat16 on a GPU.
        Raises ModelError where there is no such model.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        try:
            place = torch.device(device)
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
        model, processor = load_parts(name_or_path, DTYPES[dtype])
        model.to(device=place)  # type: ignore[call-arg]
        return cls(model, processor, scope_of(name_or_path), confidence_of(name_or_path))

    def segment(self, image: Source, question: str, *, constrained: bool = True) -> Result:
        """Answer one question about one picture (a path, an array, or a PIL image). The same answer every time.

        constrained: whether the grammar keeps the answer's form valid. Raises InputError for a picture that cannot be
        read or a question that is empty or over 2,000 characters.
        """
        return self.segment_batch([image], [question], constrained=constrained)[0]

    def segment_batch(
        self,
        images: Sequence[Source],
        questions: Sequence[str],
        *,
        constrained: bool = True,
        reasoning: Sequence[str] | None = None,
    ) -> list[Result]:
        """One question for each picture, answered together.

        The results are those of one at a time, but for pixels on a mask's very edge: sums in a batch are rounded in
        another order. `reasoning`, one text for each picture, is put into the model's mouth: its think block is that
        text, empty or not, and the answer follows from there. Raises InputError as `segment`, where there are not as
        many questions and texts as pictures, and for a text that spells a marker of the answer.
        """
        started = time.perf_counter()
        if len(images) != len(questions):
            raise InputError(
                f"got {len(images)} pictures and {len(questions)} questions; expected one question for each picture"
            )
        if reasoning is not None and len(reasoning) != len(images):
            raise InputError(
                f"got {len(images)} pictures and {len(reasoning)} reasonings; expected one reasoning for each picture"
            )
        if not len(images):
            return []
        for question in questions:
            check_question(question)
        for text in reasoning or ():
            check_reasoning(text)
        read = [read_image_and_changes(image) for image in images]
        pictures = [picture for picture, _ in read]
        batch = self.processor(pictures, questions).to(self.model.device, self.model.dtype)
        grammar = self.processor.grammar
        openings = [self.processor.opening(text.strip()) for text in reasoning or ()]
        constraint = AnswerConstraint([forced(ids) for ids in openings]) if openings else None
        if constrained:
            constraint = self.processor.constraint(batch.frames_wh, openings)
        with torch.no_grad():
            maps = encode_image(self.model.segmenter, batch.segmenter_pixels)
        generated = self.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            reasoner_inputs=batch.reasoner_inputs,
            segmenter_maps=maps,
            # An opening is not held to the grammar's budget.
            max_new_tokens=max(map(grammar.max_tokens, batch.frames_wh)) + max(map(len, openings), default=0),
            eos_token_id=self.processor.tokenizer.eos_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            constraint=constraint,
            read_boxes=partial(self.processor.read_boxes, frames_wh=batch.frames_wh),
        )
        outputs = map(
            _Output,
            generated.ids,
            generated.mask_logits,
            generated.states,
            generated.log_probabilities,
            texture(maps).cpu(),
        )
        results = [
            self._result(picture, changes, question, output, frame)
            for (picture, changes), question, output, frame in zip(
                read, questions, outputs, batch.frames_wh, strict=True
            )
        ]
        seconds = (time.perf_counter() - started) / len(pictures)
        return [replace(result, seconds=seconds) for result in results]

    def _result(
        self,
        picture: np.ndarray,
        changes: tuple[str, ...],
        question: str,
        output: "_Output",
        frame_wh: tuple[int, int],
    ) -> Result:
        """One row's ids and mask logits, brought back to the picture's own pixels; the time is not known yet."""
        height, width = picture.shape[:2]
        text = self.processor.decode(output.ids)
        answer = self.processor.read(text, frame_wh, (width, height))
        found = answer is not None and answer.found
        logits = output.mask_logits if found else None
        mask = np.zeros((height, width), dtype=bool)
        if answer and logits is not None:
            mask = (self._looked(picture, answer, output) > 0).cpu().numpy()
        boxes = np.array(answer.boxes if answer else (), dtype=np.int64).reshape(-1, 4)
        signs = asdict(Signs.read(mask, boxes, logits, output.log_probability))
        contradicts = found and not mask.any()
        confidence = None
        if self.confidence:
            confidence = self.confidence.of(signs) if answer and not contradicts else 0.0
        return Result(
            mask=mask,
            boxes=boxes,
            reasoning=answer.reasoning if answer else "",
            answer=answer_sentence(answer) if answer else "",
            text=text,
            found=found,
            valid=answer is not None,
            seconds=0.0,
            image=picture,
            warnings=(
                *changes,
                *((CONTRADICTION,) if contradicts else ()),
                *(self.scope.warnings(output.texture, question, answer) if self.scope else ()),
            ),
            confidence=confidence,
            signs=signs,
        )

    def _looked(self, picture: np.ndarray, answer: Answer, output: "_Output") -> Float[torch.Tensor, "height width"]:
        """Mask logits at the picture's own size, after as many looks as the model takes."""
        model, states = self.model, cast(torch.Tensor, output.states)[None]

        @torch.no_grad()
        def ask(part: np.ndarray, window: Box, side_px: int) -> Float[torch.Tensor, "map_height map_width"]:
            pixels = self.processor.segmenter_pixels(part, side_px).to(model.device, model.dtype)
            boxes = self.processor.segmenter_boxes(boxes_within(answer.boxes, window), part.shape[1::-1])
            present = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            maps = encode_image(model.segmenter, pixels)
            return model.decode(states, present, maps, [boxes.to(model.device)])[0]

        return all_looks(self.processor, picture, answer.category, cast(torch.Tensor, output.mask_logits), ask)


@dataclass(frozen=True)
class _Output:
    """What the model gave for one row."""

    ids: list[int]
    mask_logits: Float[torch.Tensor, "map_height map_width"] | None
    states: Float[torch.Tensor, "probes reasoner"] | None
    log_probability: float
    texture: Float[torch.Tensor, " textures"]
