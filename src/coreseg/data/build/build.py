"""The whole pipeline from one file of settings: import, keep what is hard, describe, review; then the card.

    OUT/build.toml        the settings, defaults too
    OUT/stages/import.log what the import said, where there was one: what it set aside, and why
    OUT/stages/NAME/      what each stage made, a data set of its own; pictures are links, so they take no room twice
    OUT/stages/NAME.rows  a hash of the rows that it was made of
    OUT/set/              the result, as the `datasets` library opens it
    OUT/manifest.json     rows in and out of every stage, models, prompts, seeds, money
    OUT/benchmark.jsonl   the result without its pictures, for `coreseg data restore`
    OUT/card.html, .md    the data card

A stage's folder appears when it is finished. So a build that was killed goes on with the first stage that is not there,
and that one goes on from what it keeps itself (trained folds, replies that were paid for).

Source: the paper's three stages. Our choice: everything else.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreseg import __version__
from coreseg import config as settings_files
from coreseg.config import require
from coreseg.data.build.card import Rejected, Stage, write_card
from coreseg.data.build.endpoint import require_client
from coreseg.data.build.engine import ENGINES, require_ray
from coreseg.data.build.filter import SUMMARY, filter_set
from coreseg.data.build.run import REPORT, SET_ASIDE, describe_set, review_set
from coreseg.data.build.scores import FilterSettings, RunFolds, TrainFold, rows_digest
from coreseg.data.build.settings import TeacherConfig
from coreseg.data.manifest import read_sources, write_manifest
from coreseg.data.sources import ImportSettings, recognise
from coreseg.data.store import METADATA, LesionSet, copy_rows, new_set, parse_row, require_empty, write_text, writing
from coreseg.errors import ConfigError, DataError

SETTINGS, MANIFEST, BENCHMARK = "build.toml", "manifest.json", "benchmark.jsonl"


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Settings of a build. A stage without its table is left out.

    out: folder of the build.                              data: the data set to start from, or
    import_: a table [import] with the options of `coreseg data import`, see `ImportSettings`: start from raw folders.
    filter: a table, see `FilterSettings`: keep what is hard.
    describe: a table with [describe.teacher] and, at will, [describe.judge], see `TeacherConfig`: a teacher writes the
    reasoning. Without it that of the data set stays, by default the measured description.
    review: check every row's reasoning at the end: form, pixels and, where `describe` names one, the judge.
    engine: "here", or "ray" for a cluster.                 jobs: models that the filter trains at a time, here.
    """

    out: str
    data: str | None = None
    import_: ImportSettings | None = None
    filter: FilterSettings | None = None
    describe: TeacherConfig | None = None
    review: bool = True
    engine: str = "here"
    jobs: int = 1

    def __post_init__(self) -> None:
        require(self.engine in ENGINES, "engine", self.engine, " or ".join(ENGINES))
        require(self.jobs >= 1, "jobs", self.jobs, "1 or more")
        require(self.jobs == 1 or self.engine == "here", "jobs", self.jobs, "1: a cluster takes all processors it has")
        one = (self.data is None) != (self.import_ is None)
        require(one, "data", self.data, "a data set to start from, or a table [import], and not both")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the settings ask for, in order, after the import."""
        wanted = {"filter": self.filter, "describe": self.describe, "review": self.review}
        return tuple(name for name, asked_for in wanted.items() if asked_for)


def build(
    config: BuildConfig,
    train_fold: TrainFold | None = None,
    run_folds: RunFolds | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Run what is missing of a build and return its folder. A filter that trains needs `train_fold` (see `filter_set`).

    run_folds: see `filter_set` too; by default it is the engine's.

    Raises ConfigError where a finished stage had other settings, DataError where it had other rows, where it kept none,
    or where the folder holds something else, and what the stages raise; what is finished stays. Of the stages that are
    not finished, and where they decide no result, other settings may follow those that failed.
    """
    out, start = Path(config.out), _start(config)
    _require_ready(out, config)
    _claim(out, config)
    started = time.monotonic()
    if config.import_ and not start.exists():
        _import(config.import_, start, progress)
    before = LesionSet.open(start)
    read_sources(before.root)  # the card needs them at the end
    told = [_imported(before)] if config.import_ else []
    rejected: list[Rejected] = []
    for name in config.stages:
        folder = out / "stages" / name
        _require_same_rows(before, folder)
        if not folder.exists():
            _run(name, config, train_fold, run_folds, before, folder, progress)
        _require_rows(folder)
        after = LesionSet.open(folder)
        told.append(Stage(name, len(before.samples), len(after.samples), _facts(folder)))
        rejected += _set_aside(before, folder)
        before = after
    if not (out / "set").exists():
        with new_set(out / "set") as staging:
            copy_rows(before, before.samples, staging)
    result = LesionSet.open(out / "set")
    if result.samples != before.samples:
        raise _other_rows(before, result.root)
    write_manifest(result, out / BENCHMARK)
    write_card(result, told, rejected, out / "card.html", out / "card.md")
    _write_manifest(out, config, told, time.monotonic() - started)
    return out


def _start(config: BuildConfig) -> Path:
    """The folder of the data set to start from, even if not yet imported; a wrong path is told before all else."""
    if not config.import_:
        return LesionSet.open(config.data or "").root
    folder = Path(config.out) / "stages" / "import"
    if not folder.exists() and not config.import_.form:
        recognise(Path(config.import_.source))
    return folder


def _require_ready(out: Path, config: BuildConfig) -> None:
    """What a later stage would refuse is told before an earlier one has taken hours."""
    todo = [name for name in config.stages if not (out / "stages" / name).exists()]
    if config.engine == "ray" and todo:
        require_ray()
    asks = "describe" in todo or ("review" in todo and config.describe and config.describe.judge)
    if config.describe and asks:
        if config.describe.teacher is None:
            raise ConfigError("no teacher is set; expected a table [describe.teacher] with base_url and model")
        config.describe.check_budget()
        require_client()


def _claim(out: Path, config: BuildConfig) -> None:
    file = out / SETTINGS
    if not file.exists():
        require_empty(out)
    elif differ := _decided_otherwise(out, settings_files.load(BuildConfig, file), config):
        raise ConfigError(
            f"{out} holds a build with other settings ({', '.join(differ)} changed); give another `out`, or delete "
            "that folder"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        settings_files.save(config, file)
        (out / "stages").mkdir(exist_ok=True)


def _decided_otherwise(out: Path, old: BuildConfig, new: BuildConfig) -> list[str]:
    """The settings that differ and had a say in what is finished: those of the last finished stage and all before."""
    stages = ("import", "filter", "describe", "review")
    finished = [number for number, name in enumerate(stages, start=1) if (out / "stages" / name).exists()]
    last = len(stages) if (out / "set").exists() else max(finished, default=0)
    names = ("data", *stages[:last]) if last else ()
    before, now = _deciding(old), _deciding(new)
    return [name for name in names if before[name] != now[name]]


def _deciding(config: BuildConfig) -> dict[str, Any]:
    """The settings that decide the result, by table; of an endpoint they are what its replies are kept under."""
    told = config.describe
    endpoints = [
        each and (each.model, each.temperature, each.max_tokens, each.json_schema)
        for each in (told and told.teacher, told and told.judge)
    ]
    describe = told and (*endpoints, told.attempts, told.image_px)
    return {
        "data": config.data, "import": config.import_, "filter": config.filter, "describe": describe,
        "review": config.review,
    }  # fmt: skip


def _require_same_rows(before: LesionSet, folder: Path) -> None:
    """Raises DataError where a finished stage was made of other rows; of one that is to come, writes them down."""
    file, digest = folder.with_suffix(".rows"), rows_digest(before)
    if not folder.exists():
        with writing(folder):
            write_text(file, digest + "\n")
    elif file.exists() and file.read_text(encoding="utf-8").strip() != digest:
        raise _other_rows(before, folder)


def _other_rows(before: LesionSet, folder: Path) -> DataError:
    return DataError(
        f"{folder} was made of other rows than {before.root} has now; give another `out`, or delete that folder to "
        "have it made again"
    )


def _require_rows(folder: Path) -> None:
    if not (folder / METADATA).is_file() or not (folder / METADATA).stat().st_size:
        see = f"; see {folder / SET_ASIDE}" if (folder / SET_ASIDE).is_file() else ""
        raise DataError(
            f"stage {folder.name} kept no row{see}. Change its settings or its rows, delete {folder} and run again."
        )


def _import(settings: ImportSettings, folder: Path, progress: bool) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    report = settings.run(part, progress=progress)
    # Names of files may be those of patients: they stay out of what goes into the manifest.
    counts = {
        "form": report.form.partition(",")[0],
        "set_aside": len(report.refused),
        "images_without_mask": len(report.images_without_mask),
        "masks_without_image": len(report.masks_without_image),
    }
    lines = "".join(f"{line}\n" for line in (*report.made()[1:], *report.to_mind()))
    with writing(folder):
        write_text(part / REPORT, json.dumps(counts, indent=1) + "\n")
        write_text(folder.with_suffix(".log"), lines)
        part.rename(folder)


def _imported(lesions: LesionSet) -> Stage:
    """The import as a stage: what could not be used went in, but did not come out."""
    facts = json.loads((lesions.root / REPORT).read_text(encoding="utf-8"))
    rows = len(lesions.samples)
    return Stage("import", rows + facts["set_aside"], rows, {name: value for name, value in facts.items() if value})


def _run(
    name: str,
    config: BuildConfig,
    train_fold: TrainFold | None,
    run_folds: RunFolds | None,
    before: LesionSet,
    folder: Path,
    progress: bool,
) -> None:
    engine = ENGINES[config.engine]
    if name == "filter":
        assert config.filter
        filter_set(before, folder, config.filter, train_fold, run=run_folds or engine.map, progress=progress)
    elif name == "describe":
        describe_set(before, folder, config.describe, engine=engine, progress=progress)
    else:
        review_set(before, folder, config.describe, engine=engine, progress=progress)


def _facts(folder: Path) -> dict[str, Any]:
    """What a stage's own report says beyond counts of rows."""
    if (file := folder / REPORT).is_file():
        report = json.loads(file.read_text(encoding="utf-8"))
        told = {name: report[name] for name in ("because", "met", "written", "scores") if report[name]}
        if set(told.get("written", ())) == {"0"}:  # nobody wrote, so that is what every row says
            told.pop("written")
        return told
    if (file := folder / SUMMARY).is_file():
        summary = json.loads(file.read_text(encoding="utf-8"))
        return {group: f"{cut['out']} of {cut['in']} ({cut['rule']})" for group, cut in summary["cuts"].items()}
    return {}


def _set_aside(before: LesionSet, folder: Path) -> Iterator[Rejected]:
    if (file := folder / SET_ASIDE).is_file():
        # Not `splitlines`: texts may hold its other ends of a line.
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            reasons = "; ".join(reason["text"] for reason in json.loads(line)["reasons"])
            yield Rejected(before, parse_row(line, f"{file} row {number}"), reasons)


def _write_manifest(out: Path, config: BuildConfig, told: list[Stage], seconds: float) -> None:
    reports = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in ("import", *config.stages)
        for file in (out / "stages" / name / REPORT, out / "stages" / name / SUMMARY)
        if file.is_file()
    }
    manifest = {
        "coreseg": __version__,
        "settings": asdict(config),
        "stages": [asdict(stage) for stage in told],
        "reports": reports,
        "seconds_of_last_call": round(seconds, 1),
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    with writing(out):
        write_text(out / MANIFEST, text + "\n")
