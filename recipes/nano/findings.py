"""What stage 2 earned: the arms of `recipes/nano/arms` side by side, and each claim with its interval and a verdict.

python recipes/nano/findings.py FOLDER [--start EVALUATION]

FOLDER has an evaluation for each arm and seed, ARM-SEED or ARM-SEED/evaluation; START is that of the model they all
began with. Beside an arm stands its own question-blind prompt, of the seeds that were evaluated with --question-blind:
what changed there has nothing to do with language. "Found" are the rows whose lesion all runs of both sides give a
mask: what differs there is not how readily a lesion is called absent.

Figures in %: the mean over seeds, their least and greatest in brackets; in brackets behind a name, how many seeds.
Differences: paired by question, intervals over seeds and cases (`coreseg compare`). That the first of two arms is
better is *reproduced* where the interval lies on its side of 0, *contradicted* at this size where it lies on the other,
else not distinguishable; with one seed on a side there is no verdict on a training.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreseg.errors import CoreSegError
from coreseg.evaluate.compare import Run, compare, matched, read_side, training_noise
from coreseg.evaluate.records import is_given, summarise

FIGURES = {
    "mDice": ("pooled", "dice"),
    "macro mDice": ("macro", "dice"),
    "detect": ("pooled", "detect"),
    "macro detect": ("macro", "detect"),
    "fails": ("pooled", "failure"),
    "specificity": ("presence", "specificity"),
    "called absent": ("presence", "called_absent"),
    "attribute mDice": ("attributes", "dice"),
    "attribute gain": ("attributes", "gain"),
}
NAMES = {
    "sft": "stage 1 going on",
    "grpo": "stage 2",
    "no-advantage": "mask loss alone",
    "no-mask-loss": "rewards alone",
}
CLAIMS = (("grpo", "sft"), ("grpo", "no-advantage"), ("grpo", "no-mask-loss"), ("no-mask-loss", "sft"))
"""Of each pair the first is claimed to be better."""
DIFFERENCES = {
    name: ("lesion_free" if block == "presence" else block, figure) for name, (block, figure) in FIGURES.items()
}
FOUND = {f"{name}, found": DIFFERENCES[name] for name in ("mDice", "macro mDice", "detect", "macro detect")}
VERDICTS = {"B better": "reproduced", "A better": "contradicted", "not distinguishable": ""}


def evaluations(folder: Path) -> dict[str, list[Path]]:
    """The evaluation folders of each arm, by seed."""
    found = defaultdict(list)
    for path in sorted(folder.iterdir()):
        inner = path / "evaluation" if (path / "evaluation").is_dir() else path
        if has_records(inner):
            found[path.name.rsplit("-", 1)[0]].append(inner)
    return dict(found)


def has_records(folder: Path) -> bool:
    """Whether `coreseg evaluate` wrote there."""
    return any((folder / name).is_file() for name in ("records.jsonl", "records.jsonl.gz"))


def rows(name: str, runs: Sequence[Run]) -> Iterator[str]:
    """An arm's lines: its own, and where it was asked for, that of its question-blind prompt."""
    yield row(name, runs)
    blind = [run.folder / "question-blind" for run in runs if has_records(run.folder / "question-blind")]
    if blind:
        yield row("its question-blind prompt", read_side(name, blind))


def row(name: str, runs: Sequence[Run]) -> str:
    """An arm's line of the table; "-" for what was not asked."""
    summaries: list[dict[str, Any]] = [summarise(run.records) for run in runs]
    cells = []
    for block, figure in FIGURES.values():
        figures = [(summary[block] or {}).get(figure) for summary in summaries]
        values = [each["mean"] for each in figures if each]
        spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{spread}" if values else "-")
    return f"| {name} ({len(runs)}) | " + " | ".join(cells) + " |"


def heading(cells: Sequence[str]) -> str:
    """The first two lines of a table, its first column without a name."""
    return f"| | {' | '.join(cells)} |\n|---{'|---' * len(cells)}|"


def differences(a: Sequence[Run], b: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """B less A in every figure, over all rows and over those where every run found the lesion."""
    pairs = matched(a, b)
    found = [pair for pair in pairs if all(is_given(record) for record in (*pair.a, *pair.b))]
    sides = ((DIFFERENCES, compare(pairs)), (FOUND, compare(found)))
    return {
        name: compared[block][figure]
        for figures, compared in sides
        for name, (block, figure) in figures.items()
        if compared[block]
    }


def table(columns: Sequence[dict[str, dict[str, Any]]], verdicts: bool) -> Iterator[str]:
    """The lines of a table of differences, a column each."""
    for name in (*DIFFERENCES, *FOUND):
        figures = [column.get(name) for column in columns]
        if any(figures):
            yield f"| {name} | " + " | ".join(cell(figure, verdicts) for figure in figures) + " |"


def cell(figure: dict[str, Any] | None, verdict: bool) -> str:
    """One difference with its interval; "-" where no row has it."""
    if figure is None:
        return "-"
    word = VERDICTS[figure["verdict"]] if verdict else ""
    return f"{figure['difference']:+.1f} [{figure['low']:+.1f}, {figure['high']:+.1f}] {word}".strip()


def findings(folder: Path, start: Path | None) -> Iterator[str]:
    """The tables, line by line. Raises CoreSegError for evaluations that do not belong together."""
    there = evaluations(folder)
    arms = {name: read_side(NAMES[name], there[name]) for name in NAMES if name in there}
    started = read_side("start", [start]) if start else []
    matched([*started, *(run for runs in arms.values() for run in runs)], [])  # none unfinished, all asked the same
    yield heading(list(FIGURES))
    if started:
        yield from rows("start", started)
    for name, runs in arms.items():
        yield from rows(NAMES[name], runs)
    if started:
        # One and the same model for all arms, so only an arm's own seeds are drawn.
        yield "\n" + heading([f"{NAMES[name]} less start ({len(runs)})" for name, runs in arms.items()])
        yield from table([differences(started, runs) for runs in arms.values()], verdicts=False)
    pairs = [(better, worse) for better, worse in CLAIMS if {better, worse} <= arms.keys()]
    if pairs:
        counts = [(len(arms[worse]), len(arms[better])) for better, worse in pairs]
        heads = [
            f"{NAMES[b]} less {NAMES[a]} ({of_b}, {of_a})" for (b, a), (of_a, of_b) in zip(pairs, counts, strict=True)
        ]
        yield "\n" + heading(heads)
        yield from table(
            [differences(arms[worse], arms[better]) for better, worse in pairs], verdicts=min(map(min, counts)) > 1
        )
        for count in sorted(set(counts)):
            yield "\n" + training_noise(*count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", type=Path)
    options = parser.parse_args()
    try:
        print("\n".join(findings(options.folder, options.start)))
    except CoreSegError as error:
        parser.error(str(error))
