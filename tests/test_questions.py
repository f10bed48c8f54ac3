import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from coreseg import questions
from coreseg.errors import DataError
from coreseg.questions import (
    among_other_words,
    ask,
    ask_without_name,
    attribute_questions,
    mistyped,
    names_any,
)

SIDE = 100


def picture(*boxes: tuple[int, int, int, int], greys: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture with one rectangle per box, and the mask of all."""
    image, mask = np.full((SIDE, SIDE, 3), 100, dtype=np.uint8), np.zeros((SIDE, SIDE), dtype=bool)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        mask[y1:y2, x1:x2] = True
        image[y1:y2, x1:x2] = greys[index] if greys else 180
    return image, mask


def answers(image: np.ndarray, mask: np.ndarray, held_out: bool = False) -> dict[str, np.ndarray]:
    asked = attribute_questions(image, mask, "polyp", np.random.default_rng(0), held_out)
    assert len({question.kind for question in asked}) == len(asked)
    return {question.kind: question.mask for question in asked}


def test_every_template_reads_well_for_any_category() -> None:
    rng = np.random.default_rng(0)
    texts = {ask("odd abscess", rng) for _ in range(1000)}
    assert all("odd abscess" in text.lower() for text in texts)
    assert not any("{" in text or "a odd" in text.lower() or "abscesss" in text.lower() for text in texts)
    assert any("an odd abscess" in text for text in texts)
    assert any("odd abscesses" in text for text in texts)


def test_training_questions_vary_in_wording_case_and_closing_mark() -> None:
    rng = np.random.default_rng(0)
    texts = [ask("foot ulcer", rng) for _ in range(500)]
    assert len(set(texts)) > 100
    assert any(text == text.lower() for text in texts) and any(text[0].isupper() for text in texts)
    assert any(text[-1] in ".?" for text in texts) and any(text[-1] not in ".?" for text in texts)
    assert any("open sore" in text.lower() for text in texts)


def test_held_out_questions_share_no_wording_with_training() -> None:
    rng = np.random.default_rng(0)
    training = {ask("foot ulcer", rng).lower().rstrip(".?") for _ in range(2000)}
    held_out = {ask("foot ulcer", rng, held_out=True) for _ in range(500)}
    assert len(questions._TEMPLATES) >= 24 and len(questions._HELD_OUT_TEMPLATES) >= 8
    assert not training & {text.lower().rstrip(".?") for text in held_out}
    assert any("wound" in text for text in held_out) and not any("wound" in text for text in training)


def test_no_lay_word_is_both_trained_and_held_out() -> None:
    for in_training, held_out in questions._LAY_WORDS.values():
        assert not set(in_training) & set(held_out)
    for in_training, held_out in questions._TARGETS.values():
        assert not set(in_training) & set(held_out)


def test_the_seed_decides() -> None:
    assert ask("polyp", np.random.default_rng(4)) == ask("polyp", np.random.default_rng(4))


OWN_WORDS = Path(__file__).parents[1] / "recipes" / "nano" / "own_words"


def test_own_words_come_in_two_halves_that_share_no_question() -> None:
    shown, held_back = (questions.read_own_words(OWN_WORDS / f"{half}.toml") for half in ("shown", "held_back"))
    assert shown.keys() == held_back.keys() == questions._LAY_WORDS.keys()
    texts = [[text.lower() for of_one in half.values() for text in of_one] for half in (shown, held_back)]
    assert [len(each) for each in texts] == [100, 100] == [len(set(each)) for each in texts]
    assert not set(texts[0]) & set(texts[1])
    for category in shown:
        of_templates = {
            ask(category, np.random.default_rng(seed), held) for seed in range(300) for held in (True, False)
        }
        assert not {*shown[category], *held_back[category]} & of_templates


@pytest.mark.parametrize("text", ["", "polyp = 'one'", "polyp = []", "polyp = ['  ']", "polyp", "[polyp]\na = 'b'"])
def test_a_file_that_holds_no_questions_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(DataError, match="xpected"):
        questions.read_own_words(tmp_path / "q.toml")
    with pytest.raises(DataError, match="cannot be read"):
        questions.read_own_words(tmp_path / "gone.toml")


def test_other_words_leave_the_question_in_its_order() -> None:
    rng = np.random.default_rng(0)
    question = "Is there a cyst here? Show me where."
    said = [among_other_words(question, rng) for _ in range(200)]
    assert len(set(said)) > 190
    in_order = re.compile(r"\b.*\b".join(re.findall(r"\w+", question)), re.IGNORECASE | re.DOTALL)
    assert all(in_order.search(text) for text in said)


def test_typing_errors_are_in_one_long_word_of_six_and_leave_its_ends() -> None:
    rng = np.random.default_rng(0)
    words = ["Please", "outline", "the", "haemorrhage", "in", "this", "picture", "of", "my", "eye"]
    wrong = Counter()
    for _ in range(600):
        typed = mistyped(" ".join(words), rng).split()
        assert len(typed) == len(words)
        for word, other in zip(words, typed, strict=True):
            wrong[word] += word != other
            assert word[0] == other[0] and abs(len(word) - len(other)) <= 1 and set(other) <= set(word)
    # A swap of two equal letters is no error, and there are pairs of them in "haemorrhage".
    assert all(60 < wrong[word] < 140 for word in words if len(word) >= 4)
    assert all(wrong[word] == 0 for word in words if len(word) < 4)
    assert mistyped("", rng) == ""


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("where is the brain tumour", True),
        ("brian tumr?", True),
        ("Any infarct?", True),
        ("my stroke, please", True),
        ("Where is the cat?", False),
        ("Outline the brain.", False),
        ("Would you find it?", False),
        ("", False),
    ],
)
def test_lesions_are_named_by_lay_words_and_with_errors(question: str, named: bool) -> None:
    assert names_any(question, ["brain tumor", "ischemic stroke lesion"]) == named


def test_words_of_our_templates_name_nothing() -> None:
    """However alike they are spelled: "show" and "shadow"."""
    told = (*questions._TEMPLATES, *questions._HELD_OUT_TEMPLATES, *questions._REQUESTS, *questions._HELD_OUT_REQUESTS)
    assert not [text for text in told if names_any(re.sub(r"{.*?}", "", text), questions._LAY_WORDS)]


@pytest.mark.parametrize("name", ["AVM", "CMB", "skin", "肺结节", "cyst"])
def test_a_name_that_stands_there_is_named_whatever_it_is(name: str) -> None:
    assert names_any(f"where is the {name.lower()}?", [name])


def test_questions_without_a_name_have_at_most_its_last_word_or_are_misspelled() -> None:
    rng = np.random.default_rng(0)
    asked = [ask_without_name("colon ulcer", rng).lower() for _ in range(600)]
    assert len(set(asked)) > 450
    assert not any("colon ulcer" in text for text in asked)
    assert 120 < sum("ulcer" in text for text in asked) < 240, "two nouns of five, in three questions of four"
    assert 50 < sum(bool(re.search(r"\bc[oln]+ u[lcer]+", text)) for text in asked) < 130, "one of five"
    general = re.compile("|".join(("ulcer", *questions._UNNAMED)))
    others = [category for category in questions._LAY_WORDS if category != "foot ulcer"]
    # By chance an invented or a misspelled word is spelled like a name.
    assert sum(names_any(general.sub("", text), others) for text in asked) < 30


def test_other_words_tell_nothing_of_the_held_out_wordings() -> None:
    held_out = [*questions._HELD_OUT_TEMPLATES, *questions._HELD_OUT_REQUESTS]
    held_out += [words for _, words_out in questions._TARGETS.values() for words in words_out]
    held_out += [words for _, words_out in questions._LAY_WORDS.values() for words in words_out]
    assert not set(questions._FILLER_WORDS) & set(re.findall("[a-z]+", " ".join(held_out).lower()))


def test_attributes_pick_the_right_lesion() -> None:
    boxes = ((5, 40, 15, 50), (40, 5, 70, 35), (80, 80, 95, 95))
    image, mask = picture(*boxes, greys=(200, 20, 120))
    got = answers(image, mask)
    only = [picture(box)[1] for box in boxes]
    expected = {
        "largest": only[1],
        "smallest": only[0],
        "left": only[0],
        "right": only[2],
        "upper": only[1],
        "lower": only[2],
        "brightest": only[0],
        "darkest": only[1],
        "all but largest": only[0] | only[2],
        "all but smallest": only[1] | only[2],
    }
    assert got.keys() == expected.keys()
    for kind, answer in expected.items():
        np.testing.assert_array_equal(got[kind], answer, err_msg=kind)


def test_what_is_not_clear_is_not_asked() -> None:
    image, mask = picture((10, 10, 30, 30), (14, 60, 36, 80))
    assert answers(image, mask).keys() == {"upper", "lower"}


def test_a_centre_further_left_is_not_enough_when_the_border_is_not() -> None:
    image, mask = picture((20, 10, 30, 20), (10, 60, 90, 70))
    assert "left" not in answers(image, mask)


@pytest.mark.parametrize("boxes", [(), ((10, 10, 30, 30),), ((10, 10, 30, 30), (60, 60, 61, 62))])
def test_one_lesion_or_none_gives_no_attribute_question(boxes: tuple[tuple[int, int, int, int], ...]) -> None:
    assert not answers(*picture(*boxes))


def test_crumbs_are_no_lesions_but_stay_in_the_mask() -> None:
    crumb = (60, 60, 61, 62)
    boxes = ((5, 5, 15, 15), (40, 5, 70, 35), (80, 80, 95, 95))
    got = answers(*picture(*boxes, crumb))
    assert "smallest" not in got and "all but smallest" not in got
    np.testing.assert_array_equal(got["all but largest"], picture(boxes[0], boxes[2], crumb)[1])
    np.testing.assert_array_equal(got["largest"], picture(boxes[1])[1])


def test_more_than_eight_lesions_are_not_told_apart() -> None:
    image, mask = picture(*((10 * i, 10 * i, 10 * i + 4 + i // 8 * 4, 10 * i + 5) for i in range(9)))
    assert not answers(image, mask)


def test_attribute_questions_differ_when_held_out() -> None:
    image, mask = picture((5, 40, 15, 50), (40, 5, 70, 35), (80, 80, 95, 95))
    texts: dict[bool, set[str]] = {False: set(), True: set()}
    for held_out in texts:
        for seed in range(200):
            asked = attribute_questions(image, mask, "polyp", np.random.default_rng(seed), held_out)
            texts[held_out] |= {question.text.lower().rstrip(".?") for question in asked}
    assert not texts[False] & texts[True]
    assert len(texts[False]) > 100
