"""The fork server: forks supervisors, and ends the processes that a killed supervisor leaves behind.

The fork server is a process of its own. With `fork` it is forked from the fully imported program; with `spawn` it is a
small fresh interpreter. The two differ only in `run_job`, which a job's process calls first.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.guard import TREE_END_SECONDS, end_descendants, guarded
from gpu_launcher.processes.linux import become_child_subreaper, children, kill
from gpu_launcher.processes.messages import (
    ChannelClosedError,
    StartFailed,
    StartSupervisor,
    SupervisorDied,
    receive,
    send,
)
from gpu_launcher.processes.signals import SignalPipe
from gpu_launcher.processes.supervisor import COULD_NOT_FORK, RunJob, note_signals, supervise

_log = get_logger("processes.fork_server")


def serve(control: socket.socket, launcher: int, run_job: RunJob, *, captured: bool = True) -> None:
    """Serve until the node (process id `launcher`) closes its end of `control` or dies.

    If `captured`, the output of jobs is kept in memory until they have a log; otherwise it goes where this process's
    output goes. When this returns, no process that was started through this server is alive, even if the server was
    killed.
    """
    gc.freeze()  # otherwise every job's garbage collector would write to, and so copy, pages that all jobs share
    guarded(launcher, lambda lifeline: _serve(control, lifeline, run_job, captured), control.close)


def _serve(control: socket.socket, lifeline: int, run_job: RunJob, captured: bool) -> None:
    set_role("fork server")
    become_child_subreaper()
    _Server(control, lifeline, note_signals(), run_job, captured).run()


def _why(supervisor: int, status: int) -> SupervisorDied | StartFailed:
    """Return why a supervisor ended before its job, according to its exit status."""
    error = os.waitstatus_to_exitcode(status) - COULD_NOT_FORK
    return StartFailed(supervisor, _fork_failed(error)) if error > 0 else SupervisorDied(supervisor)


def _fork_failed(error: int) -> str:
    return f"fork failed: {os.strerror(error)}"


class _Server:
    def __init__(
        self, control: socket.socket, lifeline: int, signals: SignalPipe, run_job: RunJob, captured: bool
    ) -> None:
        self._control = control
        self._lifeline = lifeline
        self._supervisors_lifeline, self._own_end = os.pipe()
        self._signals = signals
        self._run_job = run_job
        self._captured = captured
        self._supervisors: dict[int, int] = {}
        """Process id of each live supervisor, with the node's number for it."""

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._signals, select.POLLIN)
        poll.register(self._lifeline, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._lifeline in ready:
                break
            if self._signals.fileno() in ready:
                self._signals.read()
                self._collect()
            if self._control.fileno() in ready:
                try:
                    message, descriptors = receive(self._control)
                except ChannelClosedError:
                    break
                assert isinstance(message, StartSupervisor), message
                self._start(message.supervisor, *descriptors)
        self._shut_down()

    def _start(self, supervisor: int, launcher_end: int) -> None:
        try:
            # Exit code 0 means that the supervisor has no unfinished job.
            pid = fork_child(lambda: self._become_supervisor(launcher_end))
            _log.debug("supervisor %d is process %d", supervisor, pid)
            self._supervisors[pid] = supervisor
        except OSError as error:
            _log.warning("supervisor %d cannot be forked: %s", supervisor, error)
            self._tell(StartFailed(supervisor, _fork_failed(error.errno or 0)))
        os.close(launcher_end)

    def _become_supervisor(self, launcher_end: int) -> None:
        self._signals.close()
        os.close(self._lifeline)
        os.close(self._own_end)
        self._control.close()
        supervise(
            socket.socket(fileno=launcher_end),
            server=os.getppid(),
            lifeline=self._supervisors_lifeline,
            run_job=self._run_job,
            captured=self._captured,
        )

    def _collect(self) -> None:
        """Reap dead supervisors. End the processes that a killed one left behind, which are our children now."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            supervisor = self._supervisors.pop(pid, None)
            if supervisor is not None and status != 0:
                _log.warning("supervisor %d (process %d) ended with status %d: ending its job", supervisor, pid, status)
                self._end_orphans()
                self._tell(_why(supervisor, status))

    def _end_orphans(self) -> None:
        while orphans := [pid for pid in children() if pid not in self._supervisors]:
            for pid in orphans:
                kill(pid)
            os.waitpid(orphans[0], 0)

    def _tell(self, message: object) -> None:
        with contextlib.suppress(ChannelClosedError):  # `run` notices this too, and shuts down
            send(self._control, message)

    def _shut_down(self) -> None:
        _log.debug("closing: ending all jobs")
        os.close(self._own_end)
        end_descendants(TREE_END_SECONDS)
