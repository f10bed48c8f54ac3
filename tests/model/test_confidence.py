"""How good a model expects its masks to be: what an answer shows of that, and what is learned from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from coreseg.errors import DataError, ModelError
from coreseg.metrics import Boxes
from coreseg.model.confidence import NAMES, Confidence, Signs

NOTHING = np.zeros((20, 30), dtype=bool)


def signs(mask: np.ndarray, boxes: Boxes = (), sure: float = 20.0) -> Signs:
    """Signs of an answer in a picture of 20 x 30 pixels whose decoder's map has the same size."""
    return Signs.read(mask, boxes, torch.where(torch.from_numpy(mask), sure, -sure), -0.1)


def square(side: int) -> np.ndarray:
    mask = NOTHING.copy()
    mask[2 : 2 + side, 2 : 2 + side] = True
    return mask


def test_an_answer_that_agrees_with_itself() -> None:
    seen = signs(square(6), [(2, 2, 8, 8)])
    assert (seen.found, seen.boxes, seen.words) == (1.0, 1.0, -0.1)
    assert seen.sharp == pytest.approx(1.0, abs=1e-6)


def test_disagreement_shows() -> None:
    sure, unsure = signs(square(6)), signs(square(6), sure=0.5)
    inside, p = 36, 1 / (1 + np.exp(-0.5))
    assert unsure.sharp == pytest.approx(2 * inside * p / (inside * p + (600 - inside) * (1 - p) + inside), rel=1e-5)
    assert unsure.sharp < sure.sharp
    assert signs(square(6), [(2, 2, 8, 5)]).boxes == 0.5, "half of the box: IoU 0.5"


def test_size_goes_from_a_pixel_in_a_hundred_thousand_to_all() -> None:
    assert signs(np.ones((20, 30), dtype=bool)).size == 1.0
    mask = NOTHING.copy()
    mask[0, :6] = True
    assert signs(mask).size == pytest.approx(3 / 5), "a hundredth of the picture"


def test_without_a_mask_only_the_words_tell() -> None:
    words_alone = {**dict.fromkeys(NAMES, 0.0), "words": -0.2}
    assert asdict(Signs.read(NOTHING, (), None, -0.2)) == words_alone
    assert asdict(Signs.read(NOTHING, [(1, 1, 2, 2)], torch.full((20, 30), -1.0), -0.2)) == words_alone, (
        "it came out empty"
    )


def made_up(count: int, seed: int = 0) -> tuple[list[Mapping[str, float]], list[float]]:
    """Answers whose Dice follows from two of their signs, and from chance."""
    rng = np.random.default_rng(seed)
    rows = [dict(zip(NAMES, rng.uniform(0, 1, len(NAMES)).tolist(), strict=True)) for _ in range(count)]
    expected = [1 / (1 + np.exp(-(4 * row["sharp"] + 3 * row["boxes"] - 4))) for row in rows]
    return list(rows), [float(np.clip(rng.normal(each, 0.1), 0, 1)) for each in expected]


def test_it_learns_which_signs_tell() -> None:
    fitted = Confidence.fit(*made_up(600))
    fresh, dices = made_up(300, seed=1)
    told = np.array([fitted.of(each) for each in fresh])
    assert np.corrcoef(told, dices)[0, 1] > 0.9
    assert abs(told.mean() - np.mean(dices)) < 0.02
    strongest = sorted(NAMES, key=lambda name: -abs(fitted.weights[name]))[:2]
    assert set(strongest) == {"sharp", "boxes"}
    assert abs(fitted.weights["size"]) < 0.3


def test_signs_that_never_differ_do_no_harm() -> None:
    rows, dices = made_up(100)
    fitted = Confidence.fit([{**row, "size": 0.0} for row in rows], dices)
    assert np.isfinite(list(fitted.weights.values())).all() and 0 < fitted.of({**rows[0], "size": 0.0}) < 1
    always = Confidence.fit(rows, [1.0] * 100)
    assert 0.9 < always.of(rows[0]) < 1


def test_too_few_answers_teach_nothing() -> None:
    with pytest.raises(DataError, match="29 answers; expected at least 30"):
        Confidence.fit(*made_up(29))


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    assert Confidence.load(tmp_path) is None
    fitted = Confidence.fit(*made_up(40))
    fitted.save(tmp_path)
    assert Confidence.load(tmp_path) == fitted
    for broken in ("{", "[]", json.dumps({"weights": {"found": 1.0}, "bias": 0.0}), '{"weights": {}, "bias": "x"}'):
        (tmp_path / "confidence.json").write_text(broken)
        with pytest.raises(ModelError, match="damaged"):
            Confidence.load(tmp_path)
