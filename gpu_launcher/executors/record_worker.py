"""A worker of `parallel_map`: sets itself up once, and then works on the records that it is dealt.

The messages to and from a worker stand at the top. A worker notes which record it begins in a file that is mapped into
memory, and that can be read whatever ends the worker. The note, and looking at the clock, take as long as a very quick
record. So several quick records are begun with one note.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
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
"""Seconds after which results are sent even if the chunk is not done. A worker that dies loses as much work."""
GROUP_SECONDS = 5e-5
"""Maximum duration of records that are begun together, as estimated from the chunk before."""
MAX_TOGETHER = 32
"""Maximum number of records begun together. If they are slow after all, the first results wait for the last record."""
SLOW_SECONDS = 1e-3
"""Duration of a group after which the next record is begun alone: records are slow, or the process waits for a CPU."""
NO_RECORD = -1


class Positions:
    """The records that each worker has begun, by the worker's slot: a file mapped into memory."""

    def __init__(self, path: Path, slots: int, *, new: bool = False) -> None:
        """Open the file, or create it if it is to be `new`, for this number of slots."""
        flags = os.O_RDWR | os.O_CLOEXEC | ((os.O_CREAT | os.O_EXCL) if new else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if new:
                # Allocate all of it now: on a full disk, writing into a hole would kill the writer with SIGBUS.
                os.posix_fallocate(descriptor, 0, slots * 8)
            self._map = mmap.mmap(descriptor, slots * 8)
        finally:
            os.close(descriptor)
        self.at = memoryview(self._map).cast("q")

    def begun(self, slot: int) -> range:
        """Return the indices of the records that the slot's worker has begun: one, several quick ones, or none."""
        first, together = divmod(self.at[slot], MAX_TOGETHER + 1)
        return range(first, first + together) if first >= 0 else range(0)

    def close(self) -> None:
        self.at.release()
        self._map.close()


# Messages to a worker.


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """Where a worker notes its position. A worker on another machine gets None: the head cannot read it there."""

    positions: str
    slots: int
    slot: int


@dataclass(frozen=True, slots=True)
class Work:
    """Records to work on, in order."""

    first: int
    """Index of the first record."""
    records: bytes
    """The list of records, pickled."""


@dataclass(frozen=True, slots=True)
class NoMoreWork:
    """There is no more work. The worker ends."""


# Messages from a worker.


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has set itself up."""


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """`setup` raised, and the worker ends."""

    failure: PortableException


@dataclass(frozen=True, slots=True)
class RecordResults:
    """The results of the next records that the worker was dealt."""

    first: int
    """Index of the first record."""
    count: int
    values: bytes
    """The list of values, pickled. The value of a record that failed is None."""
    failures: tuple[tuple[int, PortableException], ...]
    """Failures, by position in the list."""
    seconds: float
    """Time that the records took, with pickling."""


@dataclass(frozen=True, slots=True)
class UnreadableRecords:
    """The records of a chunk could not be unpickled. None of them was begun."""

    first: int
    failure: PortableException


class RecordWorker:
    """The program that runs in each worker. See `gpu_launcher.processes.worker.Program`."""

    def __init__(self, request: Request, setup: Callable[[], Any] | None, function: Callable[..., Any]) -> None:
        self._request = request
        self._setup = setup
        self._function = function

    def __reduce__(self) -> Any:
        dumped = [
            _dump_for_spawn(name, thing) for name, thing in (("setup", self._setup), ("function", self._function))
        ]
        return _SpawnedRecordWorker, (self._request, *dumped)

    def __call__(self, number: int, spec: WorkerSlot | None, context: JobContext) -> Report:
        context.prepared(self._request, None)
        context.wait()
        if spec is None:
            # A node that ends interrupts its jobs. As an exception, that would be the result of a record.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            setup, function = self._program()
            objects = _objects(setup)
        except BaseException as error:
            context.say(SetupFailed(_portable(error)))
            return Report(False, f"raised {type(error).__name__}: {error}", b"")
        at, slot = memoryview(bytearray(8)).cast("q"), 0
        if spec is not None:
            try:
                at, slot = Positions(Path(spec.positions), spec.slots).at, spec.slot
            except FileNotFoundError:
                os._exit(1)  # the program has ended, because its directory is gone
        at[slot] = NO_RECORD
        context.say(Ready())
        calls = _Calls(context, at, slot, function, objects)
        while isinstance(work := context.hear(), Work):
            calls.do(work)
        return Report(True, None, b"")

    def _program(self) -> tuple[Callable[[], Any] | None, Callable[..., Any]]:
        return self._setup, self._function


class _SpawnedRecordWorker(RecordWorker):
    """The same program in a fresh interpreter. It imports the user's modules late, so that the user sees errors."""

    def _program(self) -> tuple[Callable[[], Any] | None, Callable[..., Any]]:
        return pickling.load(self._setup), pickling.load(self._function)  # type: ignore[arg-type]


def _dump_for_spawn(name: str, thing: object) -> bytes:
    try:
        return pickling.dump(pickling.Afresh(thing))
    except Exception as error:  # user objects may raise anything when they are pickled
        raise OptionError(
            name,
            f"workers start in fresh interpreters (spawn) or on other machines, to which {thing!r} cannot be sent: "
            f"{type(error).__name__}: {error}{found_at({name: thing})}. Remedy: build in `setup` what cannot "
            'be pickled instead of referring to it, or run on this machine with start_method="fork".',
        ) from error


def _objects(setup: Callable[[], Any] | None) -> tuple[Any, ...]:
    """Call `setup`, and return its result as arguments for the function."""
    made = None if setup is None else setup()
    if made is None:
        return ()
    return made if type(made) is tuple else (made,)  # a named tuple is one object


class _Calls:
    """Calls the function on the records of one chunk after another."""

    def __init__(
        self, context: JobContext, at: memoryview, slot: int, function: Callable[..., Any], objects: tuple[Any, ...]
    ) -> None:
        self._context = context
        self._at = at
        self._slot = slot
        # If there are no other arguments, calling the function directly is a third cheaper.
        self._call: Callable[[Any], Any] = (lambda record: function(record, *objects)) if objects else function
        self._pace = math.inf
        """Seconds per record of the chunk before."""
        self._together = 1
        """How many records are begun with the next note."""

    def do(self, work: Work) -> None:
        """Call the function on each record, and send the results at least every `FLUSH_SECONDS` seconds."""
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
        """Call the function on `records` from position `begin`, until their end or the time `until`.

        At most `most` records are begun with one note. `first` is the index of the first of `records`. Returns the
        values, and the failures by position among the values.
        """
        values: list[Any] = []
        failures: dict[int, PortableException] = {}
        # Attributes are looked up once, because records may take less than a microsecond.
        at, slot, call, append, clock = self._at, self._slot, self._call, values.append, time.perf_counter
        position, now = begin, clock()
        while True:
            group = records[position : position + self._together]
            at[slot] = (first + position) * (MAX_TOGETHER + 1) + self._together
            try:
                for record in group:
                    append(call(record))
            except BaseException as error:
                # The first record without a value has failed. If a signal handler raises when all records of the group
                # have values, it is the last one.
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
            error.__context__ = None  # the same error, from pickling all values at once
            failures[position] = _portable(problem)
            values[position] = None


def _portable(error: BaseException) -> PortableException:
    return PortableException.of(error, pickling.main_namespace())
