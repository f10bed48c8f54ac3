"""What stage 2 earned: the arms of `recipes/nano/arms` side by side, and each claim with its interval and a verdict.

python recipes/nano/findings.py FOLDER [--start EVALUATION]

FOLDER has an evaluation for each arm and seed, ARM-SEED or ARM-SEED/evaluation; START is that of the model they all
began with. Beside an arm stands its own question-blind prompt, of the seeds that were evaluated with --question-blind:
what changed there has nothing to do with language. "Found" are the rows whose lesion all runs of both sides give a
mask: what differs there is not how readily a lesion is called absent.

Figures in %: the mean over seeds, their least and greatest in brackets. Differences: paired by question, intervals over
seeds and cases (`coreseg compare`). A claim that an arm is better than another is *reproduced* where the interval lies
on its side of 0, *contradicted at this size* where it lies on the other, else *not distinguishable*.
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
CLAIMS = {
    "stage 2 beats going on with stage 1": ("sft", "grpo"),
    "the rewards earn it, not the mask loss (without KL) alone": ("no-advantage", "grpo"),
    "the mask loss is needed beside the rewards": ("no-mask-loss", "grpo"),
    "rewards alone beat going on with stage 1": ("sft", "no-mask-loss"),
}
DIFFERENCES = {
    name: ("lesion_free" if block == "presence" else block, figure) for name, (block, figure) in FIGURES.items()
}
FOUND = {f"{name}, found": DIFFERENCES[name] for name in ("mDice", "macro mDice", "detect", "macro detect")}
VERDICTS = {
    "B better": "reproduced",
    "A better": "contradicted at this size",
    "not distinguishable": "not distinguishable",
}


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
        yield row(f"{name}, question-blind", read_side(name, blind))


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


def span(figures: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{figures['difference']:+.1f} [{figures['low']:+.1f}, {figures['high']:+.1f}]"


def less_start(start: Sequence[Run], arms: dict[str, list[Run]]) -> Iterator[str]:
    """Every arm less the model that it began with: one and the same for all, so only the arm's seeds are drawn."""
    compared = {name: compare(matched(start, runs)) for name, runs in arms.items()}
    heads = (f"{name} less start ({len(runs)})" for name, runs in arms.items())
    yield "\n| | " + " | ".join(heads) + " |\n" + "|---" * (len(arms) + 1) + "|"
    for name, (block, figure) in DIFFERENCES.items():
        cells = (span(each[block][figure]) if each[block] else "-" for each in compared.values())
        yield f"| {name} | " + " | ".join(cells) + " |"


def told(name: str, figures: dict[str, Any], seeds: int) -> str:
    """One difference in words. Of one seed a side no verdict on a training is to be had."""
    verdict = VERDICTS[figures["verdict"]] if seeds > 1 else f"{figures['verdict']}, of these two checkpoints"
    return f"| {name} | {span(figures)} | {verdict} |"


def findings(folder: Path, start: Path | None) -> Iterator[str]:
    """The tables, line by line. Raises CoreSegError for evaluations that do not belong together."""
    arms = {name: read_side(name, folders) for name, folders in evaluations(folder).items()}
    started = read_side("start", [start]) if start else []
    matched([*started, *(run for runs in arms.values() for run in runs)], [])  # none unfinished, all asked the same
    yield "| arm (seeds) | " + " | ".join(FIGURES) + " |\n" + "|---" * (len(FIGURES) + 1) + "|"
    if started:
        yield from rows("start", started)
    for name, runs in arms.items():
        yield from rows(name, runs)
    if started:
        yield from less_start(started, arms)
    for claim, (a, b) in CLAIMS.items():
        if a in arms and b in arms:
            pairs, seeds = matched(arms[a], arms[b]), (len(arms[a]), len(arms[b]))
            yield f"\n**{claim}** ({b} less {a}). {training_noise(*seeds)}\n\n| | difference | verdict |\n|---|---|---|"
            found = [pair for pair in pairs if all(is_given(record) for record in (*pair.a, *pair.b))]
            for figures, compared in ((DIFFERENCES, compare(pairs)), (FOUND, compare(found))):
                for name, (block, figure) in figures.items():
                    if compared[block]:
                        yield told(name, compared[block][figure], min(seeds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", type=Path)
    options = parser.parse_args()
    try:
        print("\n".join(findings(options.folder, options.start)))
    except CoreSegError as error:
        parser.error(str(error))
