"""Describing with a scripted teacher over real HTTP: faults are caught and counted, nothing is lost or paid twice."""

import asyncio
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import complaint, run
from teacher_server import CALM, INPUT_TOKENS, OUTPUT_TOKENS, Answer, Request, TeacherServer, reply_to, well

from coreseg.config import load
from coreseg.data.build import endpoint as endpoint_module
from coreseg.data.build.ledger import Ledger
from coreseg.data.build.preview import estimate
from coreseg.data.build.quality import text_faults
from coreseg.data.build.run import DerivedSet, describe_set, review_set
from coreseg.data.build.settings import EndpointSettings, TeacherConfig
from coreseg.data.build.stage import Fault, Outcome
from coreseg.data.build.teacher import describe_rows
from coreseg.data.store import LesionSet, write_set
from coreseg.errors import ConfigError, DataError, TeacherError
from coreseg.sentences import find
from coreseg.testing import write_phantom_set


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_BACKOFF_S", 0.01)


def lesion_set(root: Path, count: int, name: Callable[[int], str] | None = None) -> LesionSet:
    """A set whose rows each show a lesion, with categories that tell the server what to do."""
    write_phantom_set(root, count=count, seed=7, size_wh=(64, 48), negatives=0.0, two_kinds=0.0)
    if name:
        samples = LesionSet.open(root).samples
        write_set(root, [replace(sample, category=name(row)) for row, sample in enumerate(samples)])
    return LesionSet.open(root)


def word(number: int) -> str:
    """A number as letters, for texts without digits."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:05d}")


PRICES = {"input_price": 1.0, "output_price": 10.0}
PRICE = (INPUT_TOKENS * 1.0 + OUTPUT_TOKENS * 10.0) / 1e6


def config_for(url: str, cache: Path, judge: bool = False, in_flight: int = 32, **settings: Any) -> TeacherConfig:
    endpoint = EndpointSettings(base_url=url, model="teacher", in_flight=in_flight, **PRICES)
    return TeacherConfig(
        teacher=endpoint,
        judge=replace(endpoint, model="judge") if judge else None,
        **{"cache": str(cache), "max_cost": 100.0, **settings},
    )


# --- what a teacher may do wrong -------------------------------------------------------------------------------------


def faulty(request: Request) -> Answer:
    """Does what the first word of the category says, at first or always."""
    what = request.category.split()[0]
    first, kind = request.times == 1, request.kind
    if kind == "judgement":
        poor = what == "hopeless" or (what == "poor" and "catches the eye" in request.words)
        return Answer(json.dumps(reply_to(request, lesion=0.2 if poor else 0.9, criticism="Too vague." * poor)))
    if what == "throttled" and first:
        return Answer(status=429, headers={"Retry-After": "0.1"})
    if what == "broken" and request.times <= 2:
        return Answer(status=500)
    if what == "gone":
        return Answer(status=503)
    if what == "slow" and first:
        return Answer(delay_s=3.0)
    if what == "cut" and kind == "description" and not request.turned_down:
        return Answer('{"normal_anatomy": "Normal tiss', finish="length")
    if what == "chatty":
        return Answer(f"Of course!\n```json\n{json.dumps(reply_to(request), indent=2)}\n```")
    if what == "refusing" or (what == "shy" and not request.turned_down):
        return Answer("I'm sorry, but I can't help with medical images.")
    if kind == "description" and what in ("mistaken", "stubborn"):
        corrected = what == "mistaken" and request.turned_down
        return Answer(json.dumps(reply_to(request, lesion=f"It lies on the {'right' if corrected else 'left'} side.")))
    if kind == "thought":
        return Answer(json.dumps({"reasoning": _thought(what, request)}))
    return well(request)


def _thought(what: str, request: Request) -> str:
    text = str(reply_to(request)["reasoning"])
    if what == "measuring":
        return text.replace("An area", "An outlined area (at [12, 40, 60, 80])")
    if what == "numbers" and not request.turned_down:
        return f"{text} It lies at x 120."
    if what == "pointing":
        return f"{text} The cyan line runs around it."
    if what == "swapped":
        side = "right" if request.turned_down and "measured on the mask: right" in request.words else "left"
        return f"{text} It lies on the {side} side of the image."
    if what == "poor" and request.turned_down and "Too vague." in request.words:
        return text.replace("catches the eye at once", "stands apart from all that is around it")
    return text


FATES = {
    # What the teacher does: what the row's traffic and its turned-down texts count, and why it is set aside.
    "fine": ({}, {}, None),
    "throttled": ({"rate limits": 2, "retries": 2}, {}, None),
    "broken": ({"server errors": 4, "retries": 4}, {}, None),
    "gone": ({"server errors": 3, "retries": 2}, {}, "no reply"),
    "slow": ({"time-outs": 2, "retries": 2}, {}, None),
    "cut": ({}, {"cut off": 1}, None),
    "chatty": ({}, {}, None),
    "refusing": ({}, {"refused": 3}, "refused"),
    "shy": ({}, {"refused": 2}, None),
    "measuring": ({}, {}, None),
    "numbers": ({}, {"coordinates": 1}, None),
    "pointing": ({}, {"marking": 3}, "marking"),
    "mistaken": ({}, {"pixels": 1}, None),
    "stubborn": ({}, {"pixels": 3}, "pixels"),
    "swapped": ({}, {"pixels": 1}, None),
    "poor": ({}, {"judge": 1}, None),
    "hopeless": ({}, {"judge": 3}, "judge"),
}


@pytest.fixture(scope="module")
def right_sided(tmp_path_factory: pytest.TempPathFactory) -> LesionSet:
    """One row for each fate, all with their lesion on the right."""
    root = tmp_path_factory.mktemp("faults") / "set"
    write_phantom_set(root, count=90, seed=7, size_wh=(64, 48), negatives=0.0, two_kinds=0.0)
    right = [sample for sample in LesionSet.open(root).samples if find("side", sample.reasoning) == {"right"}]
    write_set(root, [replace(row, category=f"{fate} nodule") for row, fate in zip(right, FATES, strict=False)])
    assert len(right) >= len(FATES)
    return LesionSet.open(root)


@pytest.fixture(scope="module")
def faulty_run(right_sided: LesionSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    cache = tmp_path_factory.mktemp("cache")
    with TeacherServer(faulty) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint_module, "_BACKOFF_S", 0.01)
        config = config_for(server.url, cache, judge=True)
        assert config.teacher
        config = replace(config, teacher=replace(config.teacher, retries=2, timeout_s=2.0))
        outcomes = list(describe_rows(right_sided, right_sided.samples, config, Ledger(cache)))
        assert sum(outcome.traffic["requests"] for outcome in outcomes) == server.requests
    assert [outcome.sample.file_name for outcome in outcomes] == [row.file_name for row in right_sided.samples]
    return {outcome.sample.category.split()[0]: outcome for outcome in outcomes}


@pytest.mark.parametrize("fate", FATES)
def test_every_fault_is_caught_retried_or_set_aside_and_counted(faulty_run: dict[str, Outcome], fate: str) -> None:
    outcome = faulty_run[fate]
    traffic, met, because = FATES[fate]
    for kind, count in traffic.items():
        assert outcome.traffic[kind] == count, outcome.traffic
    assert outcome.met == met
    assert [fault.kind for fault in outcome.faults] == ([because] if because else [])
    assert outcome.attempts == (1 if because == "no reply" else max([0, *met.values()]) + (because is None))
    if because is None:
        assert text_faults(outcome.sample.reasoning, outcome.sample.category) == []
        assert outcome.scores and outcome.scores.passes
        assert outcome.sample.query and CALM[:20] in outcome.sample.reasoning


def test_reasons_say_what_was_wrong(faulty_run: dict[str, Outcome]) -> None:
    said = {fate: outcome.faults[0].text for fate, outcome in faulty_run.items() if outcome.faults}
    assert 'side: "It lies on the left side" says left; measured on the mask: right' in said["stubborn"]
    assert "cyan" in said["pointing"] and "503" in said["gone"] and "refusal" in said["refusing"]
    assert "score 0.73" in said["hopeless"] and "Too vague." in said["hopeless"]
    assert faulty_run["measuring"].sample.reasoning.startswith("Normal tissue fills")
    assert "An area departs" in faulty_run["measuring"].sample.reasoning
    assert faulty_run["refusing"].sample.reasoning == "", "never the text that the row came with"


def test_only_what_failed_is_written_again(right_sided: LesionSet, tmp_path: Path) -> None:
    rows = {sample.category.split()[0]: sample for sample in right_sided.samples}
    counts = {}
    for fate in ("numbers", "mistaken", "poor", "hopeless"):
        with TeacherServer(faulty) as server:
            config = config_for(server.url, tmp_path / fate, judge=True)
            list(describe_rows(right_sided, [rows[fate]], config, Ledger(tmp_path / fate)))
            counts[fate] = Counter(Request(body, 1).kind for body in server.bodies)
    assert counts["numbers"] == {"description": 1, "thought": 2, "judgement": 1}
    assert counts["mistaken"] == {"description": 2, "thought": 1, "judgement": 1}
    # The judge found fault with what was seen, so that was looked at again.
    assert counts["poor"] == {"description": 2, "thought": 2, "judgement": 2}
    # One and the same text is judged once; its judgement is in the cache after.
    assert counts["hopeless"] == {"description": 3, "thought": 3, "judgement": 1}


def test_the_teacher_is_told_metadata_sides_and_whether_there_is_a_lesion(tmp_path: Path) -> None:
    root = write_phantom_set(tmp_path / "set", count=12, seed=5, size_wh=(64, 48), negatives=0.6)
    lesions = LesionSet.open(root)
    with TeacherServer(well) as server:
        config = config_for(server.url, tmp_path / "cache")
        outcomes = list(describe_rows(lesions, lesions.samples, config, Ledger(tmp_path / "cache")))
        bodies = server.bodies
    assert not any(outcome.faults for outcome in outcomes)
    absent = [sample for sample in lesions.samples if not sample.boxes]
    assert absent
    told = [Request(body, 1) for body in bodies]
    described = [request for request in told if request.kind == "description"]
    assert all(request.with_picture == (request.kind == "description") for request in told)
    assert sum("It shows no" in request.words for request in described) == len({row.file_name for row in absent})
    for body in bodies:
        assert "never those of the patient" in body["messages"][0]["content"]
    assert all("ultrasound of the neck" in r.words or "Picture: " in r.words for r in told)
    assert all(not re.search(r"\d", request.words) for request in described), "no coordinates to copy"


def test_a_stage_maps_over_batches_also_inside_an_event_loop(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 7, lambda row: f"nodule {word(row)}")
    rows = lesions.samples
    files = LesionSet(lesions.root, ())
    with TeacherServer(well) as server:
        config = config_for(server.url, tmp_path / "cache", judge=True)
        whole = list(describe_rows(lesions, rows, config, Ledger(tmp_path / "cache")))

        async def batch(start: int) -> list[Outcome]:
            config_there, ledger = pickle.loads(pickle.dumps((config, Ledger(tmp_path / "other", 1.0))))
            return list(describe_rows(files, rows[start : start + 3], config_there, ledger))

        parts = [outcome for start in (0, 3, 6) for outcome in asyncio.run(batch(start))]
    assert [(each.sample, each.faults, each.scores) for each in parts] == [
        (each.sample, each.faults, each.scores) for each in whole
    ]


def test_a_run_that_is_stopped_waits_for_what_is_out_and_keeps_it(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 20, lambda row: f"nodule {word(row)}")
    with TeacherServer(well, latency_s=0.2) as server:
        ledger = Ledger(tmp_path / "cache")
        config = config_for(server.url, tmp_path / "cache", in_flight=4)
        outcomes = describe_rows(lesions, lesions.samples, config, ledger)
        next(outcomes)
        outcomes.close()
        assert 3 <= server.requests < 2 * len(lesions.samples) and server.open == 0
        assert len_of(tmp_path / "cache") == server.requests
    assert ledger.spent().unanswered == 0 and ledger.open_requests == 0


# --- a whole set -----------------------------------------------------------------------------------------------------


def files_of(root: Path) -> dict[str, bytes | dict[str, Any]]:
    """Every file's content by name; of reports what does not hang on how it was run, of builds no settings and cost."""
    files: dict[str, bytes | dict[str, Any]] = {}
    for path in root.rglob("*"):
        if path.name == "report.json":
            report = json.loads(path.read_text())
            kept = {key: value for key, value in report.items() if key not in ("run", "spent", "settings")}
            files[str(path.relative_to(root))] = kept
        elif path.is_file() and path.name not in ("build.toml", "manifest.json"):
            files[str(path.relative_to(root))] = path.read_bytes()
    return files


def test_the_new_set_shares_pictures_and_says_what_became_of_each_row(right_sided: LesionSet, tmp_path: Path) -> None:
    (right_sided.root / "sources.json").write_text("{}")
    with TeacherServer(lambda request: well(request) if "gone" in request.category else faulty(request)) as server:
        config = config_for(server.url, tmp_path / "cache", judge=True)
        assert config.teacher
        config = replace(config, teacher=replace(config.teacher, retries=2, timeout_s=2.0))
        report = describe_set(right_sided, tmp_path / "out", config, progress=False)
    out = LesionSet.open(tmp_path / "out")
    aside = [json.loads(line) for line in (out.root / "set_aside.jsonl").read_text().splitlines()]
    lost = [fate for fate, (_, _, because) in FATES.items() if because and fate != "gone"]
    assert [row["category"].split()[0] for row in aside] == lost
    assert [row["reasons"][0]["kind"] for row in aside] == [FATES[fate][2] for fate in lost]
    assert len(out.samples) + len(aside) == len(right_sided.samples) == report.rows
    originals = {sample.category: sample for sample in right_sided.samples}
    for sample in out.samples:
        assert replace(sample, reasoning="") == replace(originals[sample.category], reasoning="")
        for name in (sample.file_name, sample.mask_file_name):
            assert (out.root / name).samefile(right_sided.root / name)
    assert not any((out.root / row["file_name"]).exists() for row in aside)
    assert report.because == Counter(FATES[fate][2] for fate in lost)
    assert sum(report.written.values()) == report.kept == len(out.samples)
    assert (out.root / "sources.json").is_file()
    assert json.loads((out.root / "report.json").read_text())["set_aside"] == len(aside)
    assert "rows kept" in report.text() and "paid in all" in report.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def impatient(config: TeacherConfig) -> TeacherConfig:
    assert config.teacher
    return replace(config, teacher=replace(config.teacher, retries=1))


def test_an_outage_near_the_end_drops_no_row(tmp_path: Path) -> None:
    """Fewer rows are left than requests may be in flight."""
    lesions = lesion_set(tmp_path / "set", 12, lambda row: f"nodule {word(row)}")
    healthy = False

    def answer(request: Request) -> Answer:
        return well(request) if healthy or server.requests <= 18 else Answer(status=503)

    with TeacherServer(answer) as server:
        config = impatient(config_for(server.url, tmp_path / "cache"))
        with pytest.raises(TeacherError, match=r"\d+ of 12 rows done, \d+ left without a reply \(.*503.* same command"):
            describe_set(lesions, tmp_path / "out", config, progress=False)
        assert [path.name for path in tmp_path.iterdir() if path.name not in ("set", "cache")] == []
        healthy = True
        assert describe_set(lesions, tmp_path / "out", config, progress=False).kept == 12
        describe_set(lesions, tmp_path / "whole", config_for(server.url, tmp_path / "fresh"), progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_row_that_is_refused_for_good_is_set_aside(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 3, lambda row: f"nodule {word(row)}")
    refused = lesions.samples[1].category

    def answer(request: Request) -> Answer:
        return Answer("policy", status=400) if request.category == refused else well(request)

    with TeacherServer(answer) as server:
        config = config_for(server.url, tmp_path / "cache")
        report = describe_set(lesions, tmp_path / "out", config, progress=False)
    assert (report.kept, report.because) == (2, {"no reply": 1})


def test_a_review_without_its_judge_is_not_finished(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 4, lambda row: f"nodule {word(row)}")
    texts = [replace(row, reasoning=f"{CALM} This fits the {row.category}.") for row in lesions.samples]
    write_set(lesions.root, texts)
    lesions = LesionSet.open(lesions.root)

    def answer(request: Request) -> Answer:
        return Answer(status=503) if request.category == lesions.samples[2].category else well(request)

    with TeacherServer(answer) as server:
        config = replace(config_for(server.url, tmp_path / "cache"), teacher=None)
        config = replace(config, judge=EndpointSettings(base_url=server.url, model="judge", retries=1, **PRICES))
        with pytest.raises(TeacherError, match="3 of 4 rows done, 1 left without a reply"):
            review_set(lesions, tmp_path / "out", config, progress=False)
        server.answer = well
        assert review_set(lesions, tmp_path / "out", config, progress=False).kept == 4
        assert server.requests == 3 + 2 + 1


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 2)

    def answer(request: Request) -> Answer:
        part = {"description": "lesion", "thought": "reasoning", "judgement": "criticism"}[request.kind]
        return (
            Answer(json.dumps(reply_to(request, **{part: f"{CALM} \ud83d"}))) if request.times == 1 else well(request)
        )

    with TeacherServer(answer) as server:
        config = config_for(server.url, tmp_path / "cache", judge=True)
        report = describe_set(lesions, tmp_path / "out", config, progress=False)
        again = describe_set(lesions, tmp_path / "again", config, progress=False)
    assert report.because == again.because and report.met["unreadable"] > 0


def test_the_image_folder_loader_opens_the_new_set(
    right_sided: LesionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    with TeacherServer(lambda request: faulty(request) if "stubborn" in request.category else well(request)) as server:
        report = describe_set(right_sided, tmp_path / "out", config_for(server.url, tmp_path / "c"), progress=False)
    assert report.set_aside == 1
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == report.kept


def test_nothing_kept_is_no_set_but_a_report(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 3)
    with TeacherServer(lambda request: Answer("What a nice picture!")) as server:
        report = describe_set(lesions, tmp_path / "out", config_for(server.url, tmp_path / "cache"), progress=False)
    assert (report.kept, report.set_aside, report.because) == (0, 3, {"unreadable": 3})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "set_aside.jsonl"]


def test_where_links_do_not_work_pictures_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    lesions = lesion_set(tmp_path / "set", 2)
    describe_set(lesions, tmp_path / "out", progress=False)
    name = lesions.samples[0].file_name
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "set" / name).read_bytes()
    assert not (tmp_path / "out" / name).samefile(tmp_path / "set" / name)


def test_a_broken_picture_is_set_aside(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 3)
    (lesions.root / lesions.samples[1].mask_file_name).unlink()
    for teacher in (False, True):
        with TeacherServer(well) as server:
            config = config_for(server.url, tmp_path / "cache") if teacher else None
            report = describe_set(lesions, tmp_path / f"out{teacher}", config, progress=False)
        assert (report.kept, report.because) == (2, {"picture": 1})


def test_a_full_folder_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesions = lesion_set(tmp_path / "set", 2)
    with pytest.raises(DataError, match="already there and not empty"):
        describe_set(lesions, tmp_path / "set", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        describe_set(lesions, tmp_path / "file" / "out", progress=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coreseg.data.build.run.share_file", full)
    with pytest.raises(DataError, match=r"out: cannot be written .*No space left"):
        describe_set(lesions, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "set"], "nothing half-written"


def test_a_disk_that_is_full_when_the_files_are_closed(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    lesions = lesion_set(tmp_path / "set", 2)
    outcome = Outcome(lesions.samples[0], (Fault("form", "too short"),))

    def write() -> None:
        with DerivedSet(lesions, tmp_path / "out") as written:
            written.add(outcome)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(DataError, match="cannot be written"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_measured_describer_is_the_default_and_repeats_an_import(tmp_path: Path) -> None:
    from coreseg.data.sources import import_set

    write_phantom_set(tmp_path / "set", count=6, seed=2, size_wh=(64, 48), two_kinds=0.0)
    (tmp_path / "set" / "metadata.jsonl").unlink()
    for path in (tmp_path / "set" / "masks").iterdir():
        path.rename(path.with_name(path.name.replace("-nodule", "").replace("-cyst", "")))
    facts = {"modality": "ct", "anatomy": "lung", "category": "lung tumor", "seed": 5}
    imported = import_set(tmp_path / "set", tmp_path / "mine", **facts, progress=False)
    lesions = LesionSet.open(imported.root)
    report = describe_set(lesions, tmp_path / "same", seed=5, progress=False)
    assert report.kept == 6 and report.spent is None and report.stated > 2
    assert LesionSet.open(tmp_path / "same").samples == lesions.samples
    describe_set(lesions, tmp_path / "other", seed=6, progress=False)
    assert LesionSet.open(tmp_path / "other").samples != lesions.samples


def test_when_the_budget_is_used_up_the_run_stops_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 12, lambda row: f"nodule {word(row)}")
    with TeacherServer(well, latency_s=0.02) as server:
        config = config_for(server.url, tmp_path / "cache", max_cost=15 * PRICE, in_flight=8)
        with pytest.raises(TeacherError, match=r"\d+ of 12 rows done, \d+ left: the budget of .* is used up"):
            describe_set(lesions, tmp_path / "out", config, progress=False)
        assert not (tmp_path / "out").exists()
        spent = Ledger(tmp_path / "cache").spent()
        assert spent.paid <= 15 * PRICE and spent.unanswered == 0
        sent = server.requests
        assert sent * PRICE == pytest.approx(spent.paid)
        describe_set(lesions, tmp_path / "out", replace(config, max_cost=60 * PRICE), progress=False)
        assert server.requests == 24
    with TeacherServer(well) as server:
        fresh = config_for(server.url, tmp_path / "fresh")
        describe_set(lesions, tmp_path / "whole", fresh, progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# --- killed, and going on --------------------------------------------------------------------------------------------


def write_config(file: Path, url: str, cache: Path, judge: bool = True, **settings: Any) -> Path:
    values = {"base_url": url, "model": "teacher", **PRICES, **settings}
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    tables = f"[teacher]\n{table}\n" + (f"[judge]\n{table}\n" if judge else "")
    file.write_text(f"cache = {json.dumps(str(cache))}\nmax_cost = 100\n{tables}")
    return file


def coreseg(*words: str | Path) -> list[str]:
    return [sys.executable, "-c", "from coreseg.cli import main; main()", *map(str, words)]


def command_for(tmp_path: Path, name: str, url: str, cache: Path, *, build: bool) -> tuple[list[str], Path]:
    """A command that has the set described by a teacher, alone or within a whole build, and its output."""
    file, out = write_config(tmp_path / f"{name}.toml", url, cache), tmp_path / name / "mine"
    if not build:
        return coreseg("data", "describe", tmp_path / "set", "--out", out, "--teacher", file), out
    tables = file.read_text().replace("[teacher]", "[describe.teacher]").replace("[judge]", "[describe.judge]")
    start = f"out = {json.dumps(str(out))}\ndata = {json.dumps(str(tmp_path / 'set'))}\n"
    file.write_text(f"{start}[filter]\nproxy = true\nkeep_share = 0.9\n[describe]\n{tables}")
    return coreseg("data", "build", file), out


def kill_and_resume(tmp_path: Path, rows: int, kills: int, latency_s: float, *, build: bool = False) -> None:
    lesion_set(tmp_path / "set", rows, lambda row: f"{list(FATES)[row % len(FATES)]} nodule {word(row)}")
    unhurried = {"gone", "slow", "throttled", "broken", "stubborn", "mistaken", "swapped"}

    def answer(request: Request) -> Answer:
        return well(request) if request.category.split()[0] in unhurried else faulty(request)

    with TeacherServer(answer, latency_s) as server:
        command, whole = command_for(tmp_path, "whole", server.url, tmp_path / "whole-cache", build=build)
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        questions = server.requests

    with TeacherServer(answer, latency_s) as server:
        cache = tmp_path / "cache"
        command, out = command_for(tmp_path, "killed", server.url, cache, build=build)
        rng, lost = random.Random(3), 0
        for moment in sorted(rng.sample(range(2, questions - 5), kills)):
            before, kept = server.requests, len_of(cache)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
                while kept + server.requests - before < moment and running.poll() is None:
                    time.sleep(0.001)
                running.kill()
            assert running.returncode == -9, "killed in the middle"
            time.sleep(2 * latency_s + 0.05)
            in_flight = server.requests - before - (len_of(cache) - kept)
            assert 0 <= in_flight <= 2 * 32, "those open at teacher and judge"
            lost += in_flight
            assert not (out / "set" if build else out).exists()
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert server.requests == questions + lost, "only what was in flight is asked a second time"
    assert files_of(out) == files_of(whole)
    assert not list(out.parent.rglob(".*.partial"))
    spent = Ledger(cache).spent()
    assert spent.paid == pytest.approx(questions * PRICE)
    assert (spent.unanswered > 0) == (lost > 0)


def len_of(cache: Path) -> int:
    """Replies that a cache holds."""
    if not (cache / "replies.sqlite").exists():
        return 0
    return int(Ledger(cache)._row("SELECT count(*) FROM replies")[0])


def test_killed_in_the_middle_it_goes_on_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, rows=20, kills=1, latency_s=0.05)


@pytest.mark.slow
def test_killed_at_five_random_moments_it_ends_the_same(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, rows=120, kills=5, latency_s=0.2)


@pytest.mark.slow
def test_a_build_killed_at_five_random_moments_ends_the_same(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, rows=120, kills=5, latency_s=0.2, build=True)


@pytest.mark.slow
def test_it_keeps_thirty_two_requests_in_flight(tmp_path: Path) -> None:
    rows = 600
    lesions = lesion_set(tmp_path / "set", rows, lambda row: f"nodule {word(row)}")
    arrived: list[float] = []

    def answer(request: Request) -> Answer:
        arrived.append(time.monotonic())
        return well(request)

    with TeacherServer(answer, latency_s=1.0) as server:
        config = write_config(tmp_path / "config.toml", server.url, tmp_path / "cache", judge=False)
        command = coreseg("data", "describe", lesions.root, "--out", tmp_path / "out", "--teacher", config)
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert (server.requests, server.most_open) == (2 * rows, 32)
    # From the second to the last but some: the first goes alone, and at the end fewer are left than may be open.
    rate = (len(arrived) - 34) / (arrived[-33] - arrived[1])
    print(f"\n{rate:.1f} requests a second; {2 * rows / (arrived[-1] + 1 - arrived[0]):.1f} with start and end")
    assert rate > 20, "the ideal is 32; a busy machine gets less"


@pytest.mark.slow
def test_memory_stays_flat_over_twenty_thousand_rows(tmp_path: Path) -> None:
    rows = 20_000
    write_phantom_set(tmp_path / "set", count=20, seed=1, negatives=0.0, two_kinds=0.0)
    samples = LesionSet.open(tmp_path / "set").samples
    write_set(
        tmp_path / "set",
        [replace(samples[row % 20], category=f"nodule {word(row // 20)}") for row in range(rows)],
    )
    with TeacherServer(well) as server:
        server.keep_bodies = False
        config = write_config(tmp_path / "config.toml", server.url, tmp_path / "cache", judge=False)
        command = coreseg("data", "describe", tmp_path / "set", "--out", tmp_path / "out", "--teacher", config)
        peaks: list[tuple[int, float]] = []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
            while running.poll() is None:
                peaks.append((server.requests, rss_mb(running.pid)))
                time.sleep(1.0)
        assert running.returncode == 0
    early = max(mb for count, mb in peaks if count <= 2 * rows * 0.15)
    late = max(mb for count, mb in peaks)
    print(f"\npeak {early:.0f} MB in the first 15 %, {late:.0f} MB in all")
    assert late < early * 1.1 + 10
    assert sum(1 for _ in (tmp_path / "out" / "metadata.jsonl").open()) == rows


def rss_mb(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


# --- the commands ----------------------------------------------------------------------------------------------------


def test_describe_then_review_costs_nothing_again(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 5)
    with TeacherServer(well) as server:
        config = write_config(tmp_path / "t.toml", server.url, tmp_path / "cache")
        done = run("data", "describe", lesions.root, "--out", tmp_path / "out", "--teacher", config)
        assert done.exit_code == 0 and "5 of 5 rows kept" in done.stdout, done.output
        sent = server.requests
        done = run("data", "review", tmp_path / "out", "--out", tmp_path / "reviewed", "--judge", config)
        assert done.exit_code == 0 and "5 of 5 rows kept" in done.stdout, done.output
        assert server.requests == sent
    assert LesionSet.open(tmp_path / "reviewed").samples == LesionSet.open(tmp_path / "out").samples


def test_a_free_judge_has_no_use_for_the_budget_of_the_teacher(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 2)
    with TeacherServer(well) as server:
        config = write_config(tmp_path / "t.toml", server.url, tmp_path / "cache", judge=False)
        judge = f'[judge]\nbase_url = "{server.url}"\nmodel = "free"\n'
        config.write_text(config.read_text() + judge)
        words = ("data", "review", lesions.root, "--judge", config)
        done = run(*words, "--out", tmp_path / "out")
        assert done.exit_code == 0 and "2 of 2 rows kept" in done.stdout, done.output
        assert "no price is set" in complaint(run(*words, "--out", tmp_path / "again", "--max-cost", "5"))


def test_review_exits_with_one_for_a_lie(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 5)
    rows = list(lesions.samples)
    rows[2] = replace(rows[2], reasoning=f"{CALM} Four huge spots fit the nodule.")
    write_set(lesions.root, rows)
    done = run("data", "review", lesions.root, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "4 of 5 rows kept, 1 set aside: 1 pixels" in done.stdout
    aside = json.loads((tmp_path / "out" / "set_aside.jsonl").read_text())
    assert {reason["kind"] for reason in aside["reasons"]} == {"pixels"} and "Four huge" in aside["reasons"][0]["text"]


def test_a_dry_run_sends_nothing_and_tells_words_and_cost(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 5)
    with TeacherServer(well) as server:
        config = write_config(tmp_path / "t.toml", server.url, tmp_path / "cache")
        done = run("data", "describe", lesions.root, "--teacher", config, "--dry-run")
        assert done.exit_code == 0 and server.requests == 0
        assert "The cyan line runs around every nodule." in done.stdout and "Be strict" in done.stdout
        assert "5 rows: 15 requests" in done.stdout and server.url in done.stdout
        told = re.search(r"cost about ([\d.]+), at most ([\d.]+)", done.stdout)
        assert told and 0 < float(told[1]) < float(told[2])
        review = run("data", "review", lesions.root, "--judge", config, "--dry-run")
        assert "5 rows: 5 requests" in review.stdout and "JSON" in review.stdout
        settings = replace(load(TeacherConfig, config), teacher=None)
        once, most = (estimate(lesions.samples, replace(settings, attempts=times)).most for times in (1, 3))
        assert most == pytest.approx(3 * once), "a text that stands is not written again"
        config.write_text(f'[judge]\nbase_url = "{server.url}"\nmodel = "m"\n')
        assert "no teacher is set" in complaint(run("data", "describe", lesions.root, "--teacher", config, "--dry-run"))
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_one_clear_error(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 2)
    config = write_config(tmp_path / "t.toml", "http://127.0.0.1:9/v1", tmp_path / "cache", judge=False)
    out = ("--out", tmp_path / "out")
    assert "--out is missing" in complaint(run("data", "describe", lesions.root))
    assert "--max-cost is for a teacher" in complaint(run("data", "describe", lesions.root, *out, "--max-cost", "3"))
    assert "--dry-run shows" in complaint(run("data", "describe", lesions.root, "--dry-run"))
    assert "no judge is set" in complaint(run("data", "review", lesions.root, *out, "--judge", config))
    assert "seed is -1; expected 0 or more" in complaint(run("data", "describe", lesions.root, *out, "--seed", "-1"))
    assert "cannot be read" in complaint(
        run("data", "describe", lesions.root, *out, "--teacher", tmp_path / "none.toml")
    )
    said = complaint(run("data", "describe", lesions.root, *out, "--teacher", config))
    assert "0 of 2 rows done, 2 left" in said and "no connection" in said
    config.write_text(config.read_text().replace("max_cost = 100\n", ""))
    assert "no budget" in complaint(run("data", "describe", lesions.root, *out, "--teacher", config))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no teacher"):
        next(describe_rows(lesions, lesions.samples, TeacherConfig(), Ledger(tmp_path / "cache")))


def test_without_the_extra_the_way_out_is_named(tmp_path: Path) -> None:
    lesions = lesion_set(tmp_path / "set", 2)
    config = write_config(tmp_path / "t.toml", "http://127.0.0.1:9/v1", tmp_path / "cache")
    program = "import sys; sys.modules['openai'] = None; from coreseg.cli import main; main()"
    words = ["data", "describe", str(lesions.root), "--out", str(tmp_path / "out"), "--teacher", str(config)]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install '.[build]'" in done.stderr


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True], ids=["free", "guided by the schema"])
def test_a_real_model_that_talks_nonsense_is_caught_every_time(tmp_path: Path, guided: bool) -> None:
    from vlm_server import serve

    from coreseg.testing_models import tiny_qwen_vl

    root = write_phantom_set(tmp_path / "set", count=12, seed=7, size_wh=(64, 48))
    lesions = LesionSet.open(root)
    rows = len(lesions.samples)
    with serve(tiny_qwen_vl(tmp_path / "model"), guided) as (url, model):
        config = write_config(tmp_path / "t.toml", url, tmp_path / "cache", max_tokens=48, timeout_s=300.0)
        done = run("data", "describe", root, "--out", tmp_path / "out", "--teacher", config)
        requests, pictures = model.requests, model.pictures
        again = run("data", "describe", root, "--out", tmp_path / "again", "--teacher", config)
        assert model.requests == requests, "nonsense is paid for once, too"
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        print(f"\n{rows} rows, {requests} requests, {pictures} pictures: {report['because']} {report['met']}")
        judged = run("data", "review", root, "--out", tmp_path / "reviewed", "--judge", config)
    assert (done.exit_code, again.exit_code, judged.exit_code) == (1, 1, 1)
    assert (report["kept"], report["set_aside"]) == (0, rows)
    assert report["run"]["requests"] == requests >= 3 * rows and pictures >= rows
    assert sum(report["met"].values()) >= 3 * rows, "each of three attempts"
    aside = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert len(aside) == rows and all(row["reasons"] and row["attempts"] == 3 for row in aside)
    assert (set(report["because"]) == {"unreadable"}) != guided
    verdicts = json.loads((tmp_path / "reviewed" / "report.json").read_text())
    assert verdicts["rows"] == rows == verdicts["kept"] + verdicts["set_aside"]
    assert set(verdicts["because"]) <= ({"judge"} if guided else {"no reply"})
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
