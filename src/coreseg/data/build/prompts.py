"""What the teacher and the judge see and are asked.

Source: the two prompts, description first and chain of thought from it, and the judge's three scores are the paper's;
their words are not public. Our choice: every word here, and the line that shows the teacher where the lesion is.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from coreseg.data.build.endpoint import Prompt
from coreseg.data.build.quality import MAX_WORDS
from coreseg.data.build.replies import Description, Judgement, Thought
from coreseg.data.build.stage import Fault
from coreseg.nouns import with_article
from coreseg.types import Sample

_LINE_RGB = (0, 214, 255)

_RULES = """\
You write reference texts for a research data set of medical images.
Left and right are those of the picture as it is shown, never those of the patient: left is the left half of the \
picture. Write plain English sentences. No digits, coordinates, percentages, lengths or areas. A thin cyan line was \
drawn around the lesion for you alone: readers see the picture without it, so never mention a line, outline, contour, \
marking or colour of it, and call the lesion's own border its edge. Do not guess at what the picture cannot show, such \
as symptoms, age or history. Begin every sentence about healthy anatomy with the word Normal.
Reply with one JSON object and nothing else."""

_WORDS = """\
Words that are checked against the picture, so use them as meant here:
side: left, right, central (the middle tenth of the width), or on both sides of the image
place: upper, lower, middle height (the middle tenth), or from top to bottom
size, by the share of the picture that the largest lesion covers: tiny under a five-hundredth, small under a \
sixtieth, medium-sized under a sixteenth, large under a fifth, very large above
number: a single, two, three, four, several
shape of the largest: round, oval, elongated, irregular
edge: sharp or blurred; brightness against the surroundings: darker, similar, brighter; interior: homogeneous or \
heterogeneous"""

_DESCRIBE = """\
Picture: {modality} of the {anatomy}. {task}
Describe it for a colleague who cannot see it:
normal_anatomy: two or three sentences on the healthy structures that can be seen.
lesion: {lesion}
{words}
JSON: {{"normal_anatomy": "...", "lesion": "..."}}{turned_down}"""

_LESION_TASK = "The cyan line runs around every {category}."
_LESION_WANTED = (
    "three to five sentences on its side and place in the picture, size, number, shape, edge, brightness against the "
    "surroundings, interior, and what it does to the structures around it."
)
_ABSENT_TASK = "It shows no {category}."
_ABSENT_WANTED = "one or two sentences saying that nothing stands out, and where one would have looked."

_THINK = """\
Picture: {modality} of the {anatomy}. Question: {query}
Description by a colleague:
normal anatomy: {normal_anatomy}
lesion: {lesion}
Write the reasoning of a careful reader who sees the picture and does not yet know the answer: what picture it is and \
how healthy tissue looks in it, then what departs from that and where, then {conclusion}. One paragraph of \
at most {most} words that says nothing the description does not say, and names the {category} in exactly this word.
JSON: {{"reasoning": "..."}}{turned_down}"""

_JUDGE_RULES = """\
You check reference texts for a research data set of medical images. Left and right are those of the picture as it is \
shown. A thin cyan line was drawn around the lesion for you alone; the text must not mention it.
Be strict: full marks are for a text that you would sign. Reply with one JSON object and nothing else."""

_JUDGE = """\
Picture: {modality} of the {anatomy}. {task}
Text: {reasoning}
Score from zero to one, with decimals:
normal_anatomy: what the text says of the healthy structures in this picture, whether it is right and specific.
lesion: what it says of the lesion (or of there being none), whether it is right, specific and complete.
reasoning: whether it goes from what is seen to its conclusion without gaps, contradictions or claims that the \
picture cannot support.
criticism: what would have to change, in one or two sentences; empty where nothing would.
JSON: {{"normal_anatomy": 0.0, "lesion": 0.0, "reasoning": 0.0, "criticism": "..."}}"""


def prompts_digest() -> str:
    """A short hash of every fixed word that teacher and judge are told, for the record of a build."""
    words = (_RULES, _WORDS, _DESCRIBE, _LESION_TASK, _LESION_WANTED, _ABSENT_TASK, _ABSENT_WANTED, _THINK)
    return hashlib.sha256("\n".join((*words, _JUDGE_RULES, _JUDGE)).encode()).hexdigest()[:16]


def picture_for_teacher(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"], side_px: int
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The picture, its longer side shrunk to `side_px` where it is longer, with a cyan line around every lesion.

    The line keeps a small distance, so that the lesion's own edge stays to be seen. No line on an empty mask.
    """
    height, width = mask.shape
    scale = min(1.0, side_px / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = np.array(Image.fromarray(image).resize(size_wh, Image.Resampling.BOX))
    # Any lesion pixel counts, so that a tiny lesion keeps its line.
    small = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size_wh, Image.Resampling.BOX)) > 0
    if small.any():
        line_px = max(1.0, max(size_wh) / 400)
        away = ndimage.distance_transform_edt(~small)
        picture[(away > 2 * line_px) & (away <= 3 * line_px)] = _LINE_RGB
    return picture


def description_prompt(
    sample: Sample, picture: UInt8[np.ndarray, "rows columns 3"] | None, earlier: str = "", faults: Sequence[Fault] = ()
) -> Prompt:
    """The first prompt: describe the picture. `earlier` is a reply that was turned down, for `faults`."""
    user = _DESCRIBE.format(
        **_facts(sample),
        lesion=_LESION_WANTED if sample.boxes else _ABSENT_WANTED,
        words=_WORDS,
        turned_down=_turned_down(earlier, faults),
    )
    return Prompt(_RULES, user, picture, Description.model_json_schema())


def thought_prompt(sample: Sample, description: Description, earlier: str = "", faults: Sequence[Fault] = ()) -> Prompt:
    """The second prompt: the chain of thought from a description; no picture. `earlier` as in the first."""
    user = _THINK.format(
        **_facts(sample),
        query=sample.query,
        normal_anatomy=description.normal_anatomy,
        lesion=description.lesion,
        conclusion=f"{'why this fits' if sample.boxes else 'that nothing here fits'} {with_article(sample.category)}",
        most=MAX_WORDS - 20,
        turned_down=_turned_down(earlier, faults),
    )
    return Prompt(_RULES, user, None, Thought.model_json_schema())


def judge_prompt(sample: Sample, picture: UInt8[np.ndarray, "rows columns 3"] | None) -> Prompt:
    """The judge's prompt: score the row's reasoning."""
    user = _JUDGE.format(**_facts(sample), reasoning=sample.reasoning)
    return Prompt(_JUDGE_RULES, user, picture, Judgement.model_json_schema())


def _facts(sample: Sample) -> dict[str, Any]:
    task = _LESION_TASK if sample.boxes else _ABSENT_TASK
    return {
        "modality": sample.modality,
        "anatomy": sample.anatomy,
        "category": sample.category,
        "task": task.format(category=sample.category),
    }


def _turned_down(earlier: str, faults: Sequence[Fault]) -> str:
    if not faults:
        return ""
    quoted = f': "{earlier}"' if earlier else ""
    reasons = "\n".join(f"- {fault.text}" for fault in faults)
    return f"\nAn earlier reply was turned down{quoted}\nbecause\n{reasons}\nWrite a new one that mends this."
