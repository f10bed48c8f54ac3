"""What a fit is worth: the choice between its two stages, and the report, from the records that evaluations wrote.

Our choice throughout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreseg.data.store import LesionSet
from coreseg.evaluate.compare import compare, matched, read_side, training_noise
from coreseg.evaluate.records import SCORES, Figure, Record, figure, is_empty
from coreseg.evaluate.report import cell
from coreseg.fit.plan import STAGES

FIGURES = "figures"
FEW_CASES = 20

_NAMES = {
    "start": "the model as it came", "sft": "stage 1 (SFT)", "grpo": "stage 2 (GRPO)", "unet": "U-Net, equal time",
    "question-blind": "question-blind prompt", "blind": "blind guess",
}  # fmt: skip
_PARTS = {"sft": "stage 1 (SFT)", "grpo": "stage 2 (GRPO)", "unet": "U-Net"}
_EXPLAINED = (
    "Failure: no overlap at all, or an invalid answer. Detect: how well the written boxes match. Both and the Dice are",
    "of rows with a lesion; specificity is the share of rows without one that got no mask. Intervals by case.",
    "Question-blind is the fitted model's segmenter without the question; the blind guess never sees the picture.",
)
_SCORES = {"iou": "mIoU", "failure": "failure", "detect": "detect"}


@dataclass(frozen=True)
class Choice:
    """The stage whose model is the fitted one, and why, in a sentence."""

    stage: str
    why: str


def choose(figures: Path) -> Choice:
    """Stage 2's model, unless the paired comparison calls stage 1's better in mDice."""
    dice = paired(figures / "sft", figures / "grpo")
    told = _difference(dice)
    if dice["verdict"] == "A better":
        return Choice("sft", f"stage 2 made the masks worse on val, by {told} in mDice, paired.")
    return Choice("grpo", f"the mDice of stage 2 less that of stage 1 is {told}, paired: not clearly worse.")


def paired(a: Path, b: Path) -> dict[str, Any]:
    """The mDice of B less that of A on the rows with a lesion, as `coreseg.evaluate.compare` has it."""
    pooled = compare(matched(read_side("A", [a]), read_side("B", [b])))["pooled"]
    dice: dict[str, Any] = pooled["dice"]
    return dice


def build_report(figures: Path, choice: Choice, lesions: LesionSet, model: str, notes: Sequence[str]) -> dict[str, Any]:
    """Figures, differences and warnings of the chosen stage as plain JSON; figures in %.

    `figures` holds the folders that `coreseg evaluate --out` writes, one for each of `STAGES`; `model` is what the fit
    started from, `notes` is what is known of the data. A U-Net is reported where the last stage's folder has one.
    """
    folders = _folders(figures, choice.stage)
    records = {name: read_side(name, [folder])[0].records for name, folder in folders.items()}
    against = [name for name in ("start", "unet", "question-blind", "blind") if name in folders]
    asked = records[choice.stage]
    differences = {name: paired(folders[name], folders[choice.stage]) for name in against}
    no_better = [_NAMES[name] for name, told in differences.items() if told["verdict"] != "B better"]
    return {
        "chosen": asdict(choice),
        "val": {
            "with_lesion": sum(record.lesion_share > 0 for record in asked),
            "without": sum(record.lesion_share == 0 for record in asked),
            "cases": len({record.drawn_with for record in asked}),
        },
        "figures": {name: _figures(of) for name, of in records.items()},
        "differences": differences,
        "noise": training_noise(1, 1),
        "warnings": [
            *([f"Nothing shows that its masks are better than those of: {', '.join(no_better)}."] if no_better else []),
            *_warnings(asked, lesions, model, notes),
        ],
    }


def _figures(records: Sequence[Record]) -> dict[str, Figure | None]:
    lesion = [record for record in records if record.lesion_share > 0]
    free = [record for record in records if record.lesion_share == 0]
    scored: dict[str, Figure | None] = {name: figure(lesion, SCORES[name], 0) for name in ("dice", *_SCORES)}
    return {**scored, "specificity": figure(free, is_empty, 0) if free else None}


def _folders(figures: Path, chosen: str) -> dict[str, Path]:
    stages = {stage: figures / stage for stage in STAGES}
    unet = figures / STAGES[-1] / "unet"
    others = {name: figures / chosen / name for name in ("question-blind", "blind")}
    return {**stages, **({"unet": unet} if unet.exists() else {}), **others}


def _warnings(asked: Sequence[Record], lesions: LesionSet, model: str, notes: Sequence[str]) -> list[str]:
    """What an honest reader has to know."""
    cases = len({record.drawn_with for record in asked})
    free = {split: any(not sample.boxes for sample in lesions.split(split)) for split in ("train", "val")}
    categories = sorted({sample.category for sample in lesions.split("train")})
    warnings = []
    if cases < FEW_CASES:
        warnings.append(f"val has {cases} cases: with fewer than {FEW_CASES} even the intervals are rough.")
    if not free["train"]:
        warnings.append("No train row is without a lesion, so it never learned to say that nothing is there.")
    if not free["val"]:
        warnings.append("No val row is without a lesion, so whether it is silent where nothing is was not tested.")
    warnings += [f"{note[0].upper()}{note[1:]}." for note in notes]
    warnings.append(
        f"It may have forgotten what {model} knew of other categories: ask it for {' or '.join(categories)} only, on "
        "pictures like these."
    )
    return [*warnings, "Research only. Not a medical device."]


def minutes_answering(figures: Path) -> float:
    """How long all answers of these figures took, by the clock."""
    sides = [folder.parent for folder in figures.rglob("records.jsonl")]
    return sum(record.seconds for side in sides for record in read_side("", [side])[0].records) / 60


# --- for people ------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page, readable as it stands on a terminal 120 columns wide."""
    val, chosen = report["val"], report["chosen"]
    rows = f"{val['with_lesion']} rows with a lesion and {val['without']} without, of {val['cases']} cases"
    dice = report["figures"][chosen["stage"]]["dice"]
    against = report["differences"]["start"]
    lines = [
        f"# The fitted model: {_NAMES[chosen['stage']]}",
        "",
        f"On val ({rows}) its mDice is {cell(dice)}; less that of the model as it came {_difference(against)}: "
        f"{_verdict(against['verdict'])}.",
        "",
        "## Figures on val, in %",
        "",
        *_table(["", "mDice [95 % interval]", *_SCORES.values(), "specificity"], _figure_rows(report["figures"])),
        "",
        *_EXPLAINED,
        "",
        f"## The fitted model less each, mDice, paired; A is the other one, B {_NAMES[chosen['stage']]}",
        "",
        *_table(["A", "B - A [95 % interval]", "verdict"], _difference_rows(report["differences"])),
        "",
        report["noise"],
        "",
        f"Why this stage: {chosen['why']} This one choice was made on val, and nothing else was.",
        "",
        "## Time",
        "",
        *_table(["", "planned", "spent", "steps"], _time_rows(report["minutes"])),
        "",
        "Trainings in processor minutes, the rest by the clock.",
        "",
        "## Mind",
        "",
        *(f"- {warning}" for warning in report["warnings"]),
        "",
        "![answers on val](overlays.png)",
        "",
        "Rows of val, evenly spaced. Amber outline: the reference; cyan: the model's mask; white: its boxes.",
        "",
        "## How this was made",
        "",
        f"    {report['command']}",
        "",
        f"coreseg {report['coreseg']}, seed {report['seed']}, rows {report['rows']}.",
        "",
        "Next:",
        "",
        *(f"    {command}" for command in report["next"]),
    ]
    return "\n".join(lines) + "\n"


def _figure_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    def mean(told: Mapping[str, float] | None) -> str:
        return "-" if told is None else f"{told['mean']:.1f}"

    return [
        [_NAMES[name], cell(told["dice"]), *(mean(told[score]) for score in _SCORES), mean(told["specificity"])]
        for name, told in figures.items()
    ]


def _difference_rows(differences: Mapping[str, Any]) -> list[list[str]]:
    return [[_NAMES[name], _difference(told), told["verdict"]] for name, told in differences.items()]


def _difference(figure: Mapping[str, Any]) -> str:
    return cell({**figure, "mean": figure["difference"]}, sign=True)


def _verdict(verdict: str) -> str:
    return {"A better": "worse than before", "B better": "better than before"}.get(verdict, verdict)


def _time_rows(minutes: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    def told(part: Mapping[str, float], name: str) -> str:
        return f"{part[name]:.2f} min" if name in part else ""

    return [
        [_PARTS.get(name, name), told(part, "planned"), told(part, "spent"), str(part.get("steps", ""))]
        for name, part in minutes.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown whose columns stand below each other in plain text too."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(f"{text:<{width}}" for text, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]
