"""Lies of many kinds, planted in measured descriptions of phantoms: those that the checks read are found."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from coreseg.sentences import find_all
from coreseg.testing import LOOKS, phantom

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "data" / "lies.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the repository around it")

LEAST = {"describer's words": 0.97, "words seen": 0.9}
HARDER = {"too small": 0.5, "both sides for one": 0.6, "a truth denied": 0.75}
"""The least share of kinds with seen words that are not read, such as "barely visible", or not of several lesions."""


@pytest.fixture(scope="module")
def lies() -> ModuleType:
    spec = spec_from_file_location("lies", SCRIPT)
    assert spec and spec.loader
    sys.modules["lies"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trial(lies: ModuleType) -> object:
    def rows() -> object:
        for seed in range(80):
            shown = phantom(seed, LOOKS[seed % len(LOOKS)], (96, 72), lesions=(1, 1, None, 2, 0)[seed % 5])
            category, mask = next(iter(shown.masks.items()))
            yield lies.Row.of(shown.image, mask, shown.modality, shown.anatomy, category, seed)

    return lies.plant_all(rows(), seed=0)


def test_untouched_descriptions_have_no_fault(trial: object) -> None:
    assert (trial.untouched.planted, trial.untouched.found) == (80, 0)  # type: ignore[attr-defined]


def test_truths_in_other_words_pass(lies: ModuleType, trial: object) -> None:
    for words, most in {lies.OWN: 0.0, lies.SEEN: 0.01, lies.UNSEEN: 0.03}.items():
        count = trial.truths[words]  # type: ignore[attr-defined]
        assert count.planted > 300 and count.found <= most * count.planted, f"{words}: {count}"


def test_lies_that_are_read_are_found(lies: ModuleType, trial: object) -> None:
    tried = set()
    for lie in lies.LIES:
        for words, least in LEAST.items():
            count = trial.counts[lie.name, words]  # type: ignore[attr-defined]
            if not lie.read_as or not count.planted:
                continue
            least = HARDER.get(lie.name, least) if words == lies.SEEN else least
            assert count.found >= least * count.planted, f"{lie.name}, {words}: {count}"
            tried.add(lie.name)
    assert len(tried) >= 32, sorted({lie.name for lie in lies.LIES} - tried)


def test_most_lies_in_words_held_out_are_found(lies: ModuleType, trial: object) -> None:
    shares = [
        count.found / count.planted
        for lie in lies.LIES
        if lie.read_as and (count := trial.counts[lie.name, lies.UNSEEN]).planted  # type: ignore[attr-defined]
    ]
    assert sum(shares) >= 0.65 * len(shares)


def test_lies_that_no_check_reads_pass(lies: ModuleType, trial: object) -> None:
    """Where this fails a check has learned to read them: say so in the table of docs/results.md."""
    for lie in lies.LIES:
        if not lie.read_as:
            assert all(trial.counts[lie.name, words].found == 0 for words in lies.VOCABULARIES), lie.name  # type: ignore[attr-defined]


def test_true_statements_in_seen_words_are_read_as_what_they_are(lies: ModuleType) -> None:
    """Words that catch a lie and refute a truth alike would be worth nothing."""
    for kind, values in lies.WORDS.items():
        for value, (seen, _) in values.items():
            for words in seen:
                read = find_all(f"An area, {words}.").get(kind, {value})
                assert read == {value} or words == "on the left and on the right", f"{words}: read as {read}"
