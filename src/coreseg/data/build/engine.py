"""Who runs a stage on a set's rows: this process, or a Ray cluster.

A stage is a function from rows to outcomes (`coreseg.data.build.stage`), so both run the same code. On a cluster rows
go out in batches and outcomes come back in the rows' order; a batch whose machine is lost is given to another one.
Every machine must see the data set; the ledger stays with the one that started the build, which answers the others.

Ray Data deals the batches out, a Ray actor holds the ledger: nothing here schedules anything itself.
"""

import json
import logging
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coreseg.data.build.ledger import Ledger, Reply, Spent
from coreseg.data.build.stage import Outcome
from coreseg.data.store import parse_row
from coreseg.errors import MissingExtraError
from coreseg.types import Sample

BATCH_ROWS = 64
"""Rows that go to a machine at once."""

RowStage = Callable[..., Iterable[Outcome]]
"""Called with the rows, and `ledger` where it has one."""

Work = TypeVar("Work")
Made = TypeVar("Made")


class Here:
    """This process."""

    def outcomes(self, stage: RowStage, samples: Sequence[Sample], ledger: Ledger | None) -> Generator[Outcome]:
        """What the stage makes of each row, in order."""
        yield from stage(samples, **_with(ledger))

    def map(self, function: Callable[[Work], Made], work: Sequence[Work]) -> Iterator[Made]:
        """The function's results, in order."""
        return map(function, work)


class OnRay(Here):
    """The Ray cluster that RAY_ADDRESS names or that was joined before, else one made of this machine.

    Raises MissingExtraError without Ray.
    """

    def outcomes(self, stage: RowStage, samples: Sequence[Sample], ledger: Ledger | None) -> Generator[Outcome]:
        """See `Here`. Batches of rows go out, as many at once as the cluster has processors."""
        ray = _joined()
        shared = None
        if ledger:
            actor = ray.remote(Ledger).remote(ledger.folder.absolute(), ledger.max_cost)
            shared = _SharedLedger(ledger.folder, ledger.max_cost, actor)
        rows = [{"row": json.dumps(asdict(sample))} for sample in samples]
        batches = ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // BATCH_ROWS)))
        outcomes = batches.map_batches(partial(_batch, stage, shared), batch_size=BATCH_ROWS)
        for row in outcomes.iter_rows():
            yield pickle.loads(row["outcome"])

    def map(self, function: Callable[[Work], Made], work: Sequence[Work]) -> Iterator[Made]:
        """See `Here`; each piece of work is a task of one processor."""
        ray = _joined()
        # Ray takes plain functions only, and what comes may be a partial one.
        task = ray.remote(max_retries=-1)(lambda each: function(each))
        for made in [task.remote(each) for each in work]:
            yield ray.get(made)


HERE = Here()
ENGINES = {"here": HERE, "ray": OnRay()}


def require_ray() -> None:
    """Raises MissingExtraError without Ray."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('engine = "ray" needs Ray; in a clone: pip install ".[cluster]"') from error


def _joined() -> Any:
    require_ray()
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, include_dashboard=False)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # ours is there already
    return ray


def _with(ledger: Any) -> dict[str, Any]:
    return {"ledger": ledger} if ledger else {}


def _batch(stage: RowStage, ledger: Any, batch: dict[str, Any]) -> dict[str, list[bytes]]:
    samples = [parse_row(row, "a row that Ray handed on") for row in batch["row"]]
    return {"outcome": [pickle.dumps(outcome) for outcome in stage(samples, **_with(ledger))]}


class _SharedLedger(Ledger):
    """The one ledger of a build, asked from any machine; only the count of open requests is each process's own."""

    def __init__(self, folder: Path, max_cost: float, actor: Any) -> None:
        self.folder, self.max_cost = folder, max_cost
        self.open_requests = self.ended_requests = 0
        self._lock = threading.Lock()
        self._actor = actor

    def __reduce__(self) -> tuple[Any, ...]:
        return _SharedLedger, (self.folder, self.max_cost, self._actor)

    def find(self, key: str) -> Reply | None:
        kept: Reply | None = self._asked("find", key)
        return kept

    def dearest(self, model: str) -> float | None:
        cost: float | None = self._asked("dearest", model)
        return cost

    def spent(self) -> Spent:
        spent: Spent = self._asked("spent")
        return spent

    def reserve(self, cost: float) -> bool:
        taken: bool = self._asked("reserve", cost)
        with self._lock:
            self.open_requests += taken
        return taken

    def release(self, reserved: float) -> None:
        self._asked("release", reserved)
        self._end()

    def abandon(self) -> None:
        self._asked("abandon")
        self._end()

    def record(self, key: str, model: str, reply: Reply, reserved: float) -> Reply:
        kept: Reply = self._asked("record", key, model, reply, reserved)
        self._end()
        return kept

    def _asked(self, name: str, *values: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, name).remote(*values))

    def _end(self) -> None:
        with self._lock:
            super()._end()
