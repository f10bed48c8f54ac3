"""Training examples: a row of a data set, seen anew each time it is drawn, becomes picture, question and answer."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from coreseg.config import StageConfig
from coreseg.data.build.describe import describe
from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.masks import box_tuples, mask_to_boxes
from coreseg.questions import Wordings, among_other_words, ask, attribute_questions, mistyped, read_own_words
from coreseg.train.augment import augment
from coreseg.types import Answer, Sample

Asks = Literal["one", "every", "kind"]


@dataclass(frozen=True)
class Example:
    """One question about one picture with its reference: boxes in the picture's own pixels.

    `picture` names the very pixels, where they will be seen again. `asks` says which lesions are wanted: one of
    several; every lesion that the picture shows; or those of a kind, which is a category that shares a picture with
    other rows.
    """

    image: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    question: str
    answer: Answer
    picture: str | None = None
    asks: Asks | None = None


class Examples(Dataset[Example]):
    """The rows of one split of one or more data sets, asked for by (row, draw).

    What is random about an example (changes of the picture, the question's words, whether it asks for one of several
    lesions or for something that is not there) comes from (seed, row, draw) alone. So a resumed run, several loading
    workers and several processes all see the examples of an uninterrupted one.
    """

    def __init__(self, rows: list[tuple[LesionSet, Sample]], config: StageConfig) -> None:
        self.rows = rows
        self.config = config
        self._categories = sorted({(sample.anatomy, sample.category) for _, sample in rows})
        self._side_by_side = side_by_side(rows)
        own_words = read_own_words(Path(config.own_words)) if config.own_words else {}
        self._wordings = Wordings(own_words, config.own_words_share, config.unnamed_share)

    @classmethod
    def open(cls, config: StageConfig, split: str) -> "Examples":
        """All rows of `split` but the sources left out; raises DataError where there is none to train on."""
        sets = [LesionSet.open(path) for path in config.data]
        known = {sample.source for lesions in sets for sample in lesions.samples}
        if unknown := sorted(set(config.leave_out) - known):
            raise DataError(f"leave_out names {', '.join(unknown)}; the sources there are: {', '.join(sorted(known))}")
        rows = [
            (lesions, sample)
            for lesions in sets
            for sample in lesions.split(split)
            if sample.source not in config.leave_out
        ]
        if split == "train" and not rows:
            raise DataError(f"no train rows in {', '.join(config.data)}; set `split` to train in metadata.jsonl")
        examples = cls(rows, config)
        if split == "train" and not examples.weights.any():
            raise DataError(
                f"source_weights is {config.source_weights}, so no row of {', '.join(config.data)} is drawn"
            )
        return examples

    @property
    def weights(self) -> Float[np.ndarray, " rows"]:
        """How often each row should be drawn, up to a factor."""
        sources = [sample.source for _, sample in self.rows]
        counts = {source: sources.count(source) for source in set(sources)}
        factors = self.config.source_weights or {}
        weights = np.array([factors.get(s, 1.0) * counts[s] ** -self.config.balance for s in sources])
        weights[[len(sample.boxes) > 1 for _, sample in self.rows]] *= self.config.several_weight
        return weights

    def fixed(self, count: int, seed: int) -> list[Example]:
        """`count` rows in equal steps through the split, unchanged, each with its plain question: for validation."""
        examples: list[Example] = []
        if not self.rows:
            return examples
        for number in np.unique(np.linspace(0, len(self.rows) - 1, count).astype(int)):
            lesions, sample = self.rows[number]
            image, mask = lesions.image(sample), lesions.mask(sample)
            question = ask(sample.category, np.random.default_rng((seed, number)))
            examples.append(Example(image, mask, question, _answer(sample.category, mask, sample.reasoning)))
        return examples

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, drawn: tuple[int, int]) -> Example:
        number, draw = drawn
        rng = np.random.default_rng((self.config.seed, number, draw))
        lesions, sample = self.rows[number]
        image, mask = lesions.image(sample), lesions.mask(sample)
        picture = None
        if self.config.remeasure and self.config.versions:
            version, name = int(rng.integers(self.config.versions)), crc32(sample.file_name.encode())
            picture = f"{lesions.root / sample.file_name} {version}"
            image, mask = _changed(image, mask, np.random.default_rng((self.config.seed, name, version)))
        elif self.config.remeasure:
            image, mask = _changed(image, mask, rng)
        category, reasoning = sample.category, sample.reasoning
        alone = category not in self._side_by_side
        question = self._wordings.ask(category, rng, alone=alone)
        asks: Asks | None = "every" if alone else "kind"
        attributes = []
        if rng.random() < self.config.attribute_share:
            attributes = attribute_questions(image, mask, category, rng)
        if attributes:
            chosen = attributes[int(rng.integers(len(attributes)))]
            question, mask = chosen.text, chosen.mask
            asks = None if chosen.kind.startswith("all but") else "one"
        elif rng.random() < self.config.absent_share and (absent := self._absent(sample, rng)):
            category, mask, asks = absent[int(rng.integers(len(absent)))], np.zeros_like(mask), None
            question = self._wordings.ask(category, rng, there=False)
        if rng.random() < self.config.filler_share:
            question = among_other_words(question, rng)
        if self.config.typo_share and rng.random() < self.config.typo_share:
            question = mistyped(question, rng)
        if not self.config.with_reasoning:
            reasoning = ""
        elif self.config.remeasure or category != sample.category or attributes:
            reasoning = describe(image, mask, sample.modality, sample.anatomy, category, int(rng.integers(2**31)))
        answer = _answer(category, mask, reasoning)
        return Example(image, mask, question, answer, picture, asks if answer.found else None)

    def _absent(self, sample: Sample, rng: np.random.Generator) -> Sequence[str]:
        """Categories that this row's picture does not show: known ones half of the time, else of other anatomies."""
        near = (self.config.known_absent or {}).get(sample.category, ())
        if near and rng.random() < 0.5:
            return near
        return of_other_anatomies(sample.anatomy, self._categories)


class Draws(Sampler[tuple[int, int]]):
    """Which rows a run sees: (row, draw) pairs, each row as often as its weight says. They depend on the seed alone."""

    def __init__(self, weights: Float[np.ndarray, " rows"], count: int, seed: int) -> None:
        self.weights = torch.from_numpy(weights)
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        return zip(rows.tolist(), range(self.count), strict=True)


def of_other_anatomies(anatomy: str, categories: Sequence[tuple[str, str]]) -> list[str]:
    """The categories that a picture of `anatomy` does not show, of (anatomy, category) pairs.

    What is known of this anatomy may well be in the picture, in a row of its own or by a wider name.
    """
    here = [category for of, category in categories if of == anatomy]
    others = sorted({category for _, category in categories})
    return [category for category in others if not any(category in known or known in category for known in here)]


def side_by_side(rows: Sequence[tuple[LesionSet, Sample]]) -> set[str]:
    """The categories that share some picture: asking for one of them is not asking for every lesion."""
    shown = Counter((lesions.root, sample.file_name) for lesions, sample in rows)
    return {sample.category for lesions, sample in rows if shown[lesions.root, sample.file_name] > 1}


def stretch_mask(mask: Bool[np.ndarray, "height width"], side_px: int) -> Bool[torch.Tensor, "side side"]:
    """A mask stretched to a square: pixels at least half covered, or the most covered one where none is."""
    pixels = torch.from_numpy(mask)[None, None].float()
    covered = functional.interpolate(pixels, (side_px, side_px), mode="bilinear", antialias=True)[0, 0]
    return covered >= min(0.5, max(float(covered.max()), 1e-6))


def _changed(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"], rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """One random change of picture and mask (see `augment`)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    new_image, new_mask = augment(pixels, torch.from_numpy(mask)[None, None].float(), generator)
    as_bytes: Any = (new_image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    return as_bytes, new_mask[0, 0].bool().numpy()


def _answer(category: str, mask: Bool[np.ndarray, "height width"], reasoning: str) -> Answer:
    boxes = box_tuples(mask_to_boxes(mask))
    return Answer(category, boxes, reasoning, found=bool(boxes))
