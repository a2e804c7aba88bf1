"""The guard: the parent of the fork server. It outlives a killed fork server and ends the processes left behind.

When a supervisor is killed, its descendants become children of the fork server. When both are killed together, the
descendants become children of the guard, which ends them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection

from gpu_launcher.debug_log import get_logger, set_role
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.keyboard import give_back_after_death, modes
from gpu_launcher.processes.linux import become_child_subreaper, children, die_with_parent, kill

_log = get_logger("processes.guard")

TREE_END_SECONDS = 1.0
"""Seconds to wait for supervisors to end their process trees before killing the supervisors too."""

SHELL_SECONDS = 0.3
"""Seconds to wait for the shell to restore its terminal after the head was killed."""

_WATCHED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP}


def guarded(launcher: int, serve: Callable[[int], None], close_in_guard: Callable[[], None]) -> None:
    """Become the guard of a forked process that runs `serve`. Return when that process and all descendants are gone.

    `serve` is called with a lifeline: a descriptor that reaches its end when the node (process id `launcher`) or the
    guard has ended. `close_in_guard` closes what only `serve` needs.
    """
    os.setsid()  # a terminal's Ctrl-C must reach only the head, which decides what it means
    become_child_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, the kernel reaps children and waitpid cannot
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    lifeline, guards_end = os.pipe()
    terminal = modes(2)

    def be_the_server() -> None:
        os.close(guards_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        serve(lifeline)

    set_role("guard")
    server = fork_child(be_the_server)
    _log.debug("fork server is process %d; the program is process %d", server, launcher)
    close_in_guard()
    os.close(lifeline)
    die_with_parent(launcher, signal.SIGTERM)
    while not _ended(server):
        signal.sigwait(_WATCHED)
        if os.getppid() != launcher:
            break
        # Otherwise SIGTERM means that the thread that forked us has ended, or systemd sent it; then the head reacts.
    os.close(guards_end)
    _log.debug("%s: ending the rest", "the fork server ended" if os.getppid() == launcher else "the program ended")
    end_descendants(1.5 * TREE_END_SECONDS)
    if os.getppid() != launcher:
        time.sleep(SHELL_SECONDS)
        give_back_after_death(2, terminal)


def end_descendants(patience: float, spare: Collection[int] = ()) -> None:
    """Wait until this process has no descendants, killing them if necessary.

    Descendants of dead supervisors are killed at once, the others after `patience` seconds. Children in `spare`, which
    this process had before, are not killed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    session = os.getsid(0)
    deadline = time.monotonic() + patience
    while _any_left():
        late = time.monotonic() >= deadline
        mine = [pid for pid in children() if pid not in spare]
        if spare and not mine:
            return
        for pid in mine:
            # The fork server and supervisors are in this session; every job has its own session.
            if late or os.getsid(pid) != session:
                kill(pid)
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)


def _ended(child: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(child, os.WNOHANG)[0] == child
    return True


def _any_left() -> bool:
    """Reap dead children. Returns whether any child is left."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
