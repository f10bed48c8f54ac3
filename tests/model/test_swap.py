"""The reasoning of real, if tiny, models replaced: the control repeats the answer, and nothing breaks the form."""

from pathlib import Path

import pytest

from coreseg.data.store import LesionSet
from coreseg.evaluate import evaluate
from coreseg.evaluate.predictors import ModelPredictor
from coreseg.evaluate.swap import swap_reasoning
from coreseg.segmenter import Segmenter
from coreseg.testing import write_phantom_set


def test_the_control_repeats_the_answer(segmenter: Segmenter, tmp_path: Path) -> None:
    lesions = LesionSet.open(write_phantom_set(tmp_path, count=12, seed=0, size_wh=(48, 40), negatives=0.0))
    predictor = ModelPredictor(segmenter, "tiny", True, {})
    evaluation = evaluate(lesions, predictor, batch_size=3, progress=False)
    summary = swap_reasoning(lesions, predictor, evaluation, batch_size=3, progress=False).summary
    own, empty = summary["own"], summary["empty"]
    assert own["n"] == empty["n"] == evaluation.summary["n_lesion"] and own["left_out"] == 0
    assert own["same_mask"]["mean"] == own["same_boxes"]["mean"] == 100.0 and own["flipped"]["mean"] == 0.0
    assert own["dice"]["mean"] == pytest.approx(evaluation.summary["pooled"]["dice"]["mean"])
    assert empty["invalid"]["mean"] == 0.0
