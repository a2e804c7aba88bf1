"""A function over many records, with a model per worker: each worker has devices of its own and sets itself up once."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from types import TracebackType
from typing import Any, Literal

from gpu_launcher.errors import OptionError
from gpu_launcher.executors import record_worker as w
from gpu_launcher.executors.chunk_scheduler import ChunkScheduler
from gpu_launcher.executors.progress import open_bar
from gpu_launcher.executors.record_engine import RecordEngine
from gpu_launcher.jobs.node_client import RemoteLoop
from gpu_launcher.jobs.node_messages import Opened, Remarked
from gpu_launcher.jobs.remarks import log
from gpu_launcher.jobs.where import this_program
from gpu_launcher.model import MILLIONTHS, Device, Request
from gpu_launcher.pool import Pool, read_pool
from gpu_launcher.requests import read_request
from gpu_launcher.validation import StartMethod, integer, one_of, read_start_method, true_or_false
from gpu_launcher.wording import count, device_counts

MAX_WORKERS = 4096


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
    - `progress`: a progress bar on stderr, if that is a terminal. `total`: for that, and for small chunks at the end,
      if `records` has no length.
    - `start_method`: fork, spawn (fresh interpreters), or auto, which forks unless threads or CUDA make that unsafe.

    No worker is started, and no record read, before the first result is asked for; `records` is read in this thread,
    while results are waited for. Breaking out of the iteration, closing it, or an exception ends the workers at once.

    A worker that dies is replaced, and the record it was at is dealt once more, alone; if that worker dies, too, the
    record has failed, with a WorkerDiedError. (Of records that take microseconds up to 32 are begun together. Then it
    is not known which it was, and each of them is first dealt alone to find it.) Not promised: that a record is worked
    on once. Results are sent every 50 ms or so, and what a worker that dies had done since then is done again.

    Raises OptionError for what cannot be used, DeviceError and PoolDirectoryError, before any worker is started; and
    from the iteration what `setup` raises, what `records` raises after the results of the records before that,
    WorkerDiedError if workers cannot set themselves up without dying, and NodeDiedError.
    """
    iterator = _iterate(records)
    function = _checked(setup, function)
    one_of("on_error", on_error, ("raise", "return"))
    for name, flag in (("ordered", ordered), ("progress", progress)):
        true_or_false(name, flag)
    read_start_method(start_method)
    if num_workers is not None:
        integer("num_workers", num_workers, least=1, most=MAX_WORKERS)
    if read_ahead is not None:
        integer("read_ahead", read_ahead, least=1)
    if total is not None:
        integer("total", total, least=0)
    request = read_request({"gpus": gpus, "memory": memory, "priority": priority})
    length = len(records) if isinstance(records, Sized) else total
    scheduler = ChunkScheduler(iterator, ordered=ordered, read_ahead=read_ahead, clock=time.monotonic, length=length)
    options = read_pool(pool).options(request, num_workers)
    loop = RemoteLoop(w.RecordWorker(request, setup, function), options, this_program(), method=start_method)
    try:
        opened = loop.open()
        for remark in loop.remarks:
            log(remark)
        most = _most_workers(num_workers, request, opened)
        slots = w.Positions(loop.directory / "positions", most, new=True)
        capped = _cap_remark(num_workers, request, opened)
        engine = RecordEngine(loop, scheduler, slots, most, returning=on_error == "return", capped=capped)
    except BaseException:
        loop.close()
        raise
    engine.bar = open_bar(progress, length)
    return ParallelMap(engine)


class ParallelMap(Iterator[Any]):
    """The results of `parallel_map`, to be iterated over once. A context manager that ends the workers."""

    def __init__(self, engine: RecordEngine) -> None:
        self._engine = engine
        self._results = engine.results()

    def __iter__(self) -> Iterator[Any]:
        return self._results  # which takes a tenth of the time that __next__ does

    def __next__(self) -> Any:
        return next(self._results)

    def close(self) -> None:
        """End the workers at once, and with them what they are doing; their devices are free then. Idempotent."""
        self._close()

    def _close(self, *, silently: bool = False) -> None:
        self._results.close()
        self._engine.close(silently=silently)

    def __enter__(self) -> ParallelMap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(silently=kind is not None)


def _iterate(records: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(records)
    except TypeError as error:
        if hasattr(type(records), "__iter__"):
            raise  # of the user's own
        if hasattr(type(records), "__aiter__"):
            what = "is asynchronous, and records are read by an ordinary `for`: collect them in a list first"
        elif callable(records):
            what = f"is a function: call it, as in `parallel_map({_name(records)}(), ...)`"
        else:
            what = f"is a single {type(records).__name__}: give a list of records, or anything else to iterate over"
        raise OptionError("records", f"{records!r} {what}") from error


def _checked(setup: Callable[[], Any] | None, function: Callable[..., Any] | None) -> Callable[..., Any]:
    """The function, if both are such as can be called here and give what can be used."""
    if function is None:
        hint = " (the second argument is `setup`: write `function=...`)" if setup is not None else ""
        raise OptionError("function", f"is missing: what is to be called on each record?{hint}")
    for option, value, arguments in (("setup", setup, ""), ("function", function, "record")):
        if value is None:
            continue
        if not callable(value):
            raise OptionError(option, f"{value!r} cannot be called")
        name = _name(value)
        if _is(inspect.iscoroutinefunction, value) or _is(inspect.isasyncgenfunction, value):
            run = f"lambda {arguments}: asyncio.run({name}({arguments}))".replace("lambda :", "lambda:")
            what = f"{name} is asynchronous: to call it does not run it. Remedy: have it run, as in `{run}`"
            raise OptionError(option, what)
    if _is(inspect.isgeneratorfunction, function):
        raise OptionError(
            "function",
            f"{_name(function)} has a `yield`: each of its results would be a generator, which cannot be sent from a "
            "worker. Remedy: return a list",
        )
    return function


def _is(kind: Callable[[Any], bool], function: Callable[..., Any]) -> bool:
    """Whether it is such a function, or an object whose `__call__` is."""
    return kind(function) or kind(type(function).__call__)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def _most_workers(wanted: int | None, request: Request, opened: Opened) -> int:
    """How many workers there will be at most, and a remark if that is not what was wanted."""
    if request.gpus == 0:
        return wanted or min(opened.at_once, MAX_WORKERS)
    most = max(1, min(MAX_WORKERS, _grantable(request, opened.devices)))
    if wanted is None or wanted <= most:
        return wanted or most
    text = f"num_workers={wanted}, but all devices of the pool ({device_counts(opened.devices)}) are enough for "
    log(Remarked(text + f"{count(most, 'such worker')}: there will be no more"))
    return most


def _cap_remark(wanted: int | None, request: Request, opened: Opened) -> Remarked | None:
    """What to say of the user's number of workers if the pool has devices for more; None if it does not."""
    possible = min(MAX_WORKERS, _grantable(request, opened.devices)) if request.gpus else 0
    if wanted is None or wanted >= possible:
        return None
    devices = device_counts(opened.devices)
    return Remarked(
        f"num_workers={wanted}, but all devices of the pool ({devices}) are enough for {possible} such workers: "
        "raise or remove it to use them"
    )


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
