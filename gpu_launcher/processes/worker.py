"""Runs in a job's process, before and after the program's own code."""

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
"""Environment variable with the number of this start of the job, counted from 1."""


class Program(Protocol):
    """The user's program as the launching program assembled it. Called once in each job's process."""

    def __call__(self, number: int, spec: Any, context: JobContext) -> Report:
        """Prepare, call `context.wait`, do the work, and report. Must not raise, but whatever it raises is reported."""


class JobContext:
    """A job's side of its channel: what it needs, when it has its devices, and messages to the source of the job."""

    def __init__(self, channel: socket.socket, output: JobOutput, to_source: socket.socket | None) -> None:
        self._channel = channel
        self._output = output
        self._to_source = to_source
        """Without it, messages to the source and its replies are relayed through `channel`."""
        self._grant: Grant | None = None
        self._lease: tuple[int, ...] = ()

    def prepared(self, request: Request, log: Path | None, options: Any = None) -> None:
        """Say what this job needs. From here on its stdout and stderr are appended to `log`, whose directory is made.

        If another job uses that file, they go to one beside it. Raises OSError if the file cannot be made.
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

    def wait(self) -> None:
        """Wait for the devices, and set the environment to use them. The lease lives as long as this process.

        When called again, it only sets the environment, which something may have changed since.
        """
        if self._grant is None:
            try:
                self._grant, self._lease = receive(self._channel)
            except ChannelClosedError:
                os._exit(1)  # the launching program ended, and our supervisor is about to end this process
            assert isinstance(self._grant, Grant), self._grant
            _log.debug("granted its devices: %s", self._grant.environment)
        os.environ.update(self._grant.environment)
        if self._grant.cpus is not None:
            os.sched_setaffinity(0, self._grant.cpus)

    def say(self, what: Any) -> None:
        """Send something to the source of the job. Ends this process if the launching program has ended."""
        try:
            if self._to_source is None:
                send(self._channel, JobMessage(what))
            else:
                send(self._to_source, what)
        except ChannelClosedError:
            os._exit(1)

    def hear(self) -> Any:
        """Wait, after the grant, for the next reply of the source of the job."""
        try:
            message, _ = receive(self._channel if self._to_source is None else self._to_source)
        except ChannelClosedError:
            os._exit(1)
        if self._to_source is not None:
            return message
        assert isinstance(message, JobReply), message
        return message.what


def work(channel: socket.socket, output: JobOutput, load_program: Callable[[], Program]) -> NoReturn:
    """Be the job: take the assignment, run the program, write the report, and exit."""
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
    except BaseException as error:  # not from the user's code: the program reports what that raises
        status = _exit_status(error)
        report = Report(ok=False, message=reason(error), payload=b"", origin=origin(error))
    # A child that the user's code forked comes here as well, and ends as it would in any program.
    try:
        with uninterrupted():  # interrupted here, a job that has ended would leave no result
            if os.getpid() == job and not _leave(report, assignment, channel):
                status = 1
    except BaseException as error:  # such as KeyboardInterrupt, if the user stops the sweep now
        print_exception(error, error.__traceback__)
    _log.debug("ends with status %d%s", status, "" if report.ok else f": {report.message}")
    _finish()
    os._exit(status)


def print_exception(error: BaseException, tb: TracebackType | None) -> None:
    """Print an exception as Python does at the end of a program. Ignore that this may fail, as on a full disk."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the user's code closed sys.stderr
        traceback.print_exception(type(error), error, tb)


def _exit_status(error: BaseException) -> int:
    """Return the exit status of a program that ends with `error`, and print it unless it is a plain exit."""
    if not isinstance(error, SystemExit) or not (error.code is None or isinstance(error.code, int)):
        print_exception(error, error.__traceback__)
        return 1
    return (error.code or 0) & 0xFF


def _leave(report: Report, assignment: Assignment, channel: socket.socket) -> bool:
    """Write the report for the launching program; return whether that worked."""
    result = Path(assignment.result)
    data = report.dump(assignment.number)
    try:
        write_whole(result, data)
        send(channel, ResultWritten(hashlib.sha256(data).digest()))
    except ChannelClosedError:
        pass  # the launching program has ended; resuming the sweep finds the file
    except OSError as error:
        try:
            send(channel, ResultLost(f"{result.parent}: {error.strerror or error}"))
        except ChannelClosedError:
            return False  # the launching program has ended, and may have removed its directory
        print_exception(error, error.__traceback__)
        return False
    return True


def forget_the_parent(handlers: dict[signal.Signals, Any]) -> None:
    """In a process forked from the user's program: drop what belongs to that program and not to its copy.

    `handlers` are the signal handlers the user's program had before the launch.
    """
    for signum, handler in handlers.items():
        # None: the handler was not set from Python and cannot be restored from it
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    # Exit handlers and finalizers that were registered so far are the parent's to run: here they would remove its
    # temporary directories. What the job registers from now on is run at its end, as in any program.
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    # At a normal end multiprocessing terminates the daemonic ones among these, which are the parent's.
    multiprocessing.process._children = set()  # type: ignore[attr-defined]
    _forget_executors()
    # What every program has from its imports; the last registered runs first.
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def use_own_positions(open_files: OpenFiles) -> None:
    """Open the program's files again, so that jobs share no position in them. For processes forked from the program."""
    for problem in open_files.open_again():
        os.write(2, os.fsencode(f"gpu-launcher: {problem}\n"))  # sys.stderr may still be the program's own object
    atexit.register(open_files.flush)


def _forget_executors() -> None:
    """Do not shut the parent's executors down when this process ends: their threads do not exist here."""
    for name, registry in (("thread", "_threads_queues"), ("process", "_threads_wakeups")):
        module = sys.modules.get(f"concurrent.futures.{name}")
        if module is not None:
            getattr(module, registry).clear()


def _be_interruptible() -> None:
    """Give SIGINT and SIGTERM an effect: a stopped sweep sends SIGINT to its jobs, a time limit SIGTERM."""
    interrupt = signal.getsignal(signal.SIGINT)
    # Ignored, as in what a script starts with `&`.
    if interrupt is signal.SIG_IGN or _is_of_an_event_loop(interrupt):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _is_of_an_event_loop(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_of_an_event_loop(handler: object) -> bool:
    """Whether a handler belongs to an event loop, which runs in the parent only."""
    function = getattr(handler, "func", handler)  # a functools.partial, as asyncio.run has it
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("asyncio", "uvloop")


def _finish() -> None:
    """Do what the interpreter does at its end, except for freeing memory, which other processes share."""
    # The first waits for the threads that are not daemons.
    for step in (threading._shutdown, atexit._run_exitfuncs, _flush):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException as error:  # such as KeyboardInterrupt, if the user stops the sweep now
            print_exception(error, error.__traceback__)


def _flush() -> None:
    """Flush Python's files that are still open, and C's.

    A forked job does not see the parent's files here, because of `gc.freeze`.
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
