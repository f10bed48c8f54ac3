"""The ledger: every reply that was paid for, and the money that replies and open requests have taken.

One SQLite file in a folder. Our choice against a file of JSON lines: a budget that several requests and processes
draw on needs "is there room, then take it" as one step, and a reply and its price must land together or not at all.
SQLite's write-ahead log gives both, also to a process that is killed, and keeps nothing in memory. It wants a disk of
this machine, as file locks on network drives do not hold.
"""

import math
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreseg.errors import DataError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dearest (model TEXT PRIMARY KEY, cost REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS purse (id INTEGER PRIMARY KEY CHECK (id = 0), taken REAL NOT NULL, paid REAL NOT NULL);
INSERT OR IGNORE INTO purse VALUES (0, 0.0, 0.0);
"""


@dataclass(frozen=True)
class Reply:
    """What an endpoint wrote. `finish` is its own word for why it stopped; `cost` is in the currency of the prices."""

    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    cost: float


@dataclass(frozen=True)
class Spent:
    """Money by what became of it.

    paid: for replies that are kept. unanswered: held back for requests without a reply, which may have been charged:
    those in flight, those that timed out, and those that were in flight when a process was killed.
    """

    paid: float
    unanswered: float


class Ledger:
    """Open (or begin) the ledger in `folder`; `max_cost` limits all that it has ever paid for, earlier runs included.

    Safe against kill -9 at any moment, and may be shared by threads and by processes of one machine. It can be
    pickled: the copy opens the same file. Raises DataError where the file cannot be read or written.
    """

    def __init__(self, folder: Path, max_cost: float = math.inf) -> None:
        self.folder, self.max_cost = folder, max_cost
        self.open_requests = self.ended_requests = 0
        self._lock = threading.Lock()
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "replies.sqlite"
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            # Every commit reaches the disk: a reply that was paid for survives a power cut too.
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)

    def __reduce__(self) -> tuple[type["Ledger"], tuple[Path, float]]:
        return Ledger, (self.folder, self.max_cost)

    def find(self, key: str) -> Reply | None:
        """The reply under a key, or None."""
        row = self._row(f"SELECT {_REPLY} FROM replies WHERE key = ?", key)
        return Reply(*row) if row else None

    def dearest(self, model: str) -> float | None:
        """What the dearest reply of a model has cost; None where it has not replied yet."""
        row = self._row("SELECT cost FROM dearest WHERE model = ?", model)
        return float(row[0]) if row else None

    def spent(self) -> Spent:
        """All money taken so far, by every run that used this ledger."""
        taken, paid = self._row("SELECT taken, paid FROM purse")
        # Both are sums of many small numbers: what is left between them may be a hair.
        return Spent(paid, taken - paid if taken - paid > 1e-9 else 0.0)

    def reserve(self, cost: float) -> bool:
        """Take so much for a request that is about to be sent; false, and nothing taken, where the budget lacks room.

        Ends with `release`, `record` or `abandon`.
        """
        with self._changing() as database:
            taken = database.execute(
                "UPDATE purse SET taken = taken + ? WHERE taken + ? <= ?", (cost, cost, self.max_cost)
            )
            if taken.rowcount:
                self.open_requests += 1
        return bool(taken.rowcount)

    def release(self, reserved: float) -> None:
        """Give back what was taken for a request that was not charged."""
        with self._changing() as database:
            database.execute("UPDATE purse SET taken = taken - ?", (reserved,))
            self._end()

    def abandon(self) -> None:
        """End a request that has no reply and may have been charged: what was taken for it stays taken."""
        with self._changing():
            self._end()

    def record(self, key: str, model: str, reply: Reply, reserved: float) -> Reply:
        """Keep a reply, with its cost in place of what was taken for it; gives what is now kept under the key.

        That is an earlier one where two requests of the same key were in flight at once; both are paid.
        """
        with self._changing() as database:
            database.execute(
                f"INSERT OR IGNORE INTO replies (key, model, {_REPLY}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (key, model, reply.text, reply.finish, reply.input_tokens, reply.output_tokens, reply.cost),
            )
            database.execute(
                "INSERT INTO dearest VALUES (?, ?) ON CONFLICT (model) DO UPDATE SET cost = max(cost, excluded.cost)",
                (model, reply.cost),
            )
            database.execute(
                "UPDATE purse SET taken = taken - ? + ?, paid = paid + ?", (reserved, reply.cost, reply.cost)
            )
            self._end()
            row = database.execute(f"SELECT {_REPLY} FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(*row)

    def _end(self) -> None:
        # In this order: who sees that none is open sees that one has ended.
        self.ended_requests += 1
        self.open_requests -= 1

    def _row(self, question: str, *values: str) -> Any:
        with self._told(), self._lock:
            return self._database.execute(question, values).fetchone()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone: all of it or nothing."""
        with self._told(), self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise DataError(
                f"{self.folder}: the cache of replies cannot be used ({error}). Check space and permissions, or name "
                "another folder as `cache`."
            ) from error


_REPLY = "text, finish, input_tokens, output_tokens, cost"
