"""The runner: what it asks, records and resumes; and what the records add up to, against figures worked by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreseg.answer import render
from coreseg.data.build.describe import describe
from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError, DataError
from coreseg.evaluate import Evaluation, Record, evaluate, summarise
from coreseg.sentences import contradict
from coreseg.types import Answer, Result, Sample

Make = Callable[..., Record]


def run(lesion_set: LesionSet, predictor: Any, **options: Any) -> Evaluation:
    """`evaluate` without a progress bar."""
    return evaluate(lesion_set, predictor, progress=False, **options)


def means(block: dict[str, Any]) -> dict[str, float]:
    """The means of a block of figures, without their intervals."""
    return {name: figure["mean"] for name, figure in block.items() if isinstance(figure, dict) and "mean" in figure}


def test_gold_answers_score_full_marks(lesion_set: LesionSet, oracle: Any) -> None:
    summary = run(lesion_set, oracle).summary
    assert (summary["n"], summary["n_lesion"], summary["n_lesion_free"]) == (5, 4, 1)
    full = dict.fromkeys(("dice", "iou", "detect"), 100.0)
    none = dict.fromkeys(("failure", "invalid", "missed", "near_miss", "wrong_category"), 0.0)
    assert means(summary["pooled"]) == means(summary["macro"]) == {**full, **none}
    assert summary["presence"]["specificity"]["mean"] == summary["presence"]["sensitivity"]["mean"] == 100.0
    assert summary["seconds_median"] == 0.25
    assert summary["attributes"] is None, "attribute questions are asked on demand only"


def test_absent_everywhere_is_missed_not_invalid(
    lesion_set: LesionSet, scripted: Any, give: Callable[..., Result]
) -> None:
    silent = scripted(lambda sample, image, question: give(sample.category, np.zeros(image.shape[:2], bool), []))
    summary = run(lesion_set, silent).summary
    pooled = means(summary["pooled"])
    assert (pooled["failure"], pooled["missed"], pooled["invalid"]) == (100.0, 100.0, 0.0)
    assert pooled["dice"] == pooled["detect"] == 0.0
    assert summary["presence"]["sensitivity"]["mean"] == 0.0
    assert summary["presence"]["specificity"]["mean"] == 100.0


def test_a_malformed_answer_counts_as_an_empty_mask(
    lesion_set: LesionSet, scripted: Any, give: Callable[..., Result]
) -> None:
    def answer(sample: Sample, image: np.ndarray, question: str) -> Result:
        return give(sample.category, np.ones(image.shape[:2], bool), [(0, 0, 40, 30)], text="The lesion is <seg>")

    evaluation = run(lesion_set, scripted(answer))
    pooled = means(evaluation.summary["pooled"])
    assert (pooled["failure"], pooled["missed"], pooled["invalid"]) == (100.0, 0.0, 100.0)
    assert pooled["dice"] == pooled["iou"] == pooled["detect"] == 0.0
    presence = evaluation.summary["presence"]
    assert presence["specificity"]["mean"] == presence["invalid_lesion_free"]["mean"] == 100.0
    assert presence["sensitivity"]["mean"] == presence["called_absent"]["mean"] == 0.0
    assert all(record.boxes == () and record.predicted_share == 0 and not record.found for record in evaluation.records)


def test_lesion_free_rows_never_enter_the_headlines(
    lesion_set: LesionSet, scripted: Any, give: Callable[..., Result]
) -> None:
    everything = scripted(
        lambda sample, image, question: give(sample.category, np.ones(image.shape[:2], bool), [(0, 0, 40, 30)])
    )
    summary = run(lesion_set, everything).summary
    dices = [200 * area / (1200 + area) for area in (100, 100, 125, 16)]
    assert summary["pooled"]["dice"]["mean"] == pytest.approx(np.mean(dices))
    assert summary["macro"]["dice"]["mean"] == pytest.approx((np.mean(dices[:3]) + dices[3]) / 2)
    assert summary["macro"]["sets"] == 2
    assert summary["pooled"]["near_miss"]["mean"] == 25.0, "the polyp's Dice is 0.026"
    assert summary["pooled"]["failure"]["mean"] == 0.0, "the whole image never fails"
    assert summary["presence"]["specificity"]["mean"] == 0.0
    assert summary["presence"]["specificity_by_source"]["clear"]["mean"] == 0.0
    assert set(summary["by"]["source"]) == {"cysts", "polyps"}
    assert summary["by"]["anatomy"]["abdomen"]["dice"]["mean"] == pytest.approx(dices[3])
    assert summary["by"]["modality"]["mri"]["n"] == summary["by"]["category"]["cyst"]["n"] == 3


def test_another_category_in_the_answer_is_flagged(
    lesion_set: LesionSet, oracle: Any, give: Callable[..., Result]
) -> None:
    def answer(sample: Sample, image: np.ndarray, question: str) -> Result:
        return give("cyst", lesion_set.mask(sample), sample.boxes)

    summary = run(lesion_set, replace(oracle, answer=answer)).summary
    assert summary["by"]["category"]["polyp"]["wrong_category"]["mean"] == 100.0
    assert summary["by"]["category"]["cyst"]["wrong_category"]["mean"] == 0.0
    assert summary["by"]["category"]["polyp"]["dice"]["mean"] == 100.0, "the flag stands beside the score"


def test_the_rows_own_question_is_asked_unless_held_out_ones_are_wanted(lesion_set: LesionSet, oracle: Any) -> None:
    run(lesion_set, oracle)
    own = [sample.query for sample in lesion_set.split("val")]
    assert oracle.asked == own

    def held_out(**options: Any) -> list[str]:
        predictor = replace(oracle, asked=[])
        run(lesion_set, predictor, held_out_questions=True, **options)
        return predictor.asked

    first = held_out()
    assert first == held_out(batch_size=2), "drawn by seed and row, whatever the batches"
    assert not set(first) & set(own)
    assert any(first != held_out(seed=seed) for seed in (1, 2, 3))


def test_own_words_are_asked_about_each_rows_category(lesion_set: LesionSet, oracle: Any) -> None:
    words = {name: (f"{name}?", f"any {name} here") for name in ("cyst", "polyp")}
    run(lesion_set, oracle, own_words=words)
    asked = zip(oracle.asked, lesion_set.split("val"), strict=True)
    assert all(question in words[sample.category] for question, sample in asked)
    assert len(set(oracle.asked)) > 2, "drawn, not the first each time"
    with pytest.raises(DataError, match="about polyp"):
        run(lesion_set, oracle, own_words={"cyst": ("cyst?",)})
    with pytest.raises(ConfigError, match="one of the two"):
        run(lesion_set, oracle, own_words=words, held_out_questions=True)


def test_batch_size_changes_nothing(lesion_set: LesionSet, oracle: Any) -> None:
    together, single = (run(lesion_set, oracle, batch_size=size, attribute_questions=True).records for size in (8, 1))
    assert together == single


def test_each_answer_is_a_line_on_disk(lesion_set: LesionSet, oracle: Any, tmp_path: Path) -> None:
    evaluation = run(lesion_set, oracle, out=tmp_path / "out")
    header, *lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert json.loads(header)["settings"] == json.loads(json.dumps(evaluation.settings))
    assert len(lines) == 5
    first = json.loads(lines[0])
    assert first["file_name"] == "images/cyst_2.png"
    assert (first["source"], first["case"], first["dice"], first["boxes"]) == ("cysts", "p2", 1.0, [[2, 2, 12, 12]])
    assert first["lesion_share"] == pytest.approx(100 / 1200)


@pytest.mark.parametrize("attributes", [False, True])
def test_a_stopped_run_goes_on(lesion_set: LesionSet, oracle: Any, tmp_path: Path, attributes: bool) -> None:
    def stop_at_polyp(sample: Sample, image: np.ndarray, question: str) -> Result:
        if sample.category == "polyp":
            raise KeyboardInterrupt
        result: Result = oracle.answer(sample, image, question)
        return result

    options = {"batch_size": 1, "attribute_questions": attributes}
    with pytest.raises(KeyboardInterrupt):
        run(lesion_set, replace(oracle, answer=stop_at_polyp), out=tmp_path, **options)
    file = tmp_path / "records.jsonl"
    kept = file.read_bytes()
    # The process may die within a line, and between the lines of one row.
    unfinished_row = kept.splitlines(keepends=True)[1].replace(b'"attribute": ""', b'"attribute": "largest"')
    file.write_bytes(kept + unfinished_row + b'{"file_name": "images/po')
    again = replace(oracle, asked=[])
    resumed = run(lesion_set, again, out=tmp_path, **options)
    assert again.asked == ["Locate and segment the polyp."] * 2, "only what was missing is asked"
    assert resumed.records == run(lesion_set, oracle, **options).records
    assert file.read_bytes().startswith(kept)
    finished = file.read_bytes()
    assert run(lesion_set, again, out=tmp_path, **options).records == resumed.records
    assert file.read_bytes() == finished


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"held_out_questions": True}, {"limit": 2}, {"own_words": {"cyst": ("c?",), "polyp": ("p?",)}}],
)
def test_records_of_another_run_are_not_mixed_in(
    lesion_set: LesionSet, oracle: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    run(lesion_set, oracle, out=tmp_path)
    with pytest.raises(ConfigError, match="another run"):
        run(lesion_set, oracle, out=tmp_path, **change)


def test_a_retrained_checkpoint_is_another_run(lesion_set: LesionSet, oracle: Any, tmp_path: Path) -> None:
    run(lesion_set, replace(oracle, settings={"checkpoint": "aa"}), out=tmp_path)
    with pytest.raises(ConfigError, match="another run"):
        run(lesion_set, replace(oracle, settings={"checkpoint": "bb"}), out=tmp_path)


def test_limit_is_spread_over_the_split(lesion_set: LesionSet, oracle: Any) -> None:
    assert [record.mask_file_name for record in run(lesion_set, oracle, limit=2).records] == [
        "masks/cyst_2.png",
        "masks/cyst_4.png",
    ]
    assert len(run(lesion_set, oracle, limit=99).records) == 5


def test_a_split_without_rows_is_a_clear_error(lesion_set: LesionSet, oracle: Any) -> None:
    with pytest.raises(DataError, match="no rows in split 'test'"):
        run(lesion_set, oracle, split="test")


def test_ignoring_the_attribute_is_visible(
    lesion_set: LesionSet, oracle: Any, give: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coreseg import questions

    def largest_only(image: Any, mask: Any, category: str, rng: Any, held_out: bool = False) -> Any:
        big = np.zeros_like(mask)
        big[2:12, 2:12] = True
        return [questions.AttributeQuestion(text=f"Segment the largest {category}.", mask=big, kind="largest")]

    monkeypatch.setattr(questions, "attribute_questions", largest_only)
    ignoring = run(lesion_set, oracle, attribute_questions=True)
    asked = [record for record in ignoring.records if record.attribute]
    assert [(record.file_name, record.attribute) for record in asked] == [("images/cyst_4.png", "largest")]
    block = means(ignoring.summary["attributes"])
    assert block["dice"] == block["whole"] == block["plain"] == pytest.approx(100 * 200 / 225)
    assert block["gain"] == 0.0
    assert block["rest"] == block["plain_rest"] == pytest.approx(100 * 50 / 150), "it outlines the other one too"
    assert block["detect"] == pytest.approx(100 * 2 / 3)
    assert ignoring.summary["n"] == 5, "attribute questions enter no other figure"
    assert ignoring.summary["pooled"]["dice"]["mean"] == 100.0

    def obey(sample: Sample, image: np.ndarray, question: str) -> Result:
        mask = lesion_set.mask(sample).copy()
        if "largest" not in question:
            return give(sample.category, mask, sample.boxes)
        mask[15:] = False
        return give(sample.category, mask, sample.boxes[:1])

    block = run(lesion_set, replace(oracle, answer=obey), attribute_questions=True).summary["attributes"]
    assert means(block)["dice"] == means(block)["detect"] == 100.0
    assert means(block)["gain"] == block["by"]["largest"]["mean"] == pytest.approx(100 * 25 / 225)
    assert (means(block)["rest"], means(block)["plain_rest"]) == (0.0, pytest.approx(100 * 50 / 150))


def test_attribute_questions_of_the_package_are_asked_and_scored(lesion_set: LesionSet, oracle: Any) -> None:
    evaluation = run(lesion_set, oracle, attribute_questions=True)
    asked = [record for record in evaluation.records if record.attribute]
    assert asked
    assert {record.file_name for record in asked} == {"images/cyst_4.png"}, "one lesion leaves nothing to choose"
    assert all(record.question in oracle.asked and record.dice == record.whole_dice < 1 for record in asked)


@settings(max_examples=25)  # a summary holds some hundred bootstraps
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.03, 0.5, 1.0]), st.booleans(), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_summary_equals_brute_force(made: Make, rows: list[tuple[str, float, bool, bool]]) -> None:
    records = [
        made(source=source, dice=score if valid else 0.0, valid=valid, lesion_share=0.1 * lesion)
        for source, score, valid, lesion in rows
    ]
    summary = summarise(records)
    json.dumps(summary, allow_nan=False)
    lesion = [record for record in records if record.lesion_share]
    assert (summary["n"], summary["n_lesion"]) == (len(records), len(lesion))
    if not lesion:
        assert summary["pooled"] is summary["macro"] is summary["presence"]["sensitivity"] is None
        return
    pooled, macro = means(summary["pooled"]), means(summary["macro"])
    assert pooled["dice"] == pytest.approx(100 * sum(record.dice for record in lesion) / len(lesion))
    assert pooled["failure"] == pytest.approx(100 * sum(record.dice == 0 for record in lesion) / len(lesion))
    assert pooled["failure"] == pytest.approx(pooled["invalid"] + pooled["missed"])
    assert pooled["near_miss"] == pytest.approx(100 * sum(record.dice < 0.05 for record in lesion) / len(lesion))
    of_set = [[record.dice for record in lesion if record.source == name] for name in "abc"]
    assert macro["dice"] == pytest.approx(100 * np.mean([np.mean(dices) for dices in of_set if dices]))
    for name in pooled:
        assert summary["pooled"][name]["low"] <= pooled[name] + 1e-9 <= summary["pooled"][name]["high"] + 2e-9


def test_no_records_sum_up_to_nothing() -> None:
    summary = summarise([])
    assert summary["n"] == 0
    assert summary["pooled"] is summary["macro"] is summary["attributes"] is summary["seconds_median"] is None


def test_size_quartiles_hold_a_quarter_each(made: Make) -> None:
    records = [made(lesion_share=share / 100, dice=share / 100) for share in range(1, 13)]
    quarters = summarise(records)["by"]["size"]
    assert [(name[:2], block["n"]) for name, block in quarters.items()] == [(f"Q{k}", 3) for k in (1, 2, 3, 4)]
    assert [block["dice"]["mean"] for block in quarters.values()] == pytest.approx([2.0, 5.0, 8.0, 11.0])


def test_equal_sizes_do_not_break_the_quartiles(made: Make) -> None:
    assert sum(block["n"] for block in summarise([made()] * 5)["by"]["size"].values()) == 5


def test_agreement_is_of_what_was_found(made: Make) -> None:
    """Not of lesion-free rows, answers of "no", and those that show no signs."""
    agreeing = [made(source="a", signs={"boxes": 0.5}), made(source="b", signs={"boxes": 1.0})]
    agreeing.append(made(source="b", signs={"boxes": 0.9}))
    others = [made(signs=None), made(found=False, signs={"boxes": 0.0}), made(lesion_share=0.0, signs={"boxes": 0.0})]
    told = summarise([*agreeing, *others])["agreement"]
    assert (told["n"], told["pooled"]["mean"], told["macro"]["mean"]) == (3, pytest.approx(80.0), pytest.approx(72.5))
    assert summarise(others)["agreement"] is None


def test_sensitivity_wants_the_word_and_the_mask(made: Make) -> None:
    records = [made(), made(found=False), made(predicted_share=0.0), made(lesion_share=0.0)]
    presence = summarise(records)["presence"]
    assert presence["sensitivity"]["mean"] == pytest.approx(100 / 3)
    assert presence["specificity"]["mean"] == 0.0


def test_intervals_go_by_case(made: Make) -> None:
    dices = [0.0, 1.0] * 20
    known = summarise([made(dice=dice, case=str(dice)) for dice in dices])["pooled"]["dice"]
    unknown = summarise([made(dice=dice, file_name=f"{row}.png") for row, dice in enumerate(dices)])["pooled"]["dice"]
    one_image = summarise([made(dice=dice, attribute="largest") for dice in dices])["attributes"]["dice"]
    assert (known["low"], known["high"]) == (0.0, 100.0)
    assert (one_image["low"], one_image["high"]) == (50.0, 50.0), "questions about one image go together"
    assert unknown["low"] > 30 and unknown["high"] < 70


def test_statements_are_held_against_the_reference_and_the_answers_own_mask(made: Make) -> None:
    def says(side: str, true: str, own: str) -> Record:
        answer = Answer("cyst", ((0, 0, 1, 1),), f"An area lies on the {side} side of the image.", found=True)
        words = {"count": ["one"], "side": [true]}
        return made(text=render(answer), reference_words=words, mask_words={"side": [own, "centre"]})

    rows = [says("left", "left", "left"), says("left", "left", "right"), says("left", "left", "left")]
    told = summarise([*rows, says("left", "right", "left")])["statements"]
    assert told["kinds"] == 1.0, "it says nothing of the count"
    side = told["by"]["side"]
    assert (side["n"], side["stated"]) == (4, 100.0)
    assert side["balanced"]["mean"] == 50.0, "always the same word, and one of two values is always wrong"
    assert side["own"]["mean"] == pytest.approx(50.0), "right of the three that lie left, wrong of the one"
    assert told["by"]["count"] == {"n": 0, "stated": 0.0, "balanced": None, "own": None}
    assert told["by"]["edge"]["stated"] is None, "of none of them can it be measured"
    malformed = replace(rows[0], valid=False)
    assert summarise([malformed])["statements"]["kinds"] == 0.0, "an answer without form states nothing"
    assert summarise([made()])["statements"] is None, "records that do not know what is true"


def test_true_words_score_full_marks_and_contradicted_ones_none(
    lesion_set: LesionSet, oracle: Any, scripted: Any
) -> None:
    def telling(change: Callable[[str], str | None]) -> Any:
        def answer(sample: Sample, image: np.ndarray, question: str) -> Result:
            result = oracle.answer(sample, image, question)
            text = describe(image, result.mask, sample.modality, sample.anatomy, sample.category, 0)
            words = Answer(sample.category, sample.boxes, change(text) or text, bool(sample.boxes))
            return replace(result, text=render(words))

        return scripted(answer)

    true = run(lesion_set, telling(lambda text: text)).summary["statements"]
    assert true["kinds"] >= 4
    assert all(scores["balanced"]["mean"] == 100.0 for scores in true["by"].values() if scores["n"])
    false = run(lesion_set, telling(contradict)).summary["statements"]["by"]
    assert all(false[kind]["balanced"]["mean"] == 0.0 for kind in ("side", "place", "count"))
    assert false["size"]["balanced"]["mean"] == 100.0


def test_pairs_tell_the_asked_lesion_from_the_other_in_the_same_image(
    tmp_path: Path, lesion_set: LesionSet, oracle: Any, scripted: Any, give: Callable[..., Result]
) -> None:
    """A second category is added to the image of the first cyst in val; one predictor listens, one does not."""
    assert run(lesion_set, oracle).summary["pairs"] is None
    cyst = next(row for row in lesion_set.split("val") if row.category == "cyst")
    (lesion_set.root / "masks/two.png").write_bytes((lesion_set.root / "masks/polyp_1.png").read_bytes())
    other = replace(cyst, category="polyp", mask_file_name="masks/two.png", boxes=((20, 10, 24, 14),))
    both = LesionSet(lesion_set.root, (*lesion_set.samples, other))
    pairs = run(both, oracle).summary["pairs"]
    assert pairs["n"] == 2 and pairs["by"].keys() == {"cysts"}
    assert pairs["dice"]["mean"] == 100.0 and pairs["other"]["mean"] == 0.0
    deaf = scripted(lambda sample, image, question: oracle.answer(cyst, image, question))
    pairs = run(both, deaf).summary["pairs"]
    assert pairs["dice"]["mean"] == pairs["other"]["mean"] == 50.0
