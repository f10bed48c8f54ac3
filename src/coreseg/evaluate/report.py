"""Figures for people (tables as in papers, %, one decimal, 95 % interval in brackets) and for programs (JSON)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError
from coreseg.evaluate.baselines import BlindBaseline
from coreseg.evaluate.run import Evaluation, Predictor, evaluate
from coreseg.metrics import bootstrap_interval, macro_bootstrap_interval, macro_mean

_WIDTH = 120
_ON_A_LINE = 3
_HEADLINES = {
    "dice": "mDice",
    "iou": "mIoU",
    "failure": "failure rate",
    "invalid": "  invalid form",
    "missed": "  missed, Dice 0",
    "near_miss": "Dice below 0.05",
    "detect": "detect score",
    "wrong_category": "wrong category",
}
_GAINS: Mapping[Literal["dice", "detect"], str] = {
    "dice": "mDice gained, paired",
    "detect": "detect score gained, paired",
}
_PRESENCE = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "called_absent": "  called absent",
    "invalid_lesion_free": "  invalid form",
}
_AGREEMENT = {"pooled": "pooled", "macro": "mean of the sets"}
_PAIRS = {"dice": "mDice with the asked lesion", "other": "mDice with the other one"}
_ATTRIBUTES = {
    "dice": "mDice",
    "plain": "  its own mask of the whole category",
    "gain": "  gain over that",
    "whole": "  the perfect mask of the whole category",
    "rest": "mDice with the lesions not asked for",
    "plain_rest": "  its own mask of the whole category",
    "failure": "failure rate",
    "detect": "detect score",
}
_SURENESS = {
    "auroc": "AUROC of telling Dice of 0.5 or more",
    "calibration_error": "calibration error",
    "risk": "1 - Dice: what any constant has",
    "risk_kept": "  mean over all shares, surest first",
    "risk_best": "  the same in the best order",
    "kept_90": "mDice of the surest 90 %",
    "kept_75": "mDice of the surest 75 %",
    "kept_50": "mDice of the surest 50 %",
}
_TITLES = {
    "source": "By set",
    "modality": "By modality",
    "anatomy": "By anatomy",
    "category": "By category",
    "size": "By lesion size, quarters of the rows",
}


def evaluate_and_report(
    lesion_set: LesionSet,
    predictor: Predictor,
    *,
    split: str = "val",
    out: Path | None = None,
    console: Console | None = None,
    baselines: Sequence[Predictor] = (),
    **options: Any,
) -> tuple[Evaluation, list[Evaluation]]:
    """`evaluate` the predictor and, beside it, the blind guess of the training split and any further `baselines`.

    Prints the tables to `console`, where one is given. With `out`, writes there `records.jsonl` and `summary.json`,
    and each baseline's records in a folder of its name. `options` are those of `evaluate`. The blind guess is left
    out where the set has no lesion in a split "train". Returns both the predictor's evaluation and the baselines';
    raises as `evaluate`, and ConfigError where two baselines have one name.
    """
    has_train = any(sample.boxes for sample in lesion_set.split("train"))
    others = [*([BlindBaseline.fit(lesion_set)] if has_train else []), *baselines]
    names = [other.name for other in others]
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two baselines are called {twice!r}; evaluate them one by one, each with another --out")
    evaluation = evaluate(lesion_set, predictor, split=split, out=out, **options)
    beside = [evaluate(lesion_set, other, split=split, out=out and out / other.name, **options) for other in others]
    if console:
        print_table(evaluation, beside, console)
    if out:
        write_summary(out / "summary.json", evaluation, beside)
    return evaluation, beside


def write_summary(
    path: Path,
    evaluation: Evaluation,
    baselines: Sequence[Evaluation] = (),
    reasoning_swapped: Mapping[str, Any] | None = None,
) -> None:
    """Write settings and figures (see `coreseg.evaluate.summarise`) of an evaluation and its baselines as JSON.

    `reasoning_swapped` are those of `coreseg.evaluate.swap.summarise_swaps`, where the reasoning was replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary(evaluation, baselines, reasoning_swapped), indent=2) + "\n")


def summary(
    evaluation: Evaluation,
    baselines: Sequence[Evaluation] = (),
    reasoning_swapped: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `write_summary` writes."""
    return {
        "settings": evaluation.settings,
        **evaluation.summary,
        **({"reasoning_swapped": reasoning_swapped} if reasoning_swapped else {}),
        "baselines": {
            each.name: {
                "settings": each.settings,
                **each.summary,
                "gain": gain(evaluation, each),
                "detect_gain": gain(evaluation, each, "detect"),
            }
            for each in baselines
        },
    }


def gain(
    evaluation: Evaluation, baseline: Evaluation, score: Literal["dice", "detect"] = "dice"
) -> dict[str, dict[str, float]] | None:
    """By how much a score is above the baseline's on the same lesion-bearing rows, paired, pooled and macro, in %.

    None where they share no such row.
    """
    scored = attrgetter(score)
    theirs = {(each.file_name, each.category): scored(each) for each in baseline.records if not each.attribute}
    rows = [
        each
        for each in evaluation.records
        if not each.attribute and each.lesion_share > 0 and (each.file_name, each.category) in theirs
    ]
    if not rows:
        return None
    gains = [100 * (scored(each) - theirs[each.file_name, each.category]) for each in rows]
    cases, sets = [each.drawn_with for each in rows], [each.source for each in rows]
    return {
        "pooled": {"mean": sum(gains) / len(gains), **asdict(bootstrap_interval(gains, cases))},
        "macro": {"mean": macro_mean(gains, sets), **asdict(macro_bootstrap_interval(gains, cases, sets))},
    }


def print_table(evaluation: Evaluation, baselines: Sequence[Evaluation] = (), console: Console | None = None) -> None:
    """Print every figure beside the baselines', to the terminal unless a console is given; 120 columns do."""
    console = console or Console(width=_WIDTH)
    figures = evaluation.summary
    console.print(
        f"{escape(evaluation.name)} on split {evaluation.settings['split']!r}: {figures['n_lesion']} rows with "
        f"the lesion, {figures['n_lesion_free']} without; {figures['seconds_median']:.3f} s per image. "
        "In %, 95 % intervals by case; unknown cases count as one each, which narrows them."
    )
    columns = [evaluation, *baselines]
    for table in (
        _headline_table("Rows with the lesion, pooled", "pooled", columns),
        _headline_table("Rows with the lesion, mean of the sets", "macro", columns),
        _block_table("Is it there?", _PRESENCE, "presence", columns),
        _block_table("Do boxes and mask agree? Detect score of one beside the other", _AGREEMENT, "agreement", columns),
        _block_table("Images with two categories: is it the asked one?", _PAIRS, "pairs", columns),
        _block_table("Questions about some of the lesions", _ATTRIBUTES, "attributes", columns),
        _statement_table(columns),
        _block_table("Does it know how good its mask is?", _SURENESS, "confidence", columns),
        *(_part_table(title, part, columns) for part, title in _TITLES.items()),
    ):
        if table.row_count:
            console.print(table)


def _headline_table(title: str, mean: str, columns: Sequence[Evaluation]) -> Table:
    apart = _apart(columns)
    table = new_table(title, [each.name for each in columns], apart)
    if columns[0].summary[mean]:
        for key, label in _HEADLINES.items():
            table.add_row(label, *(cell(each.summary[mean][key], apart) for each in columns))
        for score, label in _GAINS.items():
            gains = [gain(columns[0], each, score) for each in columns[1:]]
            if gains:
                table.add_row(label, "", *(cell(each[mean] if each else None, apart, sign=True) for each in gains))
    return table


def _block_table(title: str, rows: Mapping[str, str], block: str, columns: Sequence[Evaluation]) -> Table:
    apart = _apart(columns)
    table = new_table(title, [each.name for each in columns], apart)
    figures = [each.summary[block] or {} for each in columns]
    for key, label in rows.items():
        if any(each.get(key) for each in figures):
            table.add_row(label, *(cell(each.get(key), apart, sign=key == "gain") for each in figures))
    return table


def _statement_table(columns: Sequence[Evaluation]) -> Table:
    """Each kind's balanced accuracy beside what is true of the reference mask; of the first column also of its own."""
    apart = _apart(columns)
    first, *others = (each.summary["statements"] for each in columns)
    said = f", {first['kinds']:.1f} kinds an answer" if first else ""
    headings = ["stated", columns[0].name, "on its own mask", *(each.name for each in columns[1:])]
    table = new_table(f"Is the reasoning true? Balanced accuracy{said}", headings, apart)
    for kind, scores in first["by"].items() if first else ():
        if scores["n"]:
            theirs = [cell(other["by"][kind]["balanced"] if other else None, apart) for other in others]
            ours = [cell(scores[name], apart) for name in ("balanced", "own")]
            table.add_row(kind, f"{scores['stated']:.0f}", *ours, *theirs)
    return table


def _part_table(title: str, part: str, columns: Sequence[Evaluation]) -> Table:
    """The scores of the first column in full, and the mDice of the others; mDice alone where those are many."""
    apart = _apart(columns)
    more = {"mIoU": "iou", "fails": "failure", "detect": "detect"} if apart == " " else {}
    table = new_table(title, ["n", "mDice", *more, *(f"{each.name} mDice" for each in columns[1:])], apart)
    for name, scores in columns[0].summary["by"][part].items():
        means = [f"{scores[key]['mean']:.1f}" for key in more.values()]
        dices = [cell(each.summary["by"][part].get(name, {}).get("dice"), apart) for each in columns]
        table.add_row(escape(name), str(scores["n"]), dices[0], *means, *dices[1:])
    return table


def _apart(columns: Sequence[Evaluation]) -> str:
    """What stands between a mean and its interval: beside each other no more than so many figures fit."""
    return " " if len(columns) <= _ON_A_LINE else "\n"


def new_table(title: str, headings: Sequence[str], apart: str = " ") -> Table:
    """A table without rows yet: a column of labels, which may take several lines, and columns of figures."""
    table = Table("", title=title, title_justify="left", title_style="bold")
    table.columns[0].overflow = "fold"
    for heading in headings:
        table.add_column(_heading(heading, apart), justify="right", no_wrap=True)
    return table


def _heading(name: str, apart: str) -> str:
    """The name in lines no wider than a figure: a folder's path must not push the figures apart."""
    width = max(map(len, f"100.0{apart}[100.0, 100.0]".split("\n")))
    return escape("\n".join(wrap(name, width)))


def cell(figure: Mapping[str, float] | None, apart: str = " ", sign: bool = False) -> str:
    """`51.2 [47.9, 54.3]`, each number with its sign if asked; `-` without a figure."""
    if figure is None:
        return "-"
    form = "+.1f" if sign else ".1f"
    return f"{figure['mean']:{form}}{apart}[{figure['low']:{form}}, {figure['high']:{form}}]"
