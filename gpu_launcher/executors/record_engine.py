"""The engine of a `parallel_map`: it keeps the workers busy, replaces those that die, and returns results in order.

Theory of operation. There is no thread: everything happens in `_work`, while the caller asks for the next result. A
worker is a job of the node, with a channel to this program. The engine offers a worker when the node wants one and
there is work for it (`_offer`), deals chunks of records to workers that are ready (`_deal`), and reads their results
(`_receive`). The `ChunkScheduler` decides which records come next and puts the results in order.

A worker notes which records it has begun (`Positions`). If it dies, these are suspects and are dealt again one by one,
the others as before. A record at which two workers died has failed. If a worker dies during setup or without a record,
no record is to blame: after two such deaths in a row, workers that die are not replaced (`_do_without`).

Workers on several nodes cannot note their records where this program sees it. If one dies, or its node is lost, all
records of the chunk that it worked on are suspects.
"""

from __future__ import annotations

import math
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from gpu_launcher.errors import NodeDiedError, OptionError, RecordError, SetupError, UnreadableError, WorkerDiedError
from gpu_launcher.executors import record_worker as w
from gpu_launcher.executors.chunk_scheduler import Chunk, ChunkScheduler, RaisedByRecord
from gpu_launcher.executors.process_channels import ProcessChannels
from gpu_launcher.executors.progress import Bar
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import GaveUp, JobStarted, JobWaiting, Notice, Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.node_client import RemoteLoop
from gpu_launcher.jobs.node_messages import Closed, Ended, Message, Opened, Wanted
from gpu_launcher.jobs.notice_log import log, log_event, log_left_behind
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, traceback_of
from gpu_launcher.processes.unpicklable import found_at
from gpu_launcher.wording import count, device_names

if TYPE_CHECKING:
    from gpu_launcher.nodes.group_loop import GroupLoop

END_SECONDS = 10.0
"""Seconds that workers get to end by themselves when there is no more work."""
HANDOUT_SECONDS = 0.002
"""Seconds for which available results are handed out before the engine attends to the workers again."""
MAX_PIECE = 8192
"""Maximum number of results that are handed out at once."""
OVERDUE_SECONDS = 0.25
"""Seconds without results after which a worker gets no chunk ahead."""


class _WorkerState(Enum):
    STARTING = auto()
    """Its process is being prepared, waits for devices, or runs `setup`."""
    READY = auto()
    """It has set itself up and works on records."""
    STOPPED = auto()
    """It was told that there is no more work."""


@dataclass(slots=True)
class _Worker:
    slot: int | None
    where: str = ""
    """Names of its devices."""
    state: _WorkerState = _WorkerState.STARTING
    dealt: deque[Chunk] = field(default_factory=deque)
    """Chunks that it has and whose results are not all known."""
    quick: bool = False
    """Whether it has sent results."""
    heard: float = 0.0
    """When it last sent results, or got a chunk while it had none."""


class RecordEngine:
    """The state of one `parallel_map`, and everything that happens while its next result is asked for."""

    bar: Bar

    def __init__(
        self,
        loop: RemoteLoop | GroupLoop,
        scheduler: ChunkScheduler,
        positions: w.Positions | None,
        most: int,
        *,
        returning: bool,
        capped: str | None = None,
    ) -> None:
        """Prepare to run at most `most` workers, which note their records in `positions`, unless that is None.

        `returning`: whether errors are returned as results. `capped`: a line to log once there are more than `most`
        records.
        """
        self._loop = loop
        self._scheduler = scheduler
        self._positions = positions
        self._slots = [] if positions is None else list(range(most))
        """Free slots for workers."""
        self._most = most
        self._returning = returning
        self._capped = capped
        self._channels = ProcessChannels(loop)
        self._node_poll = select.poll()
        self._node_poll.register(loop.fileno(), select.POLLIN)
        self._workers: dict[int, _Worker] = {}
        self._number = 0
        """Number of the next worker."""
        self._wanted = 0
        """How many more workers the node could start."""
        self._errors = 0
        self._died_starting = 0
        """Number of deaths before a worker was ready, since the last one that became ready."""
        self._died_idle = 0
        """Number of deaths without a record, since the last result."""
        self._newer = 0
        """Number of the first worker that was started after the last counted death.

        The death of an older worker is not counted: several may die at once, for the same reason.
        """
        self._problem: str | None = None
        """How the last worker died."""
        self._fatal: BaseException | None = None
        """The exception that ends the iteration, after the available results have been handed out."""
        self._ending = self._over = False
        """Whether the node was told that there is no more work, and whether its run has ended."""
        self._closed = False
        self._begun = threading.Event()
        """Set when the first result is asked for."""
        self._end = weakref.finalize(self, _end, loop, self._begun)

    # The iteration

    def results(self) -> Generator[Any, None, None]:
        """Yield the results."""
        most, since = 1, 0.0
        self._begun.set()
        try:
            while True:
                took = time.monotonic() - since
                most = max(1, min(MAX_PIECE, int(most * min(8.0, HANDOUT_SECONDS / max(took, 1e-9)))))
                if not self._work():
                    break
                piece = self._scheduler.take(most)
                since = time.monotonic()
                yield from piece
            self._show(last=True)
            if self._fatal is None and self._scheduler.error is None:
                self._finish()
        finally:
            self.close()
        if (error := self._fatal or self._scheduler.error) is not None:
            raise error

    def close(self, *, silently: bool = False) -> None:
        """End everything. `silently`: do not warn if no result was ever asked for."""
        if silently:
            self._begun.set()
        if not self._closed:
            self._closed = True
            self.bar.close()
            self._end()
            for number in self._workers:
                self._channels.close(number)
            if self._positions is not None:
                self._positions.close()

    def _work(self) -> bool:
        """Attend to the workers until there is a result. Returns whether there is one."""
        self._receive(wait=False)
        enough = time.monotonic() + HANDOUT_SECONDS
        while self._fatal is None and (not self._scheduler.ready or time.monotonic() < enough):
            if self._deal() or self._offer():
                self._receive(wait=False)
                continue
            self._stop_idle()
            if self._scheduler.ready or self._scheduler.over:
                break
            self._receive(wait=True)
        self._show()
        return self._scheduler.ready

    def _show(self, *, last: bool = False) -> None:
        ready = sum(worker.state is _WorkerState.READY for worker in self._workers.values())
        self.bar.show(self._scheduler.finished, self._errors, ready, last=last)

    # Dealing

    def _deal(self) -> bool:
        """Deal a chunk to a worker that needs one, if there are both. Returns whether a chunk was taken."""
        ready = [(len(one.dealt), number) for number, one in self._workers.items() if one.state is _WorkerState.READY]
        has, number = min(ready, default=(0, None))
        if number is None or (has and not self._may_have_more(self._workers[number])):
            return False
        chunk = self._scheduler.deal(len(self._workers))
        if chunk is None:
            return False
        try:
            records = pickling.dump(chunk.records, self._loop.known)
        except Exception as error:  # user objects may raise anything when they are pickled
            if len(chunk.records) > 1:
                self._scheduler.separate(chunk)
            else:
                self._fail(chunk, _unpicklable(chunk, self._loop.known, error), traceback_of(error), "")
            return True
        self._scheduler.weighed(len(chunk.records), len(records))
        worker = self._workers[number]
        if not worker.dealt:
            worker.heard = time.monotonic()
        worker.dealt.append(chunk)
        self._channels.send(number, w.Work(chunk.first, records))
        return True

    def _may_have_more(self, worker: _Worker) -> bool:
        """Whether a worker may get a second chunk. Behind a slow record, that chunk would have to wait."""
        since = time.monotonic() - worker.heard
        return len(worker.dealt) < self._scheduler.ahead and worker.quick and since < OVERDUE_SECONDS

    def _offer(self) -> bool:
        """Offer one more worker to the node, if there is work for it. Returns whether one was offered."""
        if self._capped is not None and self._scheduler.read > self._most:
            log(self._capped)
            self._capped = None
        if not self._wanted or len(self._workers) >= self._most:
            return False
        starting = sum(worker.state is _WorkerState.STARTING for worker in self._workers.values())
        if not self._scheduler.has(starting + 1, len(self._workers) + 1):
            return False
        number, slot, spec = self._number, None, None
        self._number += 1
        self._wanted -= 1
        if self._positions is not None:
            slot = self._slots.pop()
            spec = w.WorkerSlot(str(self._loop.directory / "positions"), len(self._positions.at), slot)
        try:
            self._channels.offer(Job(number, "worker", spec))
        except NodeDiedError as error:
            self._fatal = error
            return True
        self._workers[number] = _Worker(slot)
        return True

    def _stop_idle(self) -> None:
        """Stop workers that have no work left, so that their devices become free."""
        if not self._scheduler.exhausted or self._scheduler.in_hand:
            return
        for number, worker in self._workers.items():
            if worker.dealt or worker.state is _WorkerState.STOPPED:
                continue
            if worker.state is _WorkerState.READY:
                self._channels.send(number, w.NoMoreWork())
            else:
                self._say(s.Cancel(number, "is not needed any more"))
            worker.state = _WorkerState.STOPPED

    def _finish(self) -> None:
        """Wait until the workers have ended by themselves, for at most `END_SECONDS`."""
        self._ending = True
        self._stop_idle()
        self._say(s.Exhausted())
        until = time.monotonic() + END_SECONDS
        while self._workers and not self._over and self._fatal is None and (left := until - time.monotonic()) > 0:
            self._receive(wait=True, most=left)
        if self._workers and not self._over and self._fatal is None:
            log(f"{count(len(self._workers), 'worker')} did not end within {END_SECONDS:.0f} s, and are killed")

    # What happens

    def _say(self, what: s.Statement) -> None:
        if self._fatal is None:
            try:
                self._loop.say(what)
            except NodeDiedError as error:
                self._fatal = error

    def _receive(self, *, wait: bool, most: float | None = None) -> None:
        """Handle all messages that have arrived. With `wait`, first wait until there is one."""
        patience = min(one for one in (most, self.bar.patience, self._loop.tick_seconds) if one is not None)
        milliseconds = 0.0 if not wait else None if patience == math.inf else patience * 1000
        self._loop.tick()
        while not self._over and self._fatal is None and (ready := self._channels.poll.poll(milliseconds)):
            milliseconds = 0.0
            self._hear_node()  # first, because it says which devices a worker has
            for descriptor, _ in ready:
                if (number := self._channels.numbers.get(descriptor)) is not None and self._fatal is None:
                    self._hear(number)
        if wait:
            self._show()

    def _hear_node(self) -> None:
        while not self._over and self._fatal is None and self._node_poll.poll(0.0):
            try:
                messages = self._loop.receive_ready()
            except NodeDiedError as error:
                self._fatal = error
                break
            for message in messages:
                if self._fatal is None:
                    self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Wanted(more):
                self._wanted += more
            case JobStarted(number=number, devices=devices):
                self._workers[number].where = device_names(devices)
            case Ended(result):
                log_left_behind(result)
                self._ended(result)
            case Notice() | GaveUp() | JobWaiting():
                log_event(message)
            case Closed(error) if error or not self._ending:
                self._fatal = error or WorkerDiedError(f"no more workers can be started: the last one {self._problem}")
            case Closed():
                self._over = True
            case Opened():
                raise TypeError(f"the node says {message!r}")

    def _hear(self, number: int) -> bool:
        """Handle the next message of a worker. Returns whether there was one."""
        worker = self._workers[number]
        match what := self._channels.receive(number):
            case None:
                return False
            case w.Ready():
                worker.state = _WorkerState.READY
                self._died_starting = 0
            case w.SetupFailed(failure):
                error = _load(failure)
                where = f" on {worker.where}" if worker.where else ""
                error.__cause__ = SetupError(f"setup failed{where}:\n\n{failure.traceback.rstrip()}")
                self._fatal = _raisable(error, error.__cause__)
            case w.RecordResults():
                self._results(worker, what)
            case w.UnreadableRecords(_, failure):
                chunk = worker.dealt.popleft()  # the worker began none of its records
                if len(chunk.records) > 1:
                    self._scheduler.separate(chunk)
                else:
                    self._fail(chunk, _unloadable(chunk, _load(failure)), failure.traceback, worker.where)
            case _:
                raise TypeError(f"worker {number} says {what!r}")
        return True

    def _results(self, worker: _Worker, results: w.RecordResults) -> None:
        chunk = worker.dealt[0]
        assert results.first == chunk.first and results.count <= len(chunk.records), (chunk, results)  # noqa: PT018
        self._died_idle = 0
        worker.quick, worker.heard = True, time.monotonic()
        try:
            values = pickling.load(results.values, on_cpu=True)
        except Exception as error:
            done = Chunk(chunk.first, chunk.records[: results.count])
            self._done(worker, results.count)
            if results.count > 1:  # most of them may be readable: compute them again, one by one
                self._scheduler.one_by_one()
                self._scheduler.separate(done)
            else:
                problem = UnreadableError(f"its result cannot be unpickled here: {type(error).__name__}: {error}")
                self._fail(done, problem, traceback_of(error), worker.where)
            return
        self._scheduler.measured(results.count, results.seconds, len(results.values))
        raised: dict[int, RaisedByRecord] = {}
        for position, failure in results.failures:
            problem_of = RecordError(
                chunk.first + position,
                chunk.records[position],
                _load(failure),
                failure.traceback,
                worker.where,
            )
            self._count(problem_of, position, values, raised)
        self._done(worker, results.count)
        self._scheduler.put(results.first, values, raised)

    def _done(self, worker: _Worker, count: int) -> None:
        chunk = worker.dealt[0]
        chunk.done(count)
        if not chunk.records:
            worker.dealt.popleft()

    def _fail(self, chunk: Chunk, error: BaseException, trace: str, where: str) -> None:
        """Fail the only record of a chunk."""
        values: list[Any] = [None]
        raised: dict[int, RaisedByRecord] = {}
        self._count(RecordError(chunk.first, chunk.records[0], error, trace, where), 0, values, raised)
        self._scheduler.put(chunk.first, values, raised)

    def _count(self, error: RecordError, position: int, values: list[Any], raised: dict[int, RaisedByRecord]) -> None:
        self._errors += 1
        if self._returning:
            values[position] = error
        else:
            to_raise = _raisable(error.exception, error)
            raised[position] = RaisedByRecord(to_raise, error if to_raise is not error else None)

    # Deaths

    def _ended(self, result: JobResult) -> None:
        while self._fatal is None and self._hear(result.number):
            pass  # messages that the worker sent before it ended
        worker = self._workers.pop(result.number)
        self._channels.close(result.number)
        if worker.slot is not None:
            self._slots.append(worker.slot)
        if worker.state is _WorkerState.STOPPED:
            if result.outcome is Outcome.FAILED:
                log(f"a worker {result.message} when it had done its work")
            return
        self._problem = result.message
        another = result.number >= self._newer
        if worker.state is _WorkerState.STARTING:
            self._died_starting += another
            self._do_without(self._died_starting, another, f"a worker {result.message}, before it had set itself up")
            return
        suspects = self._scheduler.lost(worker.dealt, self._may_have_begun(worker))
        if suspects is None:
            self._died_idle += another
            self._do_without(self._died_idle, another, f"a worker {result.message}, without a record")
        elif suspects.tries < 2:
            self._scheduler.separate(suspects)
        else:
            twice = WorkerDiedError(f"its worker {result.message}, as had the one before, which was at it, too")
            self._fail(suspects, twice, "", worker.where)

    def _may_have_begun(self, worker: _Worker) -> range:
        """Return the indices of the records that a worker that died may have begun."""
        if self._positions is not None and worker.slot is not None:
            return self._positions.begun(worker.slot)
        if not worker.dealt:
            return range(0)
        chunk = worker.dealt[0]
        return range(chunk.first, chunk.first + len(chunk.records))

    def _do_without(self, deaths: int, another: bool, problem: str) -> None:
        """Handle the death of a worker for which no record is to blame. After two such deaths it is not replaced.

        `deaths` is the number of such deaths, and `another` whether this one was counted. If no worker is left, the
        iteration ends with an error.
        """
        if another:
            self._newer = self._number
        if deaths < 2 or not another or self._fatal is not None:
            return
        if self._workers:
            self._most = len(self._workers)
            log(f"{problem}; so did the one before; continuing with {self._most}")
        else:
            self._fatal = WorkerDiedError(f"{problem}; so did the one before")


def _end(loop: RemoteLoop | GroupLoop, begun: threading.Event) -> None:
    """End the workers. Log a warning if no result was ever asked for, which is most likely a mistake."""
    if not begun.is_set() and loop.is_ours:
        log(
            "parallel_map was not iterated over, so that nothing was called: its work is done while its results "
            "are asked for. Remedy: `for result in parallel_map(...)`, or `list(parallel_map(...))`"
        )
    loop.close()


def _load(failure: PortableException) -> BaseException:
    """Return the worker's exception, or one that describes it if it cannot be unpickled."""
    try:
        return failure.load_alone()
    except LookupError as why:
        return UnreadableError(f"{failure.summary}. {why}")


def _raisable(error: BaseException, instead: BaseException) -> BaseException:
    """Return the exception to raise here for `error` in a worker: `error` itself if possible, or `instead`.

    SystemExit and the like would end this program silently, and a generator must not raise StopIteration.
    """
    return error if isinstance(error, Exception) and not isinstance(error, StopIteration) else instead


def _unpicklable(chunk: Chunk, known: Mapping[str, object], error: Exception) -> Exception:
    where = found_at({"the record": chunk.records[0]}, known)
    return OptionError(
        f"records[{chunk.first}]",
        f"cannot be sent to a worker: {type(error).__name__}: {error}{where}. Remedy: give what it is made from, "
        "such as a path, and make it in the function",
    )


def _unloadable(chunk: Chunk, error: BaseException) -> Exception:
    return UnreadableError(
        f"records[{chunk.first}] cannot be unpickled in a worker: {type(error).__name__}: {error}. Remedy: make what "
        "it consists of importable there, or give what it is made from"
    )
