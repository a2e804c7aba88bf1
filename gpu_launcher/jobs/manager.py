"""The process that runs the jobs of a program, for which that is their source. See `jobs.remote`."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpu_launcher.devices import usable_cpus
from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs import remarks
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Event, JobEnded, JobStarted, JobWaiting, Notice, SweepStarted
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.manager_messages import (
    Begin,
    Closed,
    End,
    Ended,
    Heard,
    Message,
    Opened,
    Remarked,
    Started,
    Wanted,
)
from gpu_launcher.jobs.sweep import Options, limits, run_jobs
from gpu_launcher.model import Device
from gpu_launcher.processes.fork_server_client import ForkServer, StartMethod
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.linux import Ending
from gpu_launcher.processes.messages import ChannelClosedError, receive, send
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.worker import Program


class _EndedError(Exception):
    """The program wants no more of it, and waits for the end."""


@dataclass
class Manager:
    """The other side: what happens in the manager's process."""

    channel: socket.socket
    program_process: int
    directory: Path
    program: Program
    options: Options
    command: str
    method: StartMethod
    captured: bool
    generators: Generators
    open_files: OpenFiles
    """Of the program."""

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
                generators=self.generators,
                open_files=self.open_files,
            )
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # only now: the jobs get the handlers of the program
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
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
                program=self.program_process,
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
        self._program_ends = Ending(program_process)

    def begin(self) -> Begin:
        try:
            message, _ = receive(self._channel)
        except ChannelClosedError:
            self._vanish()
        if isinstance(message, End):
            raise _EndedError
        assert isinstance(message, Begin), message
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
                if isinstance(message, End):
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
        if os.getppid() != self._program_process or self._program_ends:
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
        self._program_ends.close()
        if self._program is not None:
            os.close(self._program)


class _Display:
    """Tells the program what a user should know. See `gpu_launcher.jobs.events.Progress`."""

    def __init__(self, link: _Link, method: str, options: Options) -> None:
        self._link = link
        self._method = method
        self._options = options
        self._waiting: JobWaiting | None = None
        """As long as it is so."""
        self._waits = 0
        self._said_at = 0.0

    def handle(self, event: Event) -> None:
        match event:
            case SweepStarted(devices=devices):
                at_once = limits(self._options, len(devices), usable_cpus()).at_once
                self._link.send(Opened(devices, at_once, self._method))
            case Notice(text=text):
                self._link.send(Remarked(text))
            case JobWaiting(time=now, reason=reason):
                self._waiting = event if reason else None
                self._waits += 1
                self._remark(now)
            case JobStarted(number=number) | JobEnded(number=number):
                if self._waiting is not None and self._waiting.number == number:
                    self._waiting = None

    def tick(self, now: float) -> None:
        """Say again what was perhaps not passed on, so soon after something else was said."""
        if now - self._said_at >= remarks.EVERY:
            self._remark(now)

    def _remark(self, now: float) -> None:
        if self._waiting is not None:
            self._said_at = now
            text = f"waiting for devices: {self._waiting.reason}"
            self._link.send(Remarked(text, passing=True, about=f"{os.getpid()} {self._waits}"))

    def close(self) -> None:
        """Nothing was opened."""
