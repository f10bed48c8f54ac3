"""What every stage on a data set's text shares: rows in, outcomes out, in order, whatever runs at once in between.

A stage is a function from rows to outcomes that writes nothing and keeps nothing between rows, so a loop over a whole
set may call it, or a cluster on one batch after another.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coreseg.types import Sample

PASSES_AT = 0.8
"""The judge's score from which a text passes. Source: the paper."""


@dataclass(frozen=True)
class Fault:
    """Why a text, or a row, may not stay as it is. `kind` is what it is counted as, `text` is for a reader."""

    kind: str
    text: str


@dataclass(frozen=True)
class Scores:
    """The judge's scores of a row's text, each in [0, 1]."""

    normal_anatomy: float
    lesion: float
    reasoning: float

    @property
    def score(self) -> float:
        """The weighted mean. Source: the paper, 0.3 N + 0.3 L + 0.4 R."""
        return 0.3 * self.normal_anatomy + 0.3 * self.lesion + 0.4 * self.reasoning

    @property
    def passes(self) -> bool:
        """Whether the score reaches `PASSES_AT`; a hair of rounding does not count."""
        return self.score >= PASSES_AT - 1e-9

    def __str__(self) -> str:
        parts = f"normal anatomy {self.normal_anatomy:.2f}, lesion {self.lesion:.2f}, reasoning {self.reasoning:.2f}"
        return f"score {self.score:.2f} ({parts})"


@dataclass(frozen=True)
class Outcome:
    """What a stage made of one row.

    sample: the row as it may stay, or as it was last. faults: why it may not stay; empty where it may. scores: the
    judge's, of that text. attempts: how often it was written. met: what was wrong with the texts on the way, by kind.
    traffic: what its requests came to: "requests", "cached", "retries", tokens, and every kind of failure.
    """

    sample: Sample
    faults: tuple[Fault, ...] = ()
    scores: Scores | None = None
    attempts: int = 0
    met: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)


def stream(
    work: Callable[[Sample], Awaitable[Outcome]],
    samples: Iterable[Sample],
    window: int,
    closing: Sequence[Callable[[], Awaitable[None]]],
) -> Generator[Outcome]:
    """The outcomes of `work` on each row, in order, with at most `window` rows begun and not yet handed out.

    An event loop in a thread of its own does the work, so it goes on while the caller uses what came, and callers may
    have a loop themselves. Whatever ends the iteration, rows not finished are dropped, requests that are out are
    waited for, and `closing` is called.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    begun: deque[Any] = deque()
    try:
        for sample in samples:
            begun.append(asyncio.run_coroutine_threadsafe(_awaited(work, sample), loop))
            if len(begun) >= window:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for row in begun:
            row.cancel()
        asyncio.run_coroutine_threadsafe(_wind_down(closing), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _awaited(work: Callable[[Sample], Awaitable[Outcome]], sample: Sample) -> Outcome:
    return await work(sample)


async def _wind_down(closing: Sequence[Callable[[], Awaitable[None]]]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
    for close in closing:
        await close()
    await asyncio.get_running_loop().shutdown_default_executor()
