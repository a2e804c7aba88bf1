"""Reads the user's name for a storage: a SQLite file, a journal file, or another database. Opens nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from gpu_launcher.errors import StorageError
from gpu_launcher.redaction import HIDDEN, redact

SQLITE = ("sqlite", "sqlite+pysqlite")
SUFFIXES = (".db", ".sqlite", ".sqlite3")
KNOWN = ("sqlite", "journal", "postgresql", "mysql", "mariadb", "oracle", "mssql")
"""URL schemes with which Optuna is known to work."""


@dataclass(frozen=True)
class SQLiteFile:
    path: Path
    """Absolute, because a relative path would name another file after a change of directory, as in Hydra's jobs."""


@dataclass(frozen=True)
class JournalFile:
    path: Path
    """Absolute."""


@dataclass(frozen=True)
class RemoteDatabase:
    url: str


def read_storage_url(named: str | os.PathLike[str]) -> SQLiteFile | JournalFile | RemoteDatabase:
    """Read a URL, or the path of a file whose name ends like that of a SQLite database. `~` is the home directory.

    Raises StorageError for anything invalid, such as two slashes instead of three.
    """
    text = os.fspath(named)
    scheme, found, rest = text.partition("://")
    if not found:
        return _file(text)
    if scheme == "journal":
        return JournalFile(_path(text, scheme, rest))
    if scheme in SQLITE:
        if rest in ("", "/") or rest.startswith("/:memory:") or "mode=memory" in rest:
            raise StorageError(text, "is in memory, and lost with the program: name a file, such as sqlite:///study.db")
        if "?" in rest:
            raise StorageError(
                without_password(text),
                "options after `?` are not supported for SQLite, whose time limit, journal and locks gpu-launcher "
                "chooses: leave them out",
            )
        return SQLiteFile(_path(text, scheme, rest))
    if scheme == "redis":
        raise StorageError(
            without_password(text),
            "Optuna reads no such URL: pass optuna.storages.JournalStorage(JournalRedisBackend(url)), or use postgresql://",
        )
    return RemoteDatabase(text)


def _file(text: str) -> SQLiteFile:
    if scheme := re.match(rf"({'|'.join(KNOWN)})(\+\w+)?:/*", text):
        begin = f"{scheme[1]}:///" if scheme[1] in ("sqlite", "journal") else f"{scheme[1]}://"
        raise StorageError(
            without_password(text), f"is not a URL: write {begin}{without_password(text[scheme.end() :].lstrip('/'))}"
        )
    if not text.endswith(SUFFIXES) or Path(text).name in SUFFIXES:
        raise StorageError(
            text or "''",
            f"is neither a URL nor the name of a SQLite file (which ends in {', '.join(SUFFIXES)}): "
            f"write sqlite:///{text or 'study.db'} for a SQLite file, journal:///{text or 'study.log'} for a journal",
        )
    return SQLiteFile(Path(text).expanduser().absolute())


def _path(text: str, scheme: str, rest: str) -> Path:
    if not rest.startswith("/"):
        raise StorageError(
            text,
            f"has two slashes, after which {rest.partition('/')[0]!r} would be a host: "
            f"write {scheme}:///{rest}, or {scheme}:////{rest} for a file below the root directory",
        )
    if rest == "/":
        raise StorageError(text, f"names no file: write {scheme}:///study.log")
    return Path(rest[1:]).expanduser().absolute()


def without_password(url: str) -> str:
    return redact(re.sub(r"(?<=://)([^:/@]*):.*@", rf"\1:{HIDDEN}@", url))


def unknown_scheme(url: str) -> str:
    """The message about a URL of an unknown database, with a suggestion."""
    scheme, _, driver = url.partition("://")[0].partition("+")
    if driver and scheme in KNOWN:
        return f"there is no database {scheme!r} with the driver {driver!r}: write {scheme}://, or name another driver"
    meant = get_close_matches(scheme, KNOWN, 1)
    return f"there is no database {scheme!r}: " + (
        f"is it {meant[0]}://?" if meant else f"a URL begins with {', '.join(KNOWN[:4])} or the like"
    )
