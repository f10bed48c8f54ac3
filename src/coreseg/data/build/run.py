"""A stage run over a whole set: rows streamed from one folder into a new one, with a report of what became of them.

OUT/metadata.jsonl     the rows that may stay; with images/, masks/ and sources.json a data set like any other
OUT/set_aside.jsonl    the rows that may not, each with its last text and the reasons
OUT/report.json        counts, scores, traffic and money
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coreseg.config import require
from coreseg.data.build.endpoint import UNANSWERED
from coreseg.data.build.engine import HERE, Here
from coreseg.data.build.ledger import Ledger, Spent
from coreseg.data.build.settings import TeacherConfig
from coreseg.data.build.stage import Outcome
from coreseg.data.store import METADATA, SOURCES, LesionSet, new_set, require_empty, row_line, share_file
from coreseg.errors import TeacherError
from coreseg.sentences import find_all

SET_ASIDE = "set_aside.jsonl"
REPORT = "report.json"


class DerivedSet:
    """A new data set made of another one's rows and pictures, in `out` once the `with` block ends well, or nowhere.

    Raises DataError where `out` is not empty or cannot be written.
    """

    def __init__(self, source: LesionSet, out: Path) -> None:
        require_empty(out)
        self._source, self._out = source.root, out

    def __enter__(self) -> "DerivedSet":
        with ExitStack() as stack:
            self._staging = stack.enter_context(new_set(self._out))
            stack.push(self._finish)
            self._rows, self._others = (
                stack.enter_context((self._staging / name).open("w", encoding="utf-8", newline="\n"))
                for name in (METADATA, SET_ASIDE)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, outcome: Outcome) -> None:
        """Write one row where it belongs: into the set with its pictures, or aside."""
        if outcome.faults:
            self._others.write(_aside_line(outcome) + "\n")
            return
        for name in (outcome.sample.file_name, outcome.sample.mask_file_name):
            share_file(self._source / name, self._staging / name)
        self._rows.write(row_line(outcome.sample) + "\n")

    def report(self, report: "Report") -> None:
        """Write what is to be known of the run."""
        text = json.dumps(asdict(report), ensure_ascii=False, indent=1)
        (self._staging / REPORT).write_text(text + "\n", encoding="utf-8", newline="\n")

    def _finish(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        for name in (METADATA, SET_ASIDE):
            if (self._staging / name).stat().st_size == 0:
                (self._staging / name).unlink()
        if (self._source / SOURCES).is_file():
            shutil.copyfile(self._source / SOURCES, self._staging / SOURCES)


def _aside_line(outcome: Outcome) -> str:
    scores = asdict(outcome.scores) | {"score": outcome.scores.score} if outcome.scores else None
    reasons = [asdict(fault) for fault in outcome.faults]
    row = {**asdict(outcome.sample), "attempts": outcome.attempts, "scores": scores, "reasons": reasons}
    return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True)
class Report:
    """What became of the rows of one run.

    because: rows set aside, by kind of fault (a row may have several). met: what was wrong with texts on the way, kept
    rows included. written: kept rows by how often their text was written. scores: means over the rows that were
    judged. stated: kinds of statement, of eight, that a kept text makes on average, so that the pixels had a say; the
    rest of a text only the judge has seen. spent: by all runs with this ledger. run: what this run took: seconds,
    requests, replies from the ledger ("cached"), retries and every kind of failure. settings: how it was run.

    All but `run` and `spent` come out the same when a run was stopped and run again.
    """

    rows: int
    kept: int
    set_aside: int
    because: Mapping[str, int]
    met: Mapping[str, int]
    written: Mapping[str, int]
    scores: Mapping[str, float]
    stated: float
    spent: Spent | None
    run: Mapping[str, float | int]
    settings: Mapping[str, Any]

    def text(self) -> str:
        """For a reader, a line a subject."""
        lines = [f"{self.kept} of {self.rows} rows kept, {self.set_aside} set aside{_counted(self.because)}"]
        lines += [f"turned down on the way{_counted(self.met)}"] if self.met else []
        lines += [f"a kept text makes {self.stated:.1f} kinds of statement that the pixels can check"] * bool(self.kept)
        if self.scores:
            lines.append("mean scores: " + ", ".join(f"{name} {value:.2f}" for name, value in self.scores.items()))
        lines += [f"this run{_counted(self.run)}"] if self.spent else []
        if self.spent and self.spent.paid + self.spent.unanswered:
            held = f", {self.spent.unanswered:.4g} held back for requests without a reply" * bool(self.spent.unanswered)
            lines.append(f"paid in all: {self.spent.paid:.4g}{held}")
        return "\n".join(lines)


def _counted(counts: Mapping[str, float | int]) -> str:
    return (": " + ", ".join(f"{count:,.0f} {name}" for name, count in counts.items())) if counts else ""


class _Counts:
    """Adds outcomes up."""

    def __init__(self) -> None:
        self.rows = self.kept = self._stated = 0
        self.because, self.met, self.written, self.traffic = (Counter[str]() for _ in range(4))
        self._scores: Counter[str] = Counter()
        self._judged = 0

    def add(self, outcome: Outcome) -> None:
        self.rows += 1
        self.kept += not outcome.faults
        self.because.update({fault.kind for fault in outcome.faults})
        self.met.update(outcome.met)
        self.traffic.update(outcome.traffic)
        if not outcome.faults:
            self.written[str(outcome.attempts)] += 1
            self._stated += len(find_all(outcome.sample.reasoning))
        if outcome.scores:
            self._judged += 1
            self._scores.update({**asdict(outcome.scores), "score": outcome.scores.score})

    def report(self, settings: Mapping[str, Any], spent: Spent | None, seconds: float) -> Report:
        return Report(
            rows=self.rows,
            kept=self.kept,
            set_aside=self.rows - self.kept,
            because=_sorted(self.because),
            met=_sorted(self.met),
            written=_sorted(self.written),
            scores={name: total / self._judged for name, total in self._scores.items()},
            stated=self._stated / max(1, self.kept),
            spent=spent,
            run={"seconds": round(seconds, 1), **_sorted(self.traffic)},
            settings=settings,
        )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts)}


def describe_set(
    source: LesionSet,
    out: Path,
    config: TeacherConfig | None = None,
    *,
    seed: int = 0,
    engine: Here = HERE,
    progress: bool = True,
) -> Report:
    """Write a set whose reasoning is new: a teacher's, or, without a `config`, the measured description by `seed`.

    Stopped at any moment, it leaves no new set behind, and run again it pays for no reply a second time. Raises
    DataError where `out` is not empty or cannot be written, ConfigError for settings that do not go together,
    MissingExtraError without the extra `build`, TeacherError where the teacher answers no more, at the end where it did
    not answer for some rows, or the budget is used up: the message says how many rows were done.
    """
    require(seed >= 0, "seed", seed, "0 or more")
    pictures = LesionSet(source.root, ())
    if config is None:
        from coreseg.data.build.describe import describe_rows as measure

        settings: dict[str, Any] = {"teacher": None, "seed": seed}
        outcomes = engine.outcomes(partial(measure, pictures, seed=seed), source.samples, None)
        return write_outcomes(source, outcomes, out, settings, None, progress)
    from coreseg.data.build.prompts import prompts_digest
    from coreseg.data.build.teacher import describe_rows

    ledger = config.open_ledger()
    settings = {**asdict(config), "prompts": prompts_digest()}
    outcomes = engine.outcomes(partial(describe_rows, pictures, config=config), source.samples, ledger)
    return write_outcomes(source, outcomes, out, settings, ledger, progress)


def review_set(
    source: LesionSet,
    out: Path,
    config: TeacherConfig | None = None,
    *,
    engine: Here = HERE,
    progress: bool = True,
) -> Report:
    """Check every row's reasoning: its form, against the pixels, and by the judge of `config` where it names one.

    The rows that pass become a set in `out`. Resumes and raises as `describe_set` does.
    """
    from coreseg.data.build.quality import review_rows

    settings: dict[str, Any] = {"judge": None}
    ledger = None
    if config is not None and config.judge is not None:
        from coreseg.data.build.prompts import prompts_digest

        ledger = config.open_ledger()
        settings = {**asdict(config), "prompts": prompts_digest()}
    stage = partial(review_rows, LesionSet(source.root, ()), config=config)
    outcomes = engine.outcomes(stage, source.samples, ledger)
    return write_outcomes(source, outcomes, out, settings, ledger, progress)


def write_outcomes(
    source: LesionSet,
    outcomes: Generator[Outcome],
    out: Path,
    settings: Mapping[str, Any],
    ledger: Ledger | None,
    progress: bool,
) -> Report:
    """Write what a stage made of the rows of `source`, wherever it ran, as a new set in `out`, with its report.

    `settings` go into the report; the money is read from `ledger`. Raises DataError where `out` is not empty or cannot
    be written, TeacherError where rows had no answer for a reason that time may mend, and what the stage raises, with
    the number of rows done; then nothing is left in `out`.
    """
    started, counts, total = time.monotonic(), _Counts(), len(source.samples)
    unanswered: list[Outcome] = []
    bar = tqdm(total=total, unit="row", disable=not progress)
    with ExitStack() as stack:
        written = stack.enter_context(DerivedSet(source, out))
        stack.enter_context(closing(bar))
        # Inside the others: whatever ends the run, requests that are out are waited for first.
        stack.enter_context(closing(outcomes))
        try:
            for outcome in outcomes:
                written.add(outcome)
                counts.add(outcome)
                unanswered += [outcome] if outcome.traffic[UNANSWERED] else []
                bar.set_postfix(_postfix(counts, ledger), refresh=False)
                bar.update()
        except TeacherError as error:
            raise TeacherError(f"{counts.rows} of {total} rows done, {total - counts.rows} left: {error}") from error
        if unanswered:
            raise TeacherError(_unanswered(unanswered, total))
        report = counts.report(settings, ledger.spent() if ledger else None, time.monotonic() - started)
        written.report(report)
    return report


def _unanswered(outcomes: Sequence[Outcome], total: int) -> str:
    named = ", ".join(outcome.sample.file_name for outcome in outcomes[:3]) + (", …" if len(outcomes) > 3 else "")
    return (
        f"{total - len(outcomes)} of {total} rows done, {len(outcomes)} left without a reply ({named}): "
        f"{outcomes[0].faults[0].text}. Nothing is written yet. Run the same command again when the endpoint answers: "
        "the replies that came are kept. A row that never gets one must leave the data set."
    )


def _postfix(counts: _Counts, ledger: Ledger | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"aside": counts.rows - counts.kept}
    if ledger:
        traffic = counts.traffic
        shown |= {"cached": traffic["cached"], "retried": traffic["retries"], "paid": f"{ledger.spent().paid:.4g}"}
    return shown
