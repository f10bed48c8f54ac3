"""A scripted teacher: an OpenAI-compatible server on loopback that answers as a test tells it, faults included."""

import asyncio
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One question as it came. `times` counts from 1 how often this very question has come."""

    body: dict[str, Any]
    times: int

    @property
    def words(self) -> str:
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def with_picture(self) -> bool:
        return not isinstance(self.body["messages"][-1]["content"], str)

    @property
    def kind(self) -> str:
        return "judgement" if "criticism" in self.words else "thought" if '"reasoning"' in self.words else "description"

    @property
    def category(self) -> str:
        found = re.search(r"around every (.+?)\.|shows no (.+?)\.|names the (.+?) in exactly", self.words)
        assert found
        return next(filter(None, found.groups()))

    @property
    def turned_down(self) -> bool:
        return "turned down" in self.words


@dataclass(frozen=True)
class Answer:
    """What comes back. `body` stands in for the completion with `content`; `delay_s` comes on top of the latency."""

    content: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    body: bytes | None = None
    delay_s: float = 0.0
    hang_up: bool = False
    usage: bool = True


INPUT_TOKENS, OUTPUT_TOKENS = 1000, 100
"""What every reply says it took."""

CALM = "Normal tissue fills the picture and looks as it should. An area departs from it and catches the eye at once."


def well(request: Request) -> Answer:
    """A good reply, which states nothing that pixels could contradict."""
    return Answer(json.dumps(reply_to(request)))


def reply_to(request: Request, **changes: Any) -> dict[str, Any]:
    """A good reply's fields, with changes."""
    replies: dict[str, dict[str, Any]] = {
        "description": {"normal_anatomy": "Normal tissue is even.", "lesion": "An area departs from it."},
        "judgement": {"normal_anatomy": 0.9, "lesion": 0.9, "reasoning": 1, "criticism": ""},
    }
    fields = replies.get(request.kind) or {"reasoning": f"{CALM} This fits the {request.category}."}
    return {**fields, **changes}


class TeacherServer:
    """`with TeacherServer(answer) as server`: serves at `server.url`, and counts.

    requests: all that came whole. open, most_open: those not answered yet, now and at most. times: by question.
    """

    def __init__(self, answer: Callable[[Request], Answer] = well, latency_s: float = 0.0) -> None:
        self.answer, self.latency_s = answer, latency_s
        self.requests = self.open = self.most_open = 0
        self.times: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keep_bodies = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "TeacherServer":
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.search(rb"content-length: *(\d+)", head.lower())[1])
                body = await reader.readexactly(length)
                if not await self._answer(body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, content: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        digest = hashlib.sha256(content).hexdigest()
        self.times[digest] += 1
        self.requests += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            request = Request(json.loads(content), self.times[digest])
            if self.keep_bodies:
                self.bodies.append(request.body)
            answer = self.answer(request)
            await asyncio.sleep(self.latency_s + answer.delay_s)
            body = _completion(answer) if answer.body is None else answer.body
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
            lines = [f"HTTP/1.1 {answer.status} Scripted", *(f"{key}: {value}" for key, value in headers.items())]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: 10 if answer.hang_up else None])
            await writer.drain()
        finally:
            self.open -= 1
        return not answer.hang_up


def _completion(answer: Answer) -> bytes:
    if answer.status != 200:
        return json.dumps({"error": {"message": answer.content or "scripted", "code": None}}).encode()
    message = {"role": "assistant", "content": answer.content}
    completion: dict[str, Any] = {"id": "c", "object": "chat.completion", "created": 0, "model": "scripted"}
    completion["choices"] = [{"index": 0, "message": message, "finish_reason": answer.finish}]
    if answer.usage:
        tokens = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        completion["usage"] = {**tokens, "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS}
    return json.dumps(completion).encode()
