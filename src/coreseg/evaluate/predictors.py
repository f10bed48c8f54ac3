"""Models as the evaluation sees them."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float

from coreseg.answer import answer_sentence, render
from coreseg.evaluate.run import Images
from coreseg.masks import box_tuples, mask_to_boxes
from coreseg.model.assemble import find_checkpoint
from coreseg.model.core_seg import Boxes
from coreseg.model.looks import all_looks, boxes_within
from coreseg.model.processor import CoreSegProcessor, Picture
from coreseg.segmenter import Segmenter
from coreseg.types import Answer, Box, Result, Sample


@dataclass(frozen=True)
class ModelPredictor:
    """A CORE-Seg as users get it, or with free decoding."""

    segmenter: Segmenter
    name: str
    constrained: bool
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, model: str, device: str | None, dtype: str | None, *, constrained: bool) -> "ModelPredictor":
        """Load a checkpoint; all that its answers depend on is in the settings, so that none outlives its model."""
        segmenter = Segmenter.from_pretrained(model, device, dtype)
        config = segmenter.model.config
        settings = {
            "weights": model_digest(model),
            "dtype": str(segmenter.model.dtype),
            "constrained": constrained,
            "word_bias": config.word_bias,
            "looks_px": config.looks_px,
            "second_look": config.second_look,
        }
        return cls(segmenter, model, constrained, settings)

    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """Answers to the questions; nothing of the samples is looked at."""
        return self.segmenter.segment_batch(list(images), questions, constrained=self.constrained)


@dataclass(frozen=True)
class SegmenterAlone:
    """A model's own segmenter without its reasoner; what prompts it is the kind of baseline."""

    segmenter: Segmenter
    settings: Mapping[str, Any]
    name: ClassVar[str]

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """See `coreseg.evaluate.Predictor`; the questions are not read, the samples give the category for the text."""
        started = time.perf_counter()
        first = self._look(images, [sample.boxes for sample in samples])
        logits = [
            all_looks(self.segmenter.processor, image, "", row, partial(self._look_again, sample.boxes))
            for sample, image, row in zip(samples, images, first, strict=True)
        ]
        return answers_from_masks(samples, images, logits, started)

    def _look(
        self, images: Images, reference: Sequence[Sequence[Box]], side_px: int | None = None
    ) -> Float[torch.Tensor, "batch height width"]:
        model, processor = self.segmenter.model, self.segmenter.processor
        pixels = torch.cat([processor.segmenter_pixels(image, side_px) for image in images])
        boxes = [
            processor.segmenter_boxes(row, image.shape[1::-1]) for row, image in zip(reference, images, strict=True)
        ]
        return self.mask_logits(pixels.to(model.device, model.dtype), boxes)

    def _look_again(
        self, reference: Sequence[Box], part: Picture, window: Box, side_px: int
    ) -> Float[torch.Tensor, "map_height map_width"]:
        return self._look([part], [boxes_within(reference, window)], side_px)[0]

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], boxes: Boxes
    ) -> Float[torch.Tensor, "batch height width"]:
        """One mask for each picture; `boxes` are the reference's."""
        raise NotImplementedError


@dataclass(frozen=True)
class QuestionBlind(SegmenterAlone):
    """The segmenter with its "any lesion" prompt: what a mask scores that never heard the question."""

    name = "question-blind"

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], boxes: Boxes
    ) -> Float[torch.Tensor, "batch height width"]:
        """The boxes are not used."""
        return self.segmenter.model.question_blind(pixels)


@dataclass(frozen=True)
class OracleBox(SegmenterAlone):
    """The segmenter prompted by the row's reference boxes: what its masks score once it is told where to look.

    An upper bound only as far as the segmenter heeds its box prompts, which is for the figures to say. A lesion-free
    row gets an empty mask; a question about some of the lesions gets them all. See `CoreSeg.in_boxes`. Our choice.
    """

    name = "oracle box"

    def mask_logits(
        self, pixels: Float[torch.Tensor, "batch 3 side side"], boxes: Boxes
    ) -> Float[torch.Tensor, "batch height width"]:
        """They prompt."""
        return self.segmenter.model.in_boxes(pixels, boxes)


def answers_from_masks(
    samples: Sequence[Sample], images: Images, logits: Iterable[Float[torch.Tensor, "_ _"]], started: float
) -> list[Result]:
    """What a baseline without words answers: boxes and text follow from the mask, the category is the asked one.

    `started` is the `time.perf_counter()` from before the batch.
    """
    masks = [CoreSegProcessor.mask_from_logits(row, image.shape[:2]) for row, image in zip(logits, images, strict=True)]
    seconds = (time.perf_counter() - started) / len(images)
    results = []
    for sample, image, mask in zip(samples, images, masks, strict=True):
        found = bool(mask.any())
        boxes = mask_to_boxes(mask)
        answer = Answer(sample.category, box_tuples(boxes), "", found)
        results.append(
            Result(
                mask=mask,
                boxes=boxes,
                reasoning="",
                answer=answer_sentence(answer),
                text=render(answer),
                found=found,
                valid=True,
                seconds=seconds,
                image=image,
            )
        )
    return results


def model_digest(model: str) -> str:
    """What tells a model from its next version: the digest of its weights here, or its name at a hub."""
    place = find_checkpoint(model)
    return weights_digest(place) if isinstance(place, Path) else place


def weights_digest(folder: Path) -> str:
    """SHA-256 over the folder's weight files, its first 16 digits."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as weights:
            hashlib.file_digest(weights, lambda: digest)
    return digest.hexdigest()[:16]
