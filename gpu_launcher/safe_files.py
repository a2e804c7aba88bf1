"""Files in directories that other users may write to.

In such a directory, one of our names can be anything: a symbolic link to another file, a FIFO that blocks its opener, a
device, a hard link, or another user's file. The functions here open only regular files and never block. The content of
such a file is data of its owner; `why_untrusted` says whether to trust it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

PRIVATE_DIRECTORY = 0o755
"""Mode of a directory that only its owner may change, with any umask."""
PRIVATE_FILE = 0o644
"""Mode of a file that only its owner may change, with any umask."""
MAX_LINE = 16 * 2**20
"""Longest line that is kept in memory, in bytes."""


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = PRIVATE_FILE, *, dir_fd: int | None = None
) -> int:
    """Open a regular file and return its descriptor, which is not inherited.

    A file opened for writing must not have other names. Otherwise, by a hard link, another user could make us write to
    any file of this user. Raises OSError.
    """
    # O_NONBLOCK: otherwise, opening a FIFO would wait for its other end, and opening a file under a lease (fcntl(2),
    # F_SETLEASE) for the lease's holder. It has no effect on an open regular file. O_TRUNC must wait for the checks.
    wanted = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, wanted, mode, dir_fd=dir_fd)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if flags & os.O_ACCMODE != os.O_RDONLY and status.st_nlink > 1:
            raise OSError(errno.EMLINK, "has other names (hard links)", os.fspath(path))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_beneath(root: str | os.PathLike[str], parts: Sequence[str], *, directory: bool = False) -> int:
    """Open the regular file, or the directory, `root/part/part/...` for reading, and return its descriptor.

    No symbolic link below `root` is followed, so what is opened lies beneath it. Raises OSError.
    """
    if not all(map(_is_name, parts)):
        raise OSError(errno.EINVAL, "not a path beneath the directory", "/".join(parts))
    no_link = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, part in enumerate(parts, 1):
        above = descriptor
        try:
            if directory or number < len(parts):
                descriptor = os.open(part, no_link | os.O_DIRECTORY, dir_fd=above)
            else:
                descriptor = open_regular(part, dir_fd=above)
        finally:
            os.close(above)
    return descriptor


def _is_name(part: str) -> bool:
    """Whether a text from elsewhere can be the name of a file."""
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # JSON may have lone surrogates
        return False
    return part not in ("", ".", "..") and "/" not in part and "\0" not in part


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        return read_all(file.fileno(), limit)


def read_all(descriptor: int, limit: int) -> bytes:
    """Read an open file of at most `limit` bytes. Raises OSError."""
    parts = []
    left = limit + 1
    while left and (part := os.read(descriptor, min(left, 2**20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes")
    return b"".join(parts)


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the lines of a regular file, without those that are longer than MAX_LINE. Raises OSError."""
    with open(open_regular(path), "rb") as file:
        whole = True
        while line := file.readline(MAX_LINE):
            ended = line.endswith(b"\n")
            if whole and (ended or len(line) < MAX_LINE):
                yield line
            whole = ended


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is complete as soon as it exists, even if this process is killed. Raises OSError.

    It does not use fsync. The readers do not survive a crash of the machine either. And while the disk is writing
    checkpoints, fsync may take seconds, in which a job's devices would be idle.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def why_untrusted(descriptor: int) -> str | None:
    """The reason not to trust an open file, as a predicate; None if only this user or root can have written it."""
    status = os.fstat(descriptor)
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def make_directories(path: Path) -> None:
    """Create a directory and missing parents, which only their owner may change. Raises OSError."""
    try:
        path.mkdir(PRIVATE_DIRECTORY)
    except FileExistsError:
        if not path.is_dir():
            raise
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_directories(path.parent)
        path.mkdir(PRIVATE_DIRECTORY, exist_ok=True)  # fails again in /proc, so it is not retried
