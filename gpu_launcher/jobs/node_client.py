"""The head's side of a node: starting it, talking to it, and ending it. See `jobs.node` for the other side.

The program forks the node before it has any thread of ours for that node, and the node forks the fork server. The
program is the head: the source of the node's jobs, at the other end of a socket. The node asks it for jobs, and tells
it what becomes of them.

Theory of operation, threads. A fork copies only the thread that forks. A lock that another thread holds at that moment
stays locked in the child for ever. So by default, if other threads run when a node is forked, its jobs are spawned
instead of forked. But a program may have several executors, and the thread of one runs while the node of another is
forked. So our threads keep a protocol. Most of the time they hold no lock that matters: each is a `harmless_thread`.
They do work that may take locks, such as pickling, only while they hold `busy()`. A fork holds it, too (`_at_rest`), so
it finds none of them at such work. User code (`calling_back`) does not hold `busy()`, because it may itself wait for
the fork. A fork waits a moment for such code to return; then its thread counts as any other thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_launcher.errors import NodeDiedError
from gpu_launcher.jobs import notice_log
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import Notice
from gpu_launcher.jobs.node import LogFile, Node
from gpu_launcher.jobs.node_messages import Begin, BeginRun, Closed, End, HeadLives, Message, NodeReady, Opened
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.processes.forking import flush_all, fork_child, tqdm_monitors_paused
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.linux import ends_within, other_threads
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send
from gpu_launcher.processes.pickling import NOTHING, main_namespace, prepare
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.signals import uninterrupted
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod

_harmless: set[int] = set()
"""Native ids of our threads that hold no lock that a forked process needs, unless they hold `_busy`."""

_calling: set[int] = set()
"""Native ids of those harmless threads that run user code now, which may hold any lock. They do not hold `_busy`."""

_busy = threading.RLock()
"""Held by a harmless thread that may hold other locks, and by a thread that forks a node."""

MAX_MESSAGES = 64
"""Maximum number of messages that are received together, so that the head also attends to its source and display."""

FORK_WAIT_SECONDS = 1.0
"""Seconds that a fork waits for user code in our threads to return. That code may itself be waiting for the fork."""


def _forget_threads() -> None:
    """Reset what is known about threads, in a forked process, which has only one."""
    global _busy
    _harmless.clear()
    _calling.clear()
    _busy = threading.RLock()


os.register_at_fork(after_in_child=_forget_threads)


class LocalNode:
    """A node of this program on this machine. One thread may `say` while another one receives."""

    _pid: int | None = None
    """The node's process id, until the process was waited for."""
    _scratch: Scratch | None = None
    was_killed = False
    """Whether `close` killed the node, so that the processes below it end by themselves soon after."""
    _process = -1
    """Process id of the program. A fork of it must not end the node."""

    def __init__(
        self,
        program: Program,
        *,
        method: StartMethod = "auto",
        option: str = "start_method",
        captured: bool = True,
        keep: tuple[int, ...] = (),
        log_file: LogFile = as_proposed,
        open_files: OpenFiles | None = None,
    ) -> None:
        """Start the node. Call `wait_until_ready` to learn whether the fork server could be started.

        `program` is run in each job. `option` is the name of the user's option for the `method`. The output of jobs is
        `captured` until they have a log; otherwise it goes where this process's does. The node's processes keep the
        descriptors `keep` open. `log_file` chooses the log of a job, in the node. `open_files` are this program's open
        files; by default they are listed now.
        """
        self._channel, theirs = channel()
        self._process = os.getpid()
        self._saying = threading.Lock()
        self.early: list[Message] = []
        """Messages that arrived before the pool of a run was open."""
        flush_all()
        node = Node(
            channel=theirs,
            program_process=self._process,
            scratch=None if self._scratch is None else self._scratch.path,
            program=program,
            method=method,
            option=option,
            captured=captured,
            keep=keep,
            log_file=log_file,
            generators=Generators(),
            open_files=OpenFiles.of_this_process(besides=keep) if open_files is None else open_files,
        )
        with tqdm_monitors_paused():
            harmless, calling = self._fork(node)
            theirs.close()
            # Right after the fork: OpenBLAS and similar libraries end their threads for a fork.
            names = other_threads(besides=harmless | {threading.get_native_id()})
        unsafe = f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})"
        if calling:
            unsafe += ", and one of them calls back what was given to add_done_callback, or a handler of log messages"
        self.unsafe = unsafe if names else None
        """Why jobs must not be forked from this program."""
        self.say(Begin(self.unsafe))

    def _fork(self, node: Node) -> tuple[set[int], bool]:
        """Fork the node. Returns which threads are harmless, and whether another one of ours runs user code."""
        with _at_rest() as (harmless, calling), uninterrupted() as signals:

            def be_the_node() -> None:
                signals.end_in_child()
                node.be(self._channel)

            self._pid = fork_child(be_the_node, internal=True)
        return harmless, calling

    def wait_until_ready(self) -> None:
        """Wait until the fork server runs. Raises the error that prevents that, such as OptionError."""
        while not isinstance(message := self.receive(), NodeReady):
            self._refuse(message)

    def open(self) -> Opened:
        """Wait until the pool of a run is open. Raises the error that prevents that, such as PoolDirectoryError."""
        while True:
            match message := self.receive():
                case Opened():
                    return message
                case NodeReady():
                    pass
                case Closed():
                    self._refuse(message)
                case _:
                    self.early.append(message)

    def _refuse(self, message: Message) -> None:
        assert isinstance(message, Closed), message
        self.close()
        raise message.error or NodeDiedError("the process that starts jobs has ended")

    @property
    def is_ours(self) -> bool:
        """Whether this process started the node. False in a fork of that process."""
        return self._process == os.getpid()

    @property
    def is_running(self) -> bool:
        """Whether the node was started and has not been closed."""
        return self._pid is not None

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is a message to receive."""
        return self._channel.fileno()

    def receive(self) -> Message:
        """Wait for the node's next message. Raises NodeDiedError."""
        try:
            message: Message = receive(self._channel)[0]
        except (ChannelClosedError, OSError):  # OSError: `close` was called meanwhile
            raise self._died() from None
        return message

    def receive_ready(self) -> list[Message]:
        """Return some of the messages that have arrived, at least one if `fileno` is readable. Raises NodeDiedError."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        messages: list[Message] = []
        while len(messages) < MAX_MESSAGES and poll.poll(0):
            try:
                messages.append(self.receive())
            except NodeDiedError:
                if not messages:
                    raise
                break  # the next call raises it
        return messages

    def tick(self) -> None:
        """Do nothing: this node needs no sign that the head lives."""

    def say(self, what: s.Statement | Begin | BeginRun | HeadLives, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message to the node, such as the offer of a job that it wanted. Raises NodeDiedError.

        An offer may bring the descriptor of the job's end of a channel.
        """
        try:
            with self._saying:
                send(self._channel, what, descriptors)
        except (ChannelClosedError, OSError):
            raise self._died() from None

    def close(self, seconds: float | None = None) -> None:
        """End the node, and with it every job that still runs. Idempotent. Does nothing in a forked process.

        The node is killed if it has not ended after `seconds`.

        If a signal handler raises meanwhile, such as KeyboardInterrupt, the node is killed, and the exception is raised
        at the end.
        """
        if not self.is_ours:
            return
        raised: BaseException | None = None
        while self._pid is not None:
            try:
                self._end(self._pid, seconds)
            except BaseException as error:
                raised = error
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
        if raised is not None:
            raise raised

    def _end(self, pid: int, seconds: float | None) -> None:
        """End the node. If a signal handler interrupts this, it can be called again."""
        with contextlib.suppress(OSError):  # the node has closed it, or does not listen
            send(self._channel, End(), wait=False)
        # Closing is not enough: processes forked from this one have a copy of the descriptor.
        with contextlib.suppress(OSError):  # the node has closed it
            self._channel.shutdown(socket.SHUT_RDWR)
        if seconds is not None and not ends_within(pid, seconds):
            os.kill(pid, signal.SIGKILL)
            self.was_killed = True
        with contextlib.suppress(ChildProcessError):  # raised if the user's program reaps all children itself
            os.waitpid(pid, 0)
        self._channel.close()
        if self._scratch is not None:
            self._scratch.remove()
        self._pid = None

    def __del__(self) -> None:
        """Close the node, in case a signal handler kept its owner from closing it."""
        self.close()

    def _died(self) -> NodeDiedError:
        return NodeDiedError("the process that starts jobs was killed (`dmesg` may know why), and its jobs with it")


class RemoteLoop(LocalNode):
    """A node with one run, for a program that does other things meanwhile and logs what the user should know."""

    tick_seconds = math.inf
    """Maximum seconds between two calls of `receive_ready`."""
    shares_files = True
    """Whether the jobs can read files of this program that are not the user's."""
    moves_jobs = False
    """Whether a job that is interrupted may run again, on another node."""

    def __init__(
        self,
        program: Program,
        options: Options,
        command: str,
        *,
        method: StartMethod = "auto",
        captured: bool = False,
        keep: tuple[int, ...] = (),
    ) -> None:
        """Start the node and the run. Call `open` to learn whether that succeeded.

        `program` is run in each job. `command` names this program to others who wait for devices. The output of jobs is
        `captured` for the messages of failures; otherwise it goes where this process's does. `keep` is as for
        `LocalNode`.
        """
        self.known: Mapping[str, object] = dict(main_namespace())
        """Contents of the jobs' `__main__`, by name."""
        self._scratch = Scratch()
        self.directory = self._scratch.path
        """Directory for the jobs' files. It is removed when the node ends."""
        prepare()
        super().__init__(program, method=method, option=options.spell("start_method"), captured=captured, keep=keep)
        self.say(BeginRun(portable(options), ReportFiles(self.directory), command, last=True))

    def open(self) -> Opened:
        """Wait until jobs can run. Raises the error that prevents that, such as OptionError or PoolDirectoryError."""
        opened = super().open()
        for message in self.early:
            if isinstance(message, Notice):
                notice_log.log(message.text)
        if opened.method == "spawn":
            self.known = NOTHING
        return opened


@contextlib.contextmanager
def harmless_thread() -> Iterator[None]:
    """Declare that the calling thread holds no lock that a forked process needs, unless it holds `busy()`.

    Inside the block, the thread must hold `busy()` for work that may take such a lock, such as pickling objects of the
    user.
    """
    me = threading.get_native_id()
    _harmless.add(me)
    try:
        yield
    finally:
        _harmless.discard(me)


@contextlib.contextmanager
def calling_back() -> Iterator[None]:
    """Declare that a harmless thread runs user code in this block, which may take any lock and wait for anything.

    A node that is forked meanwhile waits at most `FORK_WAIT_SECONDS` for the block to end. After that the thread counts
    as a reason not to fork jobs.
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
    """Hold `_busy` while the program forks, so that no harmless thread takes it or begins to run user code.

    Yields the threads that are harmless now, and whether others of ours still run user code.
    """
    until = time.monotonic() + FORK_WAIT_SECONDS
    while True:
        with _busy:
            calling = _calling - {threading.get_native_id()}
            if not calling or time.monotonic() >= until:
                yield _harmless - calling, bool(calling)
                return
        time.sleep(0.001)


def busy() -> contextlib.AbstractContextManager[Any]:
    """Return the lock that keeps other threads from forking a node."""
    return _busy
