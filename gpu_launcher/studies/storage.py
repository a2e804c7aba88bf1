"""Opens the storages of studies, and locks and writes in them. The only module that imports SQLAlchemy.

Optuna alone lets parallel programs run the same trial twice on SQLite. It reads a trial's state `FOR UPDATE`, but
SQLAlchemy omits these words for SQLite. So here, a transaction whose first statement is `FOR UPDATE` begins with
`BEGIN IMMEDIATE`, the nearest that SQLite has. Other transactions must not: if they began like this, or explicitly at
all, those of Optuna that first read and later write would fail or wait for each other.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from gpu_launcher.errors import StorageError
from gpu_launcher.leases.pool_directory import MOUNTINFO
from gpu_launcher.studies.connections import close_before_forks, connect
from gpu_launcher.studies.files import check_file, check_local, explained, make_ready, opening
from gpu_launcher.studies.storage_url import JournalFile, SQLiteFile, read_storage_url, unknown_scheme, without_password

TABLES = frozenset(models.BaseModel.metadata.tables) | {"alembic_version"}
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages to install, by missing module, where their names differ."""
MAX_TRIALS_PER_STATEMENT = 200
"""Trials in one statement. Databases limit the parameters of a statement, old SQLite to 999."""


def storage(url: str | os.PathLike[str] | BaseStorage | None, *, mountinfo: Path = MOUNTINFO) -> BaseStorage:
    """Open a storage for `optuna.create_study(storage=...)`, `optuna.load_study` or optuna-dashboard.

    - `sqlite:///study.db`, or the path of a file that ends in .db, .sqlite or .sqlite3: a SQLite file in WAL mode
      (which stays with the file), created if it does not exist. Many processes of one machine can use it at once. Each
      enqueued trial is given out once. A transaction waits a minute for others. A power failure may lose the last
      transactions.
    - `journal:///study.log`: Optuna's journal file, with Optuna's own lock.
    - any other URL, such as `postgresql://`: what Optuna makes of it.
    - a storage: the storage itself, unchanged. An `RDBStorage` on SQLite made elsewhere has none of these features.
    - None: a storage in memory, as in Optuna.

    For each study that is created or loaded, Optuna caches in front of the storage what no longer changes.

    Raises StorageError, which says what to do, if the storage cannot work: a SQLite file on a network file system, a
    file that is not a database or belongs to another application, a URL with a typo, a driver that is not installed.

    A pickled storage opens the same file again. A process that is forked later opens its own connections to a SQLite
    file. If another thread used the storage during the fork, the child gets a StorageError. Not promised: a study
    object (its cache has locks) that another thread used during the fork, and SQLite files that are moved or replaced
    while in use.

    `mountinfo` is for tests.
    """
    if url is None:
        return InMemoryStorage()
    if isinstance(url, BaseStorage):
        return url
    if not isinstance(url, (str, os.PathLike)) or not isinstance(os.fspath(url), str):
        raise StorageError(repr(url), "is neither a URL nor a path nor an Optuna storage: write sqlite:///study.db")
    place = read_storage_url(url)
    if isinstance(place, SQLiteFile):
        check_file(place.path)
        check_local(place.path, mountinfo)
        return SQLiteStorage(place.path)
    if isinstance(place, JournalFile):
        check_file(place.path)
        return _journal(place.path)
    return _elsewhere(place.url)


def read_only_storage(connect: Callable[[], sqlite3.Connection]) -> BaseStorage:
    """Open a storage on connections that cannot write, one for each session. Nothing is created or migrated."""
    options = {"creator": connect, "poolclass": sa.pool.NullPool}
    backend = RDBStorage("sqlite://", options, skip_compatibility_check=True, skip_table_creation=True)
    return _CachedStorage(backend)


class SQLiteStorage(RDBStorage):
    """Optuna's RDBStorage on one SQLite file, with the locking that it has on other databases. Created by `storage`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        # `connect` makes the connections, so the URL is only for display. Optuna uses it as a format string.
        url = f"sqlite:///{file}".replace("{", "{{").replace("}", "}}")
        try:
            with opening(file):
                make_ready(file, TABLES)
                super().__init__(url, engine_kwargs={"creator": partial(connect, file)})
        except (SQLAlchemyError, StorageInternalError, sqlite3.Error, OSError) as error:
            raise explained(file, _cause(error)) from error
        except RuntimeError as error:
            raise _incompatible(str(file), f"sqlite:///{file}", error) from error
        sa.event.listen(self.engine, "before_execute", _begin_immediate)
        close_before_forks(self.engine)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._file,)


def _begin_immediate(connection: sa.Connection, statement: object, *others: object) -> None:
    """Take SQLite's only write lock, or wait for it, before a statement that is meant to lock what it reads."""
    if getattr(statement, "_for_update_arg", None) is None:
        return
    driver = connection.connection.dbapi_connection
    if isinstance(driver, sqlite3.Connection) and not driver.in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _cause(error: BaseException) -> Exception:
    """The driver's error. SQLAlchemy wraps it, and Optuna wraps SQLAlchemy's."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return found if isinstance(found, Exception) else RuntimeError(str(found))


def _incompatible(name: str, url: str, error: RuntimeError) -> StorageError:
    """The error for tables that another version of Optuna made. Optuna's message says which one, and what to do."""
    return StorageError(name, str(error).replace("$STORAGE_URL", url))


def _journal(file: Path) -> JournalStorage:
    try:
        return JournalStorage(JournalFileBackend(str(file)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            str(file), "is not one of Optuna's journals: name another file, or remove this one"
        ) from error
    except OSError as error:
        raise explained(file, error) from error


def _elsewhere(url: str) -> RDBStorage:
    name = without_password(url)
    try:
        made = RDBStorage(url)
    except NoSuchModuleError as error:
        raise StorageError(name, unknown_scheme(url)) from error
    except ArgumentError as error:
        raise StorageError(name, "is not a URL: write database://user:password@host:port/name") from error
    except ImportError as error:
        module = getattr(_cause(error), "name", None) or "its driver"
        raise StorageError(
            name, f"{module} is not installed, which this URL needs: pip install '{DRIVERS.get(module, module)}'"
        ) from error
    except (KeyError, IndexError, ValueError) as error:
        raise StorageError(
            name, "is not a URL that Optuna can read: double each brace, and write a number for the port"
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        said = (str(_cause(error)).strip() or repr(error)).splitlines()[0]
        raise StorageError(
            name,
            f"database unavailable ({said}): check that it runs and exists, and host, port, user and password",
        ) from error
    except RuntimeError as error:
        raise _incompatible(name, name, error) from error
    close_before_forks(made.engine)
    return made


def keep_connections_from_jobs(storage: BaseStorage) -> None:
    """Close a storage's idle connections before every fork of this process.

    For storages made elsewhere: those made by `storage` do it anyway. SQLite in memory is excluded, because it exists
    only in its connections.
    """
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    if isinstance(backend, RDBStorage) and isinstance(backend.engine.pool, sa.pool.QueuePool):
        close_before_forks(backend.engine)


@contextmanager
def locked(storage: BaseStorage) -> Iterator[None]:
    """Exclude other programs that enter this context for the same storage, for example to check and then add something.

    For a file it locks the directory, as opening the file does. In other databases it locks a row that nothing else
    locks. Raises StorageError if locking a file's directory takes more than a minute. Other kinds of storage have no
    such lock.
    """
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    if isinstance(backend, SQLiteStorage):
        with opening(backend._file):
            yield
    elif isinstance(backend, JournalStorage) and isinstance(backend._backend, JournalFileBackend):
        with opening(Path(backend._backend._file_path).absolute()):
            yield
    elif isinstance(backend, RDBStorage) and backend.engine.dialect.name != "sqlite":
        with Session(backend.engine) as session, session.begin():
            session.execute(sa.select(models.VersionInfoModel.version_info_id).with_for_update())
            yield
    else:
        yield


def store_reports(storage: BaseStorage, reports: Mapping[int, Mapping[int, float]]) -> set[int]:
    """Store intermediate values, `{trial id: {step: value}}`; returns the ids of trials that do not accept them.

    These are trials that are no longer running (told, failed from a dashboard, deleted with their study) or not yet
    running. A value replaces an earlier value of the same step. A relational database stores all values in one
    transaction or none, and holds its locks for milliseconds. Other storages use one transaction per value.

    Raises optuna.exceptions.StorageInternalError if the database fails, as Optuna does.
    """
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    given = {trial: steps for trial, steps in reports.items() if steps}
    if not isinstance(backend, RDBStorage):
        return {trial for trial, steps in given.items() if not _stored_one_by_one(backend, trial, steps)}
    skipped: set[int] = set()
    try:
        with Session(backend.engine) as session, session.begin():
            for some in _portions(sorted(given)):
                skipped |= _store(session, {trial: given[trial] for trial in some})
    except SQLAlchemyError as error:
        raise StorageInternalError(f"the reports of {len(given)} trials cannot be stored: {error}") from error
    return skipped


def _store(session: Session, reports: Mapping[int, Mapping[int, float]]) -> set[int]:
    trial, report = models.TrialModel, models.TrialIntermediateValueModel
    # All programs lock the trials in the same order. The locks last until the end, so no trial is told meanwhile.
    states = sa.select(trial.trial_id, trial.state).where(trial.trial_id.in_(reports)).order_by(trial.trial_id)
    running = {number for number, state in session.execute(states.with_for_update()) if state == TrialState.RUNNING}
    steps = {step for number in running for step in reports[number]}
    replaced = []
    for some in _portions(sorted(steps)):
        earlier = sa.select(report.trial_intermediate_value_id, report.trial_id, report.step).where(
            report.trial_id.in_(running), report.step.in_(some)
        )
        replaced += [key for key, number, step in session.execute(earlier) if step in reports[number]]
    for keys in _portions(replaced):
        session.execute(sa.delete(report).where(report.trial_intermediate_value_id.in_(keys)))
    rows = []
    for number in sorted(running):
        for step, value in reports[number].items():
            stored, kind = report.intermediate_value_to_stored_repr(value)
            rows.append(
                {"trial_id": number, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}
            )
    if rows:
        session.execute(sa.insert(report), rows)
    return set(reports) - running


def _stored_one_by_one(storage: BaseStorage, trial: int, steps: Mapping[int, float]) -> bool:
    """Store a trial's reports one by one; returns whether the trial accepts them."""
    try:
        if storage.get_trial(trial).state != TrialState.RUNNING:
            return False
        for step, value in steps.items():
            storage.set_trial_intermediate_value(trial, step, value)
    except (KeyError, UpdateFinishedTrialError):
        return False
    return True


def _portions(numbers: Iterable[int]) -> Iterator[list[int]]:
    rest = iter(numbers)
    while portion := list(islice(rest, MAX_TRIALS_PER_STATEMENT)):
        yield portion
