"""`gpu_launcher.parallel_map`: a function over many records, in workers with devices that set themselves up once."""

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
from gpu_launcher.jobs.node_messages import Opened
from gpu_launcher.jobs.notice_log import log
from gpu_launcher.model import MILLIONTHS, Device, Request
from gpu_launcher.nodes.engines import read_nodes
from gpu_launcher.nodes.start import start_loop
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
    nodes: str | Sequence[str] | None = None,
) -> ParallelMap:
    """Call `function` on every record, in worker processes that have devices of their own, and yield the results.

    Each worker calls `setup()` once, when it has its devices. Every call gets what `setup` returned: with
    `return model, metric` (a tuple), the calls are `function(record, model, metric)`; with one object,
    `function(record, model)`; with None, or without `setup`, `function(record)`. Records and results are pickled;
    functions are pickled only if workers cannot be forked from this process.

    - `num_workers`: maximum number of workers. Default: as many as the pool grants; for `gpus=0`, one per CPU. Workers
      begin when their devices are free, and others join later.
    - `gpus`: devices per worker, or a fraction of a device. `memory`: memory per device, such as "20GiB". With
      `gpus=None`, `memory` decides which part of a device a worker gets. `gpus=0`: no devices, such as for calls to
      remote models.
    - `priority`: higher priorities get devices first. `pool`: the devices to use. Default: all of the machine.
    - `ordered`: whether results come in the order of the records. If not, they come when they are ready.
    - `on_error`: "raise" ends the iteration at the first record that fails, with the exception that the function raised
      (its `__cause__`, a RecordError, has the record and the worker's traceback). "return" yields a RecordError as the
      record's result.
    - `read_ahead`: maximum number of records from the oldest whose result was not yielded to the newest that was read
      from `records`. Default: 1000, or more if they are quick, or fewer if they are large.
    - `progress`: show a progress bar if stderr is a terminal. `total`: number of records if `records` has no length,
      for the bar and for small chunks at the end.
    - `start_method`: fork, spawn (fresh interpreters), or auto, which forks unless threads or CUDA make that unsafe.
    - `nodes`: machines to run workers on, as a list of `local`, `ssh:HOST`, `slurm:COUNT`, `sbatch:COUNT`, `ray:COUNT`
      and `command:COMMAND`. Each uses its own devices. See `gpu-launcher guide nodes`. Default: this machine.

    No worker is started and no record is read before the first result is asked for. `records` is read in this thread,
    while it waits for results. Breaking out of the iteration, closing it, or an exception ends the workers at once.

    If a worker dies, it is replaced, and the record that it had begun is dealt once more, alone. If that worker dies,
    too, the record has failed with a WorkerDiedError. (Up to 32 records that take microseconds are begun together. Then
    it is not known which one was to blame, and each is first dealt alone to find out.) Not promised: that a record is
    worked on only once. Results are sent about every 50 ms, and what a dying worker did since then is done again.

    Raises OptionError for invalid arguments, DeviceError, PoolDirectoryError and NodeStartError, before any worker is
    started. The iteration raises the exceptions of `setup`; those of `records`, after the results of the records
    before; a WorkerDiedError if workers die while they set themselves up; and NodeDiedError.
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
    specs = read_nodes(nodes)
    worker = w.RecordWorker(request, setup, function)
    loop = start_loop(specs, worker, options, method=start_method, channels=True)
    try:
        opened = loop.open()
        slots, most, capped = None, num_workers or MAX_WORKERS, None
        if loop.shares_files:  # one node, whose devices are all that there will be
            most = _most_workers(num_workers, request, opened)
            slots = w.Positions(loop.directory / "positions", most, new=True)
            capped = _cap_notice(num_workers, request, opened)
        engine = RecordEngine(loop, scheduler, slots, most, returning=on_error == "return", capped=capped)
    except BaseException:
        loop.close()
        raise
    engine.bar = open_bar(progress, length)
    return ParallelMap(engine)


class ParallelMap(Iterator[Any]):
    """The results of `parallel_map`: an iterator, and a context manager that ends the workers."""

    def __init__(self, engine: RecordEngine) -> None:
        self._engine = engine
        self._results = engine.results()

    def __iter__(self) -> Iterator[Any]:
        return self._results  # the generator takes a tenth of the time of __next__

    def __next__(self) -> Any:
        return next(self._results)

    def close(self) -> None:
        """End the workers at once, even during a call. Their devices are free when it returns. Idempotent."""
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
            raise  # the user's own `__iter__` raised it
        if hasattr(type(records), "__aiter__"):
            what = "is asynchronous, and records are read by an ordinary `for`: collect them in a list first"
        elif callable(records):
            what = f"is a function: call it, as in `parallel_map({_name(records)}(), ...)`"
        else:
            what = f"is a single {type(records).__name__}: give a list of records, or anything else to iterate over"
        raise OptionError("records", f"{records!r} {what}") from error


def _checked(setup: Callable[[], Any] | None, function: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return the function, if both can be called here and have usable results. Raises OptionError."""
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
    """Whether `function` is of this kind, or an object whose `__call__` is."""
    return kind(function) or kind(type(function).__call__)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def _most_workers(wanted: int | None, request: Request, opened: Opened) -> int:
    """Return the maximum number of workers. Log a line if it is smaller than the user wanted."""
    if request.gpus == 0:
        return wanted or min(opened.at_once, MAX_WORKERS)
    most = max(1, min(MAX_WORKERS, _grantable(request, opened.devices)))
    if wanted is None or wanted <= most:
        return wanted or most
    text = f"num_workers={wanted}, but all devices of the pool ({device_counts(opened.devices)}) are enough for "
    log(text + f"{count(most, 'such worker')}: there will be no more")
    return most


def _cap_notice(wanted: int | None, request: Request, opened: Opened) -> str | None:
    """Return a line for the user if the pool has devices for more workers than the user wants; otherwise None."""
    possible = min(MAX_WORKERS, _grantable(request, opened.devices)) if request.gpus else 0
    if wanted is None or wanted >= possible:
        return None
    devices = device_counts(opened.devices)
    return (
        f"num_workers={wanted}, but all devices of the pool ({devices}) are enough for {possible} such workers: "
        "raise or remove it to use them"
    )


def _grantable(request: Request, devices: Sequence[Device]) -> int:
    """Return how many of these requests the devices could grant at the same time if they were all free."""
    if request.gpus > 1:
        return len(devices) // request.gpus
    return sum(MILLIONTHS // share for share in (_part(request, device) for device in devices) if share <= MILLIONTHS)


def _part(request: Request, device: Device) -> int:
    """Return the part of a device that the request takes, in millionths; more than a million if it does not fit."""
    if device.memory is not None and request.share.memory > device.memory:
        return MILLIONTHS + 1
    return MILLIONTHS if device.exclusive else request.share.of(device.memory).millionths
