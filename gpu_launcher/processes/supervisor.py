"""The supervisor of a job: the parent of its main process and, as a subreaper, of descendants that lose their parent.

A job's process tree is therefore exactly the supervisor's descendants, whatever they do (`setsid`, double forks,
`Popen`). The tree is gone exactly when `waitpid` says that there are no children. Then the supervisor waits for the
next job: a new supervisor would cost as much as the job's own process, which is milliseconds if the program has
imported much. Who watches whom:

- the kernel sends SIGKILL to the job's main process when its supervisor ends;
- the supervisor kills its tree when the node's end of the channel closes or the fork server ends;
- the fork server kills what a dead supervisor leaves behind, because those processes become its children;
- the guard, the fork server's parent, kills the remaining processes if the fork server is dead too.

Not promised: if a supervisor *and* the node are killed at the same instant, descendants that a job started with `Popen`
live for the few milliseconds that the fork server needs to kill them, while their lease is already free.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.job_output import early_output, end_of
from gpu_launcher.processes.linux import become_child_subreaper, die_with_parent
from gpu_launcher.processes.messages import (
    ChannelClosedError,
    HoldLease,
    JobExited,
    KillJob,
    SignalJob,
    StartJob,
    receive,
    send,
)
from gpu_launcher.processes.signals import SignalPipe, not_ignored
from gpu_launcher.processes.tree import ProcessTree

_log = get_logger("processes.supervisor")

MAX_LEFT_BEHIND = 100
"""Maximum number of processes left behind by a job that are reported to the node."""
COULD_NOT_FORK = 100
"""Base of the exit code of a supervisor that could not fork its job. The error number is added to it."""


RunJob = Callable[[socket.socket], NoReturn]
"""Runs a job in the job's process. Its argument is the job's end of its channel to the node."""


def supervise(launcher: socket.socket, *, server: int, lifeline: int, run_job: RunJob, captured: bool = True) -> None:
    """Run the jobs that the node asks for, one after another, until the node ends or closes the channel.

    `server` is the process id of the fork server, our parent. `lifeline` is a pipe whose end of file says that the fork
    server has ended. If `captured`, the output of a job before it has a log is kept in memory and reported when the job
    ends.
    """
    signals = note_signals()
    become_child_subreaper()
    die_with_parent(server, signal.SIGTERM)
    me = os.getpid()

    def be_the_job(channel: socket.socket, early: int) -> NoReturn:
        signals.restore()
        signals.close()
        for descriptor in (1, 2) if captured else ():
            os.dup2(early, descriptor)
        for descriptor in (lifeline, early):
            os.close(descriptor)
        launcher.close()
        os.setsid()
        die_with_parent(me)
        run_job(channel)

    set_role("supervisor")
    supervisor = _Supervisor(launcher, signals, lifeline, server)
    with contextlib.suppress(ChannelClosedError):  # the node has ended
        while (channel := supervisor.next_job()) is not None:
            early = early_output()
            try:
                job = fork_child(partial(be_the_job, channel, early))
            except OSError as error:
                os._exit(COULD_NOT_FORK + (error.errno or 0))
            channel.close()
            _log.debug("job is process %d", job)
            supervisor.see_to_its_end(job, early)
            os.close(early)


def note_signals() -> SignalPipe:
    """Note signals without acting on them: systemd sends them to every process, and the head decides what to do."""
    return SignalPipe(signal.SIGCHLD, signal.SIGTERM, *not_ignored(signal.SIGHUP))


class _Supervisor:
    def __init__(self, launcher: socket.socket, signals: SignalPipe, lifeline: int, server: int) -> None:
        self._launcher = launcher
        self._signals = signals
        self._lifeline = lifeline
        self._server = server
        self._poll = select.poll()
        for descriptor in (launcher.fileno(), signals.fileno(), lifeline):
            self._poll.register(descriptor, select.POLLIN)

    def next_job(self) -> socket.socket | None:
        """Wait for a job. Returns the job's end of its channel, or None if the fork server is gone.

        Raises ChannelClosedError if the node has ended.
        """
        while True:
            ready = self._wait(None)
            if self._is_orphan(ready):
                return None
            if self._launcher.fileno() in ready:
                message, descriptors = receive(self._launcher)
                if isinstance(message, StartJob):
                    return socket.socket(fileno=descriptors[0])
                for descriptor in descriptors:  # a lease that arrived after its job had ended
                    os.close(descriptor)

    def see_to_its_end(self, job: int, early: int) -> None:
        """Watch a job until its process tree is gone, then report it.

        `early` contains the output that the job printed before it had a log. Raises ChannelClosedError if the node has
        ended.
        """
        supervision = _Supervision(self._launcher, self._signals, job)
        while True:
            ready = self._wait(supervision.until_deadline())
            if self._is_orphan(ready):
                supervision.abandon()
            elif self._launcher.fileno() in ready:
                supervision.obey()
            if supervision.is_over():
                break
        exited = supervision.verdict(end_of(early))
        _log.debug(
            "job of process %d has ended with status %d, left behind: %s", job, exited.status, exited.left_behind
        )
        send(self._launcher, exited)

    def _wait(self, milliseconds: float | None) -> set[int]:
        ready = {descriptor for descriptor, _ in self._poll.poll(milliseconds)}
        if self._signals.fileno() in ready:
            self._signals.read()
        return ready

    def _is_orphan(self, ready: set[int]) -> bool:
        # SIGTERM alone means nothing: systemd sends it, and SIGHUP, to every process of a unit that it stops. The head
        # then decides how the jobs end.
        return self._lifeline in ready or os.getppid() != self._server


class _Supervision:
    """Supervises one job."""

    def __init__(self, launcher: socket.socket, signals: SignalPipe, job: int) -> None:
        self._launcher = launcher
        self._tree = ProcessTree(job, signals)
        self._lease: tuple[int, ...] = ()
        self._abandoned = False

    def is_over(self) -> bool:
        """Whether the whole process tree is gone. See `ProcessTree.is_gone`."""
        return self._tree.is_gone()

    def verdict(self, printed: bytes) -> JobExited:
        """Release the lease and return the report. Call this when the process tree is gone."""
        lease, self._lease = self._lease, ()
        for descriptor in lease:
            os.close(descriptor)
        assert self._tree.status is not None, "no children, so the job was reaped"
        left_behind = tuple(self._tree.left_behind[:MAX_LEFT_BEHIND])
        return JobExited(self._tree.status, self._abandoned, printed, left_behind, self._tree.peak_memory)

    def abandon(self) -> None:
        """Kill the job because the fork server is gone."""
        self._abandoned = True
        self._tree.kill()

    def obey(self) -> None:
        """Do what the node asks for; kill the job if the node has ended."""
        if not self._obey():
            self._tree.kill()

    def _obey(self) -> bool:
        try:
            message, descriptors = receive(self._launcher)
        except ChannelClosedError:
            return False
        _log.debug("told to %s", message)
        if isinstance(message, HoldLease):
            self._lease += descriptors
        elif isinstance(message, SignalJob):
            self._signal(message.signum)
        elif isinstance(message, KillJob):
            self._tree.kill()
        else:
            raise TypeError(f"a supervisor does not understand {message!r}")
        return True

    def _signal(self, signum: int) -> None:
        if self._tree.status is not None:
            return
        try:
            os.killpg(self._tree.main, signum)
        except ProcessLookupError:  # it has not called setsid yet
            os.kill(self._tree.main, signum)

    def until_deadline(self) -> float | None:
        """Milliseconds after which to call `is_over` even if nothing happens, for poll(2); None to wait forever."""
        return self._tree.until_deadline()
