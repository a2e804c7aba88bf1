"""Reads what the jobs of a search report from its study, while the search runs. Imports neither Optuna nor SQLAlchemy.

Another user may have written the database, so it is data: it is opened only for reading, its views are not read, and
the work that it can cause is limited. Nothing is written beside it either: SQLite would leave files of its log there,
so a database without such a log is read as one that does not change.

A study may have millions of reports. An index leads from a trial and a step to the next report, so of a long curve only
the points that are drawn are read, and reading takes about as long however many reports there are.
"""

from __future__ import annotations

import math
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import StorageError

STUDY_FILE = "study.db"
"""Name of the study's database in the directory of a search that names no storage."""
MAX_CURVES = 100
"""Maximum number of trials whose reports are read."""
MAX_POINTS = 100
"""Maximum number of points of a curve."""
BUSY_SECONDS = 1.0
"""Seconds to wait for a program that writes. With the log that gpu-launcher uses, readers and writers do not wait."""
WORK = 10_000
"""Number of instructions of SQLite's virtual machine after which the work is counted."""
MAX_WORK = 2_000
"""Maximum number of times WORK in one reading: about a second."""
MAX_CELL_BYTES = 2**20
TABLES = ("studies", "trials", "trial_intermediate_values")

_TRIALS = """
    SELECT trial_id, number FROM trials
    WHERE study_id = (SELECT study_id FROM trials ORDER BY trial_id DESC LIMIT 1)
        AND EXISTS (SELECT 1 FROM trial_intermediate_values AS report WHERE report.trial_id = trials.trial_id)
    ORDER BY state = 'RUNNING' DESC, number DESC LIMIT ?
"""
_REPORTS = """
    SELECT step, CASE WHEN intermediate_value_type = 'FINITE' THEN intermediate_value END
    FROM trial_intermediate_values WHERE trial_id = ? AND step >= ? ORDER BY step LIMIT ?
"""
_STEPS = "SELECT min(step), max(step) FROM trial_intermediate_values WHERE trial_id = ?"


@dataclass(frozen=True, slots=True)
class Curve:
    """What a job has reported."""

    number: int
    """The number of the job, which is that of its trial."""
    points: tuple[tuple[int, float | None], ...]
    """Steps in rising order, each with the value. None for a value that is infinite or not a number."""


def study_file(directory: Path) -> Path | None:
    """Return the database of a search in `directory`. None if it keeps its study elsewhere. Raises StorageError."""
    file = directory.absolute() / STUDY_FILE
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise StorageError(str(file), "is not a regular file")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(str(file), f"cannot be read: {error.strerror}") from error
    return file


def read_curves(directory: Path) -> tuple[list[Curve], bool]:
    """Return the curves of the search in `directory`, and whether it has more than these.

    Those of running jobs come first, then the latest ones. There are none if the search keeps its study elsewhere.
    Raises StorageError.
    """
    file = study_file(directory)
    if file is None:
        return [], False
    try:
        with closing(connect_to_read(file)) as database:
            work = iter(range(MAX_WORK))
            database.set_progress_handler(lambda: next(work, None) is None, WORK)
            return _read(file, database)
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:  # not Optuna's, or being written
        raise StorageError(str(file), f"cannot be read: {error}") from error


def connect_to_read(file: Path) -> sqlite3.Connection:
    """Open a database that any user may have written. Neither it nor any file beside it is written."""
    # SQLite would wait for ever for a FIFO to be opened for writing, and with it all who use SQLite in this process.
    has_log = all(_is_regular(file.with_name(f"{file.name}-{end}")) for end in ("wal", "shm"))
    # Otherwise SQLite would write into `-shm`, which may be a hard link to any file of this user.
    url = f"{file.as_uri()}?mode=ro&{'readonly_shm=1' if has_log else 'immutable=1'}"
    database = sqlite3.connect(url, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    if sys.version_info >= (3, 11):
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _is_regular(file: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(file.lstat().st_mode)
    return False


def _read(file: Path, database: sqlite3.Connection) -> tuple[list[Curve], bool]:
    kinds = "SELECT name FROM sqlite_master WHERE type = 'table' AND name IN (?, ?, ?)"
    if len(database.execute(kinds, TABLES).fetchall()) < len(TABLES):
        return [], False  # a study that is being created, or another application's
    database.execute("BEGIN")  # all is read as it was at one moment
    found = database.execute(_TRIALS, (MAX_CURVES + 1,)).fetchall()
    curves = [Curve(int(number), tuple(_points(database, trial))) for trial, number in found[:MAX_CURVES]]
    return curves, len(found) > MAX_CURVES


def _points(database: sqlite3.Connection, trial: int) -> Iterator[tuple[int, float | None]]:
    """All reports of a trial, or MAX_POINTS of them at about equal distances."""
    rows = database.execute(_REPORTS, (trial, -(2**63), MAX_POINTS + 1)).fetchall()
    if len(rows) > MAX_POINTS:
        first, last = map(int, database.execute(_STEPS, (trial,)).fetchone())
        wanted = (first + (last - first) * place // (MAX_POINTS - 1) for place in range(MAX_POINTS))
        rows = [row for step in wanted for row in database.execute(_REPORTS, (trial, step, 1))]
    for step, value in dict(rows).items():
        yield int(step), float(value) if value is not None and math.isfinite(value) else None
