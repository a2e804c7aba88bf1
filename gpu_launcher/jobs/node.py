"""The node: the process that runs the jobs of a program, its head. See `jobs.node_client` for the head's side.

Theory of operation. The head forks the node before it has threads of ours. The node is single-threaded, so it can fork
at any time. It has a session of its own, so a terminal's Ctrl-C does not reach it. It forks the fork server, and then
runs one job loop for each run that the head begins. The job loop's source is the head, at the other end of a socket:
the node asks for jobs when it has room, and reports what becomes of them.

The node never waits for the head. Messages that the head does not read are kept here, and everything else continues:
while the head is suspended (Ctrl-Z) or busy, no more jobs are offered, but the devices of jobs that end become free.
When the head ends, for whatever reason, the node ends at once, and with it everything that it has started.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import shutil
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from gpu_launcher.allocation.device_watch import links_among
from gpu_launcher.allocation.feasibility import refuse
from gpu_launcher.allocation.request_queue import RequestQueue
from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.descriptors import has_room, is_readable
from gpu_launcher.devices import select_devices, usable_cpus
from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs import notice_log
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import JobStarted, JobWaiting, Notice
from gpu_launcher.jobs.loop import JobLoop
from gpu_launcher.jobs.node_messages import (
    Begin,
    BeginRun,
    Closed,
    End,
    Ended,
    HeadLives,
    Message,
    NodeReady,
    Opened,
    Wanted,
)
from gpu_launcher.jobs.sweep import limits
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.processes.fork_server_client import ForkServer
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.linux import ProcessEnding
from gpu_launcher.processes.messages import ChannelClosedError, DescriptorsLostError, JobPrepared, receive, send
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.worker import Program
from gpu_launcher.text import one_line
from gpu_launcher.users import this_user
from gpu_launcher.validation import StartMethod
from gpu_launcher.wording import device_names

_log = get_logger("jobs.node")

LogFile = Callable[[int, JobPrepared], tuple[str, list[str]]]
"""See `jobs.directory.LogFiles.claim`."""


DESCRIPTORS_PER_JOB = 4
"""Descriptors of the node that starting a job may take: the job's channel, two for its process, and a lease."""
SPARE_DESCRIPTORS = 8
"""Descriptors that are kept free for everything else that a node opens."""


class _EndedError(Exception):
    """The head has asked the node to end, and waits until it has."""


@dataclass
class Node:
    """The node process: what it inherits from the program, and how it runs."""

    channel: socket.socket
    program_process: int
    scratch: Path | None
    """A directory to remove when the node ends."""
    program: Program
    method: StartMethod
    option: str
    """The name of the user's option for the start method."""
    captured: bool
    keep: tuple[int, ...]
    log_file: LogFile
    generators: Generators
    open_files: OpenFiles
    """The open files of the program."""

    def be(self, other_end: socket.socket) -> None:
        """Run as the node process. Returns when the head asks the node to end."""
        try:
            os.setsid()  # the head alone gets a terminal's Ctrl-C, and decides what it means
            signal.set_wakeup_fd(-1)
            gc.freeze()  # the collector would write to pages that all processes share, and so copy them
            other_end.close()
            set_role("node")
            _log.debug("started by process %d", self.program_process)
            self._serve(_Link(self.channel, self.program_process, self.scratch))
        except _EndedError:
            pass
        finally:
            if self.scratch is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def _serve(self, link: _Link) -> NoReturn:
        try:
            server = self._start_server(link)
        except GpuLauncherError as error:
            link.send(Closed(error))
            while True:
                link.next_run()
        try:
            _leave_signals_to_the_head()  # after the fork: the jobs keep the handlers of the program
            link.send(NodeReady(server.method))
            while True:
                run = link.next_run()
                closed = self._run(run, server, link)
                if run.last:
                    server.close()
                link.send(closed)
        finally:
            server.close()

    def _start_server(self, link: _Link) -> ForkServer:
        return ForkServer(
            self.program,
            self.method,
            option=self.option,
            unsafe=link.begin().unsafe,
            in_child=link.close_in_child,
            captured=self.captured,
            keep=self.keep,
            generators=self.generators,
            open_files=self.open_files,
        )

    def _run(self, run: BeginRun, server: ForkServer, link: _Link) -> Closed:
        link.begin_run(run)
        try:
            with contextlib.ExitStack() as cleanup:
                loop = self._open(run, server, link, cleanup)
                loop.run()
        except GpuLauncherError as error:
            _log.error("the run ended: %s", error)
            return Closed(error)
        _log.info("the run ended%s", ", stopped" if loop.stopped else "")
        return Closed(None, loop.stopped)

    def _open(self, run: BeginRun, server: ForkServer, link: _Link, cleanup: contextlib.ExitStack) -> JobLoop:
        """Open the pool until `cleanup` is closed, and return the job loop. Raises OptionError, PoolDirectoryError."""
        options, command = run.options, run.command
        environ = os.environ if options.environ is None else options.environ
        selection = select_devices(options.devices, environ, option=options.spell("devices"))
        devices = tuple(replace(device, node=run.node) for device in selection.devices)
        _log.info("run of %s on %s", command, device_names(devices))
        if options.request is not None:
            refuse(options.request, devices, options.spell)
            if run.term is not None:
                run.term.refuse(options.request, options.spell)

        def notice(text: str) -> None:
            link.send(Notice(time.monotonic(), text))

        ledger = cleanup.enter_context(FileLedger(resolve_pool_directory(options.pool_dir), warn=notice))
        most = replace(limits(options, len(devices), usable_cpus()), listed=run.listed, term=run.term)
        link.send(Opened(devices, most.at_once, server.method))
        needs_none = options.request is not None and options.request.gpus == 0
        for text in [*(() if needs_none else selection.notices), *server.notices]:
            notice(text)
        queue = RequestQueue(
            devices,
            ledger,
            busy_memory=options.busy_memory,
            tell=notice,
            clock=time.monotonic,
            links=links_among(devices, options.request),
            program=self.program_process,
            on_fault=lambda device, fault: notice(f"{device.label} {fault}; it is set aside"),
        )
        cleanup.callback(queue.close)
        return JobLoop(
            link,
            limits=most,
            server=server,
            queue=queue,
            # The owner of the leases is the head, because that is the process that users know and can stop.
            owner=lambda job: this_user(f"{command} #{job.number} {job.label}".rstrip(), self.program_process),
            clock=time.monotonic,
            report_path=run.reports.path,
            log_file=self.log_file,
            title=lambda job: one_line(f"#{job.number} {command} {job.label}".rstrip()),
            device_environment=replace(options.device_environment, by_uuid=selection.by_uuid),
            failures=options.failures,
            cap=options.cap,
        )


def _leave_signals_to_the_head() -> None:
    """Ignore signals that ask to end: systemd sends them to all processes, and the head decides about them.

    A handler that does nothing ignores them here, but not in programs that are executed: these get the defaults.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: None)


class _Link:
    """The source of the node's jobs: the head. See `gpu_launcher.jobs.loop.LoopSource`."""

    def __init__(self, channel: socket.socket, program_process: int, scratch: Path | None) -> None:
        self._channel = channel
        self._program_process = program_process
        self._scratch = scratch
        self._run: BeginRun | None = None
        self._heard = 0.0
        """When the head was last heard."""
        self._backlog: deque[Message] = deque()
        """Messages that could not be sent yet. The node never waits for the head, which may be busy or suspended."""
        self._full = False
        """Whether the socket had no room for the first message of the backlog."""
        self._channels: dict[int, int] = {}
        """The jobs' ends of channels between jobs and the head, by job number."""
        self._to_request = 0
        """How many jobs the loop wants that the head was not asked for yet."""
        self._expected = 0
        """How many jobs the head was asked for and has not offered yet."""
        self._inbox: deque[Any] = deque()
        """Messages from the head that have not been handled."""
        self._waiting: JobWaiting | None = None
        """The latest wait of a job that still waits for devices."""
        self._repeat_at = 0.0
        """When to send it again. The head drops waits that follow each other too quickly."""
        self._epoll = select.epoll()
        self._epoll.register(channel, select.EPOLLIN)
        self._program: int | None = None
        with contextlib.suppress(OSError):  # a kernel before 5.3, or a container that forbids it: `tick` looks
            self._program = os.pidfd_open(program_process)
            self._epoll.register(self._program, select.EPOLLIN)
        self._program_ends = ProcessEnding(program_process)

    def begin(self) -> Begin:
        """Wait for the first message."""
        try:
            message, _ = receive(self._channel)
        except ChannelClosedError:
            self._vanish()
        if isinstance(message, End):
            raise _EndedError
        assert isinstance(message, Begin), message
        self._channel.setblocking(False)
        return message

    def next_run(self) -> BeginRun:
        """Wait for the next run, and send the rest of the backlog meanwhile."""
        while True:
            self._hear()
            while self._inbox:
                message = self._inbox.popleft()
                if isinstance(message, BeginRun):
                    return message
                # Other messages are about the previous run: the head sent them before it knew that it was over.
            # Forks of the head may keep its end of the channel open when the head has ended. So look from time to time.
            self._epoll.poll(1.0)

    def begin_run(self, run: BeginRun) -> None:
        """Serve this run from now on."""
        self._run = run
        self._heard = time.monotonic()
        self._to_request = self._expected = 0
        self._waiting = None

    def fileno(self) -> int:
        return self._epoll.fileno()

    def receive(self) -> list[s.Statement]:
        self._hear()
        statements = list(self._inbox)
        self._inbox.clear()
        return statements

    def _hear(self) -> None:
        self.tick()
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    message, descriptors = receive(self._channel)
                except ChannelClosedError:
                    self._vanish()
                except DescriptorsLostError as lost:
                    if not isinstance(lost.message, s.Offer):
                        raise
                    self._expected = max(0, self._expected - 1)
                    self._inbox.append(lost.message)  # without its channel the job cannot run, so it is cancelled
                    why = "could not be started: its launching program has too many open files (`ulimit -n`)"
                    self._inbox.append(s.Cancel(lost.message.job.number, why))
                    continue
                if isinstance(message, End):
                    raise _EndedError
                if isinstance(message, HeadLives):
                    self._heard = max(self._heard, message.time)
                    continue
                if isinstance(message, s.Offer):
                    self._expected = max(0, self._expected - 1)
                if descriptors:
                    (channel,) = descriptors
                    message = s.Offer(replace(message.job, channel=channel))
                    self._channels[message.job.number] = channel
                self._inbox.append(message)

    def request_jobs(self, count: int) -> None:
        self._to_request += count
        self._request()

    def _request(self) -> None:
        """Ask the head for as many wanted jobs as there are descriptors for."""
        count = min(self._to_request, self._affordable())
        if count > 0:
            self._to_request -= count
            self._expected += count
            self.send(Wanted(count))

    def _affordable(self) -> int:
        """Return for how many more jobs there are descriptors. An offer may bring one, and a job's start takes some."""
        assert self._run is not None
        if self._run.shown:  # these jobs have no channels, and the loop postpones jobs that it cannot start
            return self._to_request
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        jobs = len(self._channels) + self._expected
        if DESCRIPTORS_PER_JOB * (jobs + self._to_request) + 64 <= limit:  # surely enough, without counting
            return self._to_request
        free = limit - sum(1 for _ in Path("/proc/self/fd").iterdir()) - SPARE_DESCRIPTORS
        return max(free // DESCRIPTORS_PER_JOB - self._expected, 0 if jobs else 1)

    def tick(self) -> None:
        if os.getppid() != self._program_process or self._program_ends:
            self._vanish()
        if self._is_cut_off():
            _log.error("the head has been silent for %.0f s", time.monotonic() - self._heard)
            self._vanish()
        waited = bool(self._backlog)
        # If the channel is closed, `receive` will notice, after the last messages of the head.
        with contextlib.suppress(BlockingIOError, ChannelClosedError):
            while self._backlog and (not self._full or has_room(self._channel)):
                self._full = True
                send(self._channel, self._backlog[0], wait=False)
                self._full = False
                self._backlog.popleft()
        if waited != bool(self._backlog):
            self._listen()
        if self._to_request:  # more descriptors may be free now
            self._request()
        if self._waiting is not None and time.monotonic() >= self._repeat_at:
            self.send(self._waiting)

    def _is_cut_off(self) -> bool:
        """Whether a head on another machine has been silent for too long, and all its messages are read."""
        if self._run is None or self._run.silence is None or time.monotonic() - self._heard <= self._run.silence:
            return False
        return not is_readable(self._channel)

    def send(self, message: Message) -> None:
        """Send a message as soon as the head has room for it."""
        match message:
            case JobWaiting():
                logged = self._run is not None and not self._run.shown
                self._waiting = message if message.reason and logged else None
                self._repeat_at = time.monotonic() + notice_log.REPEAT_SECONDS
            case JobStarted(number=number):
                self._forget(number)  # the job's process has a copy of the channel, and will not be started again
            case Ended(result):
                self._forget(result.number)
                if self._scratch is not None:
                    assert self._run is not None
                    with contextlib.suppress(OSError):
                        self._run.reports.path(result.number).unlink()
        waited = bool(self._backlog)
        self._backlog.append(message)
        if not waited:
            self.tick()
            self._listen()

    def _forget(self, number: int) -> None:
        """Forget that a job waits, and close its channel."""
        if self._waiting is not None and self._waiting.number == number:
            self._waiting = None
        if number in self._channels:
            os.close(self._channels.pop(number))

    def _listen(self) -> None:
        """Make `fileno` also readable when there is room for the backlog."""
        self._epoll.modify(self._channel, select.EPOLLIN | (select.EPOLLOUT if self._backlog else 0))

    def _vanish(self) -> NoReturn:
        """End the node at once, because the program has ended. Everything that the node has started ends with it."""
        _log.warning("the program ended: ending everything")
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        os._exit(0)

    def close_in_child(self) -> None:
        self._epoll.close()
        self._channel.close()
        for channel in self._channels.values():
            os.close(channel)
        self._program_ends.close()
        if self._program is not None:
            os.close(self._program)
