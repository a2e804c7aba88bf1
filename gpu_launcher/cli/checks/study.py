"""Checks whether many processes can use a study's file at once."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from gpu_launcher.cli.checks.finding import Finding, ok, problem, warning
from gpu_launcher.leases.pool_directory import NETWORK_FILE_SYSTEMS, file_system_of

CHECK = "study"
MAGIC = b"SQLite format 3\0"
_WAL = b"\2\2"
"""File format versions for writing and reading, at offset 18; 1 means a rollback journal.

See https://www.sqlite.org/fileformat.html.
"""


def examine_study(study: str) -> Iterator[Finding]:
    """Check a study. `study` is a path or an Optuna storage URL such as `sqlite:///study.db`."""
    path = Path(study.removeprefix("sqlite:///")).expanduser().absolute()
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except OSError as error:
        yield problem(CHECK, f"{path} cannot be read: {error.strerror}", "name an existing SQLite file with --study")
        return
    if not head.startswith(MAGIC):
        yield problem(CHECK, f"{path} is not a SQLite database", "name a SQLite file with --study, such as study.db")
        return
    yield _contents(path, head)
    yield _journal(path, head)
    kind = file_system_of(path)
    if kind in NETWORK_FILE_SYSTEMS:
        yield problem(
            CHECK,
            f"it is on a network file system ({kind}), where SQLite's locks are not reliable and WAL does not work",
            "move it to a local disk",
        )
    else:
        yield ok(CHECK, f"it is on {kind or 'a file system of unknown type'}")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        yield problem(CHECK, "this user cannot write to it, or to its directory", "check their owners and modes")


def _contents(path: Path, head: bytes) -> Finding:
    # In WAL mode, even a reader creates files beside the database, unless it opens it as immutable. Opening it so is
    # correct only if there is no log.
    in_use = head[18:20] == _WAL and Path(f"{path}-wal").exists()
    uri = f"file:{quote(str(path))}?mode=ro{'' if in_use else '&immutable=1'}"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=2)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"studies", "trials", "version_info"} <= tables:
                return warning(CHECK, f"{path} is a SQLite database without an Optuna study", "name another file")
            (studies,) = database.execute("SELECT COUNT(*) FROM studies").fetchone()
            (trials,) = database.execute("SELECT COUNT(*) FROM trials").fetchone()
    except sqlite3.Error as error:
        return problem(CHECK, f"{path} cannot be read by SQLite: {error}", f"`sqlite3 {path} 'PRAGMA integrity_check'`")
    return ok(CHECK, f"{path} has {studies} Optuna stud{'y' if studies == 1 else 'ies'} and {trials} trials")


def _journal(path: Path, head: bytes) -> Finding:
    """Read the journal mode from the header: WAL is the only mode that the file records."""
    if head[18:20] == _WAL:
        return ok(CHECK, "its journal mode is WAL: one program writes while others read")
    return problem(
        CHECK,
        "its journal mode is not WAL: parallel programs wait for each other, up to 'database is locked'",
        f"`sqlite3 {path} 'PRAGMA journal_mode=WAL'`, while no program uses it",
    )
