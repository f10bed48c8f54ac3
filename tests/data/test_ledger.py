"""The ledger: replies paid for once, and a budget that several threads and processes cannot overrun."""

import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coreseg.data.build.ledger import Ledger, Reply, Spent
from coreseg.errors import DataError

REPLY = Reply("Seen.", "stop", 10, 5, 0.25)


def test_a_reply_is_found_again_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "cache")
    assert first.find("k") is None and first.dearest("m") is None
    assert first.reserve(1.0)
    assert first.record("k", "m", REPLY, 1.0) == REPLY
    for ledger in (first, Ledger(tmp_path / "cache"), pickle.loads(pickle.dumps(first))):
        assert ledger.find("k") == REPLY
        assert ledger.dearest("m") == 0.25
        assert ledger.spent() == Spent(0.25, 0.0)


def test_of_two_replies_under_one_key_the_first_stays_and_both_are_paid(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for text in ("first", "second"):
        assert ledger.reserve(1.0)
        kept = ledger.record("k", "m", Reply(text, "stop", 1, 1, 0.5), 1.0)
        assert kept.text == "first"
    assert ledger.spent().paid == 1.0


def test_the_dearest_reply_is_remembered_by_model(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, (model, cost) in enumerate((("a", 0.1), ("a", 0.3), ("a", 0.2), ("b", 0.5))):
        ledger.reserve(1.0)
        ledger.record(str(number), model, Reply("", "", 1, 1, cost), 1.0)
    assert (ledger.dearest("a"), ledger.dearest("b"), ledger.dearest("c")) == (0.3, 0.5, None)


def test_money_is_taken_before_sending_and_settled_after(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, max_cost=1.0)
    assert ledger.reserve(0.6) and not ledger.reserve(0.5)
    assert ledger.open_requests == 1
    ledger.release(0.6)
    assert ledger.reserve(0.5) and ledger.reserve(0.5) and not ledger.reserve(0.01)
    ledger.record("k", "m", REPLY, 0.5)
    ledger.abandon()
    assert (ledger.open_requests, ledger.ended_requests) == (0, 3)
    assert ledger.spent() == Spent(0.25, 0.5)
    assert ledger.reserve(0.25) and not ledger.reserve(0.01)
    assert Ledger(tmp_path, math.inf).reserve(1e9)


def test_threads_do_not_overrun_the_budget(tmp_path: Path) -> None:
    ledger, taken = Ledger(tmp_path, max_cost=10.0), []

    def take() -> None:
        taken.extend(ledger.reserve(0.1) for _ in range(30))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 100 or sum(taken) == 99  # sums of tenths are not exact
    assert ledger.spent().unanswered <= 10.0


def test_processes_share_one_budget(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from coreseg.data.build.ledger import Ledger, Reply\n"
        "ledger = Ledger(Path(sys.argv[1]), 1.0); reply = Reply('x', 'stop', 1, 1, 1 / 64)\n"
        "print(sum(ledger.reserve(1 / 32) and bool(ledger.record(f'{sys.argv[2]}{n}', 'm', reply, 1 / 32)) "
        "for n in range(60)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    counts = [int(process.communicate(timeout=60)[0]) for process in running]
    # With one request open elsewhere there is no room for the last.
    assert 62 <= sum(counts) <= 63
    assert Ledger(tmp_path).spent().paid == sum(counts) / 64


def test_a_process_killed_while_it_writes_loses_no_reply_it_was_told_is_kept(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from coreseg.data.build.ledger import Ledger, Reply\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for n in range(10**6):\n"
        "    ledger.reserve(1.0); ledger.record(str(n), 'm', Reply('x' * 500, 'stop', 1, 1, 0.5), 1.0)\n"
        "    print(n, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        told = [int(running.stdout.readline()) for _ in range(50)][-1]
        running.kill()
        told = max([told, *map(int, running.stdout.read().split("\n")[:-1])])
    ledger = Ledger(tmp_path)
    assert all(ledger.find(str(n)) for n in range(told + 1))
    spent = ledger.spent()
    assert spent.paid in (0.5 * (told + 1), 0.5 * (told + 2))
    # What was open when it died may have been charged.
    assert spent.unanswered in (0.0, 1.0)


def test_what_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: the cache of replies cannot be used"):
        Ledger(tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "replies.sqlite").write_text("no database" * 99)
    with pytest.raises(DataError, match="not a database"):
        Ledger(tmp_path / "bad")
    ledger = Ledger(tmp_path / "full")
    ledger._database.execute("PRAGMA max_page_count = 1")
    assert ledger.reserve(1.0)
    with pytest.raises(DataError, match="full"):
        ledger.record("k", "m", Reply("x" * 10**6, "stop", 1, 1, 0.1), 1.0)
    assert ledger.find("k") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be used"):
        Ledger(tmp_path / "cache")
