"""A data set small enough to score by hand, and predictors whose right score is known."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coreseg.answer import answer_sentence, render
from coreseg.data.store import LesionSet
from coreseg.evaluate import Record
from coreseg.types import Answer, Box, Result, Sample

WIDTH, HEIGHT = 40, 30
# (name, split, source, category, case, boxes); every lesion is its whole box.
ROWS: list[tuple[str, str, str, str, str, list[Box]]] = [
    ("cyst_0", "train", "cysts", "cyst", "p0", [(2, 2, 12, 12)]),
    ("cyst_1", "train", "cysts", "cyst", "p1", [(4, 2, 14, 12)]),
    ("cyst_2", "val", "cysts", "cyst", "p2", [(2, 2, 12, 12)]),
    ("cyst_3", "val", "cysts", "cyst", "p2", [(3, 2, 13, 12)]),
    ("cyst_4", "val", "cysts", "cyst", "p3", [(2, 2, 12, 12), (30, 20, 35, 25)]),
    ("polyp_0", "train", "polyps", "polyp", "", [(20, 10, 24, 14)]),
    ("polyp_1", "val", "polyps", "polyp", "", [(20, 10, 24, 14)]),
    ("clear_0", "train", "clear", "polyp", "", []),
    ("clear_1", "val", "clear", "polyp", "", []),
]


@dataclass(frozen=True)
class Scripted:
    """A predictor that answers by a function of sample, image and question, and keeps the questions it was asked."""

    answer: Callable[[Sample, np.ndarray, str], Result]
    name: str = "scripted"
    settings: Mapping[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def predict(self, samples: Sequence[Sample], images: Sequence[Any], questions: Sequence[str]) -> Sequence[Result]:
        """See `coreseg.evaluate.Predictor`."""
        self.asked.extend(questions)
        return [self.answer(*each) for each in zip(samples, images, questions, strict=True)]


def give(category: str, mask: np.ndarray, boxes: Sequence[Box], text: str | None = None) -> Result:
    """The well-formed result with this mask and these boxes; absent where there are no boxes; malformed by `text`."""
    answer = Answer(category, tuple(boxes), "It stands out.", found=bool(boxes))
    return Result(
        mask=mask,
        boxes=np.array(boxes, dtype=int).reshape(-1, 4),
        reasoning=answer.reasoning,
        answer="" if text else answer_sentence(answer),
        text=text or render(answer),
        found=answer.found,
        valid=text is None,
        seconds=0.25,
        image=np.zeros((*mask.shape, 3), np.uint8),
    )


def filled(boxes: Sequence[Box]) -> np.ndarray:
    """The mask of all boxes."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def made(**fields: Any) -> Record:
    """A record of a found, half right lesion, but for `fields`."""
    usual: dict[str, Any] = {
        "file_name": "i.png", "mask_file_name": "m.png", "source": "s", "modality": "mri", "anatomy": "head",
        "category": "cyst", "case": "", "attribute": "", "question": "?", "lesion_share": 0.1, "text": "",
        "valid": True, "found": True, "wrong_category": False, "predicted_share": 0.1, "dice": 0.5,
        "iou": 1 / 3, "detect": 0.5, "boxes": (), "seconds": 1.0,
    }  # fmt: skip
    return Record(**{**usual, **fields})


@pytest.fixture(name="made", scope="session")
def made_fixture() -> Callable[..., Record]:
    """`made`, for tests that need records without a predictor."""
    return made


@pytest.fixture(scope="session")
def tiny_core_seg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CORE-Seg with random weights, LLaVA and EdgeTAM."""
    from coreseg.model.assemble import assemble
    from coreseg.testing_models import tiny_edgetam, tiny_llava

    root = tmp_path_factory.mktemp("tiny")
    assemble(str(tiny_llava(root / "llava")), str(tiny_edgetam(root / "edgetam")), root / "joined")
    return root / "joined"


@pytest.fixture(name="give")
def give_fixture() -> Callable[..., Result]:
    """`give`, for tests that write their own answers."""
    return give


@pytest.fixture
def scripted() -> type[Scripted]:
    """The class of predictors that answer by a function."""
    return Scripted


@pytest.fixture
def oracle() -> Scripted:
    """Answers every plain question perfectly, and every other one as if it were plain."""
    return Scripted(lambda sample, image, question: give(sample.category, filled(sample.boxes), sample.boxes), "oracle")


@pytest.fixture
def lesion_set(tmp_path: Path) -> LesionSet:
    """`ROWS` on disk: in val three cysts, one of them with two lesions, a polyp, and an image without a polyp."""
    root = tmp_path / "set"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    lines = []
    for number, (name, split, source, category, case, boxes) in enumerate(ROWS):
        image = np.full((HEIGHT, WIDTH, 3), 60 + number, np.uint8)
        image[filled(boxes)] = 200
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray(filled(boxes).astype(np.uint8) * 255).save(root / "masks" / f"{name}.png")
        row = {
            "file_name": f"images/{name}.png",
            "mask_file_name": f"masks/{name}.png",
            "modality": "mri" if category == "cyst" else "endoscopy",
            "anatomy": "head" if category == "cyst" else "abdomen",
            "category": category,
            "boxes": boxes,
            "query": f"Locate and segment the {category}.",
            "reasoning": "It stands out.",
            "source": source,
            "licence": "CC0",
            "case": case,
            "split": split,
        }
        lines.append(json.dumps(row))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return LesionSet.open(root)
