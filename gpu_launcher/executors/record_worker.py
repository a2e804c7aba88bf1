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
from pathlib import Path
from typing import Any

from gpu_launcher.errors import OptionError, UnpicklableError
from gpu_launcher.executors.transport import unreturnable
from gpu_launcher.model import Request
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, users_part
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.unpicklable import found_at
from gpu_launcher.processes.worker import JobContext

FLUSH_SECONDS = 0.05
"""Seconds after which the results so far are sent, though the chunk is not done. As much is lost when a worker dies."""
GROUP_SECONDS = 5e-5
"""Seconds that records which are begun together take, going by the chunk before."""
MAX_TOGETHER = 32
"""Records. If they are slow after all, the results of the first ones wait for so many, and are lost with them."""
SLOW_SECONDS = 1e-3
"""Seconds after which the next record is begun alone. Or the process has waited for the processor."""
NO_RECORD = -1


class Positions:
    """Which record each worker is at, by the worker's slot."""

    def __init__(self, path: Path, slots: int, *, new: bool = False) -> None:
        """Open what somebody else made, or make it, `new`, for so many slots."""
        flags = os.O_RDWR | os.O_CLOEXEC | ((os.O_CREAT | os.O_EXCL) if new else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if new:
                # All of it now: on a full disk, writing into a hole of it would kill the writer with SIGBUS.
                os.posix_fallocate(descriptor, 0, slots * 8)
            self._map = mmap.mmap(descriptor, slots * 8)
        finally:
            os.close(descriptor)
        self.at = memoryview(self._map).cast("q")

    def begun(self, slot: int) -> range:
        """The indices of the records that its worker is at: of one, of several that are quick, or of none."""
        first, together = divmod(self.at[slot], MAX_TOGETHER + 1)
        return range(first, first + together) if first >= 0 else range(0)

    def close(self) -> None:
        self.at.release()
        self._map.close()


# What a worker is told.


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """The first thing: where it notes its position."""

    positions: str
    slots: int
    slot: int


@dataclass(frozen=True, slots=True)
class Work:
    """Records to work on, in order."""

    first: int
    """Index of the first one."""
    records: bytes
    """A list, pickled."""


@dataclass(frozen=True, slots=True)
class NoMoreWork:
    """There is no more for it to do."""


# What it says.


@dataclass(frozen=True, slots=True)
class Ready:
    """It has set itself up."""


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """`setup` raised, and the worker ends."""

    failure: PortableException


@dataclass(frozen=True, slots=True)
class RecordResults:
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
class UnreadableRecords:
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

    def __call__(self, number: int, spec: WorkerSlot, context: JobContext) -> Report:
        context.prepared(self._request, None)
        context.wait()
        try:
            setup, function = self._program()
            objects = _objects(setup)
        except BaseException as error:
            context.say(SetupFailed(_portable(error)))
            return Report(False, f"raised {type(error).__name__}: {error}", b"")
        try:
            positions = Positions(Path(spec.positions), spec.slots)
        except FileNotFoundError:
            os._exit(1)  # the directory goes with the program, and nobody is left to be told anything
        positions.at[spec.slot] = NO_RECORD
        context.say(Ready())
        calls = _Calls(context, positions.at, spec.slot, function, objects)
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
        self, context: JobContext, at: memoryview, slot: int, function: Callable[..., Any], objects: tuple[Any, ...]
    ) -> None:
        self._context = context
        self._at = at
        self._slot = slot
        # With nothing else to hand over, calls are a third cheaper without the stars.
        self._call: Callable[[Any], Any] = (lambda record: function(record, *objects)) if objects else function
        self._pace = math.inf
        """Seconds per record of the chunk before."""
        self._together = 1
        """How many records are begun next with one note."""

    def do(self, work: Work) -> None:
        """Call the function on each record, and send what comes of it at least every `FLUSH_SECONDS` seconds."""
        began = time.perf_counter()
        try:
            records = pickling.load(work.records)
        except Exception as error:
            self._context.say(UnreadableRecords(work.first, _portable(error)))
            return
        most = self._together = max(1, min(MAX_TOGETHER, int(GROUP_SECONDS / self._pace)))
        start = time.perf_counter()
        sent = 0
        while sent < len(records):
            values, failures = self._call_some(records, sent, work.first, most, began + FLUSH_SECONDS)
            self._send(work.first + sent, values, failures, began)
            sent += len(values)
            began = time.perf_counter()
        self._pace = max(began - start, 1e-9) / len(records)
        self._at[self._slot] = NO_RECORD

    def _call_some(
        self, records: list[Any], begin: int, first: int, most: int, until: float
    ) -> tuple[list[Any], dict[int, PortableException]]:
        """Go through `records` from position `begin`, at most `most` with one note, to their end or a point in time.

        `first` is the index of the first of `records`. Returns the values, and the failures by position among these.
        """
        values: list[Any] = []
        failures: dict[int, PortableException] = {}
        # Looked up once: records may take less than a microsecond.
        at, slot, call, append, clock = self._at, self._slot, self._call, values.append, time.perf_counter
        position, now = begin, clock()
        while True:
            group = records[position : position + self._together]
            at[slot] = (first + position) * (MAX_TOGETHER + 1) + self._together
            try:
                for record in group:
                    append(call(record))
            except BaseException as error:
                # The first without a value. A signal's handler may raise when all of the group have one.
                failed = min(len(values), position - begin + len(group) - 1)
                values[failed:] = [None]
                failures[failed] = _portable(error)
            position = begin + len(values)
            before, now = now, clock()
            self._together = 1 if now - before > SLOW_SECONDS else min(2 * self._together, most)
            if position == len(records) or now >= until:
                return values, failures

    def _send(self, first: int, values: list[Any], failures: dict[int, PortableException], began: float) -> None:
        known = pickling.main_namespace()
        try:
            dumped = pickling.dump(values, known)
        except Exception:
            _replace_unpicklable(first, values, failures)
            dumped = pickling.dump(values, known)
        in_order = tuple(sorted(failures.items()))
        self._context.say(RecordResults(first, len(values), dumped, in_order, time.perf_counter() - began))


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
