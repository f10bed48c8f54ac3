"""Models as the evaluation sees them."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coreseg.answer import answer_sentence, render
from coreseg.evaluate.run import Images
from coreseg.masks import box_tuples, mask_to_boxes
from coreseg.model.assemble import find_checkpoint
from coreseg.segmenter import Segmenter
from coreseg.types import Answer, Result, Sample


@dataclass(frozen=True)
class ModelPredictor:
    """A CORE-Seg as users get it, or with free decoding."""

    segmenter: Segmenter
    name: str
    constrained: bool
    settings: Mapping[str, Any]

    @classmethod
    def load(cls, model: str, device: str | None, dtype: str | None, *, constrained: bool) -> "ModelPredictor":
        """Load a checkpoint; its weights' digest is part of the settings, so that no answer outlives its model."""
        segmenter = Segmenter.from_pretrained(model, device, dtype)
        place = find_checkpoint(model)
        weights = _digest(place) if isinstance(place, Path) else place
        settings = {"weights": weights, "dtype": str(segmenter.model.dtype), "constrained": constrained}
        return cls(segmenter, model, constrained, settings)

    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """Answers to the questions; nothing of the samples is looked at."""
        return self.segmenter.segment_batch(list(images), questions, constrained=self.constrained)


@dataclass(frozen=True)
class QuestionBlind:
    """The segmenter with its "any lesion" prompt: what a mask scores that never heard the question."""

    segmenter: Segmenter
    settings: Mapping[str, Any]
    name: str = "question-blind"

    @classmethod
    def of(cls, predictor: ModelPredictor) -> "QuestionBlind":
        """The baseline from a model's own segmenter."""
        return cls(predictor.segmenter, predictor.settings)

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """One mask an image; boxes and text follow from the mask, the category being taken from the sample."""
        started = time.perf_counter()
        model, processor = self.segmenter.model, self.segmenter.processor
        pixels = torch.cat([processor.segmenter_pixels(image) for image in images])
        logits = model.question_blind(pixels.to(model.device, model.dtype))
        masks = [processor.mask_from_logits(row, image.shape[:2]) for row, image in zip(logits, images, strict=True)]
        seconds = (time.perf_counter() - started) / len(images)
        results = []
        for sample, image, mask in zip(samples, images, masks, strict=True):
            found = bool(mask.any())
            boxes = mask_to_boxes(mask)
            written = box_tuples(boxes)
            answer = Answer(sample.category, written, "", found)
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


def _digest(folder: Path) -> str:
    """SHA-256 over the folder's weight files, its first 16 digits."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            hashlib.file_digest(weights, lambda: digest)
    return digest.hexdigest()[:16]
