"""Gives each forked job its own positions in the files that the program has open.

fork(2) copies descriptors, not the *file descriptions* that they refer to. All processes that inherit a description
share its position, so a `seek` in one job would change what another job reads. A job therefore reopens each file that
is open for reading, through /proc/self/fd, which also works for deleted files. The program notes all positions before
the fork, because it may move them right afterwards. Once a job has reopened its files, the positions of the shared
descriptions do not matter.

Not reopened:

- files open for writing only: their shared position keeps jobs from overwriting each other's lines;
- standard input, output and error, and other descriptors of the same files;
- pipes, sockets and terminals, which have no position.

A lock made with flock(2) stays with the program's description; a job does not hold it and cannot release it. Locks made
with fcntl(2) are never inherited. But a process that closes any descriptor of a file loses all its fcntl(2) locks on
that file, so the program itself must not reopen and close its files.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import io
import itertools
import os
import stat
import traceback
import weakref
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

_KEPT_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME | os.O_SYNC | os.O_DSYNC
"""Flags to pass to open(2) when a file is reopened. Others concern a path (O_NOFOLLOW) or make a file (O_TMPFILE)."""

_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK)
_SHARED_MEMORY = ("/dev/shm/", "/memfd:")

_LMDB = (0xBEEFC0DE).to_bytes(4, "little")
_FORMATS = (
    ("SQLite", 0, b"SQLite format 3\0"),
    ("HDF5", 0, b"\x89HDF\r\n\x1a\n"),
    ("LMDB", 16, _LMDB),
    ("LMDB", 0, _LMDB),  # its lock file
    ("GDBM", 0, (0x13579ACF).to_bytes(4, "little")),
)
"""Formats whose libraries keep state that is wrong after a fork: name, offset and value of the magic bytes."""

_MAX_LOCK_FILE = 1024
"""Maximum size in bytes of a locked file that counts as a lock file. It may say who holds the lock."""

_MAX_NAMES = 3
"""Maximum number of files of one kind that a notice names."""

_SYS_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _File:
    """A descriptor of an open file, as the program noted it."""

    descriptor: int
    path: str
    """Path in /proc through which the file can be reopened."""
    name: str
    """Path of the file. Read early, because the garbage collector may close the file at any time."""
    flags: int
    offset: int
    device: int
    inode: int
    inheritable: bool
    locked: bool
    """Whether the file is locked and open for reading and writing. Read early: forks do not inherit fcntl(2) locks."""
    duplicate_of: int | None = None
    """Another descriptor of the same description. It is reopened before this one."""

    @property
    def access(self) -> int:
        return self.flags & os.O_ACCMODE

    def is_there(self) -> bool:
        """Whether the descriptor still refers to this file. After a fork, it may be closed and its number reused."""
        return _identity(self.descriptor) == (self.device, self.inode)


class OpenFiles:
    """The files that a program had open before a fork."""

    def __init__(self) -> None:
        """Start without any files."""
        self._files: list[_File] = []
        self._writers: list[weakref.ref[IO[Any]]] = []

    @classmethod
    def of_this_process(cls, besides: Container[int] = ()) -> OpenFiles:
        """Note the open files of this process, except the descriptors `besides`. Call this right before the fork.

        Their buffers are flushed first. Otherwise each job would write the buffered data again.
        """
        noted = cls()
        files = _files()
        if written := {file.descriptor for file in files if file.access != os.O_RDONLY}:
            # Few programs get here: searching all their objects takes milliseconds.
            noted._writers = _flush_writers(written)
            files = _files()  # flushing has moved positions
        files = [file for file in files if file.access != os.O_WRONLY and file.descriptor not in besides]
        noted._files = _with_duplicates(files)
        return noted

    def open_again(self) -> list[str]:
        """Give a job its own positions, before any of the user's code runs. Returns error messages."""
        problems = []
        shared = set()
        for file in self._files:
            if not file.is_there() or file.duplicate_of in shared:
                continue
            try:
                _open_again(file)
            except OSError as error:
                shared.add(file.descriptor)
                problems.append(f"this job shares its position in {file.name} with other jobs: {error.strerror}")
        return problems

    def flush(self) -> None:
        """Flush the program's file objects at the end of a job, which may have left data in their buffers."""
        for writer in self._writers:
            stream = writer()
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except ValueError:  # detached from its buffer
                continue
            except OSError as error:
                traceback.print_exception(error)

    def notice(self) -> str | None:
        """One-line notice about files that jobs may damage; None if there are none.

        Call this in the process that noted the files, after the fork: some libraries close files before a fork.
        """
        files = [file for file in self._files if file.duplicate_of is None and file.is_there()]
        read_write = [file for file in files if file.access == os.O_RDWR]
        formats = [(file, _format(file)) for file in read_write]
        mapped = _shared_mappings() if read_write else set()
        connections = [f"{file.name} ({name})" for file, name in formats if name]
        overwritten = [file.name for file, name in formats if not name and _may_be_overwritten(file, mapped)]
        unreadable = [file.name for file in files if not _may_open(file)]
        problems = []
        if connections:
            problems.append(f"jobs must not use the program's connection to {_listed(connections)}")
        if overwritten:
            problems.append(f"jobs that write to {_listed(overwritten)} may overwrite each other's data")
        if unreadable:
            problems.append(f"jobs share their position in {_listed(unreadable)}, which they may not open again")
        if not problems:
            return None
        remedy = "Remedy: close such files before the jobs start, and open them inside each job"
        return f"files that are open when the jobs start: {'; '.join(problems)}. {remedy}"


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:  # closed
        return None
    return status.st_dev, status.st_ino


def _files() -> list[_File]:
    """Open files of this process except its standard streams, in the order of their descriptors."""
    standard = {_identity(descriptor) for descriptor in (0, 1, 2)}
    seen = map(_look, sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir()))
    return [file for file in seen if file is not None and (file.device, file.inode) not in standard]


def _look(descriptor: int) -> _File | None:
    """Return what a descriptor refers to; None if it has no position."""
    try:
        status = os.fstat(descriptor)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if stat.S_IFMT(status.st_mode) not in _KINDS or flags & os.O_PATH:
            return None
        path = f"/proc/self/fd/{descriptor}"
        return _File(
            descriptor,
            path,
            str(Path(path).readlink()),
            flags & _KEPT_FLAGS,
            os.lseek(descriptor, 0, os.SEEK_CUR),
            status.st_dev,
            status.st_ino,
            os.get_inheritable(descriptor),
            flags & os.O_ACCMODE == os.O_RDWR and _is_locked(descriptor),
        )
    except OSError:  # the descriptor that was used to list the others, which is closed now, or a file that cannot seek
        return None


def _flush_writers(descriptors: set[int]) -> list[weakref.ref[IO[Any]]]:
    """Flush the file objects that write to these descriptors. Returns those that could be flushed."""
    writers: list[weakref.ref[IO[Any]]] = []
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    for stream in [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]:
        # ValueError: closed or detached. OSError: no descriptor, or the disk is full; the program will get that error.
        with contextlib.suppress(ValueError, OSError):
            if stream.fileno() in descriptors:
                stream.flush()
                writers.append(weakref.ref(stream))
    return writers


def _with_duplicates(files: list[_File]) -> list[_File]:
    """Mark descriptors made with dup(2), which share a position in a job as they do in the program.

    The result is in the order of the descriptors, so that a duplicate comes after its original.
    """

    def alike(file: _File) -> tuple[int, int, int, int]:
        return file.device, file.inode, file.flags, file.offset

    found: list[_File] = []
    for _, group in itertools.groupby(sorted(files, key=alike), key=alike):
        first: _File | None = None
        for file in sorted(group, key=functools.cmp_to_key(_compare)):  # stable
            if first is not None and _compare(first, file) == 0:
                file = replace(file, duplicate_of=first.descriptor)
            else:
                first = file
            found.append(file)
    return sorted(found, key=lambda file: file.descriptor)


def _compare(one: _File, other: _File) -> int:
    """Compare file descriptions with kcmp(2): 0 if they are the same, otherwise their order.

    If the kernel refuses to compare them, they count as different.
    """
    if one.descriptor != other.descriptor and _SYS_KCMP is not None:
        pid = os.getpid()
        numbers = ctypes.c_ulong(one.descriptor), ctypes.c_ulong(other.descriptor)
        order = _libc.syscall(_SYS_KCMP, pid, pid, 0, *numbers)
        if order in (0, 1, 2):
            return int((0, -1, 1)[order])
    return one.descriptor - other.descriptor


def _open_again(file: _File) -> None:
    if file.duplicate_of is not None:
        os.dup2(file.duplicate_of, file.descriptor, file.inheritable)
        return
    fresh = os.open(file.path, file.flags)
    try:
        os.lseek(fresh, file.offset, os.SEEK_SET)
        os.dup2(fresh, file.descriptor, file.inheritable)
    finally:
        os.close(fresh)


def _may_open(file: _File) -> bool:
    mode = os.R_OK | os.W_OK if file.access == os.O_RDWR else os.R_OK
    return os.access(file.path, mode, effective_ids=True)


def _format(file: _File) -> str | None:
    try:
        start = os.pread(file.descriptor, 32, 0)
    except OSError:
        return None
    return next((name for name, offset, magic in _FORMATS if start.startswith(magic, offset)), None)


def _may_be_overwritten(file: _File, mapped: set[str]) -> bool:
    """Whether jobs that write to this file would each use their own position.

    False for files that are shared on purpose (mapped memory), lock files, and files opened for appending.
    """
    if file.flags & os.O_APPEND or file.name in mapped or file.name.startswith(_SHARED_MEMORY):
        return False
    with contextlib.suppress(OSError):  # just closed
        return not file.locked or os.fstat(file.descriptor).st_size > _MAX_LOCK_FILE
    return False


def _is_locked(descriptor: int) -> bool:
    return "\nlock:" in Path(f"/proc/self/fdinfo/{descriptor}").read_text()


def _shared_mappings() -> set[str]:
    """Names of the files that this process has mapped as shared memory."""
    lines = [line.split(None, 5) for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()]
    return {fields[5] for fields in lines if len(fields) == 6 and fields[1].endswith("s")}


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))  # a library may open a file several times
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
