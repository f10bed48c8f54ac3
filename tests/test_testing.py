from pathlib import Path

import numpy as np
import pytest

from coreseg.statements import measure
from coreseg.testing import CATEGORIES, HELD_OUT_LOOKS, LOOKS, phantom, write_phantom_set

COUNTS = ("none", "one", "two", "three", "four")


def test_the_same_arguments_give_the_same_phantom() -> None:
    first, second = phantom(7), phantom(7)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.masks.keys() == second.masks.keys() and first.look == second.look
    assert not np.array_equal(first.image, phantom(8).image)


@pytest.mark.parametrize("look", LOOKS + HELD_OUT_LOOKS)
def test_looks_show_the_lesions_asked_for(look: str) -> None:
    for seed in range(12):
        lesions = seed % 5
        shown = phantom(seed, look, (128, 96), lesions, kinds=1 + seed % 2)
        assert shown.look == look and shown.image.shape == (96, 128, 3) and shown.image.dtype == np.uint8
        assert len(shown.masks) == 1 + seed % 2
        for mask in shown.masks.values():
            assert measure("count", shown.image, mask) == COUNTS[lesions]


@pytest.mark.parametrize("look", LOOKS + HELD_OUT_LOOKS)
def test_nodules_are_brighter_and_cysts_darker_in_every_look(look: str) -> None:
    wrong = 0
    for seed in range(40):
        shown = phantom(seed, look, lesions=1, kinds=2)
        for category, expected in (("nodule", "brighter"), ("cyst", "darker")):
            wrong += measure("contrast", shown.image, shown.masks[category]) != expected
    assert wrong <= 2


def test_kinds_never_overlap() -> None:
    for seed in range(50):
        nodules, cysts = phantom(seed, kinds=2).masks.values()
        assert nodules.any() and cysts.any() and not (nodules & cysts).any()


def test_scale_runs_from_tiny_to_large() -> None:
    shares = [next(iter(phantom(seed, lesions=1).masks.values())).mean() for seed in range(100)]
    assert min(shares) < 0.004 and max(shares) > 0.08


@pytest.mark.parametrize("size_wh", [(16, 16), (16, 200), (200, 16), (33, 57), (256, 256)])
def test_any_size_has_at_least_one_lesion(size_wh: tuple[int, int]) -> None:
    for look in LOOKS + HELD_OUT_LOOKS:
        for seed in range(5):
            shown = phantom(seed, look, size_wh, kinds=2)
            assert shown.image.shape == (size_wh[1], size_wh[0], 3)
            assert any(mask.any() for mask in shown.masks.values())


def test_training_looks_leave_the_held_out_ones_alone() -> None:
    assert len(HELD_OUT_LOOKS) >= 2 and not set(LOOKS) & set(HELD_OUT_LOOKS)
    assert {phantom(seed, size_wh=(16, 16)).look for seed in range(100)} == set(LOOKS)


def test_a_set_on_disk(tmp_path: Path) -> None:
    store = pytest.importorskip("coreseg.data.store")
    root = write_phantom_set(tmp_path / "set", 40, seed=0, size_wh=(64, 48))
    lesions = store.LesionSet.open(root)
    samples = lesions.samples
    images = {sample.file_name for sample in samples}
    assert len(images) == 40 < len(samples)
    assert len({sample.file_name for sample in lesions.split("val")}) == 10
    assert not {s.case for s in lesions.split("val")} & {s.case for s in lesions.split("train")}
    negatives = [sample for sample in samples if not sample.boxes]
    assert 1 <= len(negatives) <= 12
    for sample in samples:
        mask = lesions.mask(sample)
        assert mask.any() == bool(sample.boxes) and lesions.image(sample).shape[:2] == mask.shape
        assert sample.category in CATEGORIES and sample.reasoning and sample.query
        assert sample.source.removeprefix("phantom_") in LOOKS


def test_a_set_is_written_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("coreseg.data.store")
    texts = [
        (write_phantom_set(tmp_path / name, 6, seed=3, size_wh=(32, 32)) / "metadata.jsonl").read_text()
        for name in ("a", "b")
    ]
    assert texts[0] == texts[1]


def test_negatives_show_nothing_or_the_other_kind(tmp_path: Path) -> None:
    store = pytest.importorskip("coreseg.data.store")
    root = write_phantom_set(tmp_path / "set", 30, seed=1, size_wh=(32, 32), negatives=1.0)
    assert all(not sample.boxes for sample in store.LesionSet.open(root).samples)
