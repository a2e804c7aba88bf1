"""The pool's mutex: an exclusive lock on the queue directory. If it is held for long, a warning names the holder.

The mutex is normally held for milliseconds. flock(2) has no time limit, and a signal does not interrupt it (PEP 475),
so locking is retried at short intervals: a program must react to Ctrl-C even if another program hangs.

Every user can lock the directory, even in shared mode, and keep the lock. Nothing is granted while that process lives,
and the others say who it is. The holder is certain only among processes whose open files are visible: the user's own,
or all for root. For other processes, the table of locks names only the one that took the lock. That process may have
ended since, a child of it may hold the lock, or its process id may belong to another process. So no message suggests
signalling a process unless it certainly holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from gpu_launcher.leases.kernel import LOCKS, LockTable, Process, holders_of, shows_files

LOCK_SECONDS = 0.25
"""Longest time that one call waits, in seconds."""
NAMED_AFTER_SECONDS = 3.0
"""Seconds after which the holder is named."""
FIRST_PAUSE = 0.0002
LONGEST_PAUSE = 0.005


@dataclass(frozen=True, slots=True)
class Blame:
    """The processes that are known to keep the pool locked."""

    holders: tuple[Process, ...] = ()
    """Processes that certainly hold the lock."""
    takers: tuple[Process, ...] = ()
    """Processes that took the lock, if no holder is visible. They or their descendants may hold it."""

    def __str__(self) -> str:
        if self.holders:
            return ", ".join(map(str, self.holders[:3])) + (
                f" and {len(self.holders) - 3} more" * (len(self.holders) > 3)
            )
        if not self.takers:
            return "a process that cannot be seen from here (in another container?)"
        taker = self.takers[0]
        if taker.user is None:
            return f"a process that this user may not look at: process {taker.pid}, which took the lock, has ended"
        if shows_files(taker.pid):
            return (
                f"a process that this user may not look at: process {taker.pid}, which took the lock, has let go of it"
            )
        return f"{taker}, or by a process that it has started"

    @property
    def remedy(self) -> str:
        """Advice for the user."""
        if not self.holders:
            return "`gpu-launcher doctor`, run by root outside of containers, names it with certainty"
        stopped = [str(holder.pid) for holder in self.holders if holder.stopped]
        if stopped:
            return f"continue it (kill -CONT {' '.join(stopped)}) or end it"
        return f"end it (kill {' '.join(str(holder.pid) for holder in self.holders)})"


class PoolMutex:
    """The mutex as one ledger uses it. Warns once per holder if it is held for suspiciously long."""

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        self._directory = directory
        self._warn = warn
        self._seen: tuple[tuple[int, ...], float] | None = None
        """The processes that took the lock, and the time since which they have been seen in the way."""
        self._named = False

    def lock(self, descriptor: int, *, wait: bool = True) -> bool:
        """Lock the queue directory, which is open as `descriptor`. Return False if another process holds the lock.

        With `wait`, retry for `LOCK_SECONDS`.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        pause = FIRST_PAUSE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    return False
                now = time.monotonic()
                if now >= deadline:
                    self._suspect(now, descriptor)
                    return False
                # Random, so that processes that started together do not retry together. The `random` module's global
                # generator is not used, because the program may have seeded it and may rely on its sequence.
                time.sleep(min(pause * (0.5 + SystemRandom().random()), deadline - now))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._seen = None
                return True

    def _suspect(self, now: float, descriptor: int) -> None:
        takers = _takers(descriptor)
        if self._seen is None or self._seen[0] != takers:
            self._seen, self._named = (takers, now - LOCK_SECONDS), False
        seconds = now - self._seen[1]
        if self._named or seconds < NAMED_AFTER_SECONDS:
            return
        self._named = True
        found = blame(descriptor)
        self._warn(
            f"pool directory {self._directory}: nothing is granted, because it has been locked for {seconds:.0f} s by "
            f"{found}: {found.remedy}"
        )


def blame(descriptor: int, table: Path = LOCKS) -> Blame:
    """Return the processes that keep the open file locked. This reads every process, so it is slow."""
    holders = [pid for pid in holders_of(os.fstat(descriptor)) if pid != os.getpid()]
    if holders:
        return Blame(holders=tuple(map(Process.of, holders)))
    return Blame(takers=tuple(map(Process.of, _takers(descriptor, table))))


def _takers(descriptor: int, table: Path = LOCKS) -> tuple[int, ...]:
    """Return the processes that took a lock on the open file, in either mode."""
    locks = LockTable.read(table)
    if locks is None:
        return ()
    return tuple(sorted({lock.pid for lock in locks.on(os.fstat(descriptor)) if lock.pid > 0}))
