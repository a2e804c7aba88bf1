"""The pool's mutex: an exclusive lock on the queue directory, held for milliseconds, and who holds it if longer.

flock(2) knows no time limit, and a signal does not get out of it (PEP 475), so it is tried at short intervals: a
program whose user presses Ctrl-C must not hang because another one does.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from gpu_launcher.users import user_name

PATIENCE = 0.25
"""Seconds for which one call waits."""
SUSPICIOUS = 3.0
"""Seconds after which the holder is named."""
FIRST_PAUSE = 0.0002
LONGEST_PAUSE = 0.005

LOCKS = Path("/proc/locks")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds the mutex, as far as it can be seen from here."""

    pid: int
    user: str | None
    command: str | None
    stopped: bool
    """By SIGSTOP, Ctrl-Z or a debugger."""

    def __str__(self) -> str:
        names = ", ".join(name for name in (self.user, self.command) if name)
        return f"process {self.pid}" + (f" ({names})" if names else "") + (", which is stopped" if self.stopped else "")


class Patience:
    """Takes the mutex for one ledger, and says once per holder that it takes suspiciously long."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        self._directory = directory
        self._warn = warn
        self._seen: tuple[int, float] | None = None
        """The pid of the holder, and since when it has been seen."""
        self._named = False

    def lock(self, descriptor: int) -> bool:
        """Lock the queue directory, open as `descriptor`. False if somebody else has it for `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        pause = FIRST_PAUSE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                now = time.monotonic()
                if now >= deadline:
                    self._suspect(now, holder_of(descriptor))
                    return False
                # Random, lest those who came at the same moment go on trying at the same moments. Not with the
                # `random` module's generator: the program may have seeded that, and count on what it draws.
                time.sleep(min(pause * (0.5 + SystemRandom().random()), deadline - now))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._seen = None
                return True

    def _suspect(self, now: float, holder: Holder | None) -> None:
        pid = holder.pid if holder else 0
        if self._seen is None or self._seen[0] != pid:
            self._seen, self._named = (pid, now - PATIENCE), False
        seconds = now - self._seen[1]
        if self._named or seconds < SUSPICIOUS:
            return
        self._named = True
        who = str(holder) if holder else "a process that cannot be seen from here (another container's?)"
        remedy = f"continue it (kill -CONT {pid}) or end it" if holder else "find it on the host, and end it"
        self._warn(
            f"pool directory {self._directory}: nothing is granted, because it has been locked for {seconds:.0f} s by "
            f"{who}: {remedy}"
        )


def holder_of(descriptor: int, locks: Path = LOCKS) -> Holder | None:
    """Return who holds an exclusive flock on the open file; None if that cannot be told. See proc_locks(5)."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    exact, inode_only = [], []
    try:
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) < 6 or fields[1] != "FLOCK" or fields[3] != "WRITE" or int(fields[4]) <= 0:
            continue
        if fields[5] == device:
            exact.append(int(fields[4]))
        elif fields[5].endswith(f":{status.st_ino}"):
            # Some file systems (btrfs, overlay) tell stat(2) another device number.
            inode_only.append(int(fields[4]))
    found = exact or inode_only
    return _described(found[0]) if len(found) == 1 else None


def _described(pid: int) -> Holder:
    process = Path(f"/proc/{pid}")
    user = command = None
    stopped = False
    try:
        user = user_name(process.stat().st_uid)
        words = os.fsdecode(process.joinpath("cmdline").read_bytes()).replace("\0", " ").split()
        command = " ".join(words)[:100] or None
        stopped = process.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        pass
    return Holder(pid, user, command, stopped)
