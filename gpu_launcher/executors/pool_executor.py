"""`gpu_launcher.PoolExecutor`: a `concurrent.futures.Executor` whose calls have devices of the pool."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar

from gpu_launcher.executors.calls import CallProgram
from gpu_launcher.executors.executor_thread import BrokenPoolExecutor, ExecutorThread, Submitted
from gpu_launcher.nodes.engines import read_nodes
from gpu_launcher.nodes.start import start_loop
from gpu_launcher.pool import Pool, read_pool
from gpu_launcher.processes.linux import cuda_in_use
from gpu_launcher.requests import read_request
from gpu_launcher.validation import StartMethod, integer, read_start_method

P = ParamSpec("P")
T = TypeVar("T")

_threads: weakref.WeakSet[ExecutorThread] = weakref.WeakSet()
"""Threads of this process's executors."""
_exiting = False


class PoolExecutor(Executor):
    """Calls functions in processes that have devices of the machine's pool: one process, and one lease, for each call.

    A call waits until its devices are free, and starts with `CUDA_VISIBLE_DEVICES` set to them. If it
    raises an exception, `Future.result` raises the same exception, with the traceback as its cause. If a process dies,
    its own call fails with `JobError`, and the others continue. Calls print to this program's output.

    Functions, arguments and values are pickled, including local functions and those of `__main__`. Calls run in forks
    of this program as it was at the first `submit`: they do not see later changes to global variables.
    """

    def __init__(
        self,
        *positional: NoReturn,
        gpus: float | None = None,
        max_workers: int | None = None,
        memory: object = None,
        priority: int = 0,
        timeout: object = None,
        pool: Pool | None = None,
        start_method: StartMethod = "auto",
        nodes: str | Sequence[str] | None = None,
    ) -> None:
        """Create an executor. All arguments are given by name. Nothing is started before the first `submit`.

        Args:
            positional: must be empty. The standard executors take `max_workers` first, but here one expects `gpus`.
            gpus: devices per call: 0, 1, 2, ..., or a fraction of a device. Default: 1, or, if `memory` is given, a
                share of a device.
            max_workers: maximum number of calls that run at the same time. Default: as many as the devices allow;
                without devices, as many as there are CPUs.
            memory: GPU memory per call, such as "20GiB", for calls that share a device.
            priority: calls with a higher priority get devices first.
            timeout: maximum duration of a call, in seconds or as text such as "2h". The call then gets SIGTERM, ten
                seconds later SIGKILL, and fails with `JobTimeoutError`.
            pool: the devices to use. Default: all devices of the machine.
            start_method: `fork` from this program, or `spawn` fresh interpreters. Default: fork, unless other threads
                run or CUDA is initialised when the first call is submitted.
            nodes: machines to make calls on, as a list of `local`, `ssh:HOST`, `slurm:COUNT`, `sbatch:COUNT`,
                `ray:COUNT` and `command:COMMAND`. Each uses its own devices. See `gpu-launcher guide nodes`. Default:
                this machine.

        Raises ValueError, most often an OptionError, and TypeError for positional arguments.
        """
        if positional:
            given, first = ", ".join(map(repr, positional)), repr(positional[0])
            raise TypeError(
                f"PoolExecutor({given}) is ambiguous. Remedy: PoolExecutor(max_workers={first}) for that "
                f"many calls at the same time, PoolExecutor(gpus={first}) for that many devices per call"
            )
        options = {"gpus": gpus, "memory": memory, "priority": priority, "timeout": timeout}
        self._request = read_request(options)
        if isinstance(max_workers, int) and not isinstance(max_workers, bool) and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")  # in the words of the standard executors
        if max_workers is not None:
            integer("max_workers", max_workers, least=1)
        self._start_method = read_start_method(start_method)
        self._options = read_pool(pool).options(self._request, max_workers, "max_workers")
        self._nodes = read_nodes(nodes)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._shut = False
        self._thread: ExecutorThread | None = None

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit the call `fn(*args, **kwargs)`, and return a Future of its value.

        The call runs as soon as it has its devices, and cannot be cancelled from then on. The first `submit` starts the
        processes. It raises an error if they cannot be started: OptionError, for example if a device does not exist,
        PoolDirectoryError, DeviceError or NodeStartError. Raises RuntimeError after `shutdown`, and BrokenPoolExecutor,
        a subclass of RuntimeError, if the executor cannot make calls any more.
        """
        with self._lock:
            if self._process != os.getpid():
                raise RuntimeError(
                    "this PoolExecutor belongs to the process that this one was forked from: make another one here"
                )
            if self._shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self._thread is None:
                self._thread = self._start()
            if self._thread.broken is not None:
                raise BrokenPoolExecutor(self._thread.broken)
            future: Future[T] = Future()
            self._thread.submit(Submitted(future, fn, args, kwargs))
            return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **more: Any,
    ) -> Iterator[T]:
        """Return the results of `map(fn, *iterables)`, with calls in parallel. See `concurrent.futures.Executor.map`.

        Each process, with one lease, gets `chunksize` elements.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **more)
        chunks = _chunks(zip(*iterables), chunksize)  # noqa: B905  (the shortest ends it, as in map)
        results = super().map(functools.partial(_call_all, fn), chunks, timeout=timeout, **more)
        return _flat(results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the processes when the last call has ended. `wait` until then by default.

        With `cancel_futures`, calls that have not begun are cancelled. If no call has begun yet, calls that can begin
        at once may still do so: the executor waits up to 5 s for them.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            self._shut = True
            thread = self._thread
        if thread is None:
            return
        if cancel_futures:
            thread.cancel()
        else:
            thread.finish()
        if wait:
            thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Shut down. After Ctrl-C, calls are interrupted, and killed ten seconds later or at a second Ctrl-C.

        The same happens if the task that runs the block is cancelled: under asyncio, that is the effect of Ctrl-C.
        """
        if kind is not None and issubclass(kind, (KeyboardInterrupt, asyncio.CancelledError)):
            self._interrupt()
            return None
        try:
            self.shutdown()
        except KeyboardInterrupt:
            self._interrupt()
            raise
        return None

    def _interrupt(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        if self._thread is None or self._process != os.getpid():
            return
        self._thread.stop()
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._thread.stop()
            self._thread.join()

    def _start(self) -> ExecutorThread:
        program = CallProgram(self._request)
        loop = start_loop(self._nodes, program, self._options, method=self._start_method, channels=True)
        try:
            opened = loop.open()
            may_fork = opened.method == "spawn" and loop.unsafe is None and not cuda_in_use()
            thread = ExecutorThread(loop, may_fork=may_fork)
        except BaseException:
            loop.close()
            raise
        _threads.add(thread)
        # When the executor is collected, no more calls can be submitted. Those that were submitted are still made.
        weakref.finalize(self, thread.finish).atexit = False
        return thread


def _chunks(rows: Iterable[tuple[Any, ...]], size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    rows = iter(rows)
    while chunk := tuple(itertools.islice(rows, size)):
        yield chunk


def _call_all(function: Callable[..., T], chunk: tuple[tuple[Any, ...], ...]) -> list[T]:
    return [function(*row) for row in chunk]


def _flat(lists: Iterator[list[T]]) -> Iterator[T]:
    for some in lists:
        some.reverse()
        while some:
            yield some.pop()  # so that no reference to the value is kept here


def _finish_all() -> None:
    """Wait for all submitted calls at the end of the interpreter, as the standard executors do."""
    global _exiting
    _exiting = True
    threads = list(_threads)
    for thread in threads:
        thread.finish()
    for thread in threads:
        thread.join()


def _forget() -> None:
    """Forget the executors in a forked process: they belong to its parent."""
    global _exiting
    _exiting = False
    _threads.clear()


threading._register_atexit(_finish_all)  # type: ignore[attr-defined]  # before it waits for threads, and before atexit
os.register_at_fork(after_in_child=_forget)
