import re

import numpy as np
import pytest

from coreseg.data.build.describe import _HEALTHY, _PICTURES, describe
from coreseg.sentences import find_all
from coreseg.statements import holds, measure_all
from coreseg.testing import LOOKS, Phantom, phantom


def shown(seed: int) -> tuple[Phantom, str, np.ndarray]:
    picture = phantom(seed, size_wh=(96, 64), kinds=1 + seed % 2)
    category, mask = next(iter(picture.masks.items()))
    return picture, category, mask


def test_descriptions_of_phantoms_are_true_short_and_plain() -> None:
    for seed in range(120):
        picture, category, mask = shown(seed)
        text = describe(picture.image, mask, picture.modality, picture.anatomy, category, seed)
        assert re.fullmatch(r"[A-Za-z ,.\-]+", text), text
        assert 25 <= len(text.split()) <= 70, text
        values = measure_all(picture.image, mask)
        assert find_all(text) == {kind: {value} for kind, value in values.items()}, text
        assert len(values) >= 4
        assert holds(text, picture.image, mask) == 1.0
        assert category in text and picture.anatomy in text


def test_longest_text_stays_under_the_limit() -> None:
    picture = phantom(3, "ct", size_wh=(96, 64), lesions=4)
    mask = next(iter(picture.masks.values()))
    for modality, anatomy in _HEALTHY:
        for seed in range(20):
            text = describe(picture.image, mask, modality, anatomy, "multiple sclerosis lesion", seed)
            assert len(text.split()) <= 70, text


def test_an_empty_mask_looks_healthy() -> None:
    picture, category, mask = shown(5)
    for seed in range(20):
        text = describe(picture.image, np.zeros_like(mask), picture.modality, picture.anatomy, category, seed)
        assert find_all(text) == {"count": {"none"}}, text
        assert "ealthy" in text and category in text
        assert len(text.split()) <= 70


def test_the_healthy_table_states_nothing_about_a_lesion() -> None:
    assert all(modality in _PICTURES for modality, _ in _HEALTHY)
    assert not any(find_all(f"{sentence}.") for sentence in _HEALTHY.values())


def test_unknown_names_fall_back() -> None:
    picture, _, mask = shown(8)
    text = describe(picture.image, mask, "oct", "knee", "odd abscess", 0)
    assert "an oct image of the knee" in text and "Healthy tissue of the knee" in text
    assert "an odd abscess" in text or "odd abscesses" in text


def test_the_seed_decides_and_wording_varies() -> None:
    picture, category, mask = shown(2)
    texts = [
        describe(picture.image, mask, picture.modality, picture.anatomy, category, seed) for seed in (1, 1, 2, 3, 4)
    ]
    assert texts[0] == texts[1] and len(set(texts)) >= 4


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_has_a_healthy_sentence_of_its_own(look: str) -> None:
    picture = phantom(0, look)
    assert (picture.modality, picture.anatomy) in _HEALTHY
