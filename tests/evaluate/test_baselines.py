"""The blind guess: right by hand on a small set, best by brute force, and never looking."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coreseg.answer import parse
from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.evaluate import BlindBaseline, Predictor, evaluate
from coreseg.evaluate.baselines import GRID, _guess, _resized
from coreseg.metrics import dice
from coreseg.sentences import find_all
from coreseg.types import Result


def predicted(blind: BlindBaseline, lesion_set: LesionSet, row: int, image: np.ndarray | None = None) -> Result:
    """The guess about one row of val."""
    sample = lesion_set.split("val")[row]
    [result] = blind.predict([sample], [lesion_set.image(sample) if image is None else image], [sample.query])
    return result


def test_the_guess_is_the_best_threshold_of_the_mean_mask_and_the_mean_box(lesion_set: LesionSet) -> None:
    result = predicted(BlindBaseline.fit(lesion_set), lesion_set, 0)
    # Two training cysts, x from 2 and from 4: their union scores 0.91 on each, their overlap 0.89.
    both = np.zeros((30, 40), bool)
    both[2:12, 2:14] = True
    assert dice(result.mask, both) > 0.97
    assert result.boxes.tolist() == [[3, 2, 13, 12]]


def test_the_answer_is_well_formed(lesion_set: LesionSet) -> None:
    result = predicted(BlindBaseline.fit(lesion_set), lesion_set, 0)
    answer = parse(result.text, frame_wh=(40, 30))
    assert answer is not None and result.valid and result.found
    assert (answer.category, answer.boxes, answer.reasoning) == ("cyst", ((3, 2, 13, 12),), result.reasoning)


def test_it_never_looks(lesion_set: LesionSet) -> None:
    blind = BlindBaseline.fit(lesion_set)
    black = predicted(blind, lesion_set, 0, np.zeros((30, 40, 3), np.uint8))
    assert np.array_equal(black.mask, predicted(blind, lesion_set, 0).mask)
    wide = predicted(blind, lesion_set, 0, np.zeros((30, 80, 3), np.uint8))
    assert wide.boxes.tolist() == [[6, 2, 26, 12]], "the guess scales with the image"
    assert wide.mask.shape == (30, 80)


def test_lesion_free_training_rows_do_not_thin_the_guess_and_it_always_finds(lesion_set: LesionSet) -> None:
    blind = BlindBaseline.fit(lesion_set)
    assert blind.by_category["polyp"].mean_mask.max() == 1.0
    summary = evaluate(lesion_set, blind, progress=False).summary
    assert summary["presence"]["specificity"]["mean"] == 0.0
    assert summary["presence"]["sensitivity"]["mean"] == 100.0
    assert summary["by"]["category"]["polyp"]["dice"]["mean"] > 90.0
    assert isinstance(blind, Predictor)
    assert json.dumps(dict(blind.settings))


def test_a_category_that_training_lacks_gets_the_overall_guess(lesion_set: LesionSet) -> None:
    blind = BlindBaseline.fit(lesion_set)
    unknown = replace(lesion_set.split("val")[0], category="wart")
    [result] = blind.predict([unknown], [np.zeros((GRID, GRID, 3), np.uint8)], ["Where?"])
    assert np.array_equal(result.mask, blind.overall.mean_mask >= blind.overall.threshold)
    assert "wart" in result.text


def test_it_says_what_the_training_texts_of_the_category_say_most(lesion_set: LesionSet) -> None:
    said = iter(["It is small, on the left.", "A large area on the left.", "A small spot on the right."])
    samples = [
        replace(row, reasoning=next(said), category="cyst") if row.split == "train" and row.boxes else row
        for row in lesion_set.samples
    ]
    blind = BlindBaseline.fit(LesionSet(lesion_set.root, tuple(samples)))
    stated = find_all(predicted(blind, lesion_set, 0).reasoning)
    assert (stated["side"], stated["size"]) == ({"left"}, {"small"})
    assert "edge" not in stated, "no text of training says anything of it"


def test_its_settings_tell_what_it_learned_from(lesion_set: LesionSet) -> None:
    before = BlindBaseline.fit(lesion_set).settings
    assert BlindBaseline.fit(lesion_set).settings == before
    mask = lesion_set.root / lesion_set.split("train")[0].mask_file_name
    mask.write_bytes((lesion_set.root / lesion_set.split("train")[1].mask_file_name).read_bytes())
    assert BlindBaseline.fit(lesion_set).settings != before, "or a stopped run would go on with old answers"


def test_a_set_without_lesions_cannot_be_fitted(lesion_set: LesionSet) -> None:
    with pytest.raises(DataError, match="no lesion in split 'test'"):
        BlindBaseline.fit(lesion_set, split="test")


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_scores_better_on_train(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :32]
    masks = [np.hypot(rows - rng.normal(16, 5), columns - rng.normal(16, 5)) < rng.uniform(1.5, 7) for _ in range(12)]
    guess = _guess(np.stack(masks).astype(np.float32), np.zeros((12, 4)), [])

    def score(threshold: float) -> float:
        return float(np.mean([dice(guess.mean_mask >= threshold, mask) for mask in masks]))

    levels = np.unique(guess.mean_mask)
    assert score(guess.threshold) == pytest.approx(max(score(level) for level in levels if level > 0))


def test_a_lesion_of_one_pixel_keeps_its_area_on_the_grid() -> None:
    mask = np.zeros((384, 300), bool)
    mask[101, 77] = True
    share = _resized(mask, GRID, GRID)
    assert share.mean() == pytest.approx(mask.mean(), rel=1e-4)
    assert share.argmax() == int(101.5 * GRID / 384) * GRID + int(77.5 * GRID / 300)


def test_resizing_by_whole_steps_is_exact() -> None:
    mask = np.random.default_rng(0).random((8, 6)) > 0.5
    assert np.array_equal(_resized(mask, 16, 18), mask.repeat(2, 0).repeat(3, 1))
    assert np.allclose(_resized(mask, 4, 2), mask.reshape(4, 2, 2, 3).mean(axis=(1, 3)))


@pytest.mark.slow
def test_on_the_real_images_it_gets_what_is_known(shared_lesions: Path, tmp_path: Path) -> None:
    from coreseg.data.sources import import_set

    import_set(shared_lesions, tmp_path / "set", describe=lambda *_: "", progress=False)
    lesion_set = LesionSet.open(tmp_path / "set")
    evaluation = evaluate(lesion_set, BlindBaseline.fit(lesion_set), progress=False)
    assert evaluation.summary["n_lesion"] == 497
    assert evaluation.summary["n_lesion_free"] == 41
    # Known from an independent measurement: 32 pooled, 21 macro, 25 pooled without ddti, fails on 14 %.
    assert evaluation.summary["pooled"]["dice"]["mean"] == pytest.approx(32, abs=0.6)
    assert evaluation.summary["macro"]["dice"]["mean"] == pytest.approx(21, abs=0.6)
    assert evaluation.summary["pooled"]["failure"]["mean"] == pytest.approx(14, abs=0.6)
    rest = [each.dice for each in evaluation.records if each.lesion_share and "ddti" not in each.source]
    assert 100 * np.mean(rest) == pytest.approx(25, abs=0.6)
