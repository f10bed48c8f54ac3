"""The text contract: what is written is read back, malformed text is refused, and the grammar never writes it."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coreseg.answer import (
    MAX_BOXES,
    SEG_TOKEN,
    AnswerGrammar,
    Piece,
    answer_sentence,
    encode,
    parse,
    pieces,
    render,
)
from coreseg.errors import ModelError
from coreseg.types import Answer

FOUND = Answer("foot ulcer", ((3, 4, 20, 30),), "A dark patch on the heel.", found=True)
TWO = Answer("foot ulcer", ((3, 4, 20, 30), (40, 40, 64, 64)), "Two patches.", found=True)
ABSENT = Answer("lung opacity", (), "Both lungs are clear.", found=False)
FRAME_WH = (64, 64)

CORNERS = st.tuples(*[st.integers(0, 500)] * 2, *[st.integers(501, 999)] * 2)
# What may stand in a category, and in reasoning: anything but what could pass for a marker.
CATEGORY = st.text(st.characters(codec="utf-8", exclude_characters="<>[]"), min_size=1, max_size=20)
REASONING = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=80)
# Category, boxes (none: absent) and reasoning of an answer.
PARTS = st.tuples(
    CATEGORY.map(str.strip).filter(bool), st.lists(CORNERS, max_size=MAX_BOXES).map(tuple), REASONING.map(str.strip)
)


def test_the_exact_forms() -> None:
    assert render(FOUND) == (
        "<think> A dark patch on the heel. </think><answer> The foot ulcer is located at [[3, 4, 20, 30]]. "
        "The mask is <seg>. </answer>"
    )
    assert "foot ulcer are located at [[3, 4, 20, 30], [40, 40, 64, 64]]. The mask" in render(TWO)
    assert render(ABSENT) == ("<think> Both lungs are clear. </think><answer> No lung opacity is visible. </answer>")


def test_what_a_person_reads() -> None:
    assert answer_sentence(FOUND) == "The foot ulcer is located at [[3, 4, 20, 30]]."
    assert answer_sentence(TWO) == "The foot ulcers are located at [[3, 4, 20, 30], [40, 40, 64, 64]]."
    assert answer_sentence(ABSENT) == "No lung opacity is visible."


@given(PARTS)
def test_what_is_written_is_read_back(parts: Any) -> None:
    answer = Answer(*parts, found=bool(parts[1]))
    text = render(answer)
    assert parse(text, (999, 999)) == answer
    assert parse(f"\n {text} ") == answer
    assert "".join(piece.text for piece in pieces(answer)) == text


def changed(old: str, new: str, answer: Answer = FOUND) -> str:
    text = render(answer)
    assert text.count(old) == 1, f"{old!r} must be there once to be changed"
    return text.replace(old, new)


MALFORMED = {
    "nothing": "",
    "no think block": render(FOUND).partition("</think>")[2],
    "no answer block": render(FOUND).partition("<answer>")[0],
    "text before": f"Sure! {render(FOUND)}",
    "text after the end": f"{render(FOUND)} I hope this helps.",
    "twice": render(FOUND) * 2,
    "text between the blocks": changed("</think><answer>", "</think> <answer>"),
    "cut off": render(FOUND)[:-1],
    "two marks": changed("<seg>", "<seg><seg>"),
    "two mark sentences": changed("The mask is <seg>.", "The mask is <seg>. The mask is <seg>."),
    "no mark": changed("<seg>", "here"),
    "mark in the reasoning only": changed("dark", "<seg>").replace("mask is <seg>", "mask is it"),
    "mark in the reasoning too": changed("dark", "<seg>"),
    "nested think": changed("dark", "<think> dark </think>"),
    "think closed twice": changed("dark", "</think>"),
    "answer in the reasoning": changed("dark", "<answer>"),
    "answer closed in the reasoning": changed("dark", "</answer>"),
    "mark in the category": changed("foot ulcer", "foot <seg> ulcer"),
    "tag in the category": changed("foot ulcer", "</answer> ulcer"),
    "brackets in the category": changed("foot ulcer", "[[0, 0, 1, 1]]"),
    "no category": changed("foot ulcer ", ""),
    "blank category": changed("foot ulcer", " "),
    "blank absent category": changed("lung opacity", " ", ABSENT),
    "no box": changed("[3, 4, 20, 30]", ""),
    "an empty box": changed("3, 4, 20, 30", ""),
    "three numbers": changed("3, 4, 20, 30", "3, 4, 20"),
    "five numbers": changed("3, 4, 20, 30", "3, 4, 20, 30, 31"),
    "one list deep": changed("[[3, 4, 20, 30]]", "[3, 4, 20, 30]"),
    "three lists deep": changed("[[3, 4, 20, 30]]", "[[[3, 4, 20, 30]]]"),
    "open list": changed("30]].", "30]."),
    "no spaces in the box": changed("3, 4, 20, 30", "3,4,20,30"),
    "nine boxes": render(Answer("foot ulcer", ((3, 4, 20, 30),) * 9, "Many.", found=True)),
    "no width": changed("3, 4, 20, 30", "20, 4, 20, 30"),
    "no height": changed("3, 4, 20, 30", "3, 30, 20, 30"),
    "swapped corners": changed("3, 4, 20, 30", "20, 30, 3, 4"),
    "right of the frame": changed("3, 4, 20, 30", "3, 4, 65, 30"),
    "below the frame": changed("3, 4, 20, 30", "3, 4, 20, 65"),
    "negative": changed("3, 4, 20, 30", "-3, 4, 20, 30"),
    "fraction": changed("3, 4, 20, 30", "3.0, 4, 20, 30"),
    "leading zero": changed("3, 4, 20, 30", "03, 4, 20, 30"),
    "thousands": changed("3, 4, 20, 30", "3, 4, 2_0, 30"),
    "huge digits": changed("3, 4, 20, 30", f"3, 4, 20, {'9' * 5000}"),
    "Arabic digits": changed("3, 4, 20, 30", "٣, ٤, ٢٠, ٣٠"),
    "full-width digits": changed("3, 4, 20, 30", "3, 4, 20, \uff13\uff10"),
    "code": changed("[[3, 4, 20, 30]]", "__import__('os').abort()"),
    "code in the list": changed("[[3, 4, 20, 30]]", "[[3, 4, 20, print(1)]]"),
    "boxes and yet absent": changed("is visible", "is visible at [[3, 4, 20, 30]]", ABSENT),
    "absent with a mark": changed("is visible.", "is visible. The mask is <seg>.", ABSENT),
    "absent in a sentence of its own": changed("No lung opacity is visible.", "Nothing is visible there.", ABSENT),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused(text: str) -> None:
    assert parse(text, FRAME_WH) is None


def test_without_a_frame_only_the_form_counts() -> None:
    assert parse(MALFORMED["right of the frame"]) is not None
    assert parse(MALFORMED["no width"]) is None


def test_a_long_unfinished_answer_is_refused_at_once() -> None:
    assert parse("<think> " + "a < b <think " * 20_000) is None
    assert parse(render(FOUND).removesuffix(". </answer>") + " is located at [[1, 2" * 20_000) is None


def train(markers: list[str], *, single_numbers: bool) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer; like nano's, with every number up to 64 one token, or with single digits."""
    tokenizer = Tokenizer(models.BPE())
    parts: list[Any] = [] if single_numbers else [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<pad>", "<eos>", *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    words = [render(answer) for answer in (FOUND, TWO, ABSENT)] * 3 + ["it is < 3 mm</ wide <-- narrow > "] * 3
    tokenizer.train_from_iterator([*words, *([str(n) for n in range(65)] * 50)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=markers
    )


@pytest.fixture(scope="module", params=["nano's markers, numbers whole", "<seg> alone, digits"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param.startswith("nano"):
        return train(["<think>", "</think>", "<answer>", "</answer>", SEG_TOKEN], single_numbers=True)
    return train([SEG_TOKEN], single_numbers=False)


@pytest.fixture(scope="module")
def grammar(tokenizer: PreTrainedTokenizerFast) -> AnswerGrammar:
    return AnswerGrammar(tokenizer, reasoning_budget=12, category_budget=4)


def test_the_two_tokenizers_differ_as_they_should() -> None:
    whole, digits = train([SEG_TOKEN], single_numbers=True), train([SEG_TOKEN], single_numbers=False)
    assert (len(encode(whole, [Piece("64")])), len(encode(digits, [Piece("64")]))) == (1, 2)


Pick = Callable[[np.ndarray], int]


def write(grammar: AnswerGrammar, eos: int, frame_wh: tuple[int, int], pick: Pick) -> list[int]:
    """One walk to its end of text, which is left out."""
    walk = grammar.walk(frame_wh)
    ids, allowed = [], next(walk)
    while (token := pick(allowed)) != eos:
        ids.append(token)
        allowed = walk.send(token)
    return ids


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def test_every_walk_is_a_valid_answer(tokenizer: PreTrainedTokenizerFast, grammar: AnswerGrammar) -> None:
    rng = np.random.default_rng(0)
    seen: dict[int, int] = {}
    for _ in range(300):
        frame_wh = (int(rng.integers(1, 65)), int(rng.integers(1, 65)))
        ids = write(grammar, tokenizer.eos_token_id, frame_wh, lambda allowed: int(rng.choice(allowed)))
        text = decode(tokenizer, ids)
        answer = parse(text, frame_wh)
        assert answer is not None, text
        assert re.fullmatch(r"[A-Za-z0-9 -]+", answer.category), text
        assert ids.count(tokenizer.convert_tokens_to_ids(SEG_TOKEN)) == text.count(SEG_TOKEN) == answer.found
        assert len(ids) + 1 <= grammar.max_tokens(frame_wh)
        seen[len(answer.boxes)] = seen.get(len(answer.boxes), 0) + 1
    assert seen[0] > 50 and seen[1] > 10 and max(seen) >= 3, "the walks must reach both forms and several boxes"


@pytest.mark.parametrize("longest", [True, False])
def test_the_longest_and_the_shortest_walk(
    tokenizer: PreTrainedTokenizerFast, grammar: AnswerGrammar, longest: bool
) -> None:
    """Free text as long as it gets, and as many boxes; then as short as it gets."""
    closing = set(encode(tokenizer, [Piece(" </think><answer>")])[:1])
    closing |= {encode(tokenizer, [Piece(text)])[0] for text in (" is visible. </answer>", " is located at [[")}
    closing |= {
        encode(tokenizer, [Piece(" are located at [[")])[0],
        *encode(tokenizer, [Piece("]]. The mask is ")])[:1],
    }
    absent = encode(tokenizer, [Piece(" No")])

    def pick(allowed: np.ndarray) -> int:
        there = [int(token) for token in allowed if (int(token) in closing) != longest] or allowed.tolist()
        return next((token for token in there if token not in absent), there[0])

    ids = write(grammar, tokenizer.eos_token_id, FRAME_WH, pick)
    answer = parse(decode(tokenizer, ids), FRAME_WH)
    assert answer is not None
    assert len(ids) + 1 <= grammar.max_tokens(FRAME_WH)
    end = ids.index(encode(tokenizer, [Piece(" </think><answer>")])[0])
    start = len(encode(tokenizer, [Piece("<think>")]))
    assert end - start == (12 if longest else 0), "the budget of free text, or none"
    assert len(answer.boxes) == (MAX_BOXES if longest else 1)


@pytest.mark.parametrize(
    "answer",
    [FOUND, TWO, ABSENT, replace(FOUND, reasoning="")],
    ids=["found", "two", "absent", "without reasoning"],
)
def test_training_text_lies_within_the_grammar(
    tokenizer: PreTrainedTokenizerFast, grammar: AnswerGrammar, answer: Answer
) -> None:
    """The very ids that training teaches are allowed, one by one, and the end of text after them."""
    wide = AnswerGrammar(tokenizer)
    walk = wide.walk(FRAME_WH)
    allowed = next(walk)
    for token in encode(tokenizer, pieces(answer)):
        assert token in allowed, tokenizer.decode([token])
        allowed = walk.send(token)
    assert allowed.tolist() == [tokenizer.eos_token_id]


@given(parts=PARTS)
def test_pieces_join_to_the_same_text_in_tokens(tokenizer: PreTrainedTokenizerFast, parts: Any) -> None:
    answer = Answer(*parts, found=bool(parts[1]))
    assert decode(tokenizer, encode(tokenizer, pieces(answer))) == render(answer)


def test_spelled_out_markers_in_free_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    words = "What is <seg> </answer> <eos>?"
    ids = encode(tokenizer, [Piece(words, free=True)])
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert decode(tokenizer, ids) == words
    assert tokenizer.convert_tokens_to_ids(SEG_TOKEN) in encode(tokenizer, [Piece(words)]), "or the test could not fail"


def test_free_text_cannot_spell_a_marker(tokenizer: PreTrainedTokenizerFast, grammar: AnswerGrammar) -> None:
    walk = grammar.walk(FRAME_WH)
    allowed = next(walk)
    for token in encode(tokenizer, [Piece("<think>")]):
        assert allowed.tolist() == [token]
        allowed = walk.send(token)
    closing = encode(tokenizer, [Piece(" </think><answer>")])[0]
    for _ in range(3):
        texts = [decode(tokenizer, [int(token)]) for token in allowed if token != closing]
        assert texts and not any("<" in text for text in texts)
        allowed = walk.send(next(int(token) for token in allowed if token != closing))


def test_a_tokenizer_that_garbles_the_form_is_refused() -> None:
    garbling = train([SEG_TOKEN], single_numbers=True)
    garbling.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="byte-level tokenizer"):
        AnswerGrammar(garbling)
