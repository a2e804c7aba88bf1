"""A worker of `parallel_map` at its records, in this process: only who it says things to is not the real one."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_launcher.executors.record_worker import MAX_TOGETHER, Positions, RecordResults, Work, _Calls
from gpu_launcher.processes import pickling


class Said:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.results: list[RecordResults] = []

    def say(self, what: Any) -> None:
        self.results.append(what)


def quick_calls(function: Callable[[int], Any], said: Any, at: memoryview) -> _Calls:
    """After a chunk of records that took a microsecond each."""
    calls = _Calls(said, at, 0, function, ())
    calls._pace = 1e-6
    return calls


def same(record: int) -> int:
    return record


def test_what_a_signals_handler_raises_fails_one_record_and_shifts_no_other(alarm: type[BaseException]) -> None:
    """Python may call the handler after the function has returned, and its result has been taken."""
    dice = random.Random(1)
    records = list(range(5000))
    work = Work(100, pickling.dump(records))
    noted = 0
    for _ in range(10_000):
        said = Said()
        calls = quick_calls(same, said, memoryview(bytearray(8)).cast("q"))
        try:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.0004))
            calls.do(work)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except alarm:
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


def test_where_it_is_can_be_read_from_outside(tmp_path: Path) -> None:
    positions = Positions(tmp_path / "positions", 1, new=True)
    seen = []

    def look(record: int) -> None:
        begun = positions.begun(0)
        assert record in begun
        seen.append(len(begun))

    quick_calls(look, Said(), positions.at).do(Work(7, pickling.dump(list(range(7, 507)))))
    assert seen[0] == MAX_TOGETHER
    assert not positions.begun(0)
    positions.close()
