"""Do the answers of trained models look like the references, or has one learned to please its reward only?

python recipes/nano/drift.py DATASET EVALUATION… --out PNG [--texts N]

For the references and for each folder that `coreseg evaluate DATASET --out EVALUATION` wrote: length of the reasoning,
number of boxes, size of the largest box and of the mask, as a table (median and middle four fifths; shares in %) and
as histograms. Rows with the lesion, plain questions, answers that found something. RUN/evaluation is named as its run.
With --texts, also what each wrote about N evenly spaced rows with the lesion. Needs matplotlib.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from coreseg.data.store import LesionSet, evenly
from coreseg.evaluate.compare import read_side
from coreseg.evaluate.records import Record
from coreseg.types import Box, Sample

matplotlib.use("Agg")
from matplotlib import pyplot

WHOLE = 90.0
"""A box that covers more of the image, in %, is called a box around everything."""
PANELS = {
    "words": "words of reasoning",
    "boxes": "boxes",
    "box": "largest box, % of the image",
    "mask": "mask, % of the image",
}
SHARES = (
    "several boxes",
    "a box around everything",
    "one sentence",
    "different texts",
    "anatomy named",
    "called found",
)
Values = Mapping[str, np.ndarray]


def shape(reasoning: str, boxes: tuple[Box, ...], mask_share: float, area: int) -> tuple[float, ...]:
    """One answer's values, in the order of `PANELS`."""
    largest = max(((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes), default=0)
    return len(reasoning.split()), len(boxes), 100 * largest / area, 100 * mask_share


def reasoning_of(record: Record) -> str:
    """What stands in the think block of a valid answer."""
    return record.text.split("<think>")[-1].split("</think>")[0].strip()


def names(text: str, anatomy: str) -> bool:
    """Whether the reasoning's first sentence, which says what picture it is, names the picture's anatomy."""
    return anatomy.lower() in text.split(".")[0].lower()


def described(name: str, texts: list[str], anatomies: list[str], values: Values, asked: int) -> str:
    """A row of the table: the values, and what a collapse would show."""
    spans = (np.quantile(values[panel], [0.5, 0.1, 0.9]) for panel in PANELS)
    shares = (
        np.mean(values["boxes"] > 1),
        np.mean(values["box"] > WHOLE),
        np.mean(["." not in text.rstrip(".") for text in texts]),
        len(set(texts)) / len(texts),
        np.mean([names(text, anatomy) for text, anatomy in zip(texts, anatomies, strict=True)]),
        len(texts) / asked,
    )
    cells = [f"{middle:.3g} [{low:.3g}, {high:.3g}]" for middle, low, high in spans]
    return f"| {name} | " + " | ".join([*cells, *(f"{100 * share:.1f}" for share in shares)]) + " |"


def shown_texts(asked: Mapping[str, list[Record]], count: int) -> Iterator[str]:
    """Lines of a table: of evenly spaced rows what each evaluation wrote, with the Dice of its mask."""
    yield "| question | " + " | ".join(asked) + " |\n|---" + "|---" * len(asked) + "|"
    for answers in zip(*(evenly(records, count) for records in asked.values()), strict=True):
        cells = (f"{reasoning_of(record)} ({100 * record.dice:.0f})" for record in answers)
        yield f"| {answers[0].question} ({answers[0].source}) | " + " | ".join(cells) + " |"


def draw(sides: Mapping[str, Values], out: Path) -> None:
    """One panel a value; sizes on a logarithmic axis."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        everything = np.concatenate([values[panel] for values in sides.values()])
        if panel == "boxes":
            bins = np.arange(0.5, everything.max() + 1)
        elif panel == "words":
            bins = np.linspace(everything.min(), everything.max() + 1, 25)
        else:
            bins = np.logspace(-2, 2, 25)
            axis.set_xscale("log")
        for name, values in sides.items():
            axis.hist(values[panel], bins, histtype="step", label=name, linewidth=1.4)
        axis.set_xlabel(title)
    axes[0].set_ylabel("answers")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=0)
    options = parser.parse_args()
    lesions = LesionSet.open(options.dataset)
    rows: dict[tuple[str, str], Sample] = {(s.file_name, s.mask_file_name): s for s in lesions.samples}
    sides: dict[str, Values] = {}
    answers: dict[str, list[Record]] = {}
    headings = ["", *PANELS.values(), *SHARES]
    print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")

    def side(name: str, texts: list[str], shapes: list[tuple[float, ...]], shown: list[Record], asked: int) -> None:
        """Print one row and keep its values for the picture."""
        sides[name] = dict(zip(PANELS, np.array(shapes, dtype=float).T, strict=True))
        print(described(name, texts, [record.anatomy for record in shown], sides[name], asked))

    for number, folder in enumerate(options.evaluations):
        (run,) = read_side("EVALUATION", [folder])
        asked = [record for record in run.records if record.lesion_share > 0 and not record.attribute]
        area = {}
        for record in asked:
            with Image.open(lesions.root / record.file_name) as picture:
                area[record.file_name] = picture.width * picture.height
        if not number:
            known = [(record, rows[record.file_name, record.mask_file_name]) for record in asked]
            references = [shape(s.reasoning, s.boxes, r.lesion_share, area[r.file_name]) for r, s in known]
            side("references", [sample.reasoning for _, sample in known], references, asked, len(asked))
        found = [record for record in asked if record.valid and record.found]
        texts = [reasoning_of(record) for record in found]
        shapes = [
            shape(text, record.boxes, record.predicted_share, area[record.file_name])
            for text, record in zip(texts, found, strict=True)
        ]
        name = folder.parent.name if folder.name == "evaluation" else folder.name
        side(name, texts, shapes, found, len(asked))
        answers[name] = asked
    if options.texts:
        print("\n" + "\n".join(shown_texts(answers, options.texts)))
    draw(sides, options.out)
