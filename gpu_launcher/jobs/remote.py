"""A job loop in a process of its own, for a program that does other things while its jobs run.

The process, the manager, is forked from the program before that has any thread of ours, and forks the fork server. It
is single-threaded, so that it may fork at any time, and signals come to it alone. The program is its jobs' source, at
the other end of a socket: it is asked for jobs, and told what becomes of them. When the program ends, however it ends,
the manager ends its jobs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.manager import Manager
from gpu_launcher.jobs.manager_messages import Begin, Closed, End, Message, Opened, Remarked
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.processes.deferred_signals import uninterrupted
from gpu_launcher.processes.fork_server_client import StartMethod
from gpu_launcher.processes.forking import internal_fork, tqdm_monitors_paused
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.linux import flush_c_streams, other_threads
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send
from gpu_launcher.processes.pickling import NOTHING, main_namespace, prepare
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.worker import Program

_harmless: set[int] = set()
"""Native ids of threads that hold no lock which a forked process would need, except while they are `_busy`."""

_calling: set[int] = set()
"""Of these, the threads that are in the user's code, which may have taken any lock. They enter it when not `_busy`."""

_busy = threading.RLock()

PATIENCE = 1.0
"""Seconds that a fork waits for the user's code in threads of ours. No longer: that may wait for the one that forks."""


def _forget_threads() -> None:
    """In a forked process: there are none but this one."""
    global _busy
    _harmless.clear()
    _calling.clear()
    _busy = threading.RLock()


os.register_at_fork(after_in_child=_forget_threads)


class ManagerDiedError(GpuLauncherError):
    """The manager process was killed, and its jobs have ended with it."""


class RemoteLoop:
    """The program's side of it. One thread may `say` while another one receives."""

    _pid: int | None = None
    """The manager, until it was waited for."""

    def __init__(
        self,
        program: Program,
        options: Options,
        command: str,
        *,
        method: StartMethod = "auto",
        captured: bool = False,
    ) -> None:
        """Start the manager; `open` then says whether it could.

        `program` is run in each job, `command` names this program to others who wait for devices. Unless the jobs'
        output is `captured` for their failures' messages, it goes where this process's does.
        """
        self._channel, theirs = channel()
        self._process = os.getpid()
        self._saying = threading.Lock()
        self.remarks: list[Remarked] = []
        """Lines for the user that were said before it was open."""
        self.known: Mapping[str, object] = dict(main_namespace())
        """What the jobs' `__main__` has, by name."""
        self._scratch = Scratch()
        self.directory = self._scratch.path
        """For files of the jobs. It goes with the manager."""
        prepare()
        _flush()
        files = OpenFiles.of_this_process()
        manager = Manager(
            theirs, self._process, self.directory, program, options, command, method, captured, Generators(), files
        )
        with tqdm_monitors_paused():
            harmless, calling = self._fork(manager)
            theirs.close()
            # Right after the fork, for which OpenBLAS and the like shut their threads down.
            names = other_threads(besides=harmless | {threading.get_native_id()})
        unsafe = f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})"
        if calling:
            unsafe += ", and one of them calls back what was given to add_done_callback, or a handler of log messages"
        self.say(Begin(unsafe if names else None))

    def _fork(self, manager: Manager) -> tuple[set[int], bool]:
        """Returns which threads are harmless, and whether one of them calls the user's code."""
        try:
            with (
                _at_rest() as (harmless, calling),
                uninterrupted() as signals,
                internal_fork(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads; we look for them ourselves
                self._pid = os.fork()
                if self._pid == 0:
                    signals.forget()
            if self._pid == 0:
                manager.be(self._channel)
        finally:
            if os.getpid() != self._process:  # Ctrl-C at its very beginning: nothing of the program is to run in it
                os._exit(1)
        return harmless, calling

    def open(self) -> Opened:
        """Wait until jobs can be run. Raises what keeps them from it, such as OptionError or PoolDirectoryError."""
        while True:
            match self.receive():
                case Opened() as opened:
                    if opened.method == "spawn":
                        self.known = NOTHING
                    return opened
                case Remarked() as remark:
                    self.remarks.append(remark)
                case Closed(error):
                    self.close()
                    raise error or ManagerDiedError("the process that starts jobs has ended")

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that made it, and not one that was forked from that."""
        return self._process == os.getpid()

    def fileno(self) -> int:
        """Readable when there is something to receive."""
        return self._channel.fileno()

    def receive(self) -> Message:
        """Wait for the next thing that the manager says. Raises ManagerDiedError."""
        try:
            message: Message = receive(self._channel)[0]
        except (ChannelClosedError, OSError):  # OSError: `close` was called meanwhile
            raise self._died() from None
        return message

    def say(self, what: s.Statement | Begin) -> None:
        """Offer a job that was wanted, answer one that runs, withdraw one, or say that there are no more.

        Raises ManagerDiedError.
        """
        try:
            with self._saying:
                send(self._channel, what)
        except (ChannelClosedError, OSError):
            raise self._died() from None

    def close(self) -> None:
        """End the manager, and with it every job that still runs. Idempotent. Nothing happens in a forked process.

        What a signal's handler raises meanwhile, such as KeyboardInterrupt, makes it short, and is raised in the end.
        """
        if not self.is_ours:
            return
        raised: BaseException | None = None
        while self._pid is not None:
            try:
                self._end(self._pid)
            except BaseException as error:
                raised = error
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
        if raised is not None:
            raise raised

    def _end(self, pid: int) -> None:
        """May be cut short anywhere, and called again."""
        with contextlib.suppress(OSError):  # the manager has closed it, or does not listen
            send(self._channel, End(), wait=False)
        # Closing is not enough: whatever was forked from this process has a copy of the descriptor.
        with contextlib.suppress(OSError):  # the manager has closed it
            self._channel.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ChildProcessError):  # raised if the user's program reaps all children itself
            os.waitpid(pid, 0)
        self._channel.close()
        self._scratch.remove()
        self._pid = None

    def __del__(self) -> None:
        """Whoever had it may have been cut short by a signal's handler before it could be closed."""
        self.close()

    def _died(self) -> ManagerDiedError:
        return ManagerDiedError("the process that starts jobs was killed (`dmesg` may know why), and its jobs with it")


@contextlib.contextmanager
def harmless_thread() -> Iterator[None]:
    """Say of the calling thread that it holds no lock that a forked process would need, whenever the fork happens.

    What might hold one, such as pickling the user's objects, it does while it is `busy`.
    """
    me = threading.get_native_id()
    _harmless.add(me)
    try:
        yield
    finally:
        _harmless.discard(me)


@contextlib.contextmanager
def calling_back() -> Iterator[None]:
    """Say of a harmless thread that it is not: it calls the user's code, which may take any lock and wait for anything.

    A fork meanwhile is put off a little, and then counts as unsafe, but does not wait for the end of it.
    """
    me = threading.get_native_id()
    if me not in _harmless or me in _calling:
        yield
        return
    with _busy:
        _calling.add(me)
    try:
        yield
    finally:
        _calling.discard(me)


@contextlib.contextmanager
def _at_rest() -> Iterator[tuple[set[int], bool]]:
    """For a fork: while entered, no harmless thread gets `busy`, or begins to call back.

    Returns those that are harmless now, and whether there are others which call back.
    """
    until = time.monotonic() + PATIENCE
    while True:
        with _busy:
            calling = _calling - {threading.get_native_id()}
            if not calling or time.monotonic() >= until:
                yield _harmless - calling, bool(calling)
                return
        time.sleep(0.001)


def busy() -> contextlib.AbstractContextManager[Any]:
    """While entered, no manager is forked from this program by another thread."""
    return _busy


def _flush() -> None:
    """Whatever is in a buffer at the fork would be written by every child as well."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    flush_c_streams()
