"""A function over many records, with a model per worker: each worker has devices of its own and sets itself up once."""

from __future__ import annotations

import select
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Any, Literal

from gpu_launcher.errors import OptionError
from gpu_launcher.executors import record_worker as w
from gpu_launcher.executors.dealing import Chunk, Dealer, Raised
from gpu_launcher.executors.progress import Bar, open_bar
from gpu_launcher.executors.record_errors import RecordError, RemoteTraceback, UnreadableError, WorkerDiedError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.progress.text import count, device_counts
from gpu_launcher.jobs.remarks import log
from gpu_launcher.jobs.remote import (
    Closed,
    Ended,
    Heard,
    ManagerDiedError,
    Message,
    Opened,
    Remarked,
    RemoteLoop,
    Started,
    Wanted,
)
from gpu_launcher.jobs.where import Where, this_program
from gpu_launcher.model import MILLIONTHS, Device, Request
from gpu_launcher.pool import Pool
from gpu_launcher.processes import pickling
from gpu_launcher.processes.starter import StartMethod
from gpu_launcher.requests import read_request

MOST_WORKERS = 4096
ENDING = 10.0
"""Seconds that workers get to end by themselves when there is nothing left to do."""
PATIENCE = 0.002
"""Seconds for which results that are there are handed out before the workers are looked after again."""
MOST_PIECE = 4096
OVERDUE = 0.25
"""Seconds without results after which a worker gets nothing ahead."""


def parallel_map(
    records: Iterable[Any],
    setup: Callable[[], Any] | None = None,
    function: Callable[..., Any] | None = None,
    num_workers: int | None = None,
    gpus: float | None = 1,
    *,
    memory: str | int | None = None,
    priority: int = 0,
    ordered: bool = True,
    on_error: Literal["raise", "return"] = "raise",
    pool: Pool | None = None,
    progress: bool = True,
    total: int | None = None,
    read_ahead: int | None = None,
    start_method: StartMethod = "auto",
) -> ParallelMap:
    """Call `function` on every record, in worker processes that each have devices of their own, and yield the results.

    Each worker calls `setup()` once, when it has its devices. What that returns is handed to every call: with
    `return model, metric` (a tuple) the calls are `function(record, model, metric)`, with one object
    `function(record, model)`, with None, or without `setup`, `function(record)`. Records and results travel by pickle,
    functions only where workers cannot be forked from this process.

    - `num_workers`: at most so many; by default as many as the pool grants, for `gpus=0` one for each CPU. Those that
      devices are free for begin, others join them when devices become free.
    - `gpus`: devices of each worker, or a fraction of one, `memory`: of each device, such as "20GiB"; with `gpus=None`
      a worker gets as much of a device as its memory says. `gpus=0`: none, as for calls to remote models.
    - `priority`: higher ones get devices first. `pool`: which devices, by default all of the machine's.
    - `ordered`: whether the results come in the order of the records, or as they are ready.
    - `on_error`: whether the first record that fails ends the iteration with the exception that the function raised
      (its `__cause__`, a RecordError, has the record and the worker's traceback), or has a RecordError as its result.
    - `read_ahead`: how many records may be in hand, from the oldest whose result has not come out to the newest that
      was read from `records`; by default 1000, or more if they are quick, or fewer if they are large.
    - `progress`: a progress bar on stderr, if that is a terminal. `total`: for that, if `records` has no length.
    - `start_method`: fork, spawn (fresh interpreters), or auto, which forks unless threads or CUDA make that unsafe.

    No worker is started, and no record read, before the first result is asked for; `records` is read in this thread,
    while results are waited for. Breaking out of the iteration, closing it, or an exception ends the workers at once.

    A worker that dies is replaced, and the record it was at is dealt once more, alone; if that worker dies, too, the
    record has failed, with a WorkerDiedError. Not promised: that a record is worked on once. Results are sent every
    50 ms or so, and what a worker that dies had done since then is done again.

    Raises OptionError for what cannot be used and PoolDirectoryError, both before any worker is started; and from the
    iteration what `setup` raises, what `records` raises after the results of the records before that, WorkerDiedError
    if workers cannot set themselves up without dying, and ManagerDiedError.
    """
    if function is None:
        raise OptionError("function", "is missing: what is to be called on each record?")
    for name, value in (("setup", setup), ("function", function)):
        if value is not None and not callable(value):
            raise OptionError(name, f"{value!r} cannot be called")
    if on_error not in ("raise", "return"):
        raise OptionError("on_error", f'{on_error!r} is neither "raise" nor "return"')
    _check_count("num_workers", num_workers, MOST_WORKERS)
    _check_count("read_ahead", read_ahead)
    request = read_request({"gpus": gpus, "memory": memory, "priority": priority})
    length = len(records) if isinstance(records, Sized) else total
    dealer = Dealer(iter(records), ordered=ordered, read_ahead=read_ahead, clock=time.monotonic)
    options = (pool or Where()).options(request, num_workers)
    loop = RemoteLoop(w.RecordWorker(request, setup, function), options, this_program(), method=start_method)
    try:
        opened = loop.open()
        for remark in loop.remarks:
            log(remark)
        most = _most_workers(num_workers, request, opened)
        seats = w.Positions(loop.directory / "positions", most, new=True)
        engine = _Engine(loop, dealer, seats, most, returning=on_error == "return")
    except BaseException:
        loop.close()
        raise
    engine.bar = open_bar(progress, length)
    return ParallelMap(engine)


class ParallelMap(Iterator[Any]):
    """The results of `parallel_map`, to be iterated over once. A context manager that ends the workers."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._results = engine.results()

    def __iter__(self) -> Iterator[Any]:
        return self._results  # which takes a tenth of the time that __next__ does

    def __next__(self) -> Any:
        return next(self._results)

    def close(self) -> None:
        """End the workers at once, and with them what they are doing; their devices are free then. Idempotent."""
        self._results.close()
        self._engine.close()

    def __enter__(self) -> ParallelMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _State(Enum):
    STARTING = auto()
    """Its process prepares itself, waits for devices, or is in `setup`."""
    READY = auto()
    STOPPED = auto()
    """It was told that there is no more for it to do."""


@dataclass(slots=True)
class _Worker:
    seat: int
    where: str = ""
    """Its devices."""
    state: _State = _State.STARTING
    dealt: deque[Chunk] = field(default_factory=deque)
    quick: bool = False
    """It has had results."""
    heard: float = 0.0
    """When it last had any, or got its chunk after it had none."""


class _Engine:
    """Keeps the workers busy. There is no thread: everything happens while the next result is asked for."""

    bar: Bar

    def __init__(self, loop: RemoteLoop, dealer: Dealer, positions: w.Positions, most: int, *, returning: bool) -> None:
        """`returning`: whether errors are results."""
        self._loop = loop
        self._dealer = dealer
        self._positions = positions
        self._seats = list(range(most))
        """Those that are free."""
        self._most = most
        self._returning = returning
        self._poll = select.poll()
        self._poll.register(loop.fileno(), select.POLLIN)
        self._workers: dict[int, _Worker] = {}
        self._number = 0
        """The next worker's."""
        self._wanted = 0
        """How many workers more the manager could start."""
        self._errors = 0
        self._died_starting = 0
        """How many times workers died before they were ready, one after another."""
        self._died_idle = 0
        """How many times they died without a record, since there was a result."""
        self._newer = 0
        """The first worker that was not there when it was last counted: several may die of one cause, and at once."""
        self._problem: str | None = None
        """Of the worker that died last."""
        self._fatal: BaseException | None = None
        """What ends the iteration, once the results that are there have come out."""
        self._ending = self._over = False
        """Whether the manager was told that there is nothing more to do, and whether it is gone."""
        self._closed = False
        self._end = weakref.finalize(self, RemoteLoop.close, loop)

    # The iteration

    def results(self) -> Generator[Any, None, None]:
        """Hand out the results."""
        most, since = 1, 0.0
        try:
            while True:
                took = time.monotonic() - since
                most = min(2 * most, MOST_PIECE) if took < PATIENCE else max(1, most // 2)
                if not self._work():
                    break
                piece = self._dealer.take(most)
                since = time.monotonic()
                yield from piece
            self._show(last=True)
            if self._fatal is None and self._dealer.error is None:
                self._finish()
        finally:
            self.close()
        if (error := self._fatal or self._dealer.error) is not None:
            raise error

    def close(self) -> None:
        """End everything."""
        if not self._closed:
            self._closed = True
            self.bar.close()
            self._end()
            self._positions.close()

    def _work(self) -> bool:
        """Look after the workers until there is a result; whether there is one."""
        self._receive(wait=False)
        enough = time.monotonic() + PATIENCE
        while self._fatal is None and (not self._dealer.ready or time.monotonic() < enough):
            if self._deal() or self._offer():
                self._receive(wait=False)
                continue
            self._stop_idle()
            if self._dealer.ready or self._dealer.over:
                break
            self._receive(wait=True)
        self._show()
        return self._dealer.ready

    def _show(self, *, last: bool = False) -> None:
        ready = sum(worker.state is _State.READY for worker in self._workers.values())
        self.bar.show(self._dealer.finished, self._errors, ready, last=last)

    # Dealing

    def _deal(self) -> bool:
        """Deal a chunk to a worker that has too little to do, if there are both."""
        ready = [(len(one.dealt), number) for number, one in self._workers.items() if one.state is _State.READY]
        has, number = min(ready, default=(0, None))
        if number is None or (has and not self._may_have_more(self._workers[number])):
            return False
        chunk = self._dealer.deal(len(self._workers))
        if chunk is None:
            return False
        try:
            records = pickling.dump(chunk.records, self._loop.known)
        except Exception as error:  # whatever the user's objects raise when they are pickled
            if len(chunk.records) > 1:
                self._dealer.separate(chunk)
            else:
                self._fail(chunk, _unpicklable(chunk, error), w.Failure.of(error).traceback, "")
            return True
        self._dealer.weighed(len(chunk.records), len(records))
        worker = self._workers[number]
        if not worker.dealt:
            worker.heard = time.monotonic()
        worker.dealt.append(chunk)
        self._say(s.Reply(number, w.Work(chunk.first, records)))
        return True

    def _may_have_more(self, worker: _Worker) -> bool:
        """Whether it is to get a chunk while it has one: what is behind a slow record waits for that."""
        since = time.monotonic() - worker.heard
        return len(worker.dealt) < self._dealer.ahead and worker.quick and since < OVERDUE

    def _offer(self) -> bool:
        """Have one more worker started, if there is work for it."""
        if not self._wanted or len(self._workers) >= self._most:
            return False
        starting = sum(worker.state is _State.STARTING for worker in self._workers.values())
        if not self._dealer.has(starting + 1, len(self._workers) + 1):
            return False
        number, seat = self._number, self._seats.pop()
        self._number += 1
        self._wanted -= 1
        self._workers[number] = _Worker(seat)
        spec = w.Seat(str(self._loop.directory / "positions"), len(self._positions.at), seat)
        self._say(s.Offer(Job(number, "worker", spec)))
        return True

    def _stop_idle(self) -> None:
        """Let go of the devices for which there is nothing left to do."""
        if not self._dealer.exhausted or self._dealer.in_hand:
            return
        for number, worker in self._workers.items():
            if worker.dealt or worker.state is _State.STOPPED:
                continue
            ready = worker.state is _State.READY
            worker.state = _State.STOPPED
            self._say(s.Reply(number, w.Stop()) if ready else s.Withdrawn(number, "is not needed any more"))

    def _finish(self) -> None:
        """Let the workers end by themselves."""
        self._ending = True
        self._stop_idle()
        self._say(s.Exhausted())
        until = time.monotonic() + ENDING
        while self._workers and not self._over and self._fatal is None and (left := until - time.monotonic()) > 0:
            self._receive(wait=True, most=left)
        if self._workers and not self._over and self._fatal is None:
            log(Remarked(f"{count(len(self._workers), 'worker')} did not end within {ENDING:.0f} s, and are killed"))

    # What happens

    def _say(self, what: s.Statement) -> None:
        if self._fatal is None:
            try:
                self._loop.say(what)
            except ManagerDiedError as error:
                self._fatal = error

    def _receive(self, *, wait: bool, most: float | None = None) -> None:
        """Take note of what has been said; first wait until something is."""
        patience = min((one for one in (most, self.bar.patience) if one is not None), default=None)
        milliseconds = 0.0 if not wait else None if patience is None else patience * 1000
        while not self._over and self._fatal is None and self._poll.poll(milliseconds):
            milliseconds = 0.0
            try:
                self._handle(self._loop.receive())
            except ManagerDiedError as error:
                self._fatal = error
        if wait:
            self._show()

    def _handle(self, message: Message) -> None:
        match message:
            case Heard(number, what):
                self._hear(number, self._workers[number], what)
            case Wanted(more):
                self._wanted += more
            case Started(number, devices):
                self._workers[number].where = w.names(devices)
            case Ended(result):
                self._ended(result)
            case Remarked():
                log(message)
            case Closed(error) if error or not self._ending:
                self._fatal = error or WorkerDiedError(f"no more workers can be started: the last one {self._problem}")
            case Closed():
                self._over = True
            case Opened():
                raise TypeError(f"the manager says {message!r}")

    def _hear(self, number: int, worker: _Worker, what: object) -> None:
        match what:
            case w.Ready():
                worker.state = _State.READY
                self._died_starting = 0
            case w.NotReady(failure):
                error = failure.read()
                where = f" on {worker.where}" if worker.where else ""
                error.__cause__ = RemoteTraceback(f"setup failed{where}:\n\n{failure.traceback.rstrip()}")
                self._fatal = _raisable(error, error.__cause__)
            case w.Results():
                self._results(worker, what)
            case w.Unreadable(_, failure):
                chunk = worker.dealt.popleft()  # none of its records was begun
                if len(chunk.records) > 1:
                    self._dealer.separate(chunk)
                else:
                    self._fail(chunk, _unloadable(chunk, failure.read()), failure.traceback, worker.where)
            case _:
                raise TypeError(f"worker {number} says {what!r}")

    def _results(self, worker: _Worker, results: w.Results) -> None:
        chunk = worker.dealt[0]
        assert chunk.first == results.first, (chunk.first, results)
        self._died_idle = 0
        worker.quick, worker.heard = True, time.monotonic()
        try:
            values = pickling.load(results.values)
        except Exception as error:
            done = Chunk(chunk.first, chunk.records[: results.count])
            self._done(worker, results.count)
            if results.count > 1:  # some may be readable
                self._dealer.one_by_one()
                self._dealer.separate(done)
            else:
                problem = UnreadableError(f"its result cannot be unpickled here: {type(error).__name__}: {error}")
                self._fail(done, problem, w.Failure.of(error).traceback, worker.where)
            return
        self._dealer.measured(results.count, results.seconds, len(results.values))
        raised: dict[int, Raised] = {}
        for position, failure in results.failures:
            problem_of = RecordError(
                chunk.first + position,
                chunk.records[position],
                failure.read(),
                failure.traceback,
                worker.where,
            )
            self._count(problem_of, position, values, raised)
        self._done(worker, results.count)
        self._dealer.put(results.first, values, raised)

    def _done(self, worker: _Worker, count: int) -> None:
        chunk = worker.dealt[0]
        chunk.done(count)
        if not chunk.records:
            worker.dealt.popleft()

    def _fail(self, chunk: Chunk, error: BaseException, trace: str, where: str) -> None:
        """A record, the only one of this chunk, has failed."""
        values: list[Any] = [None]
        raised: dict[int, Raised] = {}
        self._count(RecordError(chunk.first, chunk.records[0], error, trace, where), 0, values, raised)
        self._dealer.put(chunk.first, values, raised)

    def _count(self, error: RecordError, position: int, values: list[Any], raised: dict[int, Raised]) -> None:
        self._errors += 1
        if self._returning:
            values[position] = error
        else:
            raised[position] = Raised(_raisable(error.exception, error), error)

    # Deaths

    def _ended(self, result: JobResult) -> None:
        worker = self._workers.pop(result.number)
        self._seats.append(worker.seat)
        if worker.state is _State.STOPPED:
            if result.outcome is Outcome.FAILED:
                log(Remarked(f"a worker {result.message} when it had done its work"))
            return
        self._problem = result.message
        another = result.number >= self._newer
        if worker.state is _State.STARTING:
            self._died_starting += another
            self._do_without(self._died_starting, another, f"a worker {result.message}, before it had set itself up")
            return
        at = self._positions.at[worker.seat]
        culprit = self._dealer.lost(worker.dealt, at)
        if culprit is None:
            self._died_idle += another
            self._do_without(self._died_idle, another, f"a worker {result.message}, without a record")
        elif culprit.tries == 1:
            self._dealer.give_back(culprit)
        else:
            twice = WorkerDiedError(f"its worker {result.message}, as had the one before, which was at it, too")
            self._fail(culprit, twice, "", worker.where)

    def _do_without(self, deaths: int, another: bool, problem: str) -> None:
        """A worker died, through no record's fault. After the second time it is not replaced."""
        if another:
            self._newer = self._number
        if deaths < 2 or not another or self._fatal is not None:
            return
        if self._workers:
            self._most = len(self._workers)
            log(Remarked(f"{problem}; so did the one before, and it goes on with {self._most}"))
        else:
            self._fatal = WorkerDiedError(f"{problem}; so did the one before")


def _raisable(error: BaseException, instead: BaseException) -> BaseException:
    """What to raise here for `error` in a worker: not such as SystemExit, which would end this program silently."""
    return error if isinstance(error, Exception) else instead


def _unpicklable(chunk: Chunk, error: Exception) -> Exception:
    return OptionError(
        f"records[{chunk.first}]",
        f"cannot be sent to a worker: {type(error).__name__}: {error}. Remedy: give what it is made from, such as a "
        "path, and make it in the function",
    )


def _unloadable(chunk: Chunk, error: BaseException) -> Exception:
    return UnreadableError(
        f"records[{chunk.first}] cannot be unpickled in a worker: {type(error).__name__}: {error}. Remedy: make what "
        "it consists of importable there, or give what it is made from"
    )


def _check_count(option: str, value: int | None, most: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(option, f"{value!r} is not a number from 1")
    if most is not None and value > most:
        raise OptionError(option, f"{value} is more than {most}, which is more than any machine runs")


def _most_workers(wanted: int | None, request: Request, opened: Opened) -> int:
    """How many workers there will be at most, and a remark if that is not what was wanted."""
    if request.gpus == 0:
        return wanted or min(opened.at_once, MOST_WORKERS)
    most = max(1, min(MOST_WORKERS, _grantable(request, opened.devices)))
    if wanted is None or wanted <= most:
        return wanted or most
    text = f"num_workers={wanted}, but all devices of the pool ({device_counts(opened.devices)}) are enough for "
    log(Remarked(text + f"{count(most, 'such worker')}: there will be no more"))
    return most


def _grantable(request: Request, devices: Sequence[Device]) -> int:
    """How many such requests the devices could grant at the same time if nobody else used them."""
    if request.gpus > 1:
        return len(devices) // request.gpus
    return sum(MILLIONTHS // share for share in (_part(request, device) for device in devices) if share <= MILLIONTHS)


def _part(request: Request, device: Device) -> int:
    """What such a request takes of a device, in millionths; more than there are if it does not fit."""
    if device.memory is not None and request.share.memory > device.memory:
        return MILLIONTHS + 1
    return MILLIONTHS if device.exclusive else request.share.of(device.memory).millionths
