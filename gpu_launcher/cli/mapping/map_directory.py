"""The files of a map: its own directory, and one for each run.

    <directory>/results.jsonl        a line for each run that ended
    <directory>/results.csv          the same as a table, with --csv
    <directory>/<index>/params.json  one run's parameters
                        stdout.txt, stderr.txt; those of earlier attempts are stdout.attempt-1.txt, ...
                        outcome.json how the run ended
    <directory>/.gpu_launcher/       map.json (what was asked for), lock, and what `jobs.manifest` keeps

A run's process writes its outcome before the head writes the line of results.jsonl. So a completed run is recognised
even if the head was killed. All processes of a launch hold the lock, including the fork server and the runs. So a
launch that gets the lock knows that no process of an earlier launch is alive.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.values import Params, to_json
from gpu_launcher.errors import ManifestError, OptionError, UsageError
from gpu_launcher.jobs.directory import LOCK, DirectoryLock
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.json_data import load_object
from gpu_launcher.safe_files import (
    PRIVATE_DIRECTORY,
    make_directories,
    open_regular,
    read_regular,
    why_untrusted,
    write_whole,
)
from gpu_launcher.text import short_path

COMMAND = "gpu-launcher map"
"""Name of a map's program, shown to users who wait for its devices or its directory."""
FORMAT = 1
STDOUT, STDERR = PRINTED = ("stdout.txt", "stderr.txt")
"""Names of the files with what a run prints."""
MAX_DIGITS = 8
"""Most digits in the index of a run."""
MAX_SIZE = 2**30
"""Largest size in bytes of a JSON file that is read, such as a map's settings with its grid."""

_KEPT: dict[str, Any] = {
    "command": list,
    "param": list,
    "from": str | None,
    "shell": bool,
    "options": dict,
    "grid": list,
    "directory": str,
}
"""The fields of map.json and their types."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory of one run."""

    path: Path

    @property
    def params(self) -> Path:
        return self.path / "params.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    @property
    def stdout(self) -> Path:
        return self.path / STDOUT

    @property
    def stderr(self) -> Path:
        return self.path / STDERR

    def prepare(self, params: Params, attempt: int) -> None:
        """Prepare the directory for an attempt, and rename the previous attempt's output. Raises OSError."""
        make_directories(self.path)
        if self.path.is_symlink():  # another user may have chosen where it points
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(self.path))
        if self.stdout.exists():  # otherwise no command has run
            for file in (self.stdout, self.stderr):
                if file.exists():
                    set_aside(str(file), max(1, attempt - 1))  # no attempt is known if its node was lost at once
        write_whole(self.params, f"{to_json(params)}\n".encode())

    def begin(self) -> None:
        """Remove the previous attempt's outcome. Raises OSError."""
        self.outcome.unlink(missing_ok=True)

    def attempts(self) -> int:
        """The number of attempts so far, counted by their output files."""
        try:
            return sum(entry.name.startswith("stdout.") for entry in os.scandir(self.path))
        except OSError:
            return 0

    def read(self) -> dict[str, Any] | None:
        """The outcome; None if it is missing or unreadable."""
        return _read(self.outcome)

    def read_params(self) -> dict[str, Any] | None:
        """The parameters; None if they are missing or unreadable."""
        return _read(self.params)


@dataclass(frozen=True, slots=True)
class MapDirectory:
    """The directory of a map."""

    path: Path

    @property
    def results(self) -> Path:
        return self.path / "results.jsonl"

    @property
    def kept_results(self) -> Path:
        """The file with the results that a resumption keeps. It later replaces `results`."""
        return self.path / "results.jsonl.tmp"

    @property
    def table(self) -> Path:
        return self.path / "results.csv"

    @property
    def settings(self) -> Path:
        return self.path / DIRECTORY / "map.json"

    @property
    def lock(self) -> Path:
        return self.path / DIRECTORY / LOCK

    def run(self, index: int) -> RunDirectory:
        """The directory of the run `index`."""
        return RunDirectory(self.path / str(index))

    def indices(self) -> Iterator[int]:
        """The indices of runs that have a directory, in no particular order."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.isascii() and entry.name.isdigit() and len(entry.name) <= MAX_DIGITS:
                    yield int(entry.name)

    def create(self, settings: dict[str, Any], above: Path) -> None:
        """Create the directory of a new map.

        Raises OptionError if the path is in use or cannot be written. If writing fails, the directories made below
        `above` are removed.
        """
        name = short_path(self.path)
        try:
            self._refuse_what_is_there()
            make_directories(self.settings.parent)
            _write_new(self.settings, json.dumps({"format": FORMAT, **settings}))
        except FileExistsError:
            if not self.path.is_dir():
                raise OptionError("dir", f"{name} is not a directory: name another") from None
            raise self._is_anothers() from None
        except OSError as error:
            with contextlib.suppress(OSError):
                self._remove(above)
            if error.errno in _FULL:
                problem = (
                    f"{name} cannot be created, because there is no room ({error.strerror}): make room, or name a place"
                )
                raise OptionError("dir", f"{problem} elsewhere") from error
            raise OptionError(
                "dir", f"{name} cannot be written to ({error.strerror}): name a directory of yours"
            ) from error

    def above(self) -> Path:
        """The longest part of its path that exists."""
        return next(path for path in (self.path, *self.path.parents) if os.access(path, os.F_OK))

    def _refuse_what_is_there(self) -> None:
        """Raise OptionError if the new map would overwrite anything. Raises OSError."""
        damaged = self.settings.exists()
        if damaged and (_read(self.settings) is not None or not os.access(self.settings, os.R_OK)):
            raise self._is_anothers()
        for file in (self.results, self.table):
            if file.exists():
                raise OptionError("dir", f"{short_path(file)} exists already: name another directory")
        index = next(self.indices(), None) if self.path.is_dir() else None
        if index is not None:
            there = short_path(self.path / str(index))
            raise OptionError("dir", f"{there} exists already, as a run's directory would: name another directory")
        if damaged:  # the launch that wrote it was killed before it ran anything
            self.settings.unlink()

    def _is_anothers(self) -> OptionError:
        problem = f"{short_path(self.path)} holds another map: to continue it, give --resume {quoted(self.path)}"
        return OptionError("dir", f"{problem}, or name another directory")

    def read_settings(self) -> dict[str, Any]:
        """Read the settings of a map that is to be resumed. Raises OptionError."""
        name = short_path(self.path)
        try:
            settings = load_object(read_regular(self.settings, MAX_SIZE))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise OptionError("resume", f"{name} is not a map's directory: give what --dir named") from error
        except OSError as error:
            problem = (
                f"{short_path(self.settings)} cannot be read ({error.strerror}): resume it as the user whose map it is"
            )
            raise OptionError("resume", problem) from error
        except ValueError as error:
            raise self.damaged() from error
        version = settings.get("format")
        if not isinstance(version, int):
            raise self.damaged()
        if version != FORMAT:
            raise OptionError("resume", f"{name} is of a newer version of gpu-launcher: use that")
        if not all(name in settings and isinstance(settings[name], kind) for name, kind in _KEPT.items()):
            raise self.damaged()
        return dict(settings)

    def whose(self) -> str | None:
        """The reason not to trust the settings, as a predicate; None if only this user or root can have written them.

        Raises OSError.
        """
        with open(open_regular(self.settings), "rb") as file:
            return why_untrusted(file.fileno())

    def damaged(self) -> OptionError:
        """The error for invalid settings."""
        problem = f"{short_path(self.settings)} is damaged, so the command to run is unknown"
        return OptionError("resume", f"{problem}: give the command again, with another --dir")

    def withdraw(self, above: Path) -> None:
        """Undo `create` if nothing was run, and remove the directories made below `above`."""
        with contextlib.suppress(OSError):
            if self.results.exists() and not self.results.stat().st_size:
                self.results.unlink()
            if not self.results.exists() and next(self.indices(), None) is None:
                self.settings.unlink()
                self.lock.unlink(missing_ok=True)
                self._remove(above)

    def _remove(self, above: Path) -> None:
        """Remove the empty directories below `above`, the innermost first. Raises OSError for one that is not empty."""
        with contextlib.suppress(FileNotFoundError):
            self.settings.parent.rmdir()
        for path in (self.path, *self.path.parents):
            if path == above:
                return
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()

    @contextlib.contextmanager
    def without_kept_results(self) -> Iterator[None]:
        """Remove `kept_results` after this block, unless it has replaced the results."""
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.kept_results.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, option: str, notice: Callable[[str], None]) -> Iterator[None]:
        """Hold the map's lock, which all processes of an earlier launch must have released.

        Must be entered before the node is started, so that the node and the processes below it also hold the lock.
        Raises UsageError if another program runs this map, or if its processes do not end. Raises OptionError if the
        directory cannot be written; `option` is the one that named it.
        """
        try:
            lock = DirectoryLock.take(self.path, COMMAND, "wait for it, or stop it, before you resume", notice)
        except ManifestError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise OptionError(option, f"{short_path(self.path)} cannot be written to ({error.strerror})") from error
        try:
            yield
        finally:
            lock.close()


def quoted(path: Path) -> str:
    """The path as a user would write it in a shell command."""
    return shlex.quote(short_path(path))


def new_directory() -> Path:
    """Create `map/<date>/<time>` in the working directory. Raises OptionError."""
    now = datetime.now()
    name = Path("map", f"{now:%Y-%m-%d}", f"{now:%H-%M-%S}").absolute()
    try:
        for number in range(1, 1000):
            path = name if number == 1 else name.with_name(f"{name.name}-{number}")
            with contextlib.suppress(FileExistsError):
                make_directories(path.parent)
                path.mkdir(PRIVATE_DIRECTORY)
                return path
    except OSError as error:
        raise OptionError(
            "dir", f"{name} cannot be made ({error.strerror}): name another directory with --dir"
        ) from error
    raise OptionError("dir", f"{name} and many after it exist: name another directory")


def _write_new(path: Path, content: str) -> None:
    """Write a new file like `write_whole`. Raises FileExistsError if it exists."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write_whole(temporary, content.encode())
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return load_object(read_regular(path, MAX_SIZE))
    except (OSError, ValueError):
        return None
