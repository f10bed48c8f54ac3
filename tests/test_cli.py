"""The command line: help that works and is quick, one clear line for a user's mistake, and what `segment` prints."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import complaint, run
from PIL import Image
from typer.main import get_command

from coreseg.cli import app

QUESTION = "Where is the tumor?"


def commands(group: Any, *names: str) -> list[tuple[str, ...]]:
    """Every command and group of commands by its words."""
    found = [names]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, *names, name)
    return found


COMMANDS = commands(get_command(app))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a working folder of its own, as default outputs go there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two pictures with one bright square each, a picture in another ending, and files that are none."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number, name in enumerate(("a.png", "a.jpg", "b.PNG")):
        picture = np.full((30, 40, 3), 50, np.uint8)
        picture[4:14, 6 : 16 + number] = 250
        Image.fromarray(picture).save(folder / name, quality=100)
    (folder / "notes.txt").write_text("notes")
    (folder / "._a.png").write_text("what macOS leaves beside a file")
    (folder / "deeper.png").mkdir()
    return folder


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "coreseg")
def test_help_works_and_names_no_path(words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout and len(done.stdout.splitlines()) > 3
    for path in (Path.home(), Path.cwd(), sys.prefix, Path(__file__).parents[1]):
        assert str(path) not in done.stdout


def test_every_command_and_option_is_explained() -> None:
    for words in COMMANDS:
        command: Any = get_command(app)
        for word in words:
            command = command.commands[word]
        assert command.help, words
        unexplained = [parameter.name for parameter in command.params if not getattr(parameter, "help", None)]
        assert set(unexplained) <= {"model", "help"}, words


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['coreseg', '--help']\nfrom coreseg.cli import main\ntry:\n    main()\n"
    code += "finally:\n    print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    fastest_s = 99.0
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        fastest_s = min(fastest_s, time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]", "nothing heavy"
    bare = [sys.executable, "-c", "import typer"]
    started = time.perf_counter()
    subprocess.run(bare, check=True, timeout=60)
    # On a quiet machine 0.5 s; on a busy one no slower than a small multiple of the parser itself.
    assert fastest_s < max(0.5, 3 * (time.perf_counter() - started))


def test_one_picture(bright_segmenter: Any, scans: Path) -> None:
    done = run("segment", scans / "a.png", QUESTION)
    assert (done.exit_code, done.stderr) == (0, "")
    reasoning, answer, files = done.stdout.splitlines()
    assert (reasoning, answer) == ("It is bright.", "The tumor is located at [[6, 4, 16, 14]].")
    assert files == "mask: segmented/a.mask.png (100 px), overlay: segmented/a.overlay.png, 0.5 s"
    assert bright_segmenter.loaded == [("nano", None, None)]
    with Image.open("segmented/a.mask.png") as mask:
        assert mask.size == (40, 30) and mask.getbbox() == (6, 4, 16, 14)


def test_a_folder_and_names_that_are_taken(bright_segmenter: Any, scans: Path) -> None:
    done = run(
        "segment", scans, QUESTION, "--out", "results", "--model", "mine", "--device", "cpu", "--dtype", "float32"
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.count("It is bright.") == 3
    assert bright_segmenter.loaded == [("mine", "cpu", "float32")]
    records = {path.name: json.loads(path.read_text()) for path in Path("results").glob("*.json")}
    assert {name: Path(record["image"]).name for name, record in records.items()} == {
        "a.json": "a.jpg",
        "a-2.json": "a.png",
        "b.json": "b.PNG",
    }


def test_a_second_run_over_its_own_output_takes_the_same_pictures(bright_segmenter: Any, scans: Path) -> None:
    for _ in range(2):
        done = run("segment", scans, QUESTION, "--out", scans)
        assert done.stdout.count("It is bright.") == 3


def test_json_is_one_record_a_line(bright_segmenter: Any, scans: Path) -> None:
    done = run("segment", scans / "b.PNG", scans / "a.png", QUESTION, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["boxes"] for record in records] == [[[6, 4, 18, 14]], [[6, 4, 16, 14]]]
    assert records[0] == json.loads(Path("segmented/b.json").read_text())


def test_a_malformed_answer_is_shown_as_it_is(bright_segmenter: Any, scans: Path) -> None:
    done = run("segment", scans / "a.png", "Please mumble.")
    assert done.exit_code == 0
    assert "no valid form" in done.stdout and "<think> hm" in done.stdout
    assert json.loads(Path("segmented/a.json").read_text())["valid"] is False


def test_a_bad_file_does_not_stop_the_others(bright_segmenter: Any, scans: Path) -> None:
    (scans / "aa.png").write_text("no picture")
    done = run("segment", scans, QUESTION)
    assert done.exit_code == 1
    error, count = done.stderr.splitlines()
    assert error.startswith("error: ") and "aa.png" in error
    assert count == "1 of 4 pictures could not be used; results of the others: segmented"
    assert len(list(Path("segmented").glob("*.json"))) == 3


def test_the_same_picture_gives_the_same_files(bright_segmenter: Any, scans: Path) -> None:
    run("segment", scans / "a.png", QUESTION)
    first = {path.name: path.read_bytes() for path in Path("segmented").iterdir()}
    run("segment", scans / "a.png", QUESTION)
    assert {path.name: path.read_bytes() for path in Path("segmented").iterdir()} == first


def test_a_forgotten_question(bright_segmenter: Any, scans: Path) -> None:
    message = complaint(run("segment", scans / "a.png"))
    assert "the question is missing" in message and "coreseg segment" in message
    assert "the question is missing" in complaint(run("segment", scans / "a.png", scans))


def test_a_forgotten_picture(bright_segmenter: Any) -> None:
    assert "a picture is missing" in complaint(run("segment", QUESTION))


def test_a_question_without_quotes(bright_segmenter: Any, scans: Path) -> None:
    message = complaint(run("segment", scans / "a.png", *QUESTION.split()))
    assert "Where: no such file" in message and "the question in quotes" in message
    assert bright_segmenter.loaded == [], "a slip is told before anything is loaded"


def test_no_words_at_all() -> None:
    assert run("segment").exit_code == 2
    assert "Usage:" in run().output


def test_an_empty_folder(bright_segmenter: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no pictures in this folder" in complaint(run("segment", tmp_path / "empty", QUESTION))


def test_an_output_folder_that_is_a_file(bright_segmenter: Any, scans: Path) -> None:
    message = complaint(run("segment", scans / "a.png", QUESTION, "--out", scans / "notes.txt"))
    assert "notes.txt: File exists" in message


@pytest.mark.parametrize("words", [["segment", "--nonsense"], ["nonsense"], ["evaluate", "set", "--limit", "0"]])
def test_a_wrong_word_is_refused(words: list[str]) -> None:
    done = run(*words)
    assert done.exit_code == 2 and "Error" in done.stderr


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    assert "cannot be read" in complaint(run("train", "sft", tmp_path / "nosuch.toml"))
    (tmp_path / "sft.toml").write_text('model = "nano"\ndata = "set"\nout = "run"\n')
    assert "did you mean 'steps'" in complaint(run("train", "sft", tmp_path / "sft.toml", "--set", "step=1"))


def test_assemble_and_merge_name_what_is_missing(tmp_path: Path) -> None:
    words = ["assemble", "--reasoner", "./nosuch", "--segmenter", "./nosuch", "--out", "new"]
    assert "reasoner './nosuch'" in complaint(run(*words))
    assert "--probe" in complaint(run(*words, "--probe", "all"))
    assert "unknown model" in complaint(run("merge", "nosuch", "new"))
    assert "dtype is 'int8'" in complaint(run("merge", "nosuch", "new", "--dtype", "int8"))
    assert not Path("new").exists()


def test_a_warning_stands_on_standard_error_and_in_the_record(bright_segmenter: Any, scans: Path) -> None:
    done = run("segment", scans / "a.png", "Where is the cat?")
    assert done.exit_code == 0 and done.stderr == "warning: a cat is no tumor\n"
    assert "warning" not in run("segment", scans / "a.png", QUESTION).stderr
    printed = run("segment", scans / "a.png", "Where is the cat?", "--json")
    assert json.loads(printed.stdout)["warnings"] == ["a cat is no tumor"] and printed.stderr == ""


def test_a_mask_that_the_model_itself_doubts(bright_segmenter: Any, scans: Path) -> None:
    done = run("segment", scans / "a.png", "No doubt?")
    assert done.stderr == "warning: the model expects little of this mask, a Dice of 0.12\n"
    assert "expected Dice 0.12" in done.stdout
    told = run("segment", scans / "a.png", QUESTION)
    assert told.stderr == "" and "expected" not in told.stdout, "a model that never learned how sure it may be"
    printed = run("segment", scans / "a.png", "No doubt?", "--json")
    assert json.loads(printed.stdout)["confidence"] == 0.125 and printed.stderr == ""
    Image.new("RGB", (40, 30)).save("dark.png")
    done = run("segment", "dark.png", "No doubt?")
    assert done.stderr == "warning: the model is not sure that nothing is there, its probability is 0.12\n"
    assert "(0 px, nothing there with probability 0.12)" in done.stdout


def test_merge_learns_how_sure_a_model_may_be(bright_segmenter: Any, tmp_path: Path) -> None:
    from coreseg.data.store import LesionSet
    from coreseg.evaluate.predictors import ModelPredictor
    from coreseg.evaluate.run import evaluate
    from coreseg.model.confidence import Confidence
    from coreseg.testing import write_phantom_set

    phantoms = write_phantom_set(tmp_path / "phantoms", count=40, seed=0, size_wh=(48, 40))
    assert "no records" in complaint(run("merge", "nano", "new", "--confidence", phantoms))
    predictor = ModelPredictor(bright_segmenter(), "bright", True, {})
    for split in ("val", "train"):
        evaluate(LesionSet.open(phantoms), predictor, split=split, out=Path(split), progress=False)
    assert "expected at least 30" in complaint(run("merge", "nano", "new", "--confidence", "val"))
    assert not Path("new").exists(), "looked at before anything is written"
    assert run("merge", "nano", "new", "--confidence", "train").exit_code == 0
    assert Confidence.load("new") is not None
    assert run("merge", "nano", "both", "--confidence", "train", "--confidence", "val").exit_code == 0
    assert Confidence.load("both") != Confidence.load("new"), "all of them count"
    assert run("merge", "new", "kept").exit_code == 0
    assert Confidence.load("kept") == Confidence.load("new"), "it goes along"


def test_merge_writes_down_what_a_model_was_trained_on(tmp_path: Path) -> None:
    from coreseg.model.scope import Scope
    from coreseg.testing import write_phantom_set

    phantoms = write_phantom_set(tmp_path / "phantoms", count=40, seed=0, size_wh=(48, 40))
    assert "no metadata.jsonl" in complaint(run("merge", "nano", "new", "--scope", "nosuch"))
    assert not Path("new").exists(), "looked at before anything is written"
    assert run("merge", "nano", "new", "--scope", phantoms).exit_code == 0
    scope, kept = Scope.load("new"), run("merge", "nano", "kept", "--dtype", "float32")
    assert kept.exit_code == 0 and Scope.load("kept") is not None, "the one it has goes along"
    few = write_phantom_set(tmp_path / "few", count=4, seed=0, size_wh=(48, 40))
    assert "only one training picture" in complaint(run("merge", "nano", "other", "--scope", few))
    assert not Path("other").exists()
    assert scope is not None and {kind.categories for kind in scope.kinds} == {("cyst", "nodule")}


@pytest.fixture
def phantoms(tmp_path: Path) -> Path:
    from coreseg.testing import write_phantom_set

    return write_phantom_set(tmp_path / "phantoms", count=12, seed=0, size_wh=(48, 40))


def test_evaluate_prints_tables_and_resumes(bright_segmenter: Any, phantoms: Path, monkeypatch: Any) -> None:
    from coreseg.evaluate.predictors import ModelPredictor

    predictor = ModelPredictor(bright_segmenter(), "bright", True, {})
    monkeypatch.setattr(ModelPredictor, "load", staticmethod(lambda *words, constrained: predictor))
    first = run("evaluate", phantoms, "--out", "figures")
    assert first.exit_code == 0 and "mDice" in first.stdout and "blind" in first.stdout
    assert {path.name for path in Path("figures").iterdir()} == {"records.jsonl", "summary.json", "blind"}
    assert run("evaluate", phantoms, "--out", "figures").stdout == first.stdout
    assert "another run" in complaint(run("evaluate", phantoms, "--out", "figures", "--split", "train"))


def test_evaluate_with_the_reasoning_swapped(bright_segmenter: Any, phantoms: Path, monkeypatch: Any) -> None:
    from coreseg.evaluate.predictors import ModelPredictor

    predictor = ModelPredictor(bright_segmenter(), "bright", True, {})
    monkeypatch.setattr(ModelPredictor, "load", staticmethod(lambda *words, constrained: predictor))
    done = run("evaluate", phantoms, "--out", "figures", "--swap-reasoning")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "Is the reasoning used?" in done.stdout and "another image's" in done.stdout
    assert Path("figures/swap/records.jsonl").exists()
    own = json.loads(Path("figures/summary.json").read_text())["reasoning_swapped"]["own"]
    assert own["same_mask"]["mean"] == 100.0
    assert json.loads(run("evaluate", phantoms, "--swap-reasoning", "--json").stdout)["reasoning_swapped"]["own"] == own
    assert "--swap-reasoning" in complaint(run("evaluate", phantoms, "--model", "blind", "--swap-reasoning"))


def test_the_blind_guess_alone_as_json(phantoms: Path) -> None:
    done = run("evaluate", phantoms, "--model", "blind", "--json", "--limit", "2")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["n"] == 2


def test_trained_baselines_and_the_oracle_stand_beside_a_model(phantoms: Path, tmp_path: Path) -> None:
    from coreseg.evaluate.trained import CategoryPrompt
    from coreseg.model.assemble import assemble
    from coreseg.testing_models import tiny_edgetam, tiny_llava

    model = assemble(str(tiny_llava(tmp_path / "llava")), str(tiny_edgetam(tmp_path / "edgetam")), tmp_path / "joined")
    folder = tmp_path / "trained"
    CategoryPrompt.of(model, ["cyst", "nodule"]).save(folder, {"steps": 1})
    words = ("evaluate", phantoms, "--model", tmp_path / "joined", "--limit", "2", "--device", "cpu", "--oracle-box")
    done = run(*words, "--baseline", folder, "--out", "figures")
    assert done.exit_code == 0, done.stderr
    columns = "".join(done.stdout.split())
    assert "oraclebox" in columns and "category-" in columns and "embedding" in columns and "unet" not in columns
    beside = {path.parent.name for path in Path("figures").glob("*/records.jsonl")}
    assert beside == {"blind", "oracle box", "category-embedding"}
    assert "no trained baseline" in complaint(run(*words, "--baseline", tmp_path / "joined"))
    assert "'category-embedding'" in complaint(run(*words, "--baseline", folder, "--baseline", folder))
    assert "--baseline" in complaint(run("evaluate", phantoms, "--model", "blind", "--oracle-box"))


def test_evaluate_names_what_it_cannot_find(phantoms: Path, tmp_path: Path) -> None:
    assert "no metadata.jsonl" in complaint(run("evaluate", tmp_path))
    assert "no split 'dev'" in complaint(run("evaluate", phantoms, "--split", "dev", "--model", "blind"))
    said = complaint(run("evaluate", phantoms, "--split", "test", "--model", "blind"))
    assert "no rows in split 'test'; it has" in said and "in 'train'" in said
    assert "unknown model" in complaint(run("evaluate", phantoms, "--model", "nosuch"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as users have it: four pictures and their masks, one of them empty."""
    folder = tmp_path / "source"
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(4):
        picture = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        mask[4:20, 4 : 4 + 8 * number] = 255
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


FACTS = ("--modality", "ct", "--anatomy", "lung", "--category", "tumor", "--name", "mine")


def test_import_check_show(source: Path) -> None:
    imported = run("data", "import", source, "--out", "set", *FACTS)
    assert imported.exit_code == 0, imported.output
    assert "set: 4 rows of 4 images" in imported.stdout and "1 lesion-free" in imported.stdout
    checked = run("data", "check", "set")
    assert checked.exit_code == 0, checked.output
    assert "4 rows on 4 images" in checked.stdout
    as_json = json.loads(run("data", "check", "set", "--json").stdout)
    assert as_json["rows"] == 4 and as_json["problems"] == [] and as_json["burned_in"] == {}
    shown = run("data", "show", "set", "--out", "sheet.png", "--count", "2")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("sheet.png: 2 of ")
    with Image.open("sheet.png") as sheet:
        assert min(sheet.size) > 40
    assert "ending in .png" in complaint(run("data", "show", "set", "--out", "sheet.doc"))
    assert "no rows in split 'test'" in complaint(run("data", "show", "set", "--split", "test"))


def test_version() -> None:
    import coreseg

    assert run("--version").stdout == f"coreseg {coreseg.__version__}\n"


def test_import_names_what_does_not_fit(source: Path) -> None:
    (source / "images" / "3.png").write_text("no picture")
    (source / "masks" / "2.png").unlink()
    done = run("data", "import", source, "--out", "set", *FACTS)
    assert done.exit_code == 1
    assert "set: 2 rows of 2 images" in done.stdout
    assert "no mask for" in done.stderr and "2.png" in done.stderr
    assert "set aside:" in done.stderr and "3.png: " in done.stderr and "Refusal" not in done.stderr


def test_import_into_a_full_folder(source: Path) -> None:
    assert "already there" in complaint(run("data", "import", source, "--out", source, *FACTS))


def test_check_finds_a_picture_in_two_splits(source: Path) -> None:
    run("data", "import", source, "--out", "set", *FACTS)
    lines = Path("set/metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    copy = {**row, "file_name": "images/copy.png", "split": "val" if row["split"] == "train" else "train"}
    shutil.copy(Path("set") / row["file_name"], "set/images/copy.png")
    Path("set/metadata.jsonl").write_text("\n".join([*lines, json.dumps(copy)]) + "\n")
    done = run("data", "check", "set")
    assert done.exit_code == 1
    assert "copy.png" in done.stdout and "equal pixels" in done.stdout


@pytest.fixture
def evaluated(phantoms: Path) -> list[str]:
    """Two evaluations of the same questions: the blind guess by the right category, and by none."""
    from dataclasses import replace

    from coreseg.data.store import LesionSet
    from coreseg.evaluate import BlindBaseline, evaluate

    lesions = LesionSet.open(phantoms)
    blind = BlindBaseline.fit(lesions)
    for name, guess in (("one", blind), ("two", replace(blind, by_category={}))):
        evaluate(lesions, guess, out=Path(name), progress=False)
    return ["one", "two"]


def test_compare_prints_verdicts_and_writes_rows(evaluated: list[str]) -> None:
    done = run("compare", *evaluated, "--out", "rows.csv")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "verdict" in done.stdout and "mDice" in done.stdout
    assert len(Path("rows.csv").read_text().splitlines()) == len(Path("one/records.jsonl").read_text().splitlines())
    same = json.loads(run("compare", "one", "one", "--json").stdout)
    assert same["pooled"]["dice"]["verdict"] == "not distinguishable"
    assert same["a"][0]["folder"] == "one" and same["b"][0]["settings"]["split"] == "val"
    shutil.copytree("two", "three")
    seeds = json.loads(run("compare", *evaluated, "--b", "three", "--json").stdout)
    assert [each["folder"] for each in seeds["b"]] == ["two", "three"]


def test_compare_names_what_does_not_fit(evaluated: list[str], tmp_path: Path) -> None:
    assert "nosuch: no records" in complaint(run("compare", "one", "nosuch"))
    assert "ending in .csv" in complaint(run("compare", *evaluated, "--out", "rows.txt"))
    assert "one folder twice" in complaint(run("compare", *evaluated, "--a", "one"))
    assert run("compare", "one").exit_code == 2
