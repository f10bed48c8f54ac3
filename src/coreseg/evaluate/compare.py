"""Two evaluations of the same questions side by side: is B better than A, or could it be chance?

Everything is paired, question by question: what is hard for both says nothing about either. A side may be several
runs of one training with other seeds; their scores are averaged, and the intervals draw seeds as well as cases.

Source: our choice throughout; for the intervals see `coreseg.metrics.difference_interval`.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape

from coreseg.errors import ConfigError, DataError
from coreseg.evaluate.records import SCORES, Record, Score, attribute_gain, is_called_absent, is_empty
from coreseg.evaluate.report import cell, new_table
from coreseg.evaluate.run import read_folder
from coreseg.metrics import Interval, difference_interval, macro_mean

LISTED = 5
"""How many images with the greatest gain, and with the greatest loss, are named."""

_LABELS = {
    "dice": "mDice",
    "detect": "detect score",
    "failure": "failure rate",
    "invalid": "  invalid form",
    "specificity": "specificity",
    "called_absent": "  called absent",
    "gain": "  gain over its own mask of the whole category",
}
_SCORES: Mapping[str, Score] = {
    **SCORES,
    "specificity": is_empty,
    "called_absent": is_called_absent,
    "gain": attribute_gain,
}
_LOWER_IS_BETTER = ("failure", "invalid")
_BLOCKS = {
    "pooled": ("Rows with the lesion, pooled", ("dice", "detect", "failure", "invalid")),
    "macro": ("Rows with the lesion, mean of the sets", ("dice", "detect", "failure", "invalid")),
    "lesion_free": ("Rows without the lesion", ("specificity", "called_absent", "invalid")),
    "attributes": ("Questions about some of the lesions", ("dice", "gain", "detect", "invalid")),
}
_SAME = "not distinguishable"
_PER_IMAGE = ("dice", "detect", "invalid")
_ASKED = {
    "split": "split",
    "rows": "rows (of which data set, with which --limit)",
    "seed": "seed of the questions",
}
_OF_TRAINING = ("weights", "word_bias")
"""Model settings that differ from one training seed to the next."""
_WORDING = {"held_out_questions": "held-out questions", "own_words": "questions in own words"}


@dataclass(frozen=True)
class Run:
    """One evaluation that was read back."""

    folder: Path
    settings: Mapping[str, Any]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Pair:
    """One question with its records: from each of A's runs, and from each of B's."""

    a: tuple[Record, ...]
    b: tuple[Record, ...]

    @property
    def asked(self) -> Record:
        """Any of the records, for what they all share: the row and the question."""
        return self.a[0]


def read_side(name: str, folders: Sequence[Path]) -> list[Run]:
    """The runs of one side, A or B: folders that `coreseg evaluate --out` wrote, one for each training seed.

    Raises DataError for a folder without records, ConfigError where a folder comes twice or where runs differ in more
    than what training and fitting gave them.
    """
    runs = [_read_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"{name} names one folder twice; expected a folder for each training seed")
    first, *others = (
        {key: value for key, value in run.settings["model_settings"].items() if key not in _OF_TRAINING} for run in runs
    )
    for run, settings in zip(runs[1:], others, strict=True):
        if settings != first:
            raise ConfigError(
                f"{run.folder} is no further seed of {runs[0].folder}: it ran with {settings} instead of {first}"
            )
    return runs


def _read_run(folder: Path) -> Run:
    written = read_folder(folder)
    if missing := {"model_settings", "attribute_questions", *_ASKED} - written.settings.keys():
        raise DataError(f"{folder}: its records lack the settings {', '.join(sorted(missing))}; evaluate anew")
    return Run(folder, written.settings, written.records)


def matched(a: Sequence[Run], b: Sequence[Run], *, any_words: bool = False) -> list[Pair]:
    """Every question with its records from all runs, in the order of A's first run.

    any_words: pair what was asked about the same lesions even where the words differ, to see what wording costs.
    Attribute questions that not all runs were asked are left out; the others are the same without them.

    Raises ConfigError where runs were asked other questions, DataError where one is unfinished.
    """
    runs = [*a, *b]
    if not all(run.settings["attribute_questions"] for run in runs):
        runs = [replace(run, records=tuple(record for record in run.records if not record.attribute)) for run in runs]
    for run in runs[1:]:
        _require_same_questions(runs[0], run, any_words)
    records = [{_key(record, any_words): record for record in run.records} for run in runs]
    rows = [tuple(of_run[key] for of_run in records) for key in records[0]]
    return [Pair(row[: len(a)], row[len(a) :]) for row in rows]


def _key(record: Record, any_words: bool) -> tuple[str, ...]:
    lesions = record.file_name, record.mask_file_name, record.category, record.attribute
    return lesions if any_words else (*lesions, record.question)


def _require_same_questions(first: Run, other: Run, any_words: bool) -> None:
    differences = [
        f"{words}: {first.settings.get(name)} and {other.settings.get(name)}"
        for name, words in (_ASKED if any_words else _ASKED | _WORDING).items()
        if first.settings.get(name) != other.settings.get(name)
    ]
    if differences:
        raise ConfigError(
            f"{first.folder} and {other.folder} were asked other questions ({'; '.join(differences)}); "
            "evaluate both on the same data set with the same options"
        )
    fewer, more = sorted((first, other), key=lambda run: len(run.records))
    if len(fewer.records) < len(more.records):
        raise DataError(
            f"{fewer.folder} is unfinished: {len(fewer.records)} answers where {more.folder} has {len(more.records)}; "
            "call its `coreseg evaluate` again, it goes on"
        )
    keys = {_key(record, any_words) for record in first.records}
    if keys != {_key(record, any_words) for record in other.records} or len(keys) < len(first.records):
        raise DataError(f"the records of {first.folder} and {other.folder} do not match one to one; evaluate both anew")


def compare(pairs: Sequence[Pair], seed: int = 0) -> dict[str, Any]:
    """The differences B - A as plain JSON; figures in %.

    - `pooled`, `macro`: rows with the lesion, as the mean over rows and over the means of the sets; `lesion_free`:
      rows without; `attributes`: attribute questions. None without such rows, else `n`, `cases`, `sets` (one, unless
      macro), how many of these have a single case, and for each score `a`, `b` (means over rows and seeds),
      `difference`, its interval `low` to `high`, and `verdict`.
    - `gains`, `losses`: the rows with the lesion whose Dice differs most, see `differences`.

    `verdict` is "B better" or "A better" where the interval excludes 0, else "not distinguishable". A set of a single
    case adds no width to the interval; where there is no other set, nothing is distinguishable.
    """
    plain = [pair for pair in pairs if not pair.asked.attribute]
    lesion = [pair for pair in plain if pair.asked.lesion_share > 0]
    rows = {
        "pooled": lesion,
        "macro": lesion,
        "lesion_free": [pair for pair in plain if pair.asked.lesion_share == 0],
        "attributes": [pair for pair in pairs if pair.asked.attribute],
    }
    by_gain = sorted(differences(lesion), key=lambda row: -row["dice_difference"])
    return {
        **{name: _block(rows[name], scores, name == "macro", seed) for name, (_, scores) in _BLOCKS.items()},
        "gains": [row for row in by_gain[:LISTED] if row["dice_difference"] > 0],
        "losses": [row for row in by_gain[: -LISTED - 1 : -1] if row["dice_difference"] < 0],
    }


def differences(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One flat row a question: what was asked, and the means over A's runs and B's of some scores, in [0, 1]."""
    return [
        {
            **{name: getattr(pair.asked, name) for name in ("file_name", "mask_file_name", "source", "category")},
            **{name: getattr(pair.asked, name) for name in ("case", "attribute", "question", "lesion_share")},
            **{key: value for name in _PER_IMAGE for key, value in _per_image(pair, name).items()},
        }
        for pair in pairs
    ]


def _per_image(pair: Pair, name: str) -> dict[str, float]:
    a, b = (np.array([float(_SCORES[name](record)) for record in side]) for side in (pair.a, pair.b))
    # The mean of differences, not the difference of means: what never differs must not by rounding.
    return {
        f"{name}_a": float(a.mean()),
        f"{name}_b": float(b.mean()),
        f"{name}_difference": float((b[None] - a[:, None]).mean()),
    }


def write_differences(path: Path, pairs: Sequence[Pair]) -> None:
    """Write `differences` as a CSV table."""
    rows = differences(pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _block(pairs: Sequence[Pair], scores: Sequence[str], by_set: bool, seed: int) -> dict[str, Any] | None:
    if not pairs:
        return None
    sets = [pair.asked.source if by_set else "" for pair in pairs]
    cases = [pair.asked.drawn_with for pair in pairs]
    per_set = Counter(name for name, _ in set(zip(sets, cases, strict=True)))
    return {
        "n": len(pairs),
        "cases": len(set(cases)),
        "sets": len(per_set),
        "sets_of_one_case": sum(count == 1 for count in per_set.values()),
        **{name: _figure(pairs, name, cases, sets, seed) for name in scores},
    }


def _figure(
    pairs: Sequence[Pair], name: str, cases: Sequence[str], sets: Sequence[str], seed: int
) -> dict[str, float | str]:
    a, b = _percent([pair.a for pair in pairs], name), _percent([pair.b for pair in pairs], name)
    gained = b[None] - a[:, None]
    interval = difference_interval(gained, cases, sets, seed)
    several = len(set(zip(sets, cases, strict=True))) > len(set(sets))
    return {
        "a": macro_mean(a.mean(axis=0).tolist(), sets),
        "b": macro_mean(b.mean(axis=0).tolist(), sets),
        "difference": macro_mean(gained.mean(axis=(0, 1)).tolist(), sets),
        "low": interval.low,
        "high": interval.high,
        "verdict": _verdict(interval, name in _LOWER_IS_BETTER) if several else _SAME,
    }


def _percent(rows: Sequence[tuple[Record, ...]], name: str) -> Float[np.ndarray, "seeds rows"]:
    scores: Float[np.ndarray, "seeds rows"] = (
        100 * np.array([[float(_SCORES[name](record)) for record in runs] for runs in rows]).T
    )
    return scores


def _verdict(interval: Interval, lower_is_better: bool) -> str:
    if interval.low <= 0 <= interval.high:
        return _SAME
    return "A better" if (interval.high < 0) != lower_is_better else "B better"


def training_noise(a_seeds: int, b_seeds: int) -> str:
    """What the intervals say about training noise with so many runs a side, in a sentence."""
    if min(a_seeds, b_seeds) == 1:
        return (
            "With one run on a side the intervals say nothing about training noise: they compare these checkpoints, "
            "and another seed may differ as much."
        )
    by_chance = 2 / comb(a_seeds + b_seeds, a_seeds)
    return (
        f"Seeds are drawn again too, but they are few: of {a_seeds} and {b_seeds} runs of one and the same training, "
        f"all on one side lie above all on the other in {100 * by_chance:.2g} % of comparisons."
    )


def print_comparison(a: Sequence[Run], b: Sequence[Run], comparison: Mapping[str, Any], console: Console) -> None:
    """Print every figure of `compare` with its verdict, and the images that differ most; 120 columns do."""
    for name, runs in (("A", a), ("B", b)):
        console.print(escape(f"{name}: {', '.join(str(run.folder) for run in runs)}"))
    blocks = [comparison[name] for name in ("pooled", "lesion_free", "attributes")]
    asked = sum(block["n"] for block in blocks if block)
    console.print(
        f"{asked} questions to both, split {a[0].settings['split']!r}. In %, B - A paired, 95 % intervals by case; "
        f"unknown cases count as one each, which narrows them. {training_noise(len(a), len(b))}"
    )
    for block, (title, scores) in _BLOCKS.items():
        figures = comparison[block]
        if figures:
            table = new_table(f"{title}: {_counts(figures)}", ["A", "B", "B - A", "verdict"])
            for name in scores:
                figure = figures[name]
                difference = cell({**figure, "mean": figure["difference"]}, sign=True)
                table.add_row(_LABELS[name], f"{figure['a']:.1f}", f"{figure['b']:.1f}", difference, figure["verdict"])
            console.print(table)
    for title, rows in (("Greatest gains in Dice", "gains"), ("Greatest losses in Dice", "losses")):
        table = new_table(title, ["set", "A", "B", "B - A"])
        for row in comparison[rows]:
            a_dice, b_dice, gained = (100 * row[f"dice_{column}"] for column in ("a", "b", "difference"))
            name = escape(f"{row['file_name']}, {row['category']}")
            table.add_row(name, escape(row["source"]), f"{a_dice:.1f}", f"{b_dice:.1f}", f"{gained:+.1f}")
        if table.row_count:
            console.print(table)


def _counts(figures: Mapping[str, Any]) -> str:
    words = f"{figures['n']} rows, {figures['cases']} cases"
    if figures["sets"] == 1:
        return words
    single = figures["sets_of_one_case"]
    return f"{words}, {figures['sets']} sets" + (f" ({single} of one case, too narrow there)" if single else "")
