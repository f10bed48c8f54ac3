"""What a model was trained on: what is like it passes, what is not is said, and it comes back from disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from coreseg import nano as nano_package
from coreseg.data.store import LesionSet
from coreseg.errors import DataError, ModelError
from coreseg.evaluate.predictors import weights_digest
from coreseg.model.scope import Kind, Scope, kinds_of
from coreseg.segmenter import CONTRADICTION, Segmenter
from coreseg.testing import write_phantom_set
from coreseg.train.scope import fit_scope
from coreseg.types import Answer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HEAD = Kind("mri", "head", ("brain tumor", "stroke"))
EYE = Kind("fundus photography", "eye", ("retinal exudate",))
CHANNELS = 12


def cloud(centre: float, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Vectors around a centre, the channels of very different spread and not independent."""
    mixed = np.random.default_rng(99).normal(size=(CHANNELS, CHANNELS))
    noise = np.random.default_rng(seed).normal(size=(count, CHANNELS)) @ mixed
    return torch.from_numpy(np.logspace(-1, 2, CHANNELS) * (centre + 0.3 * noise)).float()


@pytest.fixture(scope="module")
def scope() -> Scope:
    textures = torch.cat([cloud(0.0), cloud(9.0)])
    return Scope.fit(textures, [str(HEAD)] * 400 + [str(EYE)] * 400, [EYE, HEAD])


def about(category: str) -> Answer:
    return Answer(category, (), "", found=False)


def test_what_it_was_trained_on_passes(scope: Scope) -> None:
    fresh = cloud(0.0, seed=1)
    warned = [scope.warnings(row, "Where is the brain tumor?", about("brain tumor")) for row in fresh]
    assert np.mean([bool(each) for each in warned]) < 0.05
    assert (scope.distances(fresh).argmin(1) == 1).all(), "of the two kinds, the right one"


def test_an_unlike_picture_is_said_to_be_one(scope: Scope) -> None:
    between = torch.from_numpy(np.logspace(-1, 2, CHANNELS) * 4.5).float()
    (told,) = scope.warnings(between, "Where is the brain tumor?", about("brain tumor"))
    assert told.startswith("the picture looks like none") and "mri of the head" in told
    assert scope.warnings(between, "?", None) == (told,), "an answer without form is no reason to be silent"


def test_a_question_that_belongs_to_another_kind_of_picture(scope: Scope) -> None:
    of_eye = scope.centres[0] @ torch.linalg.inv(scope.whitening) * scope.scale
    (told,) = scope.warnings(of_eye, "Is there a brain tumor?", about("brain tumor"))
    like = "the picture looks like fundus photography of the eye"
    assert told == f"{like}, where this model knows retinal exudate but no brain tumor"
    assert scope.warnings(of_eye, "Any exudates?", about("retinal exudate")) == ()


def test_an_unknown_lesion(scope: Scope) -> None:
    of_head = scope.centres[1] @ torch.linalg.inv(scope.whitening) * scope.scale
    (told,) = scope.warnings(of_head, "Where is the cat?", about("cat"))
    assert told == "this model does not know cat; it knows brain tumor, retinal exudate and stroke"
    (told,) = scope.warnings(of_head, "Where is the cat?", about("stroke"))
    assert told == "the question names no lesion that this model knows; it was taken to be about stroke"


def test_textures_that_hardly_vary_weigh_hardly_anything(tmp_path: Path) -> None:
    textures = cloud(0.0) * 1e-6
    textures[:, 3] = 0.0
    Scope.fit(textures, [str(HEAD)] * 400, [HEAD]).save(tmp_path)
    again = Scope.load(tmp_path)
    assert again is not None and again.distances(textures).isfinite().all()
    within = (again.distances(textures).amin(1) <= again.limit).float().mean()
    assert 0.97 < within < 1.0
    assert again.warnings(textures[0] + 1.0, "tumor", about("brain tumor")), "and what is far stays far"


def test_a_damaged_one_is_a_clear_error(scope: Scope, tmp_path: Path) -> None:
    (tmp_path / "scope.safetensors").write_bytes(b"oops")
    with pytest.raises(ModelError, match="damaged"):
        Scope.load(tmp_path)


def test_it_comes_back_from_disk(scope: Scope, tmp_path: Path) -> None:
    assert Scope.load(tmp_path) is None, "a checkpoint without one never warns"
    scope.save(tmp_path)
    again = Scope.load(tmp_path)
    assert again is not None and again.kinds == scope.kinds and again.limit == scope.limit
    textures = torch.cat([cloud(0.0), cloud(9.0)])
    assert torch.allclose(again.distances(textures), scope.distances(textures), rtol=0.05, atol=0.05)


def test_it_is_fitted_on_the_training_pictures_of_a_set(nano: Segmenter, tmp_path: Path) -> None:
    lesions = LesionSet.open(write_phantom_set(tmp_path / "set", count=12, seed=0, size_wh=(48, 40)))
    train = lesions.split("train")
    rows = tuple(replace(sample, modality="mri", anatomy="head") for sample in train)
    fitted = fit_scope(nano.model, nano.processor, [LesionSet(lesions.root, rows)], progress=False)
    assert fitted.kinds == tuple(kinds_of(rows)) and len(fitted.kinds) == 1
    both = tuple(replace(sample, anatomy="neck", category="cyst of the neck") for sample in rows)
    twice = fit_scope(nano.model, nano.processor, [LesionSet(lesions.root, rows + both)], progress=False)
    assert len(twice.kinds) == 2 and twice.centres.isfinite().all(), "a picture may be of two kinds"
    one = LesionSet(
        lesions.root, (*rows, replace(train[0], file_name=lesions.split("val")[0].file_name, modality="ct"))
    )
    with pytest.raises(DataError, match="only one training picture is a ct of the"):
        fit_scope(nano.model, nano.processor, [one], progress=False)
    with pytest.raises(DataError, match="no training pictures"):
        fit_scope(nano.model, nano.processor, [LesionSet(lesions.root, lesions.split("val"))], progress=False)


@pytest.fixture(scope="module")
def embedded() -> Segmenter:
    return Segmenter.from_pretrained()


def page_of_text() -> np.ndarray:
    page = Image.new("RGB", (600, 800), "white")
    for y in range(30, 770, 14):
        ImageDraw.Draw(page).text(
            (30, y), "A page of words, one line below the other, and no lesion. " * 2, fill="black"
        )
    return np.asarray(page)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def test_nano_says_nothing_of_what_it_knows(embedded: Segmenter) -> None:
    for name, question in (
        ("breast_ultrasound", "Where is the breast tumor?"),
        ("brain_flair", "Where are the multiple sclerosis lesions?"),
        ("fundus", "Show me the retinal haemorrhages."),
    ):
        told = embedded.segment(EXAMPLES / f"{name}.jpg", question).warnings
        assert set(told) <= {CONTRADICTION}, "which is about the answer"


@pytest.mark.parametrize("picture", [page_of_text, noise])
def test_nano_knows_no_page_of_text_and_no_noise(embedded: Segmenter, picture: Callable[[], np.ndarray]) -> None:
    assert "looks like none" in embedded.segment(picture(), "Where is the polyp?").warnings[0]


def test_nano_does_not_believe_every_question(embedded: Segmenter) -> None:
    told = embedded.segment(EXAMPLES / "fundus.jpg", "Where is the brain tumor?").warnings
    assert len(told) == 1 and "fundus photography of the eye" in told[0]
    assert "names no lesion" in embedded.segment(EXAMPLES / "fundus.jpg", "Where is the cat?").warnings[0]


def test_the_state_before_stage_2_knows_the_same(embedded: Segmenter) -> None:
    before = Segmenter.from_pretrained("nano-sft").scope
    assert before is not None and embedded.scope is not None and before.kinds == embedded.scope.kinds


def test_nanos_scope_is_that_of_its_model_card(embedded: Segmenter) -> None:
    card = (Path(nano_package.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert embedded.scope is not None
    assert all(category in card for kind in embedded.scope.kinds for category in kind.categories)


def test_it_is_no_part_of_the_weights(tmp_path: Path, scope: Scope) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    before = weights_digest(tmp_path)
    scope.save(tmp_path)
    assert weights_digest(tmp_path) == before
