"""Connections to SQLite files that are not inherited by forked processes.

SQLite's locks belong to a process, but fork(2) copies SQLite's records of them. If a parent's connection was open at
the fork, the child believes that it holds its parent's locks, also for connections that it opens itself. Then the last
program that closes the file removes a log to which the child still writes
(https://www.sqlite.org/howtocorrupt.html, section 2.6). So idle connections are closed before each fork. Opening
another costs the parent a millisecond. If another thread was using a connection, the child is refused the file.

Not covered: other connections of a program to the same file, such as those of Optuna's own storage, and programs that
fork without Python.
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
"""Seconds that a connection waits for another connection's transaction."""


class ConnectionPool(Protocol):
    """Keeps idle connections for later use, as SQLAlchemy's Engine does."""

    def dispose(self, close: bool = True) -> None:
        """Forget the idle connections, and close them if `close` is true."""
        ...


class Connection(sqlite3.Connection):
    """A connection that is closed when it is garbage-collected, but never by a child of its process.

    SQLAlchemy's pools do not close the connections that they forget.
    """

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
            # With WAL, the file stays consistent if the program or the machine crashes. A crash of the machine may lose
            # the last transactions. FULL would wait for the disk at each transaction.
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
    """Open a SQLite file, creating it if needed. Threads may use the connection one after another."""
    return sqlite3.connect(file, timeout=BUSY_TIMEOUT, check_same_thread=False, factory=Connection)


def close_before_forks(pool: ConnectionPool) -> None:
    """Close the pool's idle connections before every fork of this process."""
    _state.pools.add(pool)


class _State:
    """The state that the fork hooks share. There is one per process, because a fork concerns the whole process."""

    def __init__(self) -> None:
        self.gate = threading.RLock()
        """Held during a fork, and while a connection is opened or closed, when SQLite holds locks of its own."""
        self.open: WeakSet[Connection] = WeakSet()
        self.pools: WeakSet[ConnectionPool] = WeakSet()
        self.in_use: list[Connection] = []
        self.refused: set[tuple[int, int]] = set()

    def before_fork(self) -> None:
        self.gate.acquire()
        for pool in list(self.pools):
            pool.dispose()
        # Kept here, because the child loses the objects of other threads before its own hook runs.
        self.in_use = list(self.open)

    def after_fork_in_parent(self) -> None:
        self.in_use = []
        self.gate.release()

    def after_fork_in_child(self) -> None:
        self.gate = threading.RLock()
        for connection in self.in_use:
            # Its memory must never be freed. That would close it, and SQLite would roll back the parent's transaction.
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
