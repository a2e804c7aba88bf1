"""A worker of `parallel_map`: sets itself up once, and then works on the records it is dealt.

What it is told, and what it says, is at the top. It notes which record it is at in a file that is mapped into memory,
which is there to be read whatever ends it. That, and looking at the clock, takes as long as a very quick record does:
several of those are begun with one note.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gpu_launcher.errors import OptionError, UnpicklableError
from gpu_launcher.executors.packing import unreturnable
from gpu_launcher.model import Request
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, users_part
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.unpicklable import found_at
from gpu_launcher.processes.worker import JobContext

FLUSH = 0.05
"""Seconds after which the results so far are sent, though the chunk is not done. As much is lost when a worker dies."""
TOGETHER = 5e-5
"""Seconds that records which are begun together take, going by the chunk before."""
MOST_TOGETHER = 32
"""Records. If they are slow after all, the results of the first ones wait for so many, and are lost with them."""
SLOW = 1e-3
"""Seconds after which the next record is begun alone. Or the process has waited for the processor."""
NO_RECORD = -1


class Positions:
    """Which record each worker is at, by the worker's seat."""

    def __init__(self, path: Path, seats: int, *, new: bool = False) -> None:
        """Open what somebody else made, or make it, `new`, for so many seats."""
        flags = os.O_RDWR | os.O_CLOEXEC | ((os.O_CREAT | os.O_EXCL) if new else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if new:
                # All of it now: on a full disk, writing into a hole of it would kill the writer with SIGBUS.
                os.posix_fallocate(descriptor, 0, seats * 8)
            self._map = mmap.mmap(descriptor, seats * 8)
        finally:
            os.close(descriptor)
        self.at = memoryview(self._map).cast("q")

    def begun(self, seat: int) -> range:
        """The indices of the records that its worker is at: of one, of several that are quick, or of none."""
        first, together = divmod(self.at[seat], MOST_TOGETHER + 1)
        return range(first, first + together) if first >= 0 else range(0)

    def close(self) -> None:
        self.at.release()
        self._map.close()


# What a worker is told.


@dataclass(frozen=True, slots=True)
class Seat:
    """The first thing: where it notes its position."""

    positions: str
    seats: int
    seat: int


@dataclass(frozen=True, slots=True)
class Work:
    """Records to work on, in order."""

    first: int
    """Index of the first one."""
    records: bytes
    """A list, pickled."""


@dataclass(frozen=True, slots=True)
class Stop:
    """There is no more for it to do."""


# What it says.


@dataclass(frozen=True, slots=True)
class Ready:
    """It has set itself up."""


@dataclass(frozen=True, slots=True)
class NotReady:
    """`setup` raised, and the worker ends."""

    failure: PortableException


@dataclass(frozen=True, slots=True)
class Results:
    """What came of the next records that it was dealt."""

    first: int
    count: int
    values: bytes
    """A list, pickled, in which a record that failed has None."""
    failures: tuple[tuple[int, PortableException], ...]
    """Of those, by position in the list."""
    seconds: float
    """What they took, pickling included."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Records that it was dealt could not be unpickled; none of them was begun."""

    first: int
    failure: PortableException


class RecordWorker:
    """What runs in each worker. See `gpu_launcher.processes.worker.Program`."""

    def __init__(self, request: Request, setup: Callable[[], Any] | None, function: Callable[..., Any]) -> None:
        self._request = request
        self._setup = setup
        self._function = function

    def __reduce__(self) -> Any:
        dumped = [
            _dump_for_spawn(name, thing) for name, thing in (("setup", self._setup), ("function", self._function))
        ]
        return _SpawnedRecordWorker, (self._request, *dumped)

    def __call__(self, number: int, spec: Seat, context: JobContext) -> Report:
        context.prepared(self._request, None)
        context.wait()
        try:
            setup, function = self._program()
            objects = _objects(setup)
        except BaseException as error:
            context.say(NotReady(_portable(error)))
            return Report(False, f"raised {type(error).__name__}: {error}", b"")
        try:
            positions = Positions(Path(spec.positions), spec.seats)
        except FileNotFoundError:
            os._exit(1)  # the directory goes with the program, and nobody is left to be told anything
        positions.at[spec.seat] = NO_RECORD
        context.say(Ready())
        calls = _Calls(context, positions.at, spec.seat, function, objects)
        while isinstance(work := context.hear(), Work):
            calls.do(work)
        return Report(True, None, b"")

    def _program(self) -> tuple[Callable[[], Any] | None, Callable[..., Any]]:
        return self._setup, self._function


class _SpawnedRecordWorker(RecordWorker):
    """The same in a fresh interpreter. The user's modules are imported late, where an error is the user's to see."""

    def _program(self) -> tuple[Callable[[], Any] | None, Callable[..., Any]]:
        return pickling.load(self._setup), pickling.load(self._function)  # type: ignore[arg-type]


def _dump_for_spawn(name: str, thing: object) -> bytes:
    try:
        return pickling.dump(pickling.Afresh(thing))
    except Exception as error:  # whatever the user's objects raise when they are pickled
        raise OptionError(
            name,
            f"workers start in fresh interpreters (spawn), to which {thing!r} cannot be sent: "
            f"{type(error).__name__}: {error}{found_at({name: thing})}. Remedy: build in `setup` what cannot "
            'be pickled instead of referring to it, or use start_method="fork".',
        ) from error


def _objects(setup: Callable[[], Any] | None) -> tuple[Any, ...]:
    """What `setup` returns, as arguments."""
    made = None if setup is None else setup()
    if made is None:
        return ()
    return made if type(made) is tuple else (made,)  # a named tuple is one object


class _Calls:
    """Works on what is dealt, a chunk at a time."""

    def __init__(
        self, context: JobContext, at: memoryview, seat: int, function: Callable[..., Any], objects: tuple[Any, ...]
    ) -> None:
        self._context = context
        self._at = at
        self._seat = seat
        # With nothing else to hand over, calls are a third cheaper without the stars.
        self._call: Callable[[Any], Any] = (lambda record: function(record, *objects)) if objects else function
        self._pace = math.inf
        """Seconds per record of the chunk before."""

    def do(self, work: Work) -> None:
        began = time.perf_counter()
        try:
            records = pickling.load(work.records)
        except Exception as error:
            self._context.say(Unreadable(work.first, _portable(error)))
            return
        first = work.first
        values: list[Any] = []
        failures: dict[int, PortableException] = {}
        # Looked up once: records may take less than a microsecond.
        at, seat, call, clock = self._at, self._seat, self._call, time.perf_counter
        flush_at = began + FLUSH
        source, index, end = iter(records), first, first + len(records)
        most = together = max(1, min(MOST_TOGETHER, int(TOGETHER / self._pace)))
        append = values.append
        start = now = clock()
        while index < end:
            at[seat] = index * (MOST_TOGETHER + 1) + together
            try:
                for record in islice(source, together):
                    append(call(record))
            except BaseException as error:
                # Of the record that was taken last, though a signal's handler may raise when that has its result.
                failed = end - source.__length_hint__() - 1 - first
                if failed < 0:  # nothing was begun since results were sent
                    raise
                del values[failed:]
                failures[failed] = _portable(error)
                append(None)
            index = first + len(values)
            before, now = now, clock()
            together = 1 if now - before > SLOW else min(2 * together, most)
            if now >= flush_at:
                self._send(first, values, failures, began)
                first, values, failures = index, [], {}
                append = values.append
                began = now = clock()
                flush_at = began + FLUSH
        self._pace = max(clock() - start, 1e-9) / len(records)
        if values:
            self._send(first, values, failures, began)
        at[seat] = NO_RECORD

    def _send(self, first: int, values: list[Any], failures: dict[int, PortableException], began: float) -> None:
        known = pickling.main_namespace()
        try:
            dumped = pickling.dump(values, known)
        except Exception:
            _replace_unpicklable(first, values, failures)
            dumped = pickling.dump(values, known)
        in_order = tuple(sorted(failures.items()))
        self._context.say(Results(first, len(values), dumped, in_order, time.perf_counter() - began))


def _replace_unpicklable(first: int, values: list[Any], failures: dict[int, PortableException]) -> None:
    for position, value in enumerate(values):
        try:
            pickling.dump(value, pickling.main_namespace())
        except Exception as error:
            what = f"the result of records[{first + position}] cannot be sent back"
            problem = UnpicklableError(f"{what}: {unreturnable(value, error)}")
            problem.__cause__ = error.with_traceback(users_part(error.__traceback__))
            error.__context__ = None  # the same, of when all of them were pickled at once
            failures[position] = _portable(problem)
            values[position] = None


def _portable(error: BaseException) -> PortableException:
    return PortableException.of(error, pickling.main_namespace())
