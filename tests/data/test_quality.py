"""Whether a text may stay: its form, its statements against the pixels, and the judge, over real HTTP."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from teacher_server import CALM, Answer, Request, TeacherServer, reply_to, well

from coreseg.answer import check_reasoning, parse, render
from coreseg.data.build.describe import describe, describe_rows
from coreseg.data.build.ledger import Ledger
from coreseg.data.build.prompts import _turned_down, picture_for_teacher, prompts_digest
from coreseg.data.build.quality import MAX_WORDS, Facts, clean, pixel_faults, review_rows, text_faults
from coreseg.data.build.replies import Description, Judgement, Thought, parse_reply
from coreseg.data.build.settings import EndpointSettings, TeacherConfig
from coreseg.data.build.stage import Fault, Scores
from coreseg.data.store import LesionSet
from coreseg.sentences import KINDS, VALUES, find, word
from coreseg.statements import NEAR, measure_all
from coreseg.testing import phantom, write_phantom_set
from coreseg.types import Answer as ModelAnswer

GOOD = f"{CALM} This fits the nodule."


def kinds(text: str, category: str = "nodule") -> set[str]:
    return {fault.kind for fault in text_faults(text, category)}


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("**Normal** tissue;\n\n- a `mass`", "Normal tissue; - a mass"),
        ("A mass (at [120, 45]) stands out", "A mass stands out"),
        ("A mass [12, 34, 56, 78] stands out", "A mass stands out"),
        ("The outlined lesion is dark", "The lesion is dark"),
        ("A region, as marked in cyan, is dark", "A region, is dark"),
        ("A mass highlighted by the thin cyan line is dark.", "A mass is dark."),
        ("A mass (outlined in cyan) is dark", "A mass is dark"),
        ("A mass measuring about 3.5 cm in diameter is dark", "A mass is dark"),
        ("A mass, spanning 40 x 50 pixels, is dark", "A mass, is dark"),
        ("A mass covering roughly 12% of the picture", "A mass of the picture"),
        ("\u201cNormal\u201d tissue \u2013 isn\u2019t <b>bright</b>", '"Normal" tissue - isn\'t b bright /b'),
        ("A markedly dark mass with marked shadowing", "A markedly dark mass with marked shadowing"),
        ("It has a crisp outline and a T2 signal", "It has a crisp outline and a T2 signal"),
    ],
)
def test_cleaning_takes_out_what_can_go(raw: str, kept: str) -> None:
    assert clean(raw) == kept
    assert clean(kept) == kept


@pytest.mark.parametrize(
    ("addition", "kind"),
    [
        ("It lies at x 120 and y 45.", "coordinates"),
        ("It covers 12% of it.", "coordinates"),
        ("Its coordinates are plain.", "coordinates"),
        ("It is many pixels wide.", "coordinates"),
        ("A bounding box holds it.", "coordinates"),
        ("It measures 3cm.", "coordinates"),
        ("The outline shows it.", "marking"),
        ("It lies within the contour.", "marking"),
        ("It lies inside, outline and all.", "marking"),
        ("The cyan line runs around it.", "marking"),
        ("The highlighted area is it.", "marking"),
        ("It is marked by a thin line.", "marking"),
        ("The annotation shows it.", "marking"),
        ("It is in the patient's left breast.", "sides"),
        ("It is bright <seg> there.", "form"),
        ("Line\nbreak.", "form"),
        ("病变在左侧" * 3, "form"),
    ],
)
def test_what_may_not_stand_in_a_text_is_found(addition: str, kind: str) -> None:
    assert kinds(f"{GOOD} {addition}") == {kind}


def test_a_good_text_passes_and_fits_the_answer_form() -> None:
    for extra in ("", " It has a crisp outline.", " An ill-defined contour.", " T1 weighting.", " Marked enhancement."):
        text = f"{GOOD}{extra}"
        assert kinds(text) == set()
        check_reasoning(text)
        answer = ModelAnswer("nodule", ((1, 2, 3, 4),), text, found=True)
        assert parse(render(answer)) == answer


def test_length_and_the_name_of_the_lesion() -> None:
    assert kinds("It is a nodule.") == {"form"}
    assert kinds(GOOD + " more" * (MAX_WORDS - len(GOOD.split()))) == set()
    assert kinds(GOOD + " more" * (MAX_WORDS + 1 - len(GOOD.split()))) == {"form"}
    assert kinds(GOOD, "lung opacity") == {"form"}
    assert kinds(GOOD.replace("the nodule", "lung opacities"), "lung opacity") == set()


def test_measured_descriptions_pass() -> None:
    for seed in range(60):
        shown = phantom(seed, size_wh=(96, 64))
        category, mask = next(iter(shown.masks.items()))
        if seed % 6 == 0:
            mask = np.zeros_like(mask)
        text = describe(shown.image, mask, shown.modality, shown.anatomy, category, seed)
        assert text_faults(text, category) == []
        assert clean(text) == text
        assert pixel_faults(text, Facts.of(shown.image, mask)) == []


def test_every_kind_of_lie_is_found_and_named_with_what_was_measured() -> None:
    told: set[str] = set()
    for seed in range(40):
        shown = phantom(seed, size_wh=(128, 96))
        mask = next(iter(shown.masks.values()))
        facts = Facts.of(shown.image, mask)
        for kind, measured in measure_all(shown.image, mask).items():
            passable = {near for true in facts.true[kind] for near in NEAR.get(kind, {}).get(true, ())}
            for value in set(VALUES[kind]) - facts.true[kind] - passable - {"none"}:
                lie = f"Normal tissue is even. Here {word(kind, value, np.random.default_rng(seed))} things are."
                (fault,) = [fault for fault in pixel_faults(lie, facts) if fault.text.startswith(kind)]
                assert fault.kind == "pixels"
                assert f"says {value}; measured on the mask: {measured}" in fault.text
                assert '"Here ' in fault.text and "Normal tissue" not in fault.text
                told.add(kind)
    assert told == set(KINDS)


def test_on_an_empty_mask_every_statement_is_a_lie() -> None:
    shown = phantom(3)
    facts = Facts.of(shown.image, np.zeros(shown.image.shape[:2], bool))
    assert pixel_faults("Nothing stands out.", facts) == []
    (fault,) = pixel_faults("A round spot.", facts)
    assert "shape" in fault.text and "no lesion" in fault.text
    (fault,) = pixel_faults("Two spots.", facts)
    assert "says two; measured on the mask: none" in fault.text


def test_a_neighbouring_value_near_a_threshold_is_no_lie() -> None:
    facts = Facts(
        {"side": "left", "count": "one"},
        {"side": frozenset({"left", "centre"}), "count": frozenset({"one"})},
    )
    assert pixel_faults("It lies centrally in the image.", facts) == []
    assert len(pixel_faults("It lies on the right side of the image.", facts)) == 1


def test_what_is_too_small_to_tell_is_not_judged() -> None:
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), bool)
    mask[10:12, 10:12] = True
    assert pixel_faults("It is oval.", Facts.of(image, mask)) == []
    assert pixel_faults("It lies on the right side.", Facts.of(image, mask)) != []


def test_the_score_is_the_papers() -> None:
    assert Scores(1.0, 0.0, 0.0).score == pytest.approx(0.3)
    assert Scores(0.0, 1.0, 0.0).score == pytest.approx(0.3)
    assert Scores(0.0, 0.0, 1.0).score == pytest.approx(0.4)
    assert Scores(0.8, 0.8, 0.8).passes and not Scores(0.8, 0.8, 0.79).passes


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "Seen."}',
        'Sure! Here it is:\n```json\n{"reasoning": "Seen."}\n```\nAnything else?',
        '<think>{"reasoning": "draft"}</think> {"reasoning": "Seen."}',
        '{"wrong": 1} {"reasoning": "Seen."}',
        'prefix { not json {"reasoning": "Seen."}',
    ],
)
def test_a_reply_is_found_in_what_a_model_writes(text: str) -> None:
    assert parse_reply(text, Thought) == Thought(reasoning="Seen.")


@pytest.mark.parametrize(
    "text",
    [
        "", "no json", '{"reasoning": "Se', '{"reasoning": ""}', '{"reasoning": 3}', '{"reasoning": null}',
        '{"reasoning": "Seen.", "more": 1}', '["Seen."]', "{" * 5000, '{"a":' * 2000,
    ],
)  # fmt: skip
def test_what_is_no_reply(text: str) -> None:
    assert parse_reply(text, Thought) is None


def test_judgements_are_strict() -> None:
    good = '{"normal_anatomy": 1, "lesion": 0.5, "reasoning": 0.0, "criticism": ""}'
    assert parse_reply(good, Judgement) == Judgement(normal_anatomy=1.0, lesion=0.5, reasoning=0.0, criticism="")
    for wrong in ("1.2", "-0.1", '"0.5"', "true", "null", "NaN", "8"):
        assert parse_reply(good.replace("0.5", wrong), Judgement) is None
    assert "Infinity" not in str(Judgement.model_json_schema())
    assert Description.model_json_schema()["additionalProperties"] is False


def test_the_teachers_picture_is_small_and_lined_beside_the_lesion() -> None:
    shown = phantom(5, size_wh=(800, 600), lesions=2)
    mask = next(iter(shown.masks.values()))
    picture = picture_for_teacher(shown.image, mask, 400)
    assert picture.shape == (300, 400, 3)
    lined = (picture == (0, 214, 255)).all(axis=2)
    plain = picture_for_teacher(shown.image, np.zeros_like(mask), 400)
    assert lined.any() and not (plain == (0, 214, 255)).all(axis=2).any()
    assert (picture[~lined] == plain[~lined]).all()
    small = mask[::2, ::2]
    assert not (lined & small).any(), "the lesion stays as it is"
    tiny = np.zeros_like(mask)
    tiny[301, 401] = True
    assert (picture_for_teacher(shown.image, tiny, 100) == (0, 214, 255)).all(axis=2).any()
    assert picture_for_teacher(shown.image, mask, 4096).shape == shown.image.shape


def test_faults_go_back_in_words() -> None:
    assert _turned_down("", []) == ""
    told = _turned_down("It is left.", [Fault("pixels", "it is right"), Fault("form", "too short")])
    assert '"It is left."' in told and "- it is right\n- too short" in told
    assert len(prompts_digest()) == 16


@pytest.fixture
def lesions(tmp_path: Path) -> LesionSet:
    return LesionSet.open(write_phantom_set(tmp_path / "set", count=10, seed=4, size_wh=(64, 48)))


def config_for(server: TeacherServer, **settings: object) -> TeacherConfig:
    return TeacherConfig(judge=EndpointSettings(base_url=server.url, model="judge"), **settings)


def test_review_without_a_judge_finds_lies_and_broken_files(lesions: LesionSet) -> None:
    rows = list(lesions.samples)
    right = next(n for n, row in enumerate(rows) if find("side", row.reasoning) == {"right"})
    rows[right] = replace(rows[right], reasoning=rows[right].reasoning.replace("right", "left"))
    other = next(n for n in range(len(rows)) if n != right)
    (lesions.root / rows[other].file_name).write_text("no picture")
    outcomes = list(review_rows(lesions, rows))
    assert [outcome.sample for outcome in outcomes] == rows
    assert {outcome.faults[0].kind for outcome in outcomes if outcome.faults} == {"picture", "pixels"}
    (fault,) = outcomes[right].faults
    assert "says left; measured on the mask: right" in fault.text


@pytest.mark.parametrize(
    "category", ["COVID-19 consolidation", "grade 3 glioma", "BI-RADS 4 mass", "well-outlined mass", "several nodules"]
)
def test_the_name_of_a_category_states_nothing(lesions: LesionSet, category: str) -> None:
    rows = [replace(row, category=category) for row in lesions.samples]
    rows = [outcome.sample for outcome in describe_rows(lesions, rows)]
    assert all(category.lower()[:8] in row.reasoning.lower() for row in rows)
    assert [fault for outcome in review_rows(lesions, rows) for fault in outcome.faults] == []
    assert clean(f"A {category}") == f"A {category}"
    lying = replace(rows[0], reasoning=f"{rows[0].reasoning} The {category} fills 40 px, outlined.")
    (outcome,) = review_rows(lesions, [lying])
    assert {fault.kind for fault in outcome.faults} >= {"coordinates", "marking"}


def test_review_with_a_judge(lesions: LesionSet, tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        assert request.kind == "judgement" and request.with_picture
        if request.times == 1 and "cyst" in request.words:
            return Answer("Seven out of ten.")
        low = "ultrasound" in request.words
        return Answer(str(reply_to(request, lesion=0.1 if low else 0.9, criticism="Vague.")).replace("'", '"'))

    rows = list(lesions.samples)
    rows[0] = replace(rows[0], reasoning="Too short.")
    with TeacherServer(answer) as server:
        outcomes = list(review_rows(lesions, rows, config_for(server), Ledger(tmp_path / "cache")))
        sent = server.requests
        again = list(review_rows(lesions, rows, config_for(server), Ledger(tmp_path / "cache")))
        assert server.requests == sent
    assert outcomes[0].faults[0].kind == "form" and outcomes[0].scores is None and not outcomes[0].traffic
    for outcome in outcomes[1:]:
        assert outcome.scores
        failed = outcome.sample.modality == "ultrasound"
        assert [fault.kind for fault in outcome.faults] == ["judge"] * failed
        assert not failed or ("score 0.70" in outcome.faults[0].text and "Vague." in outcome.faults[0].text)
        assert outcome.met["judge: unreadable"] == ("cyst" in outcome.sample.category)
    first, second = ([replace(each, traffic=Counter()) for each in run] for run in (outcomes, again))
    assert first == second
    assert all(set(each.traffic) <= {"cached"} for each in again)


def test_a_judge_that_never_judges_sets_aside(lesions: LesionSet, tmp_path: Path) -> None:
    with TeacherServer(lambda request: Answer("Fine, I think.")) as server:
        config = config_for(server, attempts=2)
        outcomes = list(review_rows(lesions, lesions.samples, config, Ledger(tmp_path / "cache")))
        assert server.requests == 2 * len(lesions.samples)
    assert {outcome.faults[0].kind for outcome in outcomes} == {"no reply"}
    assert all(outcome.met == {"judge: unreadable": 2} for outcome in outcomes)


def test_rows_are_read_as_they_are_needed(lesions: LesionSet, tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[object]:
        nonlocal taken
        while True:
            taken += 1
            yield lesions.samples[taken % len(lesions.samples)]

    with TeacherServer(well) as server:
        judge = EndpointSettings(base_url=server.url, model="judge", in_flight=2)
        outcomes = review_rows(lesions, endless(), TeacherConfig(judge=judge), Ledger(tmp_path / "cache"))
        for _ in range(40):
            next(outcomes)
        outcomes.close()
    assert taken <= 40 + 16 * 2
