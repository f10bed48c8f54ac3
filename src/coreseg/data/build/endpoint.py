"""A model behind any OpenAI-compatible endpoint: one question, one reply, paid for once.

Every reply is written to the ledger before anything looks at it, under a key made of all that decides it. So a run that
was stopped is simply run again: it asks the same questions, and those that were answered cost nothing.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coreseg.data.build.ledger import Ledger, Reply
from coreseg.data.build.settings import EndpointSettings
from coreseg.errors import MissingExtraError, TeacherError


@dataclass(frozen=True)
class Prompt:
    """One question: the standing instructions, the question, a picture or none, and the JSON schema of the reply."""

    system: str
    user: str
    picture: UInt8[np.ndarray, "height width 3"] | None
    schema: Mapping[str, Any]

    @property
    def text_bytes(self) -> int:
        """Length of the words, the schema's included. No tokenizer in use makes more tokens of them."""
        return len(f"{self.system}{self.user}{json.dumps(self.schema)}".encode())


UNANSWERED = "unanswered"
"""What a request that failed for a reason that time may mend is counted as, once all its tries are over."""


class NoReplyError(Exception):
    """One request got no reply; the message says why. Other requests may do better."""


def require_client() -> None:
    """Raises MissingExtraError where the library that endpoints are asked with is not installed."""
    if find_spec("openai") is None:
        raise MissingExtraError("a teacher or judge needs openai and pydantic; in a clone: pip install '.[build]'")


class Endpoint:
    """A client of one endpoint, for one run: `ask` from inside its event loop, then `close`.

    Raises MissingExtraError without the extra `build`.
    """

    def __init__(self, settings: EndpointSettings, ledger: Ledger) -> None:
        require_client()
        import openai

        self.settings, self._ledger = settings, ledger
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get(settings.key_env) or "none",
            timeout=settings.timeout_s,
            max_retries=0,  # Ours are counted, wait as long as the server asks for, and know the budget.
        )
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._first = asyncio.Lock()
        self._pace = _Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._known = ledger.dearest(settings.model) is not None
        self._fruitless = 0
        self._stopped = ""
        self._limit_field = "max_tokens"
        self._with_schema = settings.json_schema

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ask(self, prompt: Prompt, attempt: int, tally: Counter[str]) -> Reply:
        """The reply to one prompt, from the ledger where it is there. Counts in `tally` what happened on the way.

        attempt: numbers the times that one thing is asked, as the same words asked again are to be answered anew.

        Raises NoReplyError where every try failed, which is counted as `UNANSWERED`, or the server refuses this
        request; TeacherError where nothing is answered any more, or the budget has no room.
        """
        key = self._key(prompt, attempt)
        if kept := self._ledger.find(key):
            tally["cached"] += 1
            return kept
        if self._known:
            return await self._paid(key, prompt, tally)
        # The first request goes alone: a wrong key or address costs one error, not one for each of those in flight,
        # and its reply tells what others will cost.
        async with self._first:
            if not self._known:
                try:
                    return await self._paid(key, prompt, tally)
                finally:
                    self._known = True
        return await self._paid(key, prompt, tally)

    def _key(self, prompt: Prompt, attempt: int) -> str:
        settings = self.settings
        words = (settings.model, settings.temperature, settings.max_tokens, settings.json_schema)
        text = json.dumps([*words, attempt, prompt.system, prompt.user, prompt.schema], sort_keys=True)
        digest = hashlib.sha256(text.encode())
        if prompt.picture is not None:
            # The pixels and not the file that is sent, which another version of the encoder may write otherwise.
            digest.update(str(prompt.picture.shape).encode())
            digest.update(prompt.picture.tobytes())
        return digest.hexdigest()

    async def _paid(self, key: str, prompt: Prompt, tally: Counter[str]) -> Reply:
        """The reply over the network, with further tries where one may help."""
        messages = await asyncio.to_thread(_messages, prompt)
        failure, trial = _Failure("", ""), 0
        while trial <= self.settings.retries:
            if trial:
                tally["retries"] += 1
                backoff_s = min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** (trial - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff_s)
            outcome = await self._in_turn(key, prompt, messages)
            tally["requests"] += 1
            if isinstance(outcome, Reply):
                self._fruitless = 0
                tally["input tokens"] += outcome.input_tokens
                tally["output tokens"] += outcome.output_tokens
                return outcome
            failure = outcome
            tally[failure.kind] += 1
            self._pace.pause(failure.retry_after_s)
            if failure.final or (failure.kind == _UNREACHABLE and not self._known and trial == 2):
                break
            # What was refused for how it was written, at most twice, has not been tried yet.
            trial += failure.kind != _UNKNOWN
        self._fruitless += 1
        gone = failure.stops_all or (failure.kind == _UNREACHABLE and not self._known)
        if gone or self._fruitless > self.settings.in_flight:
            self._stopped = (
                f"{self.settings.base_url}, model {self.settings.model}: {failure.text}. Check base_url, model and the "
                f"key in {self.settings.key_env}, then run the same command again."
            )
            raise TeacherError(self._stopped)
        tally[UNANSWERED] += not failure.final
        raise NoReplyError(failure.text)

    async def _in_turn(self, key: str, prompt: Prompt, messages: list[Any]) -> "Reply | _Failure":
        """One try, when the limits and the budget let it go."""
        async with self._slots:
            await self._pace.turn(prompt.text_bytes // 4 + self._image_tokens(prompt) + self.settings.max_tokens)
            while True:
                if self._stopped:
                    raise TeacherError(self._stopped)
                ended = self._ledger.ended_requests
                # Shielded: a request that is out when the run is stopped is waited for, and its reply kept.
                outcome = await asyncio.shield(asyncio.ensure_future(self._once(key, prompt, messages)))
                if outcome is not None:
                    return outcome
                # One that was open when the money was asked for may have given some back since.
                if self._ledger.open_requests == 0 and self._ledger.ended_requests == ended:
                    self._stopped = self._used_up(prompt)
                    continue
                await asyncio.sleep(0.05)

    async def _once(self, key: str, prompt: Prompt, messages: list[Any]) -> "Reply | _Failure | None":
        """One request, from the money taken for it to the reply on disk; None where the budget has no room for it."""
        reserved = self._upper_cost(prompt)
        if not await asyncio.to_thread(self._ledger.reserve, reserved):
            return None
        extras = self._extras(prompt)
        try:
            completion = await self._client.chat.completions.create(
                model=self.settings.model, messages=messages, **extras
            )
            reply = self._reply(completion, prompt)
        except Exception as error:
            failure = self._failure(error, extras)
            if failure.charged:
                await asyncio.to_thread(self._ledger.abandon)
            else:
                await asyncio.to_thread(self._ledger.release, reserved)
            return failure
        return await asyncio.to_thread(self._ledger.record, key, self.settings.model, reply, reserved)

    def _extras(self, prompt: Prompt) -> dict[str, Any]:
        extras: dict[str, Any] = {self._limit_field: self.settings.max_tokens}
        if self.settings.temperature is not None:
            extras["temperature"] = self.settings.temperature
        if self._with_schema:
            schema = {"name": "reply", "strict": True, "schema": dict(prompt.schema)}
            extras["response_format"] = {"type": "json_schema", "json_schema": schema}
        return extras

    def _image_tokens(self, prompt: Prompt) -> int:
        return 0 if prompt.picture is None else self.settings.image_tokens

    def _upper_cost(self, prompt: Prompt) -> float:
        """The most that one request can cost, as far as known: by its size, and by the dearest reply so far."""
        input_tokens = prompt.text_bytes + _TEMPLATE_TOKENS + self._image_tokens(prompt)
        by_size = self.settings.cost(input_tokens, self.settings.max_tokens)
        return max(by_size, self._ledger.dearest(self.settings.model) or 0.0)

    def _reply(self, completion: Any, prompt: Prompt) -> Reply:
        """What counts of a completion. Raises ValueError where the server sent something else."""
        if not getattr(completion, "choices", None):
            raise ValueError("the reply is no chat completion")
        choice = completion.choices[0]
        refusal = getattr(choice.message, "refusal", None)
        # Half a surrogate pair, which JSON allows, is no text that could be stored.
        text = (refusal or choice.message.content or "").encode(errors="replace").decode()
        usage = completion.usage
        counted = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        # Servers that do not count tokens: from above, as the budget must hold.
        most = (prompt.text_bytes + _TEMPLATE_TOKENS + self._image_tokens(prompt), len(text.encode()))
        input_tokens, output_tokens = (
            limit if tokens is None else tokens for tokens, limit in zip(counted, most, strict=True)
        )
        cost = self.settings.cost(input_tokens, output_tokens)
        return Reply(text, "refusal" if refusal else choice.finish_reason or "", input_tokens, output_tokens, cost)

    def _failure(self, error: Exception, sent: Mapping[str, Any]) -> "_Failure":
        """What an exception means for the request, for the run and for the money; `sent` are the request's extras."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return _Failure("time-outs", f"no reply within {self.settings.timeout_s:g} s", charged=True)
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error, sent)
        if isinstance(error, openai.APIConnectionError):
            cause = type(error.__cause__).__name__
            if cause in ("ConnectError", "ConnectTimeout"):
                return _Failure(_UNREACHABLE, f"no connection ({error.__cause__})")
            return _Failure("broken connections", f"the connection broke ({cause})", charged=True)
        if isinstance(error, ValueError | AttributeError | openai.APIError):
            return _Failure("unreadable responses", f"the response is no chat completion ({error})", charged=True)
        raise error

    def _refusal(self, error: Any, sent: Mapping[str, Any]) -> "_Failure":
        """What a status of 400 or above means."""
        body = error.body if isinstance(error.body, dict) else {}
        status, text = error.status_code, f"{error.status_code}, {_one_line(str(body.get('message') or error.message))}"
        if status == 429 and error.code != "insufficient_quota":
            return _Failure("rate limits", text, retry_after_s=_retry_after_s(error.response.headers))
        if status in (408, 409, 425) or status >= 500:
            return _Failure("server errors", text, retry_after_s=_retry_after_s(error.response.headers))
        if status in (400, 422) and self._drop_what_is_unknown(text, sent):
            return _Failure(_UNKNOWN, text)
        return _Failure("refused requests", text, final=True, stops_all=status in (401, 402, 404, 429))

    def _drop_what_is_unknown(self, text: str, sent: Mapping[str, Any]) -> bool:
        """Whether the refusal is for a part of what was sent that can be written otherwise, which it is from now on.

        Others that were sent at the same time are refused for it too.
        """
        if "response_format" in sent and any(word in text for word in ("response_format", "json_schema", "schema")):
            self._with_schema = False
        elif "max_tokens" in sent and "max_completion_tokens" in text:
            self._limit_field = "max_completion_tokens"
        else:
            return False
        return True

    def _used_up(self, prompt: Prompt) -> str:
        spent = self._ledger.spent()
        lost = f", {spent.unanswered:.4g} held back for requests without a reply" if spent.unanswered else ""
        return (
            f"the budget of {self._ledger.max_cost:.4g} is used up: {spent.paid:.4g} paid{lost}, and the next request "
            f"may cost {self._upper_cost(prompt):.4g}. Every reply is kept in {self._ledger.folder}: to go on, run "
            "the same command with a larger budget (max_cost in the file of settings, or --max-cost)."
        )


_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0
"""Wait before the first further try, doubled for each one more, with chance so that requests do not come in step."""

_TEMPLATE_TOKENS = 64
"""What a server's chat template adds around the words, from above."""

_UNREACHABLE, _UNKNOWN = "no connection", "settings the server does not know"


@dataclass(frozen=True)
class _Failure:
    """Why one request has no reply.

    kind: what it is counted as. final: another try would not help. stops_all: nor would another request. charged: the
    server may have answered, and charged for it, all the same.
    """

    kind: str
    text: str
    retry_after_s: float = 0.0
    final: bool = False
    stops_all: bool = False
    charged: bool = False


class _Pace:
    """Lets requests go one after another, as far apart as limits per minute ask."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_s = 0.0

    async def turn(self, tokens: int) -> None:
        """Wait for the turn of a request of so many tokens."""
        now_s = asyncio.get_running_loop().time()
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + self._request_s + tokens * self._token_s
        await asyncio.sleep(at_s - now_s)

    def pause(self, seconds: float) -> None:
        """Nobody goes for so long: who is told to wait would only be told again."""
        self._next_s = max(self._next_s, asyncio.get_running_loop().time() + seconds)


def _messages(prompt: Prompt) -> list[Any]:
    """The prompt as chat messages, its picture as a JPEG in a data URL."""
    content: Any = prompt.user
    if prompt.picture is not None:
        file = io.BytesIO()
        Image.fromarray(prompt.picture).save(file, format="JPEG", quality=92)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt.user}]
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, given as such or as a date; 0 where it does not ask."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
