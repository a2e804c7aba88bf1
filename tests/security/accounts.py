"""Processes of other users of the machine, for tests that run as root."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_launcher.processes.linux import die_with_parent

MALLORY, ADA, GRACE = 60001, 60002, 60003
"""Users without names."""


class Account:
    """A process of `user` that does something, and then lives until it is killed."""

    def __init__(self, user: int, do: Callable[[], object]) -> None:
        heard, said = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                signal.signal(signal.SIGIO, signal.SIG_IGN)  # of a broken file lease
                os.seteuid(0)
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                die_with_parent(parent)  # after the change of users, which clears that
                kept = do()
                os.write(said, b"done")
                status = 0
                while kept is not Account:  # keeps what was opened from the garbage collector
                    signal.pause()
            finally:
                os._exit(status)
        os.close(said)
        self.done = os.read(heard, 4) == b"done"
        os.close(heard)
        self._lives = True

    def kill(self) -> None:
        if self._lives:
            self._lives = False
            with acting_as(0):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """What is done in the block is done as that user."""
    before = os.getegid(), os.geteuid()
    os.seteuid(0)
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(before[0])
        os.seteuid(before[1])


PROTECTIONS = {
    "protected_hardlinks": (0, 1),
    "protected_symlinks": (0, 1),
    "protected_regular": (0, 2),
    "protected_fifos": (0, 2),
}


@contextmanager
def protections(on: bool) -> Iterator[str | None]:
    """Switch what the kernel does for sticky directories on or off; yields why that cannot be done, if so.

    The settings are the machine's, so tests in other processes that switch them wait.
    """
    before: dict[Path, str] = {}
    turn = os.open("/proc/sys/fs", os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    try:
        try:
            for name, values in PROTECTIONS.items():
                setting = Path("/proc/sys/fs", name)
                before[setting] = setting.read_text()
                setting.write_text(str(values[on]))
        except OSError as error:
            yield f"cannot be set here: {error}"
        else:
            yield None
    finally:
        for setting, value in before.items():
            if setting.read_text() != value:
                setting.write_text(value)
        os.close(turn)
