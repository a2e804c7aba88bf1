"""The files that a program has open when its jobs are forked.

fork(2) copies descriptors, not what they refer to. A *file description*, with its position, is shared by all processes
that inherit it, so a `seek` in one job would move what another one reads. A job therefore opens each file that is
open for reading again, through /proc/self/fd, which also works for files that are deleted. The program notes all
positions before the fork, because it may move them as soon as that is done. In a fork server nobody moves them, and
what the shared descriptions' positions are does not matter.

Not opened again:

- files open for writing only: their shared position keeps jobs from overwriting each other's lines;
- standard input, output and error, and other descriptors of the same files;
- pipes, sockets and terminals, which have no position.

What becomes of locks: one made with flock(2) stays with the program's description; a job neither holds it nor can
release it. Locks made with fcntl(2) are never inherited. But a process that closes any descriptor of a file loses all
of those that it has on the file, so the program itself must not open and close its files once more.
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
"""Flags that open(2) is given again. Others are about a path (O_NOFOLLOW) or make a new file (O_TMPFILE)."""

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
"""Formats whose libraries keep state in memory that is wrong after a fork, and where their files say what they are."""

_MAX_LOCK_FILE = 1024
"""Bytes up to which a locked file is taken for one that is only there to be locked. It may say who has the lock."""

_MAX_NAMES = 3
"""Files of one kind that a notice names."""

_SYS_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _File:
    """A descriptor of a file, as it was when the program noted it."""

    descriptor: int
    path: str
    """In /proc, where it can be opened again."""
    name: str
    """Read early: the garbage collector closes files at any time."""
    flags: int
    offset: int
    device: int
    inode: int
    inheritable: bool
    locked: bool
    """Whether it is open for reading and writing, and locked. Asked early: fcntl(2) locks are the program's alone."""
    duplicate_of: int | None = None
    """Another descriptor of the same description, which is opened again before this one."""

    @property
    def access(self) -> int:
        return self.flags & os.O_ACCMODE

    def is_there(self) -> bool:
        """Whether the descriptor still is this file. Some are closed after a fork, and their numbers used again."""
        return _identity(self.descriptor) == (self.device, self.inode)


class OpenFiles:
    """The files that a program had open before a fork."""

    def __init__(self) -> None:
        """None of them."""
        self._files: list[_File] = []
        self._writers: list[weakref.ref[IO[Any]]] = []

    @classmethod
    def of_this_process(cls, besides: Container[int] = ()) -> OpenFiles:
        """Note them right before the fork, but not the descriptors `besides`.

        What this process has in buffers for them is written first. Otherwise each job would write it as well.
        """
        noted = cls()
        files = _files()
        if written := {file.descriptor for file in files if file.access != os.O_RDONLY}:
            # In few programs. To look at all their objects takes milliseconds.
            noted._writers = _flush_writers(written)
            files = _files()  # which has moved positions
        files = [file for file in files if file.access != os.O_WRONLY and file.descriptor not in besides]
        noted._files = _with_duplicates(files)
        return noted

    def open_again(self) -> list[str]:
        """Give a job positions of its own, before any of the user's code runs. Returns error messages."""
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
        """At the end of a job: write what the job has left in the buffers of the program's file objects."""
        for writer in self._writers:
            stream = writer()
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except ValueError:  # it was detached from its buffer
                continue
            except OSError as error:
                traceback.print_exception(error)

    def notice(self) -> str | None:
        """A notice for the user about files that jobs may damage, in one line.

        Call it in the process that noted them, after the fork: some libraries close files before it.
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
    """Descriptors of files that this process has beside its standard streams, in order."""
    standard = {_identity(descriptor) for descriptor in (0, 1, 2)}
    seen = map(_look, sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir()))
    return [file for file in seen if file is not None and (file.device, file.inode) not in standard]


def _look(descriptor: int) -> _File | None:
    """Returns None for what has no position."""
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
    except OSError:  # a descriptor that listed the others and is closed, or a file that cannot seek
        return None


def _flush_writers(descriptors: set[int]) -> list[weakref.ref[IO[Any]]]:
    """Flush the file objects that write to them. Returns those that could be flushed."""
    writers: list[weakref.ref[IO[Any]]] = []
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    for stream in [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]:
        # ValueError: closed or detached. OSError: it has no descriptor, or the disk is full, as the program will learn.
        with contextlib.suppress(ValueError, OSError):
            if stream.fileno() in descriptors:
                stream.flush()
                writers.append(weakref.ref(stream))
    return writers


def _with_duplicates(files: list[_File]) -> list[_File]:
    """Find descriptors made with dup(2), which share a position in a job as they do in the program.

    In the order of the descriptors, so that a duplicate comes after the one that it is of.
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
    """0 for one description, else which of two comes first. Where the kernel refuses to say (kcmp(2)), they are two."""
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
    """Whether jobs would write to it at positions of their own.

    Not to what is shared on purpose (mapped memory), to a lock file, or to what is only appended to.
    """
    if file.flags & os.O_APPEND or file.name in mapped or file.name.startswith(_SHARED_MEMORY):
        return False
    with contextlib.suppress(OSError):  # it has just been closed
        return not file.locked or os.fstat(file.descriptor).st_size > _MAX_LOCK_FILE
    return False


def _is_locked(descriptor: int) -> bool:
    return "\nlock:" in Path(f"/proc/self/fdinfo/{descriptor}").read_text()


def _shared_mappings() -> set[str]:
    """Names of the files that this process has mapped so that others see what it writes."""
    lines = [line.split(None, 5) for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()]
    return {fields[5] for fields in lines if len(fields) == 6 and fields[1].endswith("s")}


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))  # a library may open a file several times
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
