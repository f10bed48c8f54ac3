"""Ask a predictor about every row of a split and record each answer.

Records are written as they come, so that a run that was stopped goes on where it stood.
"""

import gzip
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm import tqdm

from coreseg import questions
from coreseg.answer import parse
from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError, DataError
from coreseg.evaluate.records import Record, summarise
from coreseg.masks import box_tuples, mask_to_boxes
from coreseg.metrics import Boxes, detect_score, dice, iou
from coreseg.sentences import pick
from coreseg.statements import measured_and_accepted
from coreseg.types import Result, Sample

if TYPE_CHECKING:
    from coreseg.model.confidence import Confidence

Parsed = TypeVar("Parsed")
Images = Sequence[UInt8[np.ndarray, "_ _ 3"]]


@runtime_checkable
class Predictor(Protocol):
    """Whatever answers questions about images: the model, or a baseline."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its answers depend on beside the name, such as the checkpoint's digest or free decoding. JSON only.

        A run is resumed only where name and settings are those of its first part.
        """

    def predict(self, samples: Sequence[Sample], images: Images, questions: Sequence[str]) -> Sequence[Result]:
        """One result per question, in order, its mask at the size of its image.

        The samples tell a baseline the category; their boxes and masks are for tests and for an oracle only.
        """


@dataclass(frozen=True)
class Evaluation:
    """All records of one predictor on one split, and what they add up to (see `summarise`)."""

    name: str
    settings: Mapping[str, Any]
    records: tuple[Record, ...]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """One question about one row, and the mask that answers it."""

    sample: Sample
    image: UInt8[np.ndarray, "height width 3"]
    question: str
    reference: Bool[np.ndarray, "height width"]
    boxes: Boxes
    attribute: str = ""
    other: Bool[np.ndarray, "height width"] | None = None
    """The lesions of other categories in the same image, for the question about the whole category."""


def evaluate(
    lesion_set: LesionSet,
    predictor: Predictor,
    *,
    split: str = "val",
    out: Path | None = None,
    held_out_questions: bool = False,
    attribute_questions: bool = False,
    own_words: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Ask `predictor` about every row of `split`.

    The question is the row's own, or with `held_out_questions` one in words that training never saw, drawn by `seed`
    and row, or likewise one of `own_words` about its category. `attribute_questions` adds, on rows with several
    lesions, questions about some of them. `limit` looks at that many rows only, evenly spaced. With `out`, a folder,
    each answer is added to `records.jsonl` there as it comes; calling again with the same predictor and settings goes
    on after the last finished row.

    Raises DataError where the split has no rows, or rows of a category that `own_words` lacks; ConfigError where `out`
    holds the records of another run, or both kinds of questions are asked for.
    """
    rows = _chosen_rows(lesion_set.split(split), limit)
    if not rows:
        there = lesion_set.splits_there()
        raise DataError(f"the set at {lesion_set.root} has no rows in split {split!r}; it has {there}")
    if own_words is not None:
        if held_out_questions:
            raise ConfigError("held-out templates and own words were both asked for; expected one of the two")
        if lacking := sorted({sample.category for _, sample in rows} - own_words.keys()):
            raise DataError(f"there is no question in own words about {', '.join(lacking)}; add some")
    by_image: dict[str, list[Sample]] = {}
    for sample in lesion_set.split(split):
        by_image.setdefault(sample.file_name, []).append(sample)
    settings = {
        "model": predictor.name,
        "model_settings": dict(predictor.settings),
        "split": split,
        "rows": sha256("\n".join(repr(sample) for _, sample in rows).encode()).hexdigest()[:16],
        "held_out_questions": held_out_questions,
        "attribute_questions": attribute_questions,
        "seed": seed,
    }
    if own_words is not None:
        settings["own_words"] = sha256(json.dumps(own_words, sort_keys=True).encode()).hexdigest()[:16]
    file = out / "records.jsonl" if out else None
    records = _finished_records(file, settings) if file else []
    done = sum(not record.attribute for record in records)
    with tqdm(total=len(rows), initial=done, desc=predictor.name, unit="image", disable=not progress) as bar:
        for start in range(done, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            asks: list[Ask] = []
            for row, sample in batch:
                rng = np.random.default_rng([seed, row])
                same = by_image[sample.file_name]
                question = _question(sample, rng, held_out_questions, own_words)
                asks += _asks(lesion_set, sample, same, question, rng, held_out_questions, attribute_questions)
            fresh = _answered(predictor, asks, batch_size)
            records += fresh
            if file:
                with file.open("a") as lines:
                    lines.writelines(json.dumps(asdict(record)) + "\n" for record in fresh)
            bar.update(len(batch))
    return Evaluation(predictor.name, settings, tuple(records), summarise(records, seed))


def _chosen_rows(samples: Sequence[Sample], limit: int | None) -> list[tuple[int, Sample]]:
    """The rows to look at with their numbers in the split: all, or `limit` of them, evenly spaced over the sets."""
    count = len(samples) if limit is None else min(limit, len(samples))
    return [(int(row), samples[row]) for row in np.linspace(0, len(samples), count, endpoint=False, dtype=int)]


def _question(
    sample: Sample, rng: np.random.Generator, held_out: bool, own_words: Mapping[str, Sequence[str]] | None
) -> str:
    if own_words is not None:
        return pick(tuple(own_words[sample.category]), rng)
    return questions.ask(sample.category, rng, held_out=True) if held_out else sample.query


def _asks(
    lesion_set: LesionSet,
    sample: Sample,
    same_image: Sequence[Sample],
    question: str,
    rng: np.random.Generator,
    held_out: bool,
    with_attributes: bool,
) -> list[Ask]:
    """The questions about one row, the plain one last: a row whose plain record is on disk is finished."""
    image, mask = lesion_set.image(sample), lesion_set.mask(sample)
    others = [lesion_set.mask(row) for row in same_image if row.category != sample.category and row.boxes]
    plain = Ask(sample, image, question, mask, sample.boxes, other=np.any(others, axis=0) if others else None)
    if not with_attributes or len(sample.boxes) < 2:
        return [plain]
    attributes = questions.attribute_questions(image, mask, sample.category, rng, held_out=held_out)
    return [
        *(Ask(sample, image, each.text, each.mask, mask_to_boxes(each.mask), each.kind) for each in attributes),
        plain,
    ]


def _answered(predictor: Predictor, asks: Sequence[Ask], batch_size: int) -> list[Record]:
    """The records of the questions, in order; all questions about a row are among them."""
    results: list[Result] = []
    for start in range(0, len(asks), batch_size):
        batch = asks[start : start + batch_size]
        results += predictor.predict(
            [ask.sample for ask in batch], [ask.image for ask in batch], [ask.question for ask in batch]
        )
    plain = {
        ask.sample: (ask.reference, mask_of(result))
        for ask, result in zip(asks, results, strict=True)
        if not ask.attribute
    }
    return [scored(ask, result, *plain[ask.sample]) for ask, result in zip(asks, results, strict=True)]


def mask_of(result: Result) -> Bool[np.ndarray, "height width"]:
    """The mask that is scored. Source: an invalid answer counts as an empty mask."""
    return result.mask if result.valid else np.zeros_like(result.mask)


def scored(
    ask: Ask,
    result: Result,
    whole: Bool[np.ndarray, "height width"],
    plain_mask: Bool[np.ndarray, "height width"],
) -> Record:
    """The record of one result. `whole` and `plain_mask` are the row's plain question's: reference and answer."""
    sample, mask = ask.sample, mask_of(result)
    boxes = box_tuples(result.boxes) if result.valid else ()
    answer = parse(result.text) if result.valid else None
    return Record(
        file_name=sample.file_name,
        mask_file_name=sample.mask_file_name,
        source=sample.source,
        modality=sample.modality,
        anatomy=sample.anatomy,
        category=sample.category,
        case=sample.case,
        attribute=ask.attribute,
        question=ask.question,
        lesion_share=float(ask.reference.mean()),
        text=result.text,
        valid=result.valid,
        found=result.found and result.valid,
        wrong_category=answer is not None and answer.category.casefold() != sample.category.casefold(),
        predicted_share=float(mask.mean()),
        dice=dice(mask, ask.reference),
        iou=iou(mask, ask.reference),
        # An invalid answer wrote no boxes: on a lesion-free sample it must not pass for the right answer.
        detect=detect_score(boxes, ask.boxes) if result.valid else 0.0,
        boxes=boxes,
        seconds=result.seconds,
        whole_dice=dice(whole, ask.reference) if ask.attribute else None,
        plain_dice=dice(plain_mask, ask.reference) if ask.attribute else None,
        rest_dice=dice(mask, whole & ~ask.reference) if ask.attribute else None,
        plain_rest_dice=dice(plain_mask, whole & ~ask.reference) if ask.attribute else None,
        other_dice=None if ask.other is None else dice(mask, ask.other),
        reference_words=_true_words(ask.image, ask.reference),
        mask_words=_true_words(ask.image, mask),
        confidence=result.confidence,
        signs=result.signs,
    )


def _true_words(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> dict[str, list[str]]:
    measured, accepted = measured_and_accepted(image, mask)
    return {kind: [value, *sorted(accepted[kind] - {value})] for kind, value in measured.items()}


def _finished_records(file: Path, settings: Mapping[str, Any]) -> list[Record]:
    """The records of the rows that are finished in `file`, which is then ready for more.

    Its first line holds the settings. What a stopped run left half written is cut off.
    """
    written = read_records(file)
    if written is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": settings}) + "\n")
        return []
    if written.settings != json.loads(json.dumps(settings)):
        raise ConfigError(f"{file} holds the records of another run; choose another folder, or delete the file")
    os.truncate(file, written.size_bytes)
    return list(written.records)


@dataclass(frozen=True)
class Written:
    """What a run has put on disk: its settings, the records of its finished rows, and where those end in the file."""

    settings: Mapping[str, Any]
    records: tuple[Record, ...]
    size_bytes: int


def read_records(file: Path) -> Written | None:
    """The finished rows of a `records.jsonl`, or of one packed by gzip; None where there is not even a first line.

    A row is finished with its plain question, which comes last; a line without its end is what a stopped run left.
    Raises DataError for whole lines that are no records.
    """
    content = file.read_bytes() if file.exists() else b""
    lines = (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines(keepends=True)
    if not lines or not lines[0].endswith(b"\n"):
        return None
    settings = _parsed(lines[0], lambda fields: dict(fields["settings"]), f"{file} line 1")
    finished: list[Record] = []
    row: list[Record] = []
    size_bytes = finished_bytes = len(lines[0])
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith(b"\n"):
            break
        size_bytes += len(line)
        row.append(_parsed(line, _record_from, f"{file} line {number}"))
        if not row[-1].attribute:
            finished += row
            row, finished_bytes = [], size_bytes
    return Written(settings, tuple(finished), finished_bytes)


def read_folder(folder: Path) -> Written:
    """What `coreseg evaluate --out` wrote to a folder, or a packed copy of it. DataError where there are no records."""
    written = read_records(folder / "records.jsonl") or read_records(folder / "records.jsonl.gz")
    if written is None or not written.records:
        raise DataError(f"{folder}: no records in it; expected a folder that `coreseg evaluate SET --out FOLDER` wrote")
    return written


def fit_confidence(*folders: Path) -> "Confidence":
    """How sure a model may be, from the records of its answers in all folders, lesion-free rows included.

    Without attribute questions, and without the answers that are told apart anyway: those of invalid form, and those
    whose words tell of a lesion beside an empty mask.

    Raises DataError as `read_folder`, and where too few records hold what an answer showed of itself.
    """
    from coreseg.model.confidence import Confidence

    told = [
        (record.signs, record.dice)
        for folder in folders
        for record in read_folder(folder).records
        if record.signs and record.valid and record.found == (record.predicted_share > 0) and not record.attribute
    ]
    return Confidence.fit([signs for signs, _ in told], [dice for _, dice in told])


def _parsed(line: bytes, meaning: Callable[[Any], Parsed], where: str) -> Parsed:
    try:
        return meaning(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{where} is no line of this version's `coreseg evaluate --out` ({error}): evaluate anew into a new folder"
        ) from error


def _record_from(fields: dict[str, Any]) -> Record:
    return Record(**{**fields, "boxes": tuple(tuple(box) for box in fields["boxes"])})
