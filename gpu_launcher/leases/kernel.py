"""What the kernel says of files and locks: whose they are, and which processes hold them.

Contents of the pool's files are claims of the users who wrote them. This is what is known beyond that: the owner of a
file, the user of a process, and the table of locks, in which every process of the machine can read which process has
locked which file (proc_locks(5)). Three things surprise there:

- The process named is the one that took a flock(2) lock. A child that inherited the descriptor may be what holds it
  now, and the number may be another process's by then.
- In a namespace of process ids other than the machine's first, locks of processes that have no number there are left
  out. Locks of open file descriptions (OFD locks, fcntl_locking(2)) are shown everywhere, with -1 for the process.
- It is read a page at a time, between which locks come and go, so one may be missing though it was there all the time.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gpu_launcher.text import one_line
from gpu_launcher.users import user_name

LOCKS = Path("/proc/locks")
MAX_TABLE_BYTES = 32 << 20
MAX_COMMAND = 100
"""Characters of a process's command that are shown."""
FIRST_NAMESPACE = 0xEFFFFFFC
"""Inode number of the machine's first namespace of process ids (PROC_PID_INIT_INO)."""

_CHUNK = 1 << 16
_PAGE = 4000
"""Bytes that are read in one go."""


class LockTable:
    """The table of locks at one moment."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @classmethod
    def read(cls, table: Path = LOCKS) -> LockTable | None:
        """None where it cannot be read."""
        content = _read(table)
        return None if content is None else cls(content)

    def read_again(self) -> None:
        """Add what another reading has and one of several pages may have missed."""
        if len(self._content) >= _PAGE:
            self._content += _read(LOCKS) or b""

    def on(self, status: os.stat_result) -> list[Flock]:
        """Return the flock locks on a file. Those of its number on another file system count if there are none on its
        own: some (btrfs, overlay) tell stat(2) another device than the table."""
        inode = str(status.st_ino).encode()
        lines = re.findall(rb"FLOCK +\S+ +(READ|WRITE) +(\d+) ([0-9a-f]+:[0-9a-f]+):" + inode + b" ", self._content)
        device = device_of(status)
        same = [Flock(mode == b"WRITE", int(pid)) for mode, pid, where in lines if where == device]
        return list(dict.fromkeys(same or [Flock(mode == b"WRITE", int(pid)) for mode, pid, _ in lines]))

    def holders(self, directory: os.stat_result) -> dict[int, int]:
        """Return who took the exclusive flock lock on each file of the directory's file system, by inode number."""
        pattern = rb"FLOCK +\S+ +WRITE +(\d+) " + re.escape(device_of(directory)) + rb":(\d+) "
        return {int(inode): int(pid) for pid, inode in re.findall(pattern, self._content)}

    def marked(self, first: int) -> dict[int, set[int]]:
        """Return which bytes from `first` on are locked by open file descriptions, and the files' inode numbers."""
        found: dict[int, set[int]] = {}
        for inode, start in re.findall(rb"OFDLCK +\S+ +WRITE +\S+ [0-9a-f]+:[0-9a-f]+:(\d+) (\d+) ", self._content):
            if int(start) >= first:
                found.setdefault(int(start), set()).add(int(inode))
        return found


class Flock(NamedTuple):
    """A flock(2) lock."""

    exclusive: bool
    pid: int
    """The process that took it."""


def _read(table: Path) -> bytes | None:
    try:
        descriptor = os.open(table, os.O_RDONLY)
    except OSError:
        return None
    parts = []
    left = MAX_TABLE_BYTES
    try:
        while chunk := os.read(descriptor, _CHUNK):
            parts.append(chunk)
            left -= len(chunk)
            if left < 0:
                return None
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # A line with an arrow is a process that waits for the lock of the line above.
    content = b"".join(parts)
    return re.sub(rb"(?m)^\d+: +-> .*$", b"", content) if b" -> " in content else content


def sees_all_locks() -> bool:
    """Whether the table shows the flock locks of every process of the machine."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == FIRST_NAMESPACE
    except OSError:
        return False


def device_of(status: os.stat_result) -> bytes:
    """Return the file system of a file as the table of locks writes it."""
    return b"%02x:%02x" % (os.major(status.st_dev), os.minor(status.st_dev))


def user_of(pid: int) -> int | None:
    """Return the user that a process runs as; None if there is no such process, or it cannot be seen."""
    if pid <= 0:
        return None
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by Ctrl-Z, SIGSTOP or a debugger, as far as that can be seen."""
    # Without pathlib and a text file: this is most of what a view of the pool costs.
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(descriptor, 256).rpartition(b") ")[2][:1] in (b"T", b"t")
    except ProcessLookupError:  # it has ended meanwhile
        return False
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as far as it can be seen from here."""

    pid: int
    user: str | None
    command: str | None
    stopped: bool
    """By SIGSTOP, Ctrl-Z or a debugger."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Look at it."""
        process = Path(f"/proc/{pid}")
        user = command = None
        with contextlib.suppress(OSError):
            user = user_name(process.stat().st_uid)
            with process.joinpath("cmdline").open("rb") as file:
                words = os.fsdecode(file.read(4096)).replace("\0", " ").split()
            command = one_line(" ".join(words), MAX_COMMAND) or None
        return cls(pid, user, command, is_stopped(pid))

    def __str__(self) -> str:
        names = ", ".join(name for name in (self.user, self.command) if name)
        return f"process {self.pid}" + (f" ({names})" if names else "") + (", which is stopped" if self.stopped else "")


def holders_of(status: os.stat_result) -> list[int]:
    """Return the processes seen to hold a flock lock on the file now: all that have the descriptor it was taken on.

    Those of other users are seen by root alone. Looks at every open file, so it takes a while.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
                if any(_holds(process, name, status) for name in os.listdir(process / "fd")):  # noqa: PTH208
                    found.append(int(process.name))
    return sorted(found)


def shows_files(pid: int) -> bool:
    """Whether this user may see which files a process has open."""
    try:
        return bool(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except OSError:
        return False


def _holds(process: Path, descriptor: str, status: os.stat_result) -> bool:
    try:
        opened = process.joinpath("fd", descriptor).stat()
        if (opened.st_dev, opened.st_ino) != (status.st_dev, status.st_ino):
            return False
        return "FLOCK" in process.joinpath("fdinfo", descriptor).read_text()
    except OSError:
        return False
