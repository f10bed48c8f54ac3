"""The whole pipeline: stages in order, killed and gone on with, here and on a cluster."""

import json
import operator
import shutil
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from teacher_server import Answer, Request, TeacherServer, well
from typer.testing import CliRunner

from coreseg.cli import app
from coreseg.config import load
from coreseg.data.build import build as building
from coreseg.data.build import engine
from coreseg.data.build.build import BENCHMARK, MANIFEST, BuildConfig, build
from coreseg.data.build.scores import FilterSettings
from coreseg.data.build.settings import EndpointSettings, TeacherConfig
from coreseg.data.manifest import restore
from coreseg.data.sources import ImportSettings
from coreseg.data.store import LesionSet, write_set
from coreseg.errors import ConfigError, DataError, MissingExtraError, TeacherError
from coreseg.testing import write_phantom_set


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_phantom_set(tmp_path / "source", count=24, seed=3, two_kinds=0.2)


def config_for(source: Path, out: Path, **changes: Any) -> BuildConfig:
    return replace(
        BuildConfig(out=str(out), data=str(source), filter=FilterSettings(proxy=True, keep_share=0.5)), **changes
    )


def files(root: Path) -> dict[str, bytes]:
    """All files by name, but for what tells the time."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, "report.json", "build.toml")
    }


def test_stages_follow_each_other(source: Path, tmp_path: Path) -> None:
    lesions = LesionSet.open(source)
    # A lie, in the hardest half or not: the review must find it wherever it is kept.
    samples = [replace(s, reasoning=s.reasoning.replace("left", "right")) for s in lesions.samples]
    lies = {s.mask_file_name for s, before in zip(samples, lesions.samples, strict=True) if s != before}
    write_set(source, samples)
    out = build(config_for(source, tmp_path / "out"), progress=False)
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    first, second = manifest["stages"]
    assert (first["name"], second["name"]) == ("filter", "review")
    assert first["rows_in"] == len(samples) > first["rows_out"] == second["rows_in"] > second["rows_out"]
    result = LesionSet.open(out / "set")
    assert len(result.samples) == second["rows_out"] and not lies & {s.mask_file_name for s in result.samples}
    page = (out / "card.html").read_text(encoding="utf-8")
    assert "side:" in page and "measured on the mask" in page
    assert restore(out / BENCHMARK, [source], tmp_path / "again", progress=False).missing == ()
    assert LesionSet.open(tmp_path / "again").samples == result.samples


def test_a_finished_build_is_not_done_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(source, tmp_path / "out")
    before = files(build(config, progress=False))
    monkeypatch.setattr(building, "_run", lambda *_: pytest.fail("a finished stage ran again"))
    assert files(build(config, progress=False)) == before
    with pytest.raises(ConfigError, match="other settings \\(review changed\\)"):
        build(replace(config, review=False), progress=False)


def test_a_cluster_counts_its_processors_itself(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="setting jobs is 2"):
        config_for(source, tmp_path / "out", engine="ray", jobs=2)


def test_a_build_that_died_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(source, tmp_path / "out")
    whole = files(build(replace(config, out=str(tmp_path / "whole" / "out")), progress=False))
    for where in ("review_set", "write_manifest", "write_card", "_write_manifest"):
        with monkeypatch.context() as patch:

            def died(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(building, where, died)
            with pytest.raises(KeyboardInterrupt):
                build(config, progress=False)
    assert files(build(config, progress=False)) == whole


def test_a_teacher_writes_and_a_judge_reads(source: Path, tmp_path: Path) -> None:
    with TeacherServer() as server:
        settings = EndpointSettings(base_url=server.url, model="large")
        teacher = TeacherConfig(teacher=settings, judge=settings, cache=str(tmp_path / "cache"))
        out = build(config_for(source, tmp_path / "out", filter=None, describe=teacher), progress=False)
        asked = server.requests
        shutil.rmtree(out)
        build(config_for(source, tmp_path / "out", filter=None, describe=teacher), progress=False)
        assert server.requests == asked, "replies are never paid for twice"
    told = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    assert [stage["name"] for stage in told["stages"]] == ["describe", "review"]
    assert told["reports"]["describe"]["settings"]["prompts"]
    assert load(BuildConfig, out / "build.toml").describe == teacher


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(source: Path, tmp_path: Path) -> None:
    with TeacherServer() as server:
        endpoint = EndpointSettings(base_url=server.url, model="large", input_price=2.5, output_price=10.0)
        teacher = TeacherConfig(teacher=endpoint, cache=str(tmp_path / "cache"), max_cost=0.03)
        config = config_for(source, tmp_path / "out", describe=teacher)
        with pytest.raises(TeacherError, match="max_cost in the file of settings"):
            build(config, progress=False)
        with pytest.raises(ConfigError, match="filter changed"):
            build(replace(config, filter=FilterSettings(proxy=True)), progress=False)
        mended = replace(endpoint, in_flight=4, retries=2, timeout_s=60.0, requests_per_minute=6000)
        larger = replace(config, describe=replace(teacher, teacher=mended, max_cost=20.0), jobs=2)
        out = build(larger, progress=False)
        assert load(BuildConfig, out / "build.toml") == larger
        build(replace(larger, describe=replace(teacher, max_cost=30.0)), progress=False)
        other = replace(teacher, teacher=replace(endpoint, model="small"))
        with pytest.raises(ConfigError, match="describe changed"):
            build(replace(config, describe=other), progress=False)


@pytest.mark.parametrize("left", ["filter", "review", "set"])
def test_other_rows_at_the_start_are_told(source: Path, tmp_path: Path, left: str) -> None:
    """Also where only a later stage is left of the first build."""
    changes = {"filter": {}, "review": {"filter": None}, "set": {"filter": None, "review": False}}[left]
    config = config_for(source, tmp_path / "out", **changes)
    build(config, progress=False)
    shutil.rmtree(source)
    write_phantom_set(source, count=20, seed=4)
    with pytest.raises(DataError, match=f"{left} was made of other rows than"):
        build(config, progress=False)


def test_a_picture_that_cannot_be_read_stays_off_the_card(source: Path, tmp_path: Path) -> None:
    lost = LesionSet.open(source).samples[3]
    (source / lost.mask_file_name).write_text("no picture")
    out = build(config_for(source, tmp_path / "out", filter=None), progress=False)
    assert lost.mask_file_name in (out / "card.md").read_text(encoding="utf-8")
    assert (out / "card.html").read_text(encoding="utf-8").count("<figure><figcaption>") == 1


def test_what_a_later_stage_would_refuse_is_told_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_run", lambda *_: pytest.fail("a stage ran"))
    endpoint = EndpointSettings(base_url="http://x/v1", model="m")
    for changes, error, words in (
        ({"describe": TeacherConfig()}, ConfigError, "no teacher is set"),
        ({"describe": TeacherConfig(teacher=replace(endpoint, input_price=1.0))}, ConfigError, "no budget"),
    ):
        with pytest.raises(error, match=words):
            build(config_for(source, tmp_path / "out", **changes), progress=False)
    for module, changes in (
        ("openai", {"describe": TeacherConfig(teacher=endpoint)}),
        ("ray", {"engine": "ray"}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match="pip install"):
            build(config_for(source, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_line_of_what_was_set_aside_ends_where_json_says(source: Path, tmp_path: Path) -> None:
    lesions = LesionSet.open(source)
    odd = "A lie\u2028of three\u2029lines\x85more."
    write_set(source, [replace(lesions.samples[0], reasoning=odd), *lesions.samples[1:]])
    out = build(config_for(source, tmp_path / "out", filter=None), progress=False)
    assert len(LesionSet.open(out / "set").samples) == len(lesions.samples) - 1


def test_a_stage_that_keeps_no_row_is_named(source: Path, tmp_path: Path) -> None:
    write_set(source, [replace(sample, reasoning="Short.") for sample in LesionSet.open(source).samples])
    config = config_for(source, tmp_path / "out", filter=None)
    for _ in range(2):
        with pytest.raises(DataError, match=r"stage review kept no row; see .*review.set_aside\.jsonl"):
            build(config, progress=False)


def test_what_cannot_be_written_is_one_clear_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = config_for(source, tmp_path / "out", filter=None), Path.write_text
    for name in ("build.toml", "review.rows", "card.html", "card.md", MANIFEST):

        def full(path: Path, *words: Any, name: str = name, **options: Any) -> int:
            if path.name.startswith(name):
                raise OSError(28, "No space left on device")
            return write(path, *words, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            with pytest.raises(DataError, match=r"cannot be written .*No space left"):
                build(config, progress=False)
        assert not (tmp_path / "out" / name).exists()
    build(config, progress=False)


@pytest.mark.parametrize("text", ['{"a": "text"}', "[]", "no JSON"])
def test_broken_sources_are_told_at_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (source / "sources.json").write_text(text)
    monkeypatch.setattr(building, "_run", lambda *_: pytest.fail("a stage ran"))
    with pytest.raises(DataError, match=r"sources\.json: .*Correct the file, or delete it"):
        build(config_for(source, tmp_path / "out"), progress=False)


@pytest.fixture
def raw(source: Path, tmp_path: Path) -> Path:
    """Pictures and masks in folders, as users have them; one picture is damaged, one has no mask."""
    lesions, folder = LesionSet.open(source), tmp_path / "raw"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for number, sample in enumerate(lesions.samples):
        shutil.copy(source / sample.file_name, folder / "images" / f"ward3 {number}.png")
        shutil.copy(source / sample.mask_file_name, folder / "masks" / f"ward3 {number}.png")
    (folder / "images" / "ward3 0.png").write_text("no picture")
    (folder / "masks" / "ward3 1.png").unlink()
    return folder


SETTINGS = """
out = "out"
[import]
source = "raw"
modality = "ct"
anatomy = "lung"
category = "nodule"
val_share = 0.25
seed = 3
[filter]
proxy = true
keep_share = 0.5
"""


def test_raw_folders_are_imported_first(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("build.toml").write_text(SETTINGS, encoding="utf-8")
    done = CliRunner().invoke(app, ["data", "build", "build.toml"])
    assert done.exit_code == 0, done.output
    told = json.loads(Path("out", MANIFEST).read_text(encoding="utf-8"))
    first, second, _ = told["stages"]
    rows = len(LesionSet.open(Path("out", "stages", "import")).samples)
    assert (first["name"], first["rows_in"], first["rows_out"]) == ("import", rows + 1, rows)
    assert first["facts"] == {"form": "folder", "set_aside": 1, "images_without_mask": 1}
    assert (second["name"], second["rows_in"]) == ("filter", rows)
    assert told["settings"]["import_"]["val_share"] == 0.25
    assert "ward3" not in json.dumps(told) and "ward3 0.png" in Path("out", "stages", "import.log").read_text()
    settings = ImportSettings(source="raw", modality="ct", anatomy="lung", category="nodule", val_share=0.25, seed=3)
    settings.run(tmp_path / "again", progress=False)
    assert {name: files(tmp_path / "again")[name] for name in ("metadata.jsonl", "sources.json")}.items() <= files(
        Path("out", "stages", "import")
    ).items()
    shutil.rmtree(raw)
    assert CliRunner().invoke(app, ["data", "build", "build.toml"]).exit_code == 0, "what is finished needs no source"
    again = CliRunner().invoke(app, ["data", "build", "build.toml", "--set", "review=false"])
    assert again.exit_code == 2 and "(review changed)" in again.output


def test_an_import_that_failed_or_died_starts_anew(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BuildConfig(
        out=str(tmp_path / "out"), import_=ImportSettings(source=str(raw), modality="ct"), review=False
    )
    with pytest.raises(DataError, match="anatomy is given nowhere"):
        build(config, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["build.toml"]
    mended = replace(config, import_=ImportSettings(source=str(raw), modality="ct", anatomy="lung", category="nodule"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(mended, progress=False)
    out = build(mended, progress=False)
    assert load(BuildConfig, out / "build.toml") == mended
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["import", "import.log"]


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_builds_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Ray nodes on loopback; one is killed while the teacher writes."""
    monkeypatch.setattr(engine, "BATCH_ROWS", 3)
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, logging_level="ERROR")
        moment = threading.Event()

        def answer(request: Request) -> Answer:
            if server.requests == whole_took + 9:
                moment.set()
            return well(request)

        with TeacherServer(answer, latency_s=0.2) as server:
            settings = EndpointSettings(base_url=server.url, model="large", in_flight=1)

            def built(name: str, on: str) -> dict[str, bytes]:
                teacher = TeacherConfig(teacher=settings, cache=str(tmp_path / f"cache-{name}"))
                config = config_for(source, tmp_path / name / "out", filter=None, describe=teacher, engine=on)
                return files(build(config, progress=False))

            whole_took = 10**9
            whole = built("here", "here")
            whole_took = server.requests
            killer = threading.Thread(
                target=lambda: moment.wait(60) and cluster.remove_node(lost, allow_graceful=False)
            )
            killer.start()
            assert built("ray", "ray") == whole
            killer.join()
            assert moment.is_set() and server.requests >= 2 * whole_took
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_cluster_maps_in_order() -> None:
    """Folds come as a partial function."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        assert list(engine.OnRay().map(partial(operator.sub, 10), [1, 2, 3])) == [9, 8, 7]
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('data = "x"\nout = "o"\nengine = "spark"\n', "engine is 'spark'; expected here or ray"),
        ('data = "nowhere"\nout = "o"\n', "this is no data set"),
        ('data = "x"\nout = "o"\n[filter]\nfold = 2\n', "did you mean 'folds'"),
        ('out = "o"\n', "a data set to start from, or a table [import], and not both"),
        ('data = "x"\nout = "o"\n[import]\nsource = "y"\n', "and not both"),
        ('out = "o"\n[import]\nsource = "y"\n', "y: no such folder"),
        ('out = "o"\n[import]\nmodality = "ct"\n', "source missing"),
        ('out = "o"\n[import]\nsource = "y"\nsalt = "x"\n', "unknown setting 'salt'"),
        ('out = "o"\n[import]\nsource = "y"\naxis = "up"\n', "The axis is 'up'"),
        ('out = "o"\n[import]\nsource = "y"\nseed = -1\n', "seed is -1"),
    ],
)
def test_mistakes_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("build.toml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["data", "build", "build.toml"])
    assert result.exit_code == 2 and complaint in " ".join(result.output.split()), result.output
    assert not Path("o").exists()


def test_what_lies_in_the_folder_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        build(config_for(source, tmp_path / "out"), progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
