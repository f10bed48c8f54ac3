"""What every test shares: array shapes checked at run time, and the real images where a checkout has them."""

import os
from pathlib import Path
from typing import Any

# The suite runs in two processes on two cores, see pyproject.toml: one computing thread each. torch reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Before anything imports the package: from here on every call checks its shapes and types.
install_import_hook("coreseg", "beartype.beartype")

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("coreseg", deadline=None)
hypothesis.settings.load_profile("coreseg")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_lesions() -> Path:
    """The folder of real lesion sets that may lie beside a checkout; users do not have it."""
    folder = REPO.parent / "shared" / "data" / "lesions"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/lesions beside this checkout: the real images are not part of the project")
    return folder


@pytest.fixture
def bright_segmenter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of a segmenter without weights, which the command line now loads under any name.

    It finds whatever is brighter than 200; where a question says "mumble", its answer is malformed, where it says
    "cat", there is a warning, and where it says "doubt", its mask is expected to be poor. `loaded` keeps what it was
    asked to load.
    """
    from coreseg.answer import answer_sentence, check_question, render
    from coreseg.imaging import read_image
    from coreseg.masks import mask_to_boxes
    from coreseg.model.confidence import NAMES
    from coreseg.segmenter import Segmenter
    from coreseg.types import Answer, Result

    class BrightSegmenter(Segmenter):
        loaded: list[tuple[Any, ...]] = []  # noqa: RUF012 one list for the test

        def __init__(self) -> None:
            pass

        def segment(self, image: Any, question: str, *, constrained: bool = True) -> Result:
            check_question(question)
            picture = read_image(image)
            mask = (picture > 200).any(axis=2)
            boxes = mask_to_boxes(mask)
            answer = Answer("tumor", tuple(tuple(map(int, box)) for box in boxes), "It is bright.", bool(mask.any()))
            if "mumble" in question:
                return Result(np.zeros_like(mask), boxes[:0], "", "", "<think> hm", False, False, 0.5, picture)
            told = answer.reasoning, answer_sentence(answer), render(answer), answer.found, True, 0.5
            warned = ("a cat is no tumor",) if "cat" in question else ()
            signs = dict.fromkeys(NAMES, 0.5) | {"size": float(mask.mean())}
            return Result(mask, boxes, *told, picture, warned, 0.125 if "doubt" in question else None, signs)

        def segment_batch(
            self, images: Any, questions: Any, *, constrained: bool = True, reasoning: Any = None
        ) -> list[Result]:
            return [self.segment(*each, constrained=constrained) for each in zip(images, questions, strict=True)]

    def load(*arguments: Any) -> BrightSegmenter:
        BrightSegmenter.loaded.append(arguments)
        return BrightSegmenter()

    monkeypatch.setattr(Segmenter, "from_pretrained", staticmethod(load))
    return BrightSegmenter
