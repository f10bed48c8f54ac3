"""Reading what others wrote: 200 sentences about 50 val pictures, by somebody who had not seen our wordings.

`accepted` is what the pictures' reference masks bear out, measured by `accepted_all`; `lies` are the kinds of statement
that are false in a sentence, by eye. Patterns were widened on the pictures of the half `seen` only.
"""

import json
from pathlib import Path

import pytest

from coreseg.sentences import find
from coreseg.statements import contradictions

FILE = Path(__file__).parent / "data" / "free_sentences.jsonl"
SENTENCES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def refuted(sentence: dict[str, object]) -> bool:
    return bool(contradictions(sentence["sentence"], sentence["accepted"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("half", ["seen", "unseen"])
def test_lies_are_caught_and_truths_pass(half: str) -> None:
    lies = [refuted(s) for s in SENTENCES if s["half"] == half and not s["true"]]
    truths = [refuted(s) for s in SENTENCES if s["half"] == half and s["true"]]
    assert len(lies) == len(truths) == 50
    assert sum(lies) >= 43 and sum(truths) <= 6, f"{half}: {sum(lies)} lies caught, {sum(truths)} false alarms"


def test_most_claims_are_understood() -> None:
    claiming = [s for s in SENTENCES if s["claims"]]
    understood = sum(any(find(kind, s["sentence"]) for kind in s["claims"]) for s in claiming)
    assert understood >= 0.93 * len(claiming)
    silent = [s for s in SENTENCES if not s["claims"]]
    assert len(silent) == 19 and sum(refuted(s) for s in silent) <= 2


ONE_SMALL_ON_THE_LEFT = {"side": ["left"], "place": ["upper"], "size": ["small"], "count": ["one"]}
TWO = {"side": ["both"], "place": ["spread"], "size": ["small"], "count": ["two"]}


@pytest.mark.parametrize(
    ("text", "true", "kinds"),
    [
        ("A mass on the right side of the image.", ONE_SMALL_ON_THE_LEFT, {"side"}),
        ("A tiny mass, about one per cent of the picture.", ONE_SMALL_ON_THE_LEFT, set()),
        ("It takes up a third of the picture.", ONE_SMALL_ON_THE_LEFT, {"size"}),
        ("It lies in the upper third of the picture.", ONE_SMALL_ON_THE_LEFT, set()),
        ("It is not confined to the right side.", ONE_SMALL_ON_THE_LEFT, set()),
        ("A second lesion is not seen.", ONE_SMALL_ON_THE_LEFT, set()),
        ("A second lesion is seen.", ONE_SMALL_ON_THE_LEFT, {"count"}),
        (
            "A smaller one at the upper left and a larger one at the lower right.",
            ONE_SMALL_ON_THE_LEFT,
            {"side", "place"},
        ),
        ("One small area on the left, one on the right.", TWO | {"side": ["both", "left"]}, {"count"}),
        ("One mass lies in the upper left, a second mass in the lower right.", TWO, set()),
        ("Two masses are seen, one left of the midline and one right of it.", TWO, set()),
        ("There are two masses: one above, one below.", TWO, set()),
        ("Two masses, one brighter.", TWO, set()),
        ("Two masses, both on the left side.", TWO, {"side"}),
        ("Two masses, one left of the midline and one right of it.", TWO | {"side": ["centre"]}, {"side"}),
        ("Three masses, one brighter.", TWO, {"count"}),
        ("Right lower lobe.", ONE_SMALL_ON_THE_LEFT, set()),
        ("A small area on the left.", {"count": ["none"]}, {"side", "size"}),
        ("Nothing stands out.", {"count": ["none"]}, set()),
        ("It does not lie on the left.", ONE_SMALL_ON_THE_LEFT, {"side"}),
        ("It does not lie on the right.", ONE_SMALL_ON_THE_LEFT, set()),
        ("The larger isn't on the left.", TWO | {"side": ["left"]}, set()),
        ("It does not have a sharp edge; it has no blurred border.", {"edge": ["sharp"]}, {"edge"}),
        ("It is not round.", {"shape": ["round", "oval"]}, set()),
        ("There are no small vessels.", ONE_SMALL_ON_THE_LEFT, set()),
        ("It is three centimetres long, and of one tone.", TWO, set()),
        ("A nodule is not seen.", ONE_SMALL_ON_THE_LEFT, {"count"}),
        ("There is no nodule here.", ONE_SMALL_ON_THE_LEFT, {"count"}),
    ],
)
def test_what_refutes_what(text: str, true: dict[str, list[str]], kinds: set[str]) -> None:
    assert {found.kind for found in contradictions(text, true)} == kinds
