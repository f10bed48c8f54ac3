"""The filter's arithmetic: folds by case, the power law, the knee, and what is kept, on curves with known answers."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreseg.data.build import difficulty
from coreseg.data.build.difficulty import (
    FALLBACK_SHARE,
    POOL,
    Decision,
    Knee,
    PowerLaw,
    decide,
    ease,
    find_knee,
    fit_power_law,
    group_rows,
    split_folds,
)
from coreseg.statements import Features
from coreseg.types import Sample

ROW = Sample("", "", "mri", "head", "cyst", ((0, 0, 2, 2),), "?", "", "a", "", "", "train")


def rows(source: str, count: int, cases: int = 0, **fields: Any) -> list[Sample]:
    """Rows of one source; with `cases`, dealt among so many patients."""
    names = [f"{source}_{number}" for number in range(count)]
    case_of = [f"{source} {number % cases}" if cases else "" for number in range(count)]
    pairs = zip(names, case_of, strict=True)
    return [replace(ROW, file_name=n, mask_file_name=n, source=source, case=c, **fields) for n, c in pairs]


def two_pieces(steep: int = 20, flat: int = 80) -> np.ndarray:
    """From 0.1 to 0.8 in `steep` rows, then to 0.9: the knee is the corner."""
    return np.concatenate([np.linspace(0.1, 0.8, steep), np.linspace(0.8, 0.9, flat + 1)[1:]])


def power_law_errors(x_min: float = 0.05, alpha: float = 2.5, rows: int = 400) -> np.ndarray:
    """Errors of which the larger 70 % follow a power law exactly, by its quantiles; the others lie evenly below."""
    quantiles = (np.arange(int(0.7 * rows)) + 0.5) / int(0.7 * rows)
    tail = x_min * (1 - quantiles) ** (-1 / (alpha - 1))
    return np.concatenate([np.linspace(0.2 * x_min, x_min, rows - len(tail), endpoint=False), tail])


# --- groups and folds ------------------------------------------------------------------------------------------------


def test_small_sources_and_those_of_few_cases_are_pooled() -> None:
    samples = rows("big", 50) + rows("small", 49) + rows("few", 60, cases=2) + rows("healthy", 70, boxes=())
    groups = group_rows(samples, pool_under=50, folds=3)
    assert list(groups) == ["big", POOL]
    assert {name: len(members) for name, members in groups.items()} == {"big": 50, POOL: 109}
    assert {sample.source for sample in groups[POOL]} == {"small", "few"}
    assert list(group_rows(samples, pool_under=49, folds=2)) == ["big", "few", "small"]


@given(
    cases=st.lists(st.integers(0, 12), min_size=2, max_size=40), folds=st.integers(2, 5), seed=st.integers(0, 2**32 - 1)
)
def test_every_row_is_held_out_once_and_no_case_crosses(cases: list[int], folds: int, seed: int) -> None:
    samples = [replace(ROW, file_name=f"{n}.png", case=f"p{case}") for n, case in enumerate(cases)]
    found = split_folds("a", samples, folds, seed)
    distinct = len(set(cases))
    assert len(found) == (min(folds, distinct) if distinct > 1 else 0)
    if found:
        assert Counter(sample for fold in found for sample in fold.held_out) == Counter(samples)
    for fold in found:
        assert fold.train and fold.held_out
        assert not {sample.case for sample in fold.train} & {sample.case for sample in fold.held_out}
        assert set(fold.train) | set(fold.held_out) == set(samples)


def test_folds_are_even_and_depend_on_the_seed_alone() -> None:
    samples = rows("a", 100)
    first, again, other = (split_folds("a", samples, 3, seed) for seed in (0, 0, 1))
    assert sorted(len(fold.held_out) for fold in first) == [33, 33, 34]
    assert first == again != other
    turned = split_folds("a", samples[::-1], 3, 0)
    assert [set(fold.held_out) for fold in turned] == [set(fold.held_out) for fold in first], "not on the file's order"


def test_folds_are_even_though_one_case_is_large() -> None:
    for seed in range(5):
        samples = rows("one", 30, cases=1) + rows("others", 30)
        assert [len(fold.held_out) for fold in split_folds("a", samples, 2, seed)] == [30, 30]


def test_a_picture_without_a_case_stays_in_one_fold_with_all_of_its_rows() -> None:
    samples = [replace(row, category=name) for row in rows("a", 12) for name in ("cyst", "nodule")]
    # One of the two rows of this picture knows its patient, who has another picture too.
    samples[0] = replace(samples[0], case="p")
    samples[5] = replace(samples[5], case="p")
    for fold in split_folds("a", samples, 4, 0):
        held_out = {sample.file_name for sample in fold.held_out}
        assert not held_out & {sample.file_name for sample in fold.train}
        assert (samples[0].file_name in held_out) == (samples[5].file_name in held_out)


# --- power law and knee ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_min", "alpha"), [(0.05, 2.5), (0.1, 4.0)])
def test_the_power_law_is_found_where_it_begins(x_min: float, alpha: float) -> None:
    errors = power_law_errors(x_min, alpha)
    law = fit_power_law(np.sort(1 - errors))
    assert law is not None
    assert law.x_min == pytest.approx(x_min, rel=0.1) and law.alpha == pytest.approx(alpha, rel=0.05)
    assert law.tail == (errors >= law.x_min - 1e-12).sum() and law.distance < 0.05


def test_the_fitted_curve_is_that_of_the_law() -> None:
    errors = power_law_errors()
    curve = np.sort(1 - errors)
    law = fit_power_law(curve)
    assert law is not None
    expected = law.dice()
    assert len(expected) == law.tail and expected[-1] == pytest.approx(1 - law.x_min)
    assert expected[0] == 0 and (np.diff(expected) >= 0).all()
    middle = slice(law.tail // 10, law.tail)
    assert np.abs(expected[middle] - curve[: law.tail][middle]).max() < 0.01


def test_a_steep_tail_has_the_exponent_it_has() -> None:
    """The library's own range for alpha ends at 3."""
    law = fit_power_law(np.sort(1 - power_law_errors(0.5, 9.0, 100)))
    assert law is not None and law.alpha == pytest.approx(9.0, rel=0.1)


def test_a_power_law_is_fitted_to_no_fewer_than_ten_rows() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        law = fit_power_law(np.sort(generator.random(30)))
        assert law is None or law.tail >= 10


def test_the_knee_is_the_corner() -> None:
    for steep, flat in ((20, 80), (7, 200)):
        knee = find_knee(two_pieces(steep, flat))
        assert knee is not None and knee.rank == steep and knee.dice == pytest.approx(0.8)


def test_the_knee_of_a_noisy_curve_is_still_the_corner() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        noisy = np.sort(two_pieces(60, 240) + generator.normal(0, 0.01, 300))
        knee = find_knee(noisy)
        assert knee is not None and 50 <= knee.rank <= 70


@pytest.mark.parametrize(
    "curve",
    [
        np.linspace(0.1, 0.9, 60),
        np.sort(np.random.default_rng(1).random(400)),
        np.linspace(0, 1, 60) ** 3,
        np.concatenate([np.zeros(50), np.linspace(0, 0.5, 10)]),
        np.concatenate([np.full(1001, 0.5), [0.9]]),
    ],
    ids=["straight", "straight with noise", "hollow", "zeros first", "equal but for the last"],
)
def test_a_curve_without_a_knee_has_none(curve: np.ndarray) -> None:
    assert find_knee(curve) is None


def test_large_groups_are_thinned_without_moving_the_answer() -> None:
    curve = np.sort(1 - power_law_errors(rows=20_000))
    law, knee = fit_power_law(curve), find_knee(two_pieces(4_000, 16_000))
    assert law is not None and law.x_min == pytest.approx(0.05, rel=0.1) and law.tail == pytest.approx(14_000, rel=0.1)
    assert knee is not None and knee.rank == pytest.approx(4_000, abs=20)


# --- what is kept ----------------------------------------------------------------------------------------------------


def with_limits(monkeypatch: pytest.MonkeyPatch, law: PowerLaw | None, knee: Knee | None) -> None:
    monkeypatch.setattr(difficulty, "fit_power_law", lambda curve: law)
    monkeypatch.setattr(difficulty, "find_knee", lambda curve: knee)


LAW = PowerLaw(x_min=0.75, alpha=2.0, tail=25, distance=0.05)
SCORES = np.arange(1, 101) / 100


@pytest.mark.parametrize(
    ("law", "knee", "kept", "rule"),
    [
        (LAW, Knee(40, 0.4), 25, "the lower of 1 - x_min and the Dice at the knee"),
        (LAW, Knee(10, 0.1), 10, "the lower of 1 - x_min and the Dice at the knee"),
        (LAW, None, 25, "the power law alone, as no knee was found"),
        (None, Knee(40, 0.4), 40, "the knee alone, as no power law was found"),
        (None, None, 30, "the hardest 30%, because neither a power law nor a knee was found"),
        (replace(LAW, tail=100), None, 30, "the hardest 30%, because law and knee together would keep every row"),
    ],
)
def test_the_formula_and_its_fallbacks(
    monkeypatch: pytest.MonkeyPatch, law: PowerLaw | None, knee: Knee | None, kept: int, rule: str
) -> None:
    with_limits(monkeypatch, law, knee)
    done = decide(SCORES[::-1])
    assert np.array_equal(done.kept, SCORES[::-1] <= kept / 100)
    assert done.threshold == pytest.approx(kept / 100) and done.rule == rule
    assert (done.power_law, done.knee) == (law, knee), "what was found is told, whatever decided"


def test_on_a_real_curve_both_are_asked() -> None:
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.beta(12, 2, 220), generator.beta(1, 2, 80), np.zeros(20)])
    done = decide(scores)
    assert (
        done.power_law and done.knee and done.threshold == min(done.knee.dice, np.sort(scores)[done.power_law.tail - 1])
    )
    assert np.array_equal(done.kept, scores <= done.threshold)
    assert 0.2 < done.kept.mean() < 0.5


def test_equal_scores_stay_together_under_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch, None, Knee(30, 0.25))
    done = decide(np.repeat([0.0, 0.25, 0.5, 0.75], 20))
    assert done.kept.sum() == 40


@pytest.mark.parametrize(
    ("scores", "kept", "reason"),
    [
        (np.linspace(0, 1, 49), 15, "49 rows are too few for a fit"),
        (np.zeros(60), 18, "every row has the same score"),
        (np.ones(60), 18, "every row has the same score"),
        (np.array([0.4]), 1, "1 rows are too few for a fit"),
        (np.r_[np.zeros(99), 0.5], 30, "law"),
        (np.r_[np.full(20, np.nan), np.zeros(60)], 18, "every row has the same score"),
    ],
)
def test_degenerate_scores_fall_back_and_say_so(scores: np.ndarray, kept: int, reason: str) -> None:
    done = decide(scores)
    assert done.kept.sum() == kept and done.rule.startswith("the hardest 30%, because ") and reason in done.rule


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("scores", [np.full(70, np.nan), np.array([])])
def test_without_any_score_nothing_is_kept(scores: np.ndarray, share: float | None) -> None:
    done = decide(scores, keep_share=share)
    assert not done.kept.any() and done.threshold is None and "no row has a score" in done.rule


scores_of = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, float("nan")]) | st.floats(0, 1), max_size=120)


@given(scores=scores_of, fit_from=st.sampled_from([0, 20, 50]))
def test_no_curve_crashes_the_cut(scores: list[float], fit_from: int) -> None:
    values = np.array(scores, dtype=float)
    done = decide(values, fit_from=fit_from)
    assert not done.kept[np.isnan(values)].any()
    kept, dropped = values[done.kept], values[~done.kept & np.isfinite(values)]
    assert kept.size == 0 or dropped.size == 0 or kept.max() <= dropped.min()
    assert kept.size or not np.isfinite(values).any()
    assert done.threshold is None or done.threshold == kept.max()


@given(scores=scores_of, low=st.floats(0.01, 1), high=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_a_share_is_exact_and_a_smaller_one_keeps_some_of_the_same(
    scores: list[float], low: float, high: float, seed: int
) -> None:
    values, (low, high) = np.array(scores, dtype=float), sorted((low, high))
    few, many = (decide(values, keep_share=share, seed=seed) for share in (low, high))
    count = int(np.isfinite(values).sum())
    for share, done in ((low, few), (high, many)):
        assert done.kept.sum() == min(count, max(1, round(share * count)))
    assert not (few.kept & ~many.kept).any()


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_does_not_depend_on_the_order_of_the_rows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = np.concatenate([generator.beta(8, 2, 60), generator.random(30)])
    order = generator.permutation(len(scores))
    assert np.array_equal(decide(scores).kept[order], decide(scores[order]).kept)


def test_which_of_equal_rows_make_up_a_share_is_drawn() -> None:
    def kept(seed: int) -> list[int]:
        done: Decision = decide(np.zeros(100), keep_share=FALLBACK_SHARE, seed=seed)
        return np.flatnonzero(done.kept).tolist()

    assert kept(0) == kept(0) != kept(1)
    assert max(kept(0)) >= 50, "not the first of the file"


# --- the proxy -------------------------------------------------------------------------------------------------------


def seen(size: float, contrast: float | None, step: float | None) -> Features:
    return Features(0.0, 0.0, 0.0, 0.0, 0.5, 0.5, size, 1, None, None, step, contrast, None)


def test_large_contrasting_and_sharp_lesions_are_easy() -> None:
    found = ease([seen(0.2, -0.4, 0.9), seen(0.1, 0.2, 0.5), seen(0.01, 0.01, 0.1), seen(0.001, None, None)])
    assert found.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert ease([seen(0.1, 0.2, 0.5)] * 2).tolist() == [0.75, 0.75]
