"""The data card: what a data set holds, how it came about, and what was thrown away, as one HTML page and as Markdown.

The page stands alone (pictures inside), so that it can be passed on; where images may not be, pass on the Markdown.
"""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coreseg.data.manifest import read_sources
from coreseg.data.store import SPLITS, LesionSet, evenly, write_text, writing
from coreseg.errors import CoreSegError
from coreseg.imaging import overlay
from coreseg.types import Sample

EXAMPLES = 12
_SIDE_PX = 256
_PARTS = ("modality", "anatomy", "category", "source")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#2b6cb0;height:.8rem;border-radius:2px}
.rows{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1.2rem}
figure{margin:0}figure img{width:100%;border-radius:4px}figcaption{font-size:13px}.why{color:#b42318}
"""


@dataclass(frozen=True)
class Stage:
    """One step of a build: how many rows went in and came out, and what else is worth saying, as plain JSON."""

    name: str
    rows_in: int
    rows_out: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A row that was thrown away, where its picture lies, and why."""

    lesions: LesionSet
    sample: Sample
    reason: str


def write_card(
    lesions: LesionSet, stages: Sequence[Stage], rejected: Sequence[Rejected], page: Path, text: Path
) -> None:
    """Write the card of a data set as HTML to `page` and as Markdown, without pictures, to `text`.

    Raises DataError where they cannot be written, or `sources.json` cannot be read.
    """
    with writing(page):
        write_text(page, _html(lesions, stages, rejected))
        write_text(text, _markdown(lesions, stages, rejected))


def name_of(lesions: LesionSet) -> str:
    """What a card calls a set: its folder's name, of a build's `set` the build's."""
    folder = lesions.root.resolve()
    return folder.parent.name if folder.name == "set" else folder.name


def counts(samples: Iterable[Sample], part: str) -> list[tuple[str, int]]:
    """Rows by one of a row's fields, most first."""
    return Counter(str(getattr(sample, part)) for sample in samples).most_common()


def _facts(lesions: LesionSet) -> dict[str, str]:
    samples = lesions.samples
    unknown = sum(not sample.case for sample in samples)
    splits = {split: len(lesions.split(split)) for split in SPLITS}
    return {
        "rows": f"{len(samples)} on {len({sample.file_name for sample in samples})} images",
        "splits": ", ".join(f"{count} {split}" for split, count in splits.items() if count),
        "without a lesion": str(sum(not sample.boxes for sample in samples)),
        "patients": f"{len({s.case for s in samples if s.case})} known, {unknown} rows of unknown ones",
    }


def _licences(lesions: LesionSet) -> list[tuple[str, str, str]]:
    """Source, title and terms of each source."""
    told = read_sources(lesions.root)
    terms = sorted({(sample.source, sample.licence) for sample in lesions.samples})
    return [(source, str(told.get(source, {}).get("title", "")), licence) for source, licence in terms]


def _told(facts: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def _markdown(lesions: LesionSet, stages: Sequence[Stage], rejected: Sequence[Rejected]) -> str:
    lines = [f"# {name_of(lesions)}", ""]
    lines += [f"- {name}: {value}" for name, value in _facts(lesions).items()]
    lines += ["", "## How it was made", "", *_table(("stage", "in", "out", ""), _stage_rows(stages))]
    for part in _PARTS:
        lines += ["", f"## By {part}", "", *_table((part, "rows"), counts(lesions.samples, part))]
    lines += ["", "## Thrown away", "", *_table(("reason", "rows"), Counter(r.reason for r in rejected).most_common())]
    lines += ["", "## Licences", "", *_table(("source", "title", "terms"), _licences(lesions))]
    return "\n".join(lines) + "\n"


def _stage_rows(stages: Sequence[Stage]) -> list[tuple[Any, ...]]:
    return [(stage.name, stage.rows_in, stage.rows_out, _told(stage.facts)) for stage in stages]


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {row} |" for row in cells)]


def _html(lesions: LesionSet, stages: Sequence[Stage], rejected: Sequence[Rejected]) -> str:
    name = html.escape(name_of(lesions))
    shown = [_figure(lesions, sample, sample.query, sample.reasoning) for sample in evenly(lesions.samples, EXAMPLES)]
    thrown = [_figure(r.lesions, r.sample, "", r.reason, "why") for r in evenly(rejected, EXAMPLES)]
    body = [
        f"<h1>{name}</h1>",
        _html_table((), _facts(lesions).items()),
        "<h2>How it was made</h2>",
        _html_table(("stage", "in", "out", ""), _stage_rows(stages)),
        *(f"<h2>By {part}</h2>{_bars(counts(lesions.samples, part))}" for part in _PARTS),
        f"<h2>Examples</h2><div class=rows>{''.join(shown)}</div>",
        f"<h2>Thrown away: {len(rejected)}</h2><div class=rows>{''.join(thrown)}</div>",
        "<h2>Licences</h2>",
        _html_table(("source", "title", "terms"), _licences(lesions)),
    ]
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def _html_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in rows), default=1)
    lines = [
        f"<tr><td>{html.escape(name)}</td><td class=n>{count}</td>"
        f'<td style="width:24rem"><div class=bar style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _figure(lesions: LesionSet, sample: Sample, title: str, text: str, kind: str = "") -> str:
    try:
        shown = f'<img alt="{html.escape(sample.category)}" src="{_picture(lesions, sample)}">'
    except CoreSegError:  # as it may have been thrown away for that
        shown = ""
    return (
        f"<figure>{shown}<figcaption>"
        f"<b>{html.escape(title or sample.category)}</b><br>{html.escape(f'{sample.source}, {sample.split}')}<br>"
        f"<span class={kind or 'text'}>{html.escape(text)}</span></figcaption></figure>"
    )


def _picture(lesions: LesionSet, sample: Sample) -> str:
    drawn = overlay(lesions.image(sample), lesions.mask(sample), np.array(sample.boxes, dtype=np.int64).reshape(-1, 4))
    drawn.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
