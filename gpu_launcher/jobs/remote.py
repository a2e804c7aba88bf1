"""A job loop in a process of its own, for a program that does other things while its jobs run.

The process, the manager, is forked from the program before that has any thread of ours, and forks the fork server. It
is single-threaded, so that it may fork at any time, and signals come to it alone. The program is its jobs' source, at
the other end of a socket: it is asked for jobs, and told what becomes of them. When the program ends, however it ends,
the manager ends its jobs.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpu_launcher.devices import usable_cpus
from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Event, JobWaiting, Notice, SweepStarted
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.sweep import Options, limits, run_jobs
from gpu_launcher.model import Device
from gpu_launcher.processes.forks import own_fork
from gpu_launcher.processes.linux import flush_c_streams, other_threads
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send
from gpu_launcher.processes.pickling import NOTHING, main_namespace, prepare
from gpu_launcher.processes.starter import ForkServer, StartMethod
from gpu_launcher.processes.worker import Program

_harmless: set[int] = set()
"""Native ids of threads that hold no lock which a forked process would need, except while they are `_busy`."""

_busy = threading.RLock()


def _forget_threads() -> None:
    """In a forked process: there are none but this one."""
    global _busy
    _harmless.clear()
    _busy = threading.RLock()


os.register_at_fork(after_in_child=_forget_threads)


class ManagerDiedError(GpuLauncherError):
    """The manager process was killed, and its jobs have ended with it."""


# What the manager says.


@dataclass(frozen=True, slots=True)
class Opened:
    """Jobs can be run. The first thing it says."""

    devices: tuple[Device, ...]
    at_once: int
    """How many jobs could run at the same time, as far as that is known."""
    method: str
    """How they are started: fork or spawn."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many jobs more could be prepared now."""

    count: int


@dataclass(frozen=True, slots=True)
class Started:
    """A job has its devices, and runs."""

    number: int
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a job said with `Gate.say`."""

    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """A job will not run any more, or never did."""

    result: JobResult


@dataclass(frozen=True, slots=True)
class Remarked:
    """A line for the user."""

    text: str
    passing: bool = False
    """Whether it says how things are at the moment, and may be said again."""


@dataclass(frozen=True, slots=True)
class Closed:
    """All jobs have ended, and so does the manager. The last thing it says."""

    error: GpuLauncherError | None = None
    """Why, if that is not what it was asked to do."""


Message = Opened | Wanted | Started | Heard | Ended | Remarked | Closed


@dataclass(frozen=True, slots=True)
class _Begin:
    """The first thing it is told."""

    unsafe: str | None
    """Why jobs must not be forked from the program."""


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing it is told, unless the program ends without a word."""


class RemoteLoop:
    """The program's side of it. One thread may `say` while another one receives."""

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
        self.directory = Path(tempfile.mkdtemp(prefix="gpu-launcher-"))
        """For files of the jobs. It goes with the manager."""
        manager = _Manager(theirs, self._process, self.directory, program, options, command, method, captured)
        prepare()
        _flush()
        with _busy, own_fork(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads; we look for them ourselves
            self._pid: int | None = os.fork()
        if self._pid == 0:
            manager.be(self._channel)
        theirs.close()
        # Right after the fork, for which OpenBLAS and the like shut their threads down.
        names = other_threads(besides=_harmless | {threading.get_native_id()})
        unsafe = f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})"
        self.say(_Begin(unsafe if names else None))

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

    def say(self, what: s.Statement | _Begin) -> None:
        """Offer a job that was wanted, answer one that runs, withdraw one, or say that there are no more.

        Raises ManagerDiedError.
        """
        try:
            with self._saying:
                send(self._channel, what)
        except (ChannelClosedError, OSError):
            raise self._died() from None

    def close(self) -> None:
        """End the manager, and with it every job that still runs. Idempotent. Nothing happens in a forked process."""
        if self._process != os.getpid() or self._pid is None:
            return
        pid, self._pid = self._pid, None
        with contextlib.suppress(OSError):  # the manager has closed it, or does not listen
            send(self._channel, _End(), wait=False)
        # Closing is not enough: whatever was forked from this process has a copy of the descriptor.
        with contextlib.suppress(OSError):  # the manager has closed it
            self._channel.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ChildProcessError):  # raised if the user's program reaps all children itself
            os.waitpid(pid, 0)
        self._channel.close()
        shutil.rmtree(self.directory, ignore_errors=True)

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


def busy() -> contextlib.AbstractContextManager[Any]:
    """While entered, no manager is forked from this program by another thread."""
    return _busy


class _EndedError(Exception):
    """The program wants no more of it, and waits for the end."""


@dataclass
class _Manager:
    """The other side: what happens in the manager's process."""

    channel: socket.socket
    program_process: int
    directory: Path
    program: Program
    options: Options
    command: str
    method: StartMethod
    captured: bool

    def be(self, other_end: socket.socket) -> NoReturn:
        """Be the process."""
        status = 1
        try:
            os.setsid()  # a terminal's Ctrl-C is the program's to interpret
            signal.set_wakeup_fd(-1)
            other_end.close()
            link = _Link(self.channel, self.program_process, self.directory)
            link.finish(self._run(link))
            status = 0
        except _EndedError:
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
            os._exit(status)

    def _run(self, link: _Link) -> Closed:
        server = None
        try:
            begin = link.begin()
            option = self.options.spell("start_method")
            server = ForkServer(
                self.program,
                self.method,
                option=option,
                unsafe=begin.unsafe,
                in_child=link.close_in_child,
                captured=self.captured,
            )
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # only now: the jobs get the handlers of the program
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            display = _Display(link, server.method, self.options)
            run_jobs(
                [],
                server,
                self.options,
                self.directory,
                self.command,
                source=link,
                display=display,
                recorded=False,
            )
        except GpuLauncherError as error:
            return Closed(error)
        finally:
            if server is not None:
                server.close()
        return Closed()


class _Link:
    """The source of the manager's jobs: the program. See `gpu_launcher.jobs.source.JobSource`."""

    def __init__(self, channel: socket.socket, program_process: int, directory: Path) -> None:
        self._channel = channel
        self._program_process = program_process
        self._directory = directory
        self._backlog: deque[Message] = deque()
        """What could not be sent yet. The program is never waited for: it may be busy for any time."""
        self._epoll = select.epoll()
        self._epoll.register(channel, select.EPOLLIN)
        self._program: int | None = None
        with contextlib.suppress(OSError):  # a kernel before 5.3, or a container that forbids it: there is `tick`
            self._program = os.pidfd_open(program_process)
            self._epoll.register(self._program, select.EPOLLIN)

    def begin(self) -> _Begin:
        try:
            message, _ = receive(self._channel)
        except ChannelClosedError:
            self._vanish()
        if isinstance(message, _End):
            raise _EndedError
        assert isinstance(message, _Begin), message
        self._channel.setblocking(False)
        return message

    def finish(self, closed: Closed) -> None:
        """Say the last word, and wait until the program has heard it all: until then it needs the jobs' files."""
        self._channel.setblocking(True)
        with contextlib.suppress(ChannelClosedError):
            for message in (*self._backlog, closed):
                send(self._channel, message)
            # Its end of the channel need not close when it ends: what it has forked may have that, too.
            while os.getppid() == self._program_process:
                if select.select([self._channel], [], [], 1.0)[0]:
                    receive(self._channel)  # what it said before it knew, and in the end that it is closed

    def fileno(self) -> int:
        return self._epoll.fileno()

    def receive(self) -> list[s.Statement]:
        self.tick()
        statements: list[s.Statement] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    message, _ = receive(self._channel)
                except ChannelClosedError:
                    self._vanish()
                if isinstance(message, _End):
                    raise _EndedError
                statements.append(message)
        return statements

    def ask(self, count: int) -> None:
        self.send(Wanted(count))

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        self.send(Started(job.number, devices))

    def said(self, number: int, what: Any) -> None:
        self.send(Heard(number, what))

    def ended(self, result: JobResult) -> None:
        with contextlib.suppress(OSError):
            (self._directory / f"{result.number}.report").unlink()
        self.send(Ended(result))

    def tick(self) -> None:
        if os.getppid() != self._program_process:
            self._vanish()
        waited = bool(self._backlog)
        # Closed: `receive` will see it, and what the program had still said.
        with contextlib.suppress(BlockingIOError, ChannelClosedError):
            while self._backlog:
                send(self._channel, self._backlog[0], wait=False)
                self._backlog.popleft()
        if waited != bool(self._backlog):
            self._listen()

    def send(self, message: Message) -> None:
        """Say it as soon as the program listens."""
        waited = bool(self._backlog)
        self._backlog.append(message)
        if not waited:
            self.tick()
            self._listen()

    def _listen(self) -> None:
        """Be readable also when there is room for what waits."""
        self._epoll.modify(self._channel, select.EPOLLIN | (select.EPOLLOUT if self._backlog else 0))

    def _vanish(self) -> NoReturn:
        """The program has ended. Nobody waits for anything, and all that the manager has started ends with it."""
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(0)

    def close_in_child(self) -> None:
        self._epoll.close()
        self._channel.close()
        if self._program is not None:
            os.close(self._program)


class _Display:
    """Tells the program what a user should know. See `gpu_launcher.jobs.events.Progress`."""

    def __init__(self, link: _Link, method: str, options: Options) -> None:
        self._link = link
        self._method = method
        self._options = options

    def handle(self, event: Event) -> None:
        match event:
            case SweepStarted(devices=devices):
                at_once = limits(self._options, len(devices), usable_cpus()).at_once
                self._link.send(Opened(devices, at_once, self._method))
            case Notice(text=text):
                self._link.send(Remarked(text))
            case JobWaiting(reason=reason) if reason:
                self._link.send(Remarked(f"waiting for devices: {reason}", passing=True))

    def tick(self, now: float) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing was opened."""


def _flush() -> None:
    """Whatever is in a buffer at the fork would be written by every child as well."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    flush_c_streams()
