"""Checks the files that contain studies, and prepares them before their first use."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import SystemRandom
from typing import TypeVar

from gpu_launcher.errors import StorageError
from gpu_launcher.leases.pool_directory import MOUNTINFO, NETWORK_FILE_SYSTEMS, file_system_of
from gpu_launcher.studies.connections import BUSY_TIMEOUT, connect

ALWAYS = frozenset({"studies", "trials", "version_info"})
"""Tables that every complete study database has, in all versions of Optuna."""

T = TypeVar("T")


def check_file(file: Path) -> None:
    """Raise StorageError unless this user can write or create `file` and other files beside it.

    It does not read the contents: closing a file drops all locks that SQLite has on it in this process (fcntl(2)).
    """
    try:
        _check_file(file)
    except OSError as error:
        raise explained(file, error) from error


def _check_file(file: Path) -> None:
    name = str(file)
    if file.is_dir():
        raise StorageError(name, f"is a directory: name a file in it, such as {file / 'study.db'}")
    if not file.parent.exists():
        raise StorageError(name, f"directory {file.parent} does not exist: make it, or correct the name")
    if not file.parent.is_dir():
        raise StorageError(name, f"{file.parent} is a file, where a directory should be: correct the name")
    if file.exists() and not os.access(file, os.W_OK):
        raise StorageError(name, f"cannot be written by user {os.geteuid()}: change its mode, or work on a copy")
    if not os.access(file.resolve().parent, os.R_OK | os.W_OK | os.X_OK):
        raise StorageError(
            name,
            f"directory {file.resolve().parent} cannot be written by user {os.geteuid()}, and files beside it are "
            "needed: change its mode, or name a file elsewhere",
        )


def check_local(file: Path, mountinfo: Path = MOUNTINFO) -> None:
    """Raise StorageError if the file is, or would be, on a network file system."""
    kind = file_system_of(file, mountinfo)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StorageError(
            str(file),
            f"is on a network file system ({kind}), where SQLite loses data, for its locks are not reliable and WAL "
            "needs shared memory: name a file in a local directory, or use PostgreSQL (postgresql://), "
            "which several machines can use at once",
        )


@contextmanager
def opening(file: Path) -> Iterator[None]:
    """Exclude all other processes and threads that open a database in the file's directory.

    It locks the directory itself (flock(2)). So it leaves no file behind, and a dead process leaves no lock. Raises
    StorageError after a minute.
    """
    descriptor = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:

        def lock() -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

        try:
            _patiently(lock, BlockingIOError)
        except BlockingIOError:
            raise StorageError(
                str(file),
                f"another program has locked the directory {file.parent} for {BUSY_TIMEOUT:.0f} s: find it with "
                f"`lslocks` and end it, or name a file elsewhere",
            ) from None
        try:
            yield
        finally:
            # Closing the descriptor is not enough: a process that was forked meanwhile has a copy of it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def make_ready(file: Path, tables: frozenset[str]) -> None:
    """Switch the SQLite file to WAL mode, after checking that it has no tables, or Optuna's.

    `tables` names all of Optuna's tables. The file stores the journal mode. Raises StorageError and sqlite3.Error.
    """
    with closing(connect(file)) as database:
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite@_%' ESCAPE '@'"
        found = {name for (name,) in database.execute(names)}
        # Fewer tables than all: a program was killed while it created them.
        if not (found >= ALWAYS or found <= tables):
            raise StorageError(
                str(file),
                f"is the database of another application (with tables {_some(found - tables)}): name another file",
            )

        def switch() -> str:
            (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)

        # Here SQLite itself waits for a connection that reads, but not for one that writes.
        mode = _patiently(switch, sqlite3.OperationalError, lambda error: "locked" in str(error))
    if mode != "wal":
        raise StorageError(
            str(file),
            f"its file system has no shared memory, which WAL needs (journal mode stays {mode!r}): "
            "name a file in another local directory",
        )


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (" …" if len(names) > len(first) else "")


def _patiently(
    attempt: Callable[[], T], busy: type[Exception], is_busy: Callable[[Exception], bool] = lambda error: True
) -> T:
    """Retry an attempt until it succeeds or a minute has passed."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            return attempt()
        except busy as error:
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
        # The pause is random, so programs that came at the same moment do not retry at the same moments. It does not
        # use the `random` module's generator, which the program may have seeded and may rely on.
        time.sleep(SystemRandom().uniform(0.005, 0.02))


def explained(file: Path, error: Exception) -> StorageError:
    """The StorageError that explains an error of SQLite or of the system to the user."""
    text = str(error)
    check = f"`sqlite3 {file} 'PRAGMA integrity_check'`"
    modes = f"check the modes of it, its directory, and {file.name}-*"
    problems = {
        "not a database": "is not a SQLite database: name another file, or remove this one",
        "malformed": f"is damaged: see {check}, then `sqlite3 {file} .recover`, or take a copy from before",
        "locked": f"another program has kept it locked for {BUSY_TIMEOUT:.0f} s: find it with `lsof {file}` and end it",
        "disk is full": "the disk is full: free some space, or name a file elsewhere",
        "readonly": f"cannot be written by user {os.geteuid()}: {modes}",
        "unable to open": f"cannot be opened by user {os.geteuid()}: {modes}",
        "Permission denied": f"cannot be reached by user {os.geteuid()}: check the modes of the directories above it",
        "disk I/O error": "the disk reports an error: see `dmesg`, and take a copy to another disk",
    }
    found = next((problem for words, problem in problems.items() if words in text), None)
    return StorageError(str(file), found or f"cannot be used ({text.splitlines()[0] if text else repr(error)})")
