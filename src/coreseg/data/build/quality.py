"""Whether a reasoning text may stay: its form, what it says against the pixels, and what a judge thinks of it.

Source: the judge and its formula are the paper's third stage. Our choice: its prompt, and beside it the check against
the pixels, which no judge can outvote.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt8

from coreseg.data.build.endpoint import Endpoint, NoReplyError
from coreseg.data.build.ledger import Ledger
from coreseg.data.build.settings import TeacherConfig
from coreseg.data.build.stage import Fault, Outcome, Scores, stream
from coreseg.data.store import LesionSet
from coreseg.errors import DataError, InputError
from coreseg.nouns import plural
from coreseg.sentences import find
from coreseg.statements import contradictions, measured_and_accepted
from coreseg.types import Sample

MIN_WORDS, MAX_WORDS = 15, 110
"""Length of a reasoning text. The upper end fits the 160 tokens that `coreseg.answer.AnswerGrammar` lets it have."""

# --- the text itself -------------------------------------------------------------------------------------------------

# What typographers and Markdown add, as plain letters or as nothing.
_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
    | dict.fromkeys("*_#`<>|~\u00a0\u2022", " ")
    | {"\u2014": ", ", "\u2026": "...", "\u00d7": "x"}
)
_NUMBER = r"\d+(?:[.,]\d+)?"
_UNIT = r"(?: ?(?:%|px|pixels?|mm|cm|percent|per cent)(?!\w))"
_DRAWN = r"(?:outlined|marked|highlighted|circled|encircled|annotated|delineated|contoured|indicated)"
_BY_LINE = r"(?:in|by|with|using) (?:the |a )?(?:[\w-]+ ){0,3}(?:line|outline|contour|colou?r|cyan|marking)s?"
_STRIPPED = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # What stands in brackets around a number or around a word of the drawn line.
        rf" ?[(\[{{][^()\[\]{{}}]*(?:\d|{_DRAWN}|outline|contour|cyan)[^()\[\]{{}}]*[)\]}}]",
        r" ?[(\[{](?:at|in|to|from|see|[ ,;x-])*[)\]}]",
        rf",? ?\b(?:measuring|spanning|covering|occupying) (?:about |approximately |around |roughly )?"
        rf"{_NUMBER}{_UNIT}?(?: ?(?:x|by|-|to) ?{_NUMBER}{_UNIT}?)*"
        r"(?: (?:in|across) (?:diameter|size|length|width|height))?",
        rf",? ?\b(?:as )?{_DRAWN} {_BY_LINE}",
        rf"(?<!-)\b{_DRAWN} (?=(?:lesion|area|region|mass|nodule|structure|zone|tumou?r|focus|spot)s?\b)",
    )
)


def clean(text: str) -> str:
    """A teacher's text as one plain line, without what can be taken out and leave a sentence.

    Taken out are markup, coordinates and numbers in brackets, measured extents, and words of the drawn line ("the
    outlined region", "as marked in cyan"). What is left of these is for `text_faults` to find.
    """
    plain = " ".join(text.translate(_PLAIN).split())
    for pattern in _STRIPPED:
        plain = pattern.sub("", plain)
    return re.sub(r" +([.,;:!?])", r"\1", " ".join(plain.split()))


# Words of a lesion's own border, not of the drawn line: "a crisp outline".
_OF_LESION = (
    "sharp crisp clear distinct defined soft blurred blurry fuzzy indistinct unclear vague smooth irregular lobulated "
    "spiculated regular even uneven rounded round oval wavy jagged"
)
_OF_LESION_WORDS = tuple(_OF_LESION.split())
_LINE = re.compile(r"([\w-]*)\W*\b(?:outline|contour)s?\b", re.IGNORECASE)
_TELLTALES = tuple(
    (kind, what, re.compile(pattern, re.IGNORECASE))
    for kind, what, pattern in (
        # T1, L4 and the like are names.
        ("coordinates", "a number in digits", r"(?<![A-Za-z\d])\d\S*|%"),
        ("coordinates", "a word of coordinates", r"\b(?:coordinates?|pixels?|px|bounding box(?:es)?|[xy][- ]axis)\b"),
        ("coordinates", "a length", r"\b(?:(?:centi|milli)met(?:re|er)|inche?)s?\b|\b(?:cm|mm)\b"),
        (
            "marking",
            "a word of the drawn line",
            rf"\b(?:outlined|contoured|encircled|circled|cyan|annotat\w+|overlay\w*|ground truth|segmentation mask)\b|"
            rf"\b(?:drawn|colou?red|blue) (?:line|border|marking)s?\b|\b{_DRAWN} {_BY_LINE}|{_STRIPPED[-1].pattern}",
        ),
        (
            "sides",
            "a side of the patient",
            r"\bpatient'?s (?:own )?(?:left|right)\b|\banatomical(?:ly)? (?:left|right)|"
            r"\b(?:left|right)(?:[ -]hand)?(?: side)? of the patient\b",
        ),
    )
)


def _unnamed(text: str, category: str) -> str:
    """The text with "lesion" for the category: digits and words of a name, as in "grade 3 glioma", state nothing."""
    for name, instead in ((plural(category), "lesions"), (category, "lesion")):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text, flags=re.IGNORECASE)
    return text


def text_faults(text: str, category: str) -> list[Fault]:
    """What keeps a text from being the reasoning of a row, whatever its picture shows."""
    faults = []
    words = len(text.split())
    if not MIN_WORDS <= words <= MAX_WORDS:
        faults.append(Fault("form", f"it has {words} words, expected {MIN_WORDS} to {MAX_WORDS}"))
    if re.search(r"[<>\n]", text) or sum(letter.isascii() for letter in text) < 0.95 * len(text):
        faults.append(Fault("form", "it is not one paragraph of plain English without < and >"))
    if not any(name.lower() in text.lower() for name in (category, plural(category))):
        faults.append(Fault("form", f"it does not name the {category}"))
    told = _unnamed(text, category)
    for kind, what, pattern in _TELLTALES:
        if hit := pattern.search(told):
            faults.append(Fault(kind, f"it has {what}: {hit.group()!r}"))
    for hit in _LINE.finditer(told):
        if hit[1].lower().split("-")[-1] not in _OF_LESION_WORDS:
            faults.append(Fault("marking", f"it has a word of the drawn line: {hit.group()!r}"))
    return faults


# --- against the pixels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What can be measured of one row, per kind of statement: the value, and all that count as true."""

    measured: Mapping[str, str]
    true: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]) -> "Facts":
        """Measured on a picture and its mask."""
        return cls(*measured_and_accepted(image, mask))


def pixel_faults(text: str, facts: Facts, category: str = "lesion") -> list[Fault]:
    """The statements of a text that the pixels contradict, each with its sentence and the measured value.

    The category's name states nothing. On an empty mask every statement about a lesion is wrong. What the mask is too
    small to tell is not judged.
    """
    sentences = [sentence.strip() for sentence in re.findall(r"[^.;:!?\n]+", text)]
    faults = []
    for found in contradictions(_unnamed(text, category), facts.true):
        for value in sorted(found.wrong):
            says = (
                sentence
                for sentence in sentences
                if value in find(found.kind, _unnamed(sentence, category), denied=found.denied)
            )
            told, said = next(says, text), f"not {value}" if found.denied else value
            measured = facts.measured.get(found.kind, "no lesion")
            faults.append(Fault("pixels", f'{found.kind}: "{told}" says {said}; measured on the mask: {measured}'))
    return faults


# --- the judge, and the stage ----------------------------------------------------------------------------------------


async def judged(
    judge: Endpoint,
    sample: Sample,
    picture: UInt8[np.ndarray, "rows columns 3"],
    attempts: int,
    met: Counter[str],
    traffic: Counter[str],
) -> tuple[Scores, list[Fault]]:
    """A judge's scores of a row's text, and its criticism where they do not pass. Counts in `met` and `traffic`.

    A reply that is no judgement is asked for again. Raises NoReplyError where none of the attempts gives one, and what
    `Endpoint.ask` raises.
    """
    from coreseg.data.build.prompts import judge_prompt
    from coreseg.data.build.replies import Judgement, ask_for

    last = ""
    for attempt in range(1, attempts + 1):
        said = await ask_for(judge, judge_prompt(sample, picture), Judgement, attempt, traffic)
        if isinstance(said, Fault):
            met[f"judge: {said.kind}"] += 1
            last = said.text
            continue
        scores = Scores(said.normal_anatomy, said.lesion, said.reasoning)
        return scores, [] if scores.passes else [Fault("judge", f"{scores}: {said.criticism}")]
    raise NoReplyError(f"the judge gave no judgement in {attempts} attempts; last: {last}")


def review_rows(
    pictures: LesionSet, samples: Iterable[Sample], config: TeacherConfig | None = None, ledger: Ledger | None = None
) -> Generator[Outcome]:
    """The stage that checks texts as they are: form, pixels, and the judge of `config` where it names one.

    What form or pixels have failed is not judged: it costs money and would change nothing. `pictures` is the set that
    the rows' files lie in; its own rows are not read. In order; raises TeacherError where the judge answers no more.
    """
    if config is None or config.judge is None or ledger is None:
        for sample in samples:
            yield _checked(pictures, sample)[0]
        return
    judge = Endpoint(config.judge, ledger)
    limit = asyncio.Semaphore(2 * config.judge.in_flight)

    async def review(sample: Sample) -> Outcome:
        async with limit:
            outcome, picture = await asyncio.to_thread(_checked, pictures, sample, config.image_px)
            if outcome.faults or picture is None:
                return outcome
            try:
                scores, faults = await judged(judge, sample, picture, config.attempts, outcome.met, outcome.traffic)
            except NoReplyError as error:
                return replace(outcome, faults=(Fault("no reply", str(error)),))
            return replace(outcome, scores=scores, faults=tuple(faults))

    yield from stream(review, samples, 16 * config.judge.in_flight, [judge.close])


def _checked(
    pictures: LesionSet, sample: Sample, image_px: int = 0
) -> tuple[Outcome, UInt8[np.ndarray, "rows columns 3"] | None]:
    """A row after the checks that need no judge, and, where `image_px` is given, its picture for one."""
    try:
        image, mask = pictures.image(sample), pictures.mask(sample)
    except (DataError, InputError) as error:
        return Outcome(sample, (Fault("picture", str(error)),)), None
    text, category = sample.reasoning, sample.category
    faults = (*text_faults(text, category), *pixel_faults(text, Facts.of(image, mask), category))
    if faults or not image_px:
        return Outcome(sample, faults), None
    from coreseg.data.build.prompts import picture_for_teacher

    return Outcome(sample), picture_for_teacher(image, mask, image_px)
