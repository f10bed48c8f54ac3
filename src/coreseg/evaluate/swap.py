"""Is the reasoning used? The same image and question again, with another reasoning in the model's mouth.

The model answers as usual; then its think block is replaced, and boxes, `<seg>` and mask follow from the replacement.
A mask that never moves means that the state at `<seg>` is a look-up of the category. Every figure is paired with the
answer after the model's own reasoning.

Source: our choice throughout; the paper does not ask.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from coreseg.answer import parse
from coreseg.data.store import LesionSet
from coreseg.evaluate.predictors import ModelPredictor
from coreseg.evaluate.records import Record, figure
from coreseg.evaluate.report import cell, new_table
from coreseg.evaluate.run import Ask, Evaluation, mask_of, scored
from coreseg.metrics import Boxes, detect_score, dice
from coreseg.sentences import contradict
from coreseg.types import Result

VARIANTS = {
    "own": "its own again",
    "empty": "none",
    "other": "another image's",
    "contradicted": "contradicted",
}
"""What the reasoning is replaced by. "own" is the control: the same words as text must give the same answer."""


@dataclass(frozen=True, kw_only=True)
class Swap(Record):
    """One answer after a replaced reasoning, beside the answer after the model's own.

    variant: which of `VARIANTS`. reasoning: the text that was given.
    own_text, own_found, own_dice, own_detect: of the answer after its own reasoning.
    same_mask: Dice of the two predicted masks. same_boxes: detect score of the two lists of boxes.
    shift: mean distance of the boxes' centres in units of the image's diagonal, boxes paired for the least total and
        those left over not counted; None where either answer has no boxes.
    """

    variant: str
    reasoning: str
    own_text: str
    own_found: bool
    own_dice: float
    own_detect: float
    same_mask: float
    same_boxes: float
    shift: float | None


@dataclass(frozen=True)
class Swapped:
    """Every swap of an evaluation, and what they add up to (see `summarise_swaps`)."""

    swaps: tuple[Swap, ...]
    summary: Mapping[str, Any]


def swap_reasoning(
    lesion_set: LesionSet,
    predictor: ModelPredictor,
    evaluation: Evaluation,
    *,
    batch_size: int = 8,
    out: Path | None = None,
    progress: bool = True,
) -> Swapped:
    """Replace the reasoning of every valid answer about a lesion that is there; attribute questions are left out.

    `evaluation` is the predictor's on `lesion_set`. The replacements are the `VARIANTS`: the own reasoning again,
    none, the one that the model wrote about the next such row of another source (of another image where there is one
    source only), and its own with side, place and count contradicted. With `out`, a folder, writes `records.jsonl`
    there; a stopped run starts anew.
    """
    samples = {(row.file_name, row.category): row for row in lesion_set.split(evaluation.settings["split"])}
    rows = [each for each in evaluation.records if not each.attribute and each.lesion_share > 0]
    valid = [each for each in rows if each.valid]
    others = _others(valid)
    swaps: list[Swap] = []
    with tqdm(total=len(valid), desc="reasoning swapped", unit="image", disable=not progress) as bar:
        for start in range(0, len(valid), batch_size):
            batch = valid[start : start + batch_size]
            asks = []
            for record in batch:
                sample = samples[record.file_name, record.category]
                image, mask = lesion_set.image(sample), lesion_set.mask(sample)
                asks.append(Ask(sample, image, record.question, mask, sample.boxes))
            swaps += _swaps(predictor, asks, others[start : start + batch_size])
            bar.update(len(batch))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        lines = [{"settings": evaluation.settings}, *map(asdict, swaps)]
        (out / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Swapped(tuple(swaps), summarise_swaps(swaps, len(rows)))


def _others(records: Sequence[Record]) -> list[str | None]:
    """For each record the reasoning of the next one of another source, or of another image where there is one source.

    Empty ones are passed over; None where there is no other.
    """
    parsed = [parse(record.text) for record in records]
    reasonings = [answer.reasoning if answer else "" for answer in parsed]
    apart = "source" if len({record.source for record in records}) > 1 else "file_name"

    def next_other(row: int) -> str | None:
        order = [*range(row + 1, len(records)), *range(row)]
        return next(
            (
                reasonings[each]
                for each in order
                if reasonings[each] and getattr(records[each], apart) != getattr(records[row], apart)
            ),
            None,
        )

    return [next_other(row) for row in range(len(records))]


def _swaps(predictor: ModelPredictor, asks: Sequence[Ask], others: Sequence[str | None]) -> Iterator[Swap]:
    """The swaps of one batch, variant by variant."""
    owns = _answers(predictor, asks)
    for variant in VARIANTS:
        given = [_replacement(variant, own, other) for own, other in zip(owns, others, strict=True)]
        chosen = [row for row, reasoning in enumerate(given) if reasoning is not None]
        reasonings = [reasoning for reasoning in given if reasoning is not None]
        results = _answers(predictor, [asks[row] for row in chosen], reasonings)
        for row, reasoning, result in zip(chosen, reasonings, results, strict=True):
            yield _swap(variant, reasoning, asks[row], owns[row], result)


def _answers(
    predictor: ModelPredictor, asks: Sequence[Ask], reasonings: Sequence[str] | None = None
) -> Sequence[Result]:
    images, questions = [ask.image for ask in asks], [ask.question for ask in asks]
    return predictor.segmenter.segment_batch(images, questions, constrained=predictor.constrained, reasoning=reasonings)


def _replacement(variant: str, own: Result, other: str | None) -> str | None:
    """The text that stands in; None where this answer is left out of this variant."""
    if not own.valid:  # as in the evaluation it was, but for rounding in another batch
        return None
    return {"own": own.reasoning, "empty": "", "other": other, "contradicted": contradict(own.reasoning)}[variant]


def _swap(variant: str, reasoning: str, ask: Ask, own: Result, result: Result) -> Swap:
    before = scored(ask, own, ask.reference, mask_of(own))
    after = scored(ask, result, ask.reference, mask_of(result))
    height, width = ask.reference.shape
    return Swap(
        **asdict(after),
        variant=variant,
        reasoning=reasoning,
        own_text=own.text,
        own_found=before.found,
        own_dice=before.dice,
        own_detect=before.detect,
        same_mask=dice(mask_of(own), mask_of(result)),
        same_boxes=detect_score(before.boxes, after.boxes),
        shift=centre_shift(before.boxes, after.boxes, (width, height)),
    )


def centre_shift(first: Boxes, second: Boxes, size_wh: tuple[int, int]) -> float | None:
    """Mean distance between the centres of paired boxes, see `Swap.shift`; None where a list is empty."""
    if not len(first) or not len(second):
        return None
    a, b = _centres(first), _centres(second)
    distances_px = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return float(distances_px[linear_sum_assignment(distances_px)].mean() / np.hypot(*size_wh))


def _centres(boxes: Boxes) -> Float[np.ndarray, "boxes 2"]:
    corners = np.asarray(boxes, dtype=np.float64)
    centres: Float[np.ndarray, "boxes 2"] = (corners[:, :2] + corners[:, 2:]) / 2
    return centres


_SCORES: Mapping[str, tuple[str, Callable[[Swap], float]]] = {
    "same_mask": ("mask: Dice with that after its own", lambda swap: swap.same_mask),
    "same_boxes": ("boxes: detect score with those after its own", lambda swap: swap.same_boxes),
    "dice": ("mDice", lambda swap: swap.dice),
    "dice_change": ("  change", lambda swap: swap.dice - swap.own_dice),
    "detect": ("detect score", lambda swap: swap.detect),
    "detect_change": ("  change", lambda swap: swap.detect - swap.own_detect),
    "flipped": ("found or absent flips", lambda swap: swap.found != swap.own_found),
    "invalid": ("invalid form", lambda swap: not swap.valid),
}
_SHIFT = "box centres moved, median, % of the diagonal"


def summarise_swaps(swaps: Sequence[Swap], rows: int, seed: int = 0) -> dict[str, Any]:
    """What swaps out of so many rows with the lesion add up to, by variant, as plain JSON; figures in % as ever.

    - `n`, `left_out`: rows that were answered again, and those whose own form was invalid, or that had nothing to
      contradict, or no other image.
    - `same_mask`, `same_boxes`: 100 where nothing moved. `shift_median`: of `Swap.shift`, in %.
    - `dice`, `detect`: against the reference; `dice_change`, `detect_change`: less those after its own reasoning.
    - `flipped`: answers that turned from found to absent or back. `invalid`: form broken after the replacement.

    A variant without swaps has its counts only.
    """
    return {variant: _summary([swap for swap in swaps if swap.variant == variant], rows, seed) for variant in VARIANTS}


def _summary(swaps: Sequence[Swap], rows: int, seed: int) -> dict[str, Any]:
    counts = {"n": len(swaps), "left_out": rows - len(swaps)}
    if not swaps:
        return counts
    shifts = [100 * swap.shift for swap in swaps if swap.shift is not None]
    return {
        **counts,
        **{name: figure(swaps, score, seed) for name, (_, score) in _SCORES.items()},
        "shift_median": median(shifts) if shifts else None,
    }


def print_swaps(summary: Mapping[str, Any], console: Console) -> None:
    """Print what `summarise_swaps` gives; 120 columns do."""
    console.print(
        "Is the reasoning used? Boxes and mask after a replaced reasoning, beside those after its own. In %, paired, "
        "95 % intervals by case. The control, its own reasoning given as text, should change nothing."
    )
    table = new_table("Rows with the lesion, reasoning replaced by", list(VARIANTS.values()))
    columns = [summary[variant] for variant in VARIANTS]
    table.add_row("rows", *(str(each["n"]) for each in columns))
    table.add_row("  left out", *(str(each["left_out"]) for each in columns))
    for name, (label, _) in _SCORES.items():
        table.add_row(label, *(cell(each.get(name), sign=name.endswith("change")) for each in columns))
        if name == "same_boxes":
            shifts = [each.get("shift_median") for each in columns]
            table.add_row(_SHIFT, *("-" if shift is None else f"{shift:.1f}" for shift in shifts))
    console.print(table)
