"""Connections to SQLite files that no process gets from its parent.

SQLite's locks belong to a process, and its notes about them are copied by fork(2): a child believes that it has locks
that only its parent has, for connections of its own too, if one of the parent's was open at the fork. The last program
that closes the file then removes a log to which the child still writes
(https://www.sqlite.org/howtocorrupt.html, section 2.6). So idle connections are closed before each fork, which costs
the parent a millisecond for opening another. Where one was in use, by another thread, the child is refused the file.

Nothing of this is about other connections that a program may have to the same file, such as those of Optuna's own
storage, nor about programs that fork without Python.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from gpu_launcher.errors import StorageError

BUSY_TIMEOUT = 60.0
"""Seconds for which a connection waits for another one's transaction."""


class ConnectionPool(Protocol):
    """What keeps connections for later: SQLAlchemy's Engine."""

    def dispose(self, close: bool = True) -> None:
        """Forget the idle connections, and close them or not."""
        ...


class Connection(sqlite3.Connection):
    """One that is closed when forgotten, as SQLAlchemy's pools do not, and never by a child of its process."""

    file: Path
    opened = False

    def __init__(self, database: Path, **options: Any) -> None:
        self.file = database
        with _state.gate:
            if _identity(database) in _state.refused:
                raise StorageError(
                    str(database),
                    "was in use by another thread when this process was forked, and SQLite's locks do not survive "
                    "that: fork before the study is opened, or start a fresh interpreter (multiprocessing's `spawn`)",
                )
            super().__init__(database, **options)
            _state.open.add(self)
            self.opened = True
            # With WAL, the file is consistent after a crash of the program and also of the machine, which may cost
            # the last transactions. FULL would wait for the disk at each.
            self.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        with _state.gate:
            super().close()
            _state.open.discard(self)
            self.opened = False

    def __del__(self) -> None:
        if self.opened:
            self.close()


def connect(file: Path) -> Connection:
    """Open the file, and make an empty one where there is none. Threads may use the connection one after another."""
    return sqlite3.connect(file, timeout=BUSY_TIMEOUT, check_same_thread=False, factory=Connection)


def close_before_forks(pool: ConnectionPool) -> None:
    """Close the pool's idle connections whenever this process is about to be forked."""
    _state.pools.add(pool)


class _State:
    """What the hooks around fork share. One for the process, as forks are."""

    def __init__(self) -> None:
        self.gate = threading.RLock()
        """Held while a connection is opened or closed, and during a fork: SQLite has locks of its own then."""
        self.open: WeakSet[Connection] = WeakSet()
        self.pools: WeakSet[ConnectionPool] = WeakSet()
        self.in_use: list[Connection] = []
        self.refused: set[tuple[int, int]] = set()

    def before_fork(self) -> None:
        self.gate.acquire()
        for pool in list(self.pools):
            pool.dispose()
        # Held, for the child is rid of the other threads' objects before its own hook runs.
        self.in_use = list(self.open)

    def after_fork_in_parent(self) -> None:
        self.in_use = []
        self.gate.release()

    def after_fork_in_child(self) -> None:
        self.gate = threading.RLock()
        for connection in self.in_use:
            # Not even its memory may be freed, which would close it: SQLite would undo the parent's transaction.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
            connection.opened = False
            if (identity := _identity(connection.file)) is not None:
                self.refused.add(identity)
        self.in_use = []
        self.open = WeakSet()
        for pool in list(self.pools):
            pool.dispose(close=False)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


_state = _State()
os.register_at_fork(
    before=_state.before_fork,
    after_in_parent=_state.after_fork_in_parent,
    after_in_child=_state.after_fork_in_child,
)
