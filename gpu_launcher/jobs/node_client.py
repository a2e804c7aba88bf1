"""The head's side of a node: starting it, talking to it, and ending it. See `jobs.node` for the other side.

The node is forked from the program before that has any thread of ours, and forks the fork server. The program is the
head: the source of the node's jobs, at the other end of a socket. It is asked for jobs, and told what becomes of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_launcher.errors import NodeDiedError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.node import LogFile, Node
from gpu_launcher.jobs.node_messages import Begin, BeginRun, Closed, End, Message, NodeReady, Opened, Remarked
from gpu_launcher.jobs.reports import ReportFiles
from gpu_launcher.jobs.scratch import Scratch
from gpu_launcher.jobs.sweep import Options, portable
from gpu_launcher.processes.forking import flush_all, fork_child, tqdm_monitors_paused
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.linux import other_threads
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send
from gpu_launcher.processes.pickling import NOTHING, main_namespace, prepare
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.signals import uninterrupted
from gpu_launcher.processes.worker import Program
from gpu_launcher.validation import StartMethod

_harmless: set[int] = set()
"""Native ids of threads that hold no lock which a forked process would need, except while they are `_busy`."""

_calling: set[int] = set()
"""Of these, the threads that are in the user's code, which may have taken any lock. They enter it when not `_busy`."""

_busy = threading.RLock()

FORK_WAIT_SECONDS = 1.0
"""Seconds that a fork waits for user code in our threads. The user code may itself be waiting for the fork."""


def _forget_threads() -> None:
    """Reset what is known of threads, in a forked process, which has only one."""
    global _busy
    _harmless.clear()
    _calling.clear()
    _busy = threading.RLock()


os.register_at_fork(after_in_child=_forget_threads)


class LocalNode:
    """The node of this program on this machine. One thread may `say` while another one receives."""

    _pid: int | None = None
    """The node's process, until it was waited for."""
    _scratch: Scratch | None = None
    _process = -1
    """The program, which alone may end the node."""

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
        """Start the node; `wait_until_ready` then says whether it could.

        `program` is run in each job, `option` is what the user writes for the choice of the `method`. Unless the jobs'
        output is `captured` until they have a log, it goes where this process's does. The node's processes keep the
        descriptors `keep` open; `log_file` says in the node where a job logs, `open_files` are this program's if not
        those that it has now.
        """
        self._channel, theirs = channel()
        self._process = os.getpid()
        self._saying = threading.Lock()
        self.early: list[Message] = []
        """Messages that came before the pool of a run was open."""
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
            # Right after the fork, for which OpenBLAS and the like shut their threads down.
            names = other_threads(besides=harmless | {threading.get_native_id()})
        unsafe = f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})"
        if calling:
            unsafe += ", and one of them calls back what was given to add_done_callback, or a handler of log messages"
        self.unsafe = unsafe if names else None
        """Why jobs must not be forked from this program."""
        self.say(Begin(self.unsafe))

    def _fork(self, node: Node) -> tuple[set[int], bool]:
        """Returns which threads are harmless, and whether one of them calls the user's code."""
        with _at_rest() as (harmless, calling), uninterrupted() as signals:

            def be_the_node() -> None:
                signals.end_in_child()
                node.be(self._channel)

            self._pid = fork_child(be_the_node, internal=True)
        return harmless, calling

    def wait_until_ready(self) -> None:
        """Wait until the fork server runs. Raises what keeps it from that, such as OptionError."""
        while not isinstance(message := self.receive(), NodeReady):
            self._refuse(message)

    def open(self) -> Opened:
        """Wait until the pool of a run is open. Raises what keeps it from that, such as PoolDirectoryError."""
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
        """Whether the node has been started and not closed."""
        return self._pid is not None

    def fileno(self) -> int:
        """Readable when there is something to receive."""
        return self._channel.fileno()

    def receive(self) -> Message:
        """Wait for the next message of the node. Raises NodeDiedError."""
        try:
            message: Message = receive(self._channel)[0]
        except (ChannelClosedError, OSError):  # OSError: `close` was called meanwhile
            raise self._died() from None
        return message

    def say(self, what: s.Statement | Begin | BeginRun) -> None:
        """Begin a run, offer a job that was wanted, answer one, withdraw one, or say that there are no more.

        Raises NodeDiedError.
        """
        self._send(what)

    def offer_with_channel(self, job: Job) -> socket.socket:
        """Offer a job that was wanted; returns this program's end of a channel to the job's process.

        What the job says is there before its end is known: read the channel until it is empty when the job has ended.
        Raises NodeDiedError.
        """
        mine, theirs = channel()
        with theirs:
            try:
                self._send(s.Offer(job), (theirs.fileno(),))
            except BaseException:
                mine.close()
                raise
        return mine

    def _send(self, what: s.Statement | Begin | BeginRun, descriptors: tuple[int, ...] = ()) -> None:
        try:
            with self._saying:
                send(self._channel, what, descriptors)
        except (ChannelClosedError, OSError):
            raise self._died() from None

    def close(self) -> None:
        """End the node, and with it every job that still runs. Idempotent. Nothing happens in a forked process.

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
        """End the node. A signal handler may interrupt this anywhere; it can then be called again."""
        with contextlib.suppress(OSError):  # the node has closed it, or does not listen
            send(self._channel, End(), wait=False)
        # Closing is not enough: whatever was forked from this process has a copy of the descriptor.
        with contextlib.suppress(OSError):  # the node has closed it
            self._channel.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ChildProcessError):  # raised if the user's program reaps all children itself
            os.waitpid(pid, 0)
        self._channel.close()
        if self._scratch is not None:
            self._scratch.remove()
        self._pid = None

    def __del__(self) -> None:
        """Close the node if a signal handler kept the owner from that."""
        self.close()

    def _died(self) -> NodeDiedError:
        return NodeDiedError("the process that starts jobs was killed (`dmesg` may know why), and its jobs with it")


class RemoteLoop(LocalNode):
    """A node with one run, for a program that does other things meanwhile and logs what the user should know."""

    def __init__(
        self,
        program: Program,
        options: Options,
        command: str,
        *,
        method: StartMethod = "auto",
        captured: bool = False,
    ) -> None:
        """Start the node and the run; `open` then says whether that went well.

        `program` is run in each job, `command` names this program to others who wait for devices. Unless the jobs'
        output is `captured` for their failures' messages, it goes where this process's does.
        """
        self.known: Mapping[str, object] = dict(main_namespace())
        """Contents of the jobs' `__main__`, by name."""
        self._scratch = Scratch()
        self.directory = self._scratch.path
        """Directory for files of the jobs. It is removed when the node ends."""
        prepare()
        super().__init__(program, method=method, option=options.spell("start_method"), captured=captured)
        self.say(BeginRun(portable(options), ReportFiles(self.directory), command, last=True))

    def open(self) -> Opened:
        """Wait until jobs can be run. Raises what keeps them from it, such as OptionError or PoolDirectoryError."""
        opened = super().open()
        self.remarks = [message for message in self.early if isinstance(message, Remarked)]
        """Lines for the user that came before the pool was open."""
        if opened.method == "spawn":
            self.known = NOTHING
        return opened


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
    """Keep harmless threads from becoming `busy` or calling user code while the program forks.

    Returns those that are harmless now, and whether there are others which call back.
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
    """Keep other threads from forking a node from this program."""
    return _busy
