"""The filter on a data set on disk: what it writes and counts, and that a killed run goes on as if it had not been.

The trainings are stood in for by a function whose Dice is known; real ones are in `tests/train/test_baselines.py`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from coreseg.cli import app
from coreseg.data.build import filter as stage
from coreseg.data.build import scores as scoring
from coreseg.data.build.curves import save_curve
from coreseg.data.build.difficulty import POOL, Fold
from coreseg.data.build.filter import filter_set
from coreseg.data.build.scores import FilterSettings, read_scores
from coreseg.data.store import LesionSet, copy_rows, write_set
from coreseg.errors import ConfigError, CoreSegError, DataError, MissingExtraError
from coreseg.testing import write_phantom_set
from coreseg.types import Sample

SETTINGS = FilterSettings(pool_under=15)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> LesionSet:
    """90 tiny rows of three sources, five of them without a lesion; "b" is too small for a model of its own."""
    root = tmp_path_factory.mktemp("filter") / "lesions"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "sources.json").write_text('{"a": {}}')
    rows = []
    for number in range(90):
        source = "a" if number < 60 else "b" if number < 72 else "c/test"
        mask = np.zeros((16, 16), bool)
        mask[4:8, 4 : 5 + number % 8] = number % 18 != 17
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        boxes = ((4, 4, 5 + number % 8, 8),) if mask.any() else ()
        split, case = ("val" if number % 5 == 0 else "train"), f"p{number // 2}" if source == "a" else ""
        names = (f"images/{number}.png", f"masks/{number}.png")
        rows.append(Sample(*names, "mri", "head", "cyst", boxes, "?", "", source, "CC0", case, split))
    write_set(root, rows)
    return LesionSet.open(root)


@pytest.fixture(autouse=True)
def plot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Plots take most of a run's time here: empty files stand in for them until this is called."""
    monkeypatch.setattr(stage, "save_curve", lambda path, *what: path.write_bytes(b""))
    return lambda: monkeypatch.setattr(stage, "save_curve", save_curve)


def dice_of(sample: Sample) -> float:
    """Made up, but always the same: a curve with a steep beginning."""
    share = crc32(sample.file_name.encode()) / 2**32
    return min(4 * share, 0.8 + 0.1 * share)


def scripted(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
    return [dice_of(sample) for sample in fold.held_out]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def run(lesions: LesionSet, out: Path, settings: FilterSettings = SETTINGS, train: Any = scripted, **more: Any) -> Any:
    return filter_set(lesions, out, settings, train, progress=False, **more)


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_hard_rows_become_a_set_of_their_own(lesions: LesionSet, tmp_path: Path) -> None:
    report = run(lesions, tmp_path / "hard")
    kept, scores = LesionSet.open(tmp_path / "hard"), read_scores(tmp_path / "hard/scores.jsonl")
    assert [score.file_name for score in scores] == [sample.file_name for sample in lesions.samples]
    assert kept.samples == tuple(row for row, score in zip(lesions.samples, scores, strict=True) if score.kept)
    for sample, score in zip(lesions.samples, scores, strict=True):
        assert score.dice == (dice_of(sample) if sample.boxes else None) and score.ease is None
        assert score.group == ("" if not sample.boxes else POOL if sample.source == "b" else sample.source)
    first, copied = kept.samples[0], {path.name for path in (tmp_path / "hard/images").iterdir()}
    assert (kept.root / first.file_name).samefile(lesions.root / first.file_name), "a link takes no space"
    assert copied == {Path(sample.file_name).name for sample in kept.samples}
    assert (kept.root / "sources.json").read_text() == '{"a": {}}'
    assert report.summary == json.loads((tmp_path / "hard/filter.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["hard"], "nothing is left beside it"


def test_the_summary_counts_rows_in_and_out(lesions: LesionSet, tmp_path: Path) -> None:
    told = run(lesions, tmp_path / "hard").summary
    scores = read_scores(tmp_path / "hard/scores.jsonl")
    assert told["rows_in"] == 90 and told["rows_out"] == sum(score.kept for score in scores)
    assert told["lesion_free"] == {"in": 5, "out": 5}
    assert told["sources"]["a"] == {"in": 60, "out": sum(score.kept for score in scores if score.source == "a")}
    assert (
        sum(part["out"] for part in told["splits"].values()) == told["rows_out"] and told["splits"]["val"]["in"] == 18
    )
    cut = told["cuts"]["a"]
    of_a = [score for score in scores if score.group == "a"]
    assert cut["in"] == len(of_a) and cut["out"] == sum(score.kept for score in of_a) < len(of_a)
    assert {score.kept for score in of_a if score.dice is not None and score.dice <= cut["threshold"]} == {True}
    assert told["cuts"][POOL]["rule"].endswith("11 rows are too few for a fit") and told["cuts"][POOL]["out"] == 3
    assert told["settings"]["network"] in ("pretrained", "plain") and "powerlaw" in told["versions"]


def test_every_cut_has_a_plot_that_no_loader_takes_for_a_split(
    lesions: LesionSet, tmp_path: Path, plot: Callable[[], None]
) -> None:
    import datasets

    plot()
    run(lesions, tmp_path / "hard")
    plots = sorted((tmp_path / "hard/curves").iterdir())
    assert [path.name for path in plots] == ["01_POOLED.png", "02_A.png", "03_C_TEST.png"]
    assert all(Image.open(path).size == (700, 450) for path in plots)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "hard"), cache_dir=str(tmp_path / "cache"))
    kept = LesionSet.open(tmp_path / "hard")
    assert list(loaded) == ["train"] and loaded["train"].num_rows == len(kept.samples)


def test_rows_without_a_lesion_are_kept_unless_told_otherwise(lesions: LesionSet, tmp_path: Path) -> None:
    told = run(lesions, tmp_path / "hard", replace(SETTINGS, drop_lesion_free=True)).summary
    assert told["lesion_free"] == {"in": 5, "out": 0}
    assert all(sample.boxes for sample in LesionSet.open(tmp_path / "hard").samples)


def test_a_share_is_taken_of_every_source(lesions: LesionSet, tmp_path: Path) -> None:
    report = run(lesions, tmp_path / "hard", replace(SETTINGS, keep_share=0.25))
    assert {name: (cut["in"], cut["out"]) for name, cut in report.summary["cuts"].items()} == {
        "a": (57, 14), "b": (11, 3), "c/test": (17, 4)
    }  # fmt: skip
    assert "b: 3 of 11, up to 0." in report.text() and "the hardest 25%" in report.text()


def test_the_text_tells_what_was_kept_and_why(lesions: LesionSet, tmp_path: Path) -> None:
    text = run(lesions, tmp_path / "hard").text()
    assert "of 90 rows kept" in text and "5 of 5 rows without a lesion are among them" in text
    assert "(pooled): 3 of 11, up to " in text and "too few for a fit" in text


def test_scores_of_an_earlier_run_decide_anew_without_training(lesions: LesionSet, tmp_path: Path) -> None:
    first = run(lesions, tmp_path / "hard")
    again = run(lesions, tmp_path / "again", train=None, scores=tmp_path / "hard/scores.jsonl")
    other = replace(SETTINGS, keep_share=0.9)
    more = run(lesions, tmp_path / "more", other, train=None, scores=tmp_path / "hard/scores.jsonl")
    assert again.summary["cuts"] == first.summary["cuts"] and again.summary["scores"] != "trained"
    assert more.summary["rows_out"] > first.summary["rows_out"]
    assert [replace(s, kept=False) for s in read_scores(tmp_path / "more/scores.jsonl")] == [
        replace(s, kept=False) for s in read_scores(tmp_path / "hard/scores.jsonl")
    ]


def test_where_links_are_impossible_pictures_are_copied(
    lesions: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    copy_rows(lesions, lesions.samples[:3], tmp_path / "copy")
    copied = LesionSet.open(tmp_path / "copy")
    assert copied.samples == lesions.samples[:3]
    assert np.array_equal(copied.image(copied.samples[2]), lesions.image(lesions.samples[2]))
    assert not (copied.root / copied.samples[0].file_name).samefile(lesions.root / copied.samples[0].file_name)


# --- folds and runs that are killed ----------------------------------------------------------------------------------


def test_no_case_is_scored_by_a_model_that_saw_it(lesions: LesionSet, tmp_path: Path) -> None:
    seen: list[Fold] = []

    def train(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
        seen.append(fold)
        return scripted(lesions, settings, work, fold)

    run(lesions, tmp_path / "hard", train=train)
    assert [fold.group for fold in seen] == ["a"] * 3 + ["c/test"] * 3 + [POOL] * 3
    scores = {score.file_name: score for score in read_scores(tmp_path / "hard/scores.jsonl")}
    assert sum(len(fold.held_out) for fold in seen) == 85
    for fold in seen:
        assert not {row.case or row.file_name for row in fold.train} & {
            row.case or row.file_name for row in fold.held_out
        }
        assert all((scores[row.file_name].group, scores[row.file_name].fold) == (fold.group, fold.number)
                   for row in fold.held_out)  # fmt: skip
        assert {row.split for row in fold.train} == {"train", "val"}, "every row takes part, whatever its split"


class Killed(BaseException):
    """As a kill would: nothing catches it."""


@pytest.mark.parametrize("survived", [0, 1, 4])
def test_a_killed_run_goes_on_to_the_same_result(lesions: LesionSet, tmp_path: Path, survived: int) -> None:
    calls: list[str] = []

    def train(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
        if len(calls) == survived:
            raise Killed
        calls.append(fold.name)
        return scripted(lesions, settings, work, fold)

    with pytest.raises(Killed):
        run(lesions, tmp_path / "one/hard", train=train)
    assert not (tmp_path / "one/hard").exists()
    survived = -1  # no more
    run(lesions, tmp_path / "one/hard", train=train)
    run(lesions, tmp_path / "other/hard")
    assert len(calls) == len(set(calls)) == 9, "no fold was trained twice"
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_line_cut_off_by_the_kill_is_scored_again(lesions: LesionSet, tmp_path: Path) -> None:
    run(lesions, tmp_path / "hard")
    expected = contents(tmp_path / "hard")
    calls: list[str] = []

    def train(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
        calls.append(fold.name)
        if len(calls) == 3:
            raise Killed
        return scripted(lesions, settings, work, fold)

    with pytest.raises(Killed):
        run(lesions, tmp_path / "again", train=train)
    state = tmp_path / ".again.filtering/folds.jsonl"
    state.write_text(state.read_text()[:-20])
    run(lesions, tmp_path / "again", train=train)
    assert calls[1] == calls[3] and len(calls) == 11
    assert contents(tmp_path / "again") == expected


def test_a_run_killed_while_writing_leaves_nothing_in_the_output(
    lesions: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_curve", kill)
        with pytest.raises(Killed):
            run(lesions, tmp_path / "hard")
    assert [path.name for path in tmp_path.iterdir()] == [".hard.filtering"]
    (tmp_path / ".hard.partial").mkdir()
    (tmp_path / ".hard.partial/half.png").write_text("")  # as kill -9 would leave it
    run(lesions, tmp_path / "hard", train=scripted)
    assert [path.name for path in tmp_path.iterdir()] == ["hard"]
    run(lesions, tmp_path / "other")
    assert contents(tmp_path / "hard") == contents(tmp_path / "other")


def test_an_unfinished_run_with_other_settings_is_refused(lesions: LesionSet, tmp_path: Path) -> None:
    def kill(*arguments: Any) -> list[float]:
        raise Killed

    with pytest.raises(Killed):
        run(lesions, tmp_path / "hard", train=kill)
    with pytest.raises(ConfigError, match=r"steps was 300, is 7\).*delete that folder"):
        run(lesions, tmp_path / "hard", replace(SETTINGS, steps=7))
    run(lesions, tmp_path / "hard", replace(SETTINGS, keep_share=0.5))


def test_an_unfinished_run_is_not_lost_to_a_filter_without_training(lesions: LesionSet, tmp_path: Path) -> None:
    def train(lesions: LesionSet, settings: FilterSettings, work: Path, fold: Fold) -> list[float]:
        if fold.number:
            raise Killed
        return scripted(lesions, settings, work, fold)

    run(lesions, tmp_path / "other")
    with pytest.raises(Killed):
        run(lesions, tmp_path / "hard", train=train)
    before = contents(tmp_path / ".hard.filtering")
    for scores in (None, tmp_path / "other" / "scores.jsonl"):
        settings = replace(SETTINGS, proxy=not scores)
        with pytest.raises(ConfigError, match="unfinished"):
            filter_set(lesions, tmp_path / "hard", settings, scores=scores, progress=False)
    assert contents(tmp_path / ".hard.filtering") == before != {}


def test_folds_may_be_mapped_by_a_pool(lesions: LesionSet, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        run(lesions, tmp_path / "pool/hard", run=pool.map)
    run(lesions, tmp_path / "one/hard")
    assert contents(tmp_path / "pool") == contents(tmp_path / "one")


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(kind: type[CoreSegError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_something_in_it_is_not_touched(lesions: LesionSet, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in refusal(DataError, lambda: run(lesions, tmp_path))
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_an_output_that_cannot_be_written_is_one_error(lesions: LesionSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(DataError, lambda: run(lesions, tmp_path / "file" / "hard"))
    assert "cannot be written" in message and "permissions" in message


@pytest.mark.parametrize("where", ["copy_rows", "save_curve"])
def test_a_full_disk_is_one_error_and_leaves_no_set(
    lesions: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, where, full)
    assert "No space left" in refusal(DataError, lambda: run(lesions, tmp_path / "hard"))
    kept = sorted(path.name for path in (tmp_path / ".hard.filtering").iterdir())
    assert not (tmp_path / "hard").exists() and kept == ["folds.jsonl", "run.json"], "what took time is kept, no more"
    proxy = FilterSettings(proxy=True)
    assert "No space left" in refusal(DataError, lambda: run(lesions, tmp_path / "other", proxy))
    assert [path.name for path in tmp_path.iterdir()] == [".hard.filtering"]


def test_a_set_without_lesions_has_no_difficulty(lesions: LesionSet, tmp_path: Path) -> None:
    healthy = replace(lesions, samples=tuple(replace(sample, boxes=()) for sample in lesions.samples))
    assert "no row has a lesion" in refusal(DataError, lambda: run(healthy, tmp_path / "hard"))


def test_rows_of_one_case_cannot_be_scored_by_others(lesions: LesionSet, tmp_path: Path) -> None:
    one = replace(lesions, samples=tuple(replace(sample, case="p") for sample in lesions.samples))
    message = refusal(DataError, lambda: run(one, tmp_path / "hard"))
    assert "85 rows of a, b, c/test are of one case" in message and "--proxy" in message
    assert list(tmp_path.iterdir()) == []


ROW_OF_SCORES = {
    "file_name": "x",
    "category": "cyst",
    "source": "a",
    "group": "a",
    "fold": 0,
    "dice": 0.5,
    "ease": None,
}


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        '{"file_name": "x"}',
        "[1]",
        "\udcff",
        json.dumps(ROW_OF_SCORES | {"file_name": ["x"]}),
        json.dumps(ROW_OF_SCORES | {"ease": "0.5"}),
    ],
)
def test_a_file_without_scores_is_one_error(lesions: LesionSet, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "scores.jsonl"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert "no scores can be read" in refusal(DataError, lambda: run(lesions, tmp_path / "hard", scores=path))


def test_scores_of_another_set_or_of_a_proxy_are_refused(lesions: LesionSet, tmp_path: Path) -> None:
    run(lesions, tmp_path / "proxy", FilterSettings(proxy=True))
    run(replace(lesions, samples=lesions.samples[:70]), tmp_path / "part")
    for name, missing in (("proxy", "images/0.png"), ("part", "images/70.png")):
        path = tmp_path / name / "scores.jsonl"
        message = refusal(DataError, lambda path=path: run(lesions, tmp_path / "hard", scores=path))
        assert f"no Dice for the cyst in {missing}" in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"folds": 1}, "folds is 1; expected 2 or more"),
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"minutes_per_fold": -1.0}, "minutes_per_fold is -1.0; expected 0 or more"),
        ({"size_px": 100}, "size_px is 100; expected a multiple of 32"),
        ({"network": "vit"}, "network is 'vit'; expected auto or pretrained or plain"),
        ({"keep_share": 1.5}, "keep_share is 1.5; expected a share from 0 to 1"),
        ({"keep_share": float("nan")}, "keep_share is nan"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], expected: str) -> None:
    assert expected in refusal(ConfigError, lambda: FilterSettings(**setting))


def test_a_missing_library_is_named_before_any_work(
    lesions: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object | None:
        return None if name in ("powerlaw", "segmentation_models_pytorch") else object()

    monkeypatch.setattr(stage, "find_spec", find)
    monkeypatch.setattr(scoring, "find_spec", find)
    message = refusal(MissingExtraError, lambda: run(lesions, tmp_path / "hard"))
    assert "needs powerlaw;" in message and "pip install '.[build]'" in message
    wanted = replace(SETTINGS, network="pretrained", keep_share=0.5)
    message = refusal(MissingExtraError, lambda: run(lesions, tmp_path / "hard", wanted))
    assert "needs segmentation-models-pytorch;" in message
    told = run(lesions, tmp_path / "hard", replace(SETTINGS, keep_share=0.5)).summary
    assert told["settings"]["network"] == "plain", "what is there is taken, and told"


def test_a_row_whose_mask_is_empty_against_its_boxes_is_one_error(lesions: LesionSet, tmp_path: Path) -> None:
    broken = replace(lesions, samples=tuple(replace(row, boxes=((4, 4, 6, 8),)) for row in lesions.samples))
    message = refusal(DataError, lambda: run(broken, tmp_path / "hard", FilterSettings(proxy=True)))
    assert "masks/17.png: the mask is empty" in message and "data check" in message


def test_a_proxy_and_scores_exclude_each_other(lesions: LesionSet, tmp_path: Path) -> None:
    both = FilterSettings(proxy=True)
    assert "one of the two" in refusal(ConfigError, lambda: run(lesions, tmp_path / "x", both, scores=tmp_path / "y"))


# --- the proxy, and the command --------------------------------------------------------------------------------------


def command(*words: str | Path) -> Any:
    done = CliRunner().invoke(app, ["data", "filter", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_the_proxy_needs_no_training(tmp_path: Path) -> None:
    lesions = LesionSet.open(write_phantom_set(tmp_path / "phantoms", 24, seed=0, looks=("ct", "mri")))
    done = command(lesions.root, "--out", tmp_path / "hard", "--proxy", "--json")
    assert done.exit_code == 0, done.stderr
    told, scores = json.loads(done.stdout), read_scores(tmp_path / "hard/scores.jsonl")
    assert told["scores"] == "proxy" and told["settings"]["keep_share"] == 0.3
    for cut in told["cuts"].values():
        assert cut["out"] == round(0.3 * cut["in"]) and cut["power_law"] is None
    assert all((score.ease is None) == (not sample.boxes) and score.dice is None
               for score, sample in zip(scores, lesions.samples, strict=True))  # fmt: skip
    hard, easy = ([s.ease for s in scores if s.ease is not None and s.kept is kept] for kept in (True, False))
    assert np.mean(hard) < np.mean(easy)


def test_the_command_says_what_it_kept(lesions: LesionSet, tmp_path: Path) -> None:
    run(lesions, tmp_path / "first")
    scores = tmp_path / "first/scores.jsonl"
    done = command(lesions.root, "--out", tmp_path / "hard", "--scores", scores, "--keep-share", "0.5")
    assert done.exit_code == 0 and "the hardest 50%" in done.stdout
    assert LesionSet.open(tmp_path / "hard").samples
    for words, part in ((("--folds", "1"), "folds is 1"), (("--scores", tmp_path / "none"), "no scores can be read")):
        done = command(lesions.root, "--out", tmp_path / "other", *words)
        assert done.exit_code == 2 and done.stderr.startswith("error: ") and part in done.stderr
