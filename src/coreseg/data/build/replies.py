"""What a teacher and a judge must reply: JSON objects, validated; and how one is found in what a model really wrote."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from coreseg.data.build.endpoint import Endpoint, Prompt
from coreseg.data.build.stage import Fault
from coreseg.errors import MissingExtraError

try:
    from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
except ImportError as error:
    raise MissingExtraError(
        "a teacher or judge needs openai and pydantic; in a clone: pip install '.[build]'"
    ) from error


def _writable(text: str) -> str:
    # Half a surrogate pair, which JSON allows, can be stored nowhere.
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("is no text")
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return _writable(text)


def _share(score: float) -> float:
    if not 0 <= score <= 1:
        raise ValueError("is not between 0 and 1")
    return score


# Validators and not limits of the schema: servers that guide decoding by a schema know few of its words.
_Text = Annotated[str, AfterValidator(_said)]
_Note = Annotated[str, AfterValidator(_writable)]
_Score = Annotated[float, AfterValidator(_share)]


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Description(_Reply):
    """The first prompt's reply: what is seen in one picture."""

    normal_anatomy: _Text
    lesion: _Text


class Thought(_Reply):
    """The second prompt's reply: the reasoning of a row."""

    reasoning: _Text


class Judgement(_Reply):
    """The judge's reply: scores in [0, 1], and what would have to change."""

    normal_anatomy: _Score
    lesion: _Score
    reasoning: _Score
    criticism: _Note


Kind = TypeVar("Kind", bound=_Reply)


_REFUSAL = re.compile(
    r"\W*(?:I(?:'m| am) (?:very |so )?(?:sorry|unable|not able)|sorry|I (?:can't|cannot|can not|won't)|as an AI)", re.I
)


async def ask_for(
    endpoint: Endpoint, prompt: Prompt, kind: type[Kind], attempt: int, traffic: Counter[str]
) -> Kind | Fault:
    """An endpoint's reply as a `kind`, or what is wrong with it. Raises what `Endpoint.ask` raises."""
    reply = await endpoint.ask(prompt, attempt, traffic)
    found = parse_reply(reply.text, kind)
    if found is not None:
        return found
    fields = ", ".join(kind.model_fields)
    if reply.finish in ("refusal", "content_filter") or _REFUSAL.match(reply.text.replace("\u2019", "'")):
        return Fault("refused", f"the reply was a refusal; expected the fields {fields}")
    if reply.finish == "length":
        return Fault("cut off", f"the reply was cut off at {endpoint.settings.max_tokens} tokens: write less")
    return Fault("unreadable", f"the reply was no JSON object with exactly the fields {fields}, each filled in rightly")


def parse_reply(text: str, kind: type[Kind]) -> Kind | None:
    """The last JSON object in a text that is a `kind` without a flaw, or None.

    Fences, words before and after, drafts and line breaks inside strings do no harm; a missing, further or wrongly
    typed field does.
    """
    found = None
    for value in _objects(text):
        try:
            found = kind.model_validate(value)
        except ValidationError:
            continue
    return found


def _objects(text: str) -> Iterator[Any]:
    """Every outermost JSON object in a text."""
    decoder = json.JSONDecoder(strict=False)
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            yield value
        except (ValueError, RecursionError):
            end = start + 1
        start = text.find("{", end)
