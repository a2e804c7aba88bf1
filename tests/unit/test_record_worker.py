"""A worker of `parallel_map` at its records, in this process: only who it says things to is not the real one."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from gpu_launcher.executors.record_worker import MOST_TOGETHER, Results, Work, _Calls
from gpu_launcher.processes import pickling


class Said:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.results: list[Results] = []

    def say(self, what: Any) -> None:
        self.results.append(what)


class LateError(BaseException):
    """A signal has come."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def same(record: int) -> int:
    return record


def test_what_a_signals_handler_raises_fails_one_record_and_shifts_no_other(alarm: None) -> None:
    """Python may call the handler after the function has returned, and its result has been taken."""
    dice = random.Random(1)
    records = list(range(5000))
    work = Work(100, pickling.dump(records))
    noted = 0
    for _ in range(10_000):
        said = Said()
        calls = _Calls(said, memoryview(bytearray(8)).cast("q"), 0, same, ())  # type: ignore[arg-type]
        calls._pace = 1e-6
        try:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.0004))
            calls.do(work)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except LateError:
            continue  # between records: that ends the worker
        values: list[Any] = []
        failed: set[int] = set()
        for results in said.results:
            assert results.first == 100 + len(values)
            failed.update(len(values) + position for position, _ in results.failures)
            values += pickling.load(results.values)
            assert len(values) == results.first + results.count - 100
        assert values == [None if number in failed else number for number in records]
        noted += len(failed)
        if noted == 50:
            return
    raise AssertionError(f"only {noted} were interrupted")


def test_where_it_is_can_be_read_from_outside() -> None:
    at = memoryview(bytearray(8)).cast("q")
    seen = []

    def look(record: int) -> None:
        first, together = divmod(at[0], MOST_TOGETHER + 1)
        assert first <= record < first + together
        seen.append(together)

    calls = _Calls(Said(), at, 0, look, ())  # type: ignore[arg-type]
    calls._pace = 1e-6
    calls.do(Work(7, pickling.dump(list(range(7, 507)))))
    assert seen[0] == MOST_TOGETHER
    assert at[0] == -1
