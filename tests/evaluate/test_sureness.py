"""Confidence beside the Dice that came out: order, calibration, and what is gained by keeping the surest answers."""

import numpy as np
import pytest

from coreseg.evaluate.sureness import auroc, calibration_error, risks, sureness


def arrays(*columns: list[float]) -> list[np.ndarray]:
    return [np.array(column) for column in columns]


def test_auroc_counts_pairs() -> None:
    sure, dice = arrays([0.9, 0.8, 0.3, 0.6, 0.6], [0.9, 0.5, 0.4, 0.1, 0.7])
    good, bad = sure[dice >= 0.5], sure[dice < 0.5]
    pairs = [1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad]
    assert auroc(sure, dice) == pytest.approx(np.mean(pairs))
    assert auroc(np.full(5, 0.4), dice) == 0.5, "a constant tells nothing"
    assert np.isnan(auroc(*arrays([0.5, 0.6], [0.9, 0.8])))


def test_calibration_error() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0, 1, 5000)
    dice = (rng.uniform(0, 1, 5000) < sure).astype(float)
    assert calibration_error(sure, dice) < 0.03
    assert calibration_error(sure, 0 * dice) == pytest.approx(sure.mean())
    assert calibration_error(*arrays([0.2, 0.9], [0.4, 0.6])) == pytest.approx((0.2 + 0.3) / 2), "a bin each"


def test_risks_of_the_surest() -> None:
    sure, dice = arrays([0.1, 0.9, 0.5], [0.0, 0.8, 0.4])
    assert risks(sure, dice) == pytest.approx([0.2, (0.2 + 0.6) / 2, (0.2 + 0.6 + 1.0) / 3])
    assert risks(np.ones(3), dice) == pytest.approx([0.6] * 3), "no order without differences"


def test_the_summary() -> None:
    rng = np.random.default_rng(1)
    dice = rng.uniform(0, 1, 300)
    sure = np.clip(dice + rng.normal(0, 0.2, 300), 0, 1)
    cases = [str(row // 3) for row in range(300)]
    told = sureness(sure.tolist(), dice.tolist(), cases)
    assert told is not None and told["n"] == 300
    for name in ("auroc", "calibration_error", "risk", "risk_kept", "risk_best", "kept_90", "kept_50"):
        assert told[name]["low"] <= told[name]["mean"] <= told[name]["high"], name
    assert 85 < told["auroc"]["mean"] < 100
    assert told["risk_best"]["mean"] < told["risk_kept"]["mean"] < told["risk"]["mean"]
    assert told["kept_50"]["mean"] > told["kept_75"]["mean"] > told["kept_90"]["mean"] > 100 - told["risk"]["mean"]
    assert told == sureness(sure.tolist(), dice.tolist(), cases), "the same again"


def test_nothing_to_tell_from() -> None:
    assert sureness([], [], []) is None
    only_good = sureness([0.5, 0.6], [0.9, 0.8], ["a", "b"])
    assert only_good is not None and only_good["auroc"] is None and only_good["risk"]["mean"] == pytest.approx(15.0)
