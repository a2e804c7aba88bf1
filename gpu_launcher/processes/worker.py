"""Runs a job in its own process: takes the assignment, calls the program, and leaves a report.

A forked job starts with a copy of the program's state, so it first drops what belongs to the parent: signal handlers,
exit handlers, executors and child processes. At its end it does what an interpreter does at exit, and then calls
`os._exit`, because freeing memory would copy pages that all jobs share.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import io
import logging
import multiprocessing.process
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.model import Request
from gpu_launcher.processes import job_channel, rank_decisions
from gpu_launcher.processes.exceptions import origin, reason
from gpu_launcher.processes.forking import flush_all
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.job_output import JobOutput, use_descriptors
from gpu_launcher.processes.linux import set_process_title
from gpu_launcher.processes.messages import (
    Assignment,
    ChannelClosedError,
    Grant,
    JobMessage,
    JobPrepared,
    JobReply,
    LogFile,
    Report,
    ResultLost,
    ResultWritten,
    receive,
    send,
)
from gpu_launcher.processes.signals import uninterrupted
from gpu_launcher.safe_files import make_directories, write_whole

_log = get_logger("processes.worker")

ATTEMPT = "GPU_LAUNCHER_ATTEMPT"
"""Environment variable with the number of the attempt at this job, counted from 1."""


class Program(Protocol):
    """The user's program as the head assembled it. It is called once in each job's process."""

    def __call__(self, number: int, spec: Any, context: JobContext) -> Report:
        """Prepare, call `context.wait`, do the work, and report. Must not raise; if it does, the error is reported."""


class JobContext:
    """The job's side of its channel: its request, its grant, and messages to and from its source."""

    def __init__(self, channel: socket.socket, output: JobOutput, to_source: socket.socket | None) -> None:
        self._channel = channel
        self._output = output
        self._to_source = to_source
        """Channel to the source. If it is None, messages and replies are relayed through `channel`."""
        self._grant: Grant | None = None
        self._lease: tuple[int, ...] = ()

    def prepared(self, request: Request, log: Path | None, options: Any = None) -> None:
        """Say what this job needs, and append its stdout and stderr to `log` from now on.

        The directory of `log` is created. If another job uses that file, the output goes to a file beside it. Raises
        OSError if the file cannot be created.
        """
        place = None
        if log is not None:
            make_directories(log.parent)
            status = log.parent.stat()
            place = (status.st_dev, status.st_ino)
        try:
            send(self._channel, JobPrepared(request, None if log is None else str(log), os.getpid(), options, place))
            if log is not None:
                message, _ = receive(self._channel)
        except ChannelClosedError:
            os._exit(1)
        if log is not None:
            assert isinstance(message, LogFile), message
            self._output.redirect(Path(message.path))

    def log_into(self, log: Path) -> None:
        """Append the output of this job to `log` from now on. Raises OSError if the file cannot be created."""
        make_directories(log.parent)
        self._output.redirect_from_now_on(log)

    def wait(self) -> None:
        """Wait for the devices and set the environment to use them. The lease lives as long as this process.

        A second call only sets the environment again, because other code may have changed it.
        """
        if self._grant is None:
            try:
                self._grant, self._lease = receive(self._channel)
            except ChannelClosedError:
                os._exit(1)  # the node has ended, and our supervisor is about to kill this process
            assert isinstance(self._grant, Grant), self._grant
            _log.debug("granted its devices: %s", self._grant.environment)
        os.environ.update(self._grant.environment)
        if self._grant.cpus is not None:
            os.sched_setaffinity(0, self._grant.cpus)

    def say(self, what: Any) -> None:
        """Send a message to the source of the job. Ends this process if the channel is closed."""
        try:
            if self._to_source is None:
                send(self._channel, JobMessage(what))
            else:
                send(self._to_source, what)
        except ChannelClosedError:
            os._exit(1)

    def hear(self) -> Any:
        """Wait for the next reply from the source of the job. Call this after the grant."""
        try:
            message, _ = receive(self._channel if self._to_source is None else self._to_source)
        except ChannelClosedError:
            os._exit(1)
        if self._to_source is not None:
            return message
        assert isinstance(message, JobReply), message
        return message.what


def work(channel: socket.socket, output: JobOutput, load_program: Callable[[], Program]) -> NoReturn:
    """Run as the job: take the assignment, run the program, write the report, and exit."""
    use_descriptors()
    try:
        assignment, descriptors = receive(channel)
    except ChannelClosedError:
        os._exit(1)
    to_source = socket.socket(fileno=descriptors[0]) if descriptors else None
    assert isinstance(assignment, Assignment), assignment
    set_role(f"job {assignment.number}")
    _log.debug("attempt %d begins", assignment.attempt)
    if assignment.title:
        set_process_title(assignment.title)
    _be_interruptible()
    os.environ[ATTEMPT] = str(assignment.attempt)
    rank_decisions.forget()
    job = os.getpid()
    try:
        if assignment.about is not None:
            job_channel.begin(channel, assignment.about, rank_decisions.path_for(Path(assignment.result)))
        report = load_program()(assignment.number, assignment.spec, JobContext(channel, output, to_source))
        status = 0 if report.ok else 1
    except BaseException as error:  # not from the user's code, whose errors the program itself reports
        status = _exit_status(error)
        report = Report(ok=False, message=reason(error), payload=b"", origin=origin(error))
    # A child that the user's code forked may also get here. It ends as it would in any program.
    try:
        with uninterrupted():  # if it were interrupted here, a finished job would leave no result
            if os.getpid() == job and not _leave(report, assignment, channel):
                status = 1
    except BaseException as error:  # such as KeyboardInterrupt if the user stops the sweep now
        print_exception(error, error.__traceback__)
    _log.debug("ends with status %d%s", status, "" if report.ok else f": {report.message}")
    _finish()
    os._exit(status)


def print_exception(error: BaseException, tb: TracebackType | None) -> None:
    """Print an exception as Python does at the end of a program. Errors in printing, as on a full disk, are ignored."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the user's code closed sys.stderr
        traceback.print_exception(type(error), error, tb)


def _exit_status(error: BaseException) -> int:
    """Return the exit status of a program that ends with `error`. Prints the error unless it is a plain exit."""
    if not isinstance(error, SystemExit) or not (error.code is None or isinstance(error.code, int)):
        print_exception(error, error.__traceback__)
        return 1
    return (error.code or 0) & 0xFF


def _leave(report: Report, assignment: Assignment, channel: socket.socket) -> bool:
    """Write the report for the head. Returns whether that worked."""
    result = Path(assignment.result)
    data = report.dump(assignment.number)
    try:
        write_whole(result, data)
        send(channel, ResultWritten(hashlib.sha256(data).digest()))
    except ChannelClosedError:
        pass  # the node has ended; resuming the sweep finds the file
    except OSError as error:
        try:
            send(channel, ResultLost(f"{result.parent}: {error.strerror or error}"))
        except ChannelClosedError:
            return False  # the node has ended, so the directory may have been removed
        print_exception(error, error.__traceback__)
        return False
    return True


def forget_the_parent(handlers: dict[signal.Signals, Any]) -> None:
    """Drop what belongs to the user's program, in a process forked from it.

    `handlers` are the signal handlers that the program had when the node was forked. They are restored.
    """
    for signum, handler in handlers.items():
        # None: the handler was not set from Python and cannot be restored from it
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    # Exit handlers and finalizers registered so far must run only in the parent: here they would remove its temporary
    # directories. Those that the job registers from now on run at its end, as in any program.
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    # At a normal exit multiprocessing would terminate the daemonic ones among these children, which are the parent's.
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    _forget_executors()
    # Exit handlers that every program gets from its imports; the last registered runs first.
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def use_own_positions(open_files: OpenFiles) -> None:
    """Reopen the program's files, so that jobs do not share positions. Call this in a fork of the program."""
    for problem in open_files.open_again():
        os.write(2, os.fsencode(f"gpu-launcher: {problem}\n"))  # sys.stderr may still be the program's own object
    atexit.register(open_files.flush)


def _forget_executors() -> None:
    """Keep this process from shutting down the parent's executors at exit: their threads do not exist here."""
    for name, registry in (("thread", "_threads_queues"), ("process", "_threads_wakeups")):
        module = sys.modules.get(f"concurrent.futures.{name}")
        if module is not None:
            getattr(module, registry).clear()


def _be_interruptible() -> None:
    """Replace handlers that make SIGINT or SIGTERM ineffective.

    A stopped sweep sends SIGINT to its jobs, and a time limit sends SIGTERM.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    # SIGINT is ignored in a program that a script starts with `&`.
    if interrupt is signal.SIG_IGN or _is_of_an_event_loop(interrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _is_of_an_event_loop(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_of_an_event_loop(handler: object) -> bool:
    """Whether a handler belongs to an event loop, which runs only in the parent."""
    function = getattr(handler, "func", handler)  # asyncio.run installs a functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("asyncio", "uvloop")


def _finish() -> None:
    """Do what the interpreter does at exit, but do not free memory, which other processes share."""
    # `threading._shutdown` waits for the threads that are not daemons.
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException as error:  # such as KeyboardInterrupt, if the user stops the sweep now
            print_exception(error, error.__traceback__)


def _flush() -> None:
    """Flush open files of Python and C.

    In a forked job this does not find the parent's files, which `gc.freeze` hides.
    """
    flush_all(ignore_errors=True)
    buffered = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    for stream in [thing for thing in gc.get_objects() if issubclass(type(thing), buffered)]:
        try:
            if not stream.closed and stream.writable():
                stream.flush()
        except ValueError:  # detached from its buffer
            continue
        except OSError as error:
            print_exception(error, None)
