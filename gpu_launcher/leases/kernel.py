"""Reads facts about files and locks from the kernel: their owners, and which processes hold locks.

The contents of the pool's files are claims of the users who wrote them. The kernel confirms more: the owner of a file,
the user of a process, and the table of locks (proc_locks(5)), which shows every process who has locked which file. The
table has three surprises:

- It names the process that took a flock(2) lock. A child that inherited the descriptor may hold the lock now, and the
  process id may already belong to another process.
- In a PID namespace other than the machine's initial one, it omits locks of processes outside that namespace. It shows
  locks of open file descriptions (OFD locks, fcntl_locking(2)) everywhere, with -1 as the process.
- It is read one page at a time. Locks come and go between pages, so a lock may be missing although it always existed.
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
"""Maximum number of characters shown of a process's command."""
FIRST_NAMESPACE = 0xEFFFFFFC
"""Inode number of the machine's initial PID namespace (PROC_PID_INIT_INO)."""

_CHUNK = 1 << 16
_PAGE = 4000
"""Number of bytes that the kernel returns at most at once. A longer table is read in several pages."""


class LockTable:
    """The table of locks at one moment."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @classmethod
    def read(cls, table: Path = LOCKS) -> LockTable | None:
        """Read the table; return None if it cannot be read."""
        content = _read(table)
        return None if content is None else cls(content)

    def read_again(self) -> None:
        """Read a table of several pages again, and add locks that the first reading may have missed."""
        if len(self._content) >= _PAGE:
            self._content += _read(LOCKS) or b""

    def on(self, status: os.stat_result) -> list[Flock]:
        """Return the flock locks on a file.

        If there are none on its device, locks on files with the same inode number on other devices count, because some
        file systems (btrfs, overlay) report another device to stat(2) than the table.
        """
        inode = str(status.st_ino).encode()
        lines = re.findall(rb"FLOCK +\S+ +(READ|WRITE) +(\d+) ([0-9a-f]+:[0-9a-f]+):" + inode + b" ", self._content)
        device = device_of(status)
        same = [Flock(mode == b"WRITE", int(pid)) for mode, pid, where in lines if where == device]
        return list(dict.fromkeys(same or [Flock(mode == b"WRITE", int(pid)) for mode, pid, _ in lines]))

    def holders(self, directory: os.stat_result) -> dict[int, int]:
        """Return the processes that took exclusive flock locks on the directory's file system, by inode number."""
        pattern = rb"FLOCK +\S+ +WRITE +(\d+) " + re.escape(device_of(directory)) + rb":(\d+) "
        return {int(inode): int(pid) for pid, inode in re.findall(pattern, self._content)}

    def marked(self, first: int) -> dict[int, set[int]]:
        """Return the offsets from `first` on that have OFD locks, each with the files' inode numbers."""
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
    # A line with an arrow shows a process that waits for the lock on the line above.
    content = b"".join(parts)
    return re.sub(rb"(?m)^\d+: +-> .*$", b"", content) if b" -> " in content else content


def sees_all_locks() -> bool:
    """Whether the table shows the flock locks of every process of the machine."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == FIRST_NAMESPACE
    except OSError:
        return False


def device_of(status: os.stat_result) -> bytes:
    """Return the device of a file in the notation of the table of locks."""
    return b"%02x:%02x" % (os.major(status.st_dev), os.minor(status.st_dev))


def is_stopped(pid: int) -> bool:
    """Whether a process is known to be stopped, by Ctrl-Z, SIGSTOP or a debugger."""
    # Plain system calls instead of pathlib, because this is most of the cost of a view of the pool.
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(descriptor, 256).rpartition(b") ")[2][:1] in (b"T", b"t")
    except ProcessLookupError:  # the process has ended
        return False
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Process:
    """The visible facts about a process."""

    pid: int
    user: str | None
    command: str | None
    stopped: bool
    """Whether it is stopped by SIGSTOP, Ctrl-Z or a debugger."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Read the facts about a process."""
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
    """Return the visible processes that hold a flock lock on the file: all that have the lock's descriptor.

    Only root sees other users' processes. This reads the open files of all processes, so it is slow.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # the process has ended, or this user may not read it
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
