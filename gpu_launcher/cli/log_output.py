"""Prints the log of a job, also while the job adds to it."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gpu_launcher.cli.mapping.map_directory import RunDirectory
from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.control import ranges_of, spell
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST, launches_in
from gpu_launcher.jobs.manifest import Entry, State, read, read_chosen_sweep
from gpu_launcher.jobs.sweep_finder import running_sweep
from gpu_launcher.safe_files import open_regular

LOOK_SECONDS = 0.1
"""Seconds between two looks at a log that is followed."""
LOOK_AGAIN_SECONDS = 2.0
"""Seconds after which the manifest is read again even if it has not changed: a killed sweep writes nothing."""
SPARING = 9
"""How much longer to wait than to read the manifest, which takes a second if there are ten thousand jobs."""
CHUNK = 2**16


def print_log(named: str | None, number: int, out: BinaryIO, *, follow: bool) -> None:
    """Print the log of a job of the sweep in the directory `named`. By default, of the sweep that `Sweep` steers.

    With `follow`, this returns when the job has ended. Raises ManifestError.
    """
    directory, manifest = read_chosen_sweep(running_sweep(Path()) if named is None else Path(named))
    entries = manifest.entries
    entry = entries.get(number)
    logs: dict[str, _Log] = {}
    seen, not_before, next_look = _stamp(directory), -math.inf, time.monotonic() + LOOK_AGAIN_SECONDS
    try:
        while True:
            over = _is_over(entry, directory)
            if entry is not None and not (entry.retried and logs):  # the log of an attempt that failed has been renamed
                for kind, path in _paths(directory, entry).items():
                    logs.setdefault(kind, _Log()).path = path
            for log in logs.values():
                log.copy(out)
            if over or not follow:
                break
            time.sleep(LOOK_SECONDS)
            began, now = time.monotonic(), _stamp(directory)
            if (now != seen and began > not_before) or began > max(next_look, not_before):
                seen = now
                entries = read(directory)
                ended = time.monotonic()
                not_before, next_look = ended + SPARING * (ended - began), ended + LOOK_AGAIN_SECONDS
                entry = entries.get(number)
    finally:
        for log in logs.values():
            log.close()
    if entry is None:
        known = spell(ranges_of(entries))
        yet, so_far = ("", "") if over else (" yet", " so far")
        raise ManifestError(f"{directory} has no job {number}{yet} (it has {known}{so_far})")
    if not any(log.exists for log in logs.values()):
        why = f"it ended without one ({entry.state.value})" if over else "it has not been started"
        raise ManifestError(f"job {number} of {directory} has no log: {why}")


def _is_over(entry: Entry | None, directory: Path) -> bool:
    """Whether a job will not be started any more, and does not run."""
    if entry is None or entry.retried:
        return not _may_run(directory)
    return entry.state not in (State.WAITING, State.RUNNING)


def _may_run(directory: Path) -> bool:
    """Whether jobs of the sweep may still be started."""
    return any(launch.is_alive is not False for launch in launches_in(directory))


def _stamp(directory: Path) -> object:
    """A value that changes when the manifest does."""
    with suppress(OSError):
        status = (directory / DIRECTORY / MANIFEST).stat()
        return status.st_size, status.st_mtime_ns
    return None


def _paths(directory: Path, entry: Entry) -> dict[str, Path]:
    """The files with what a job printed, by what they are."""
    if entry.log is None:
        return {}
    log, run = Path(entry.log), RunDirectory(directory.absolute() / str(entry.number))
    if (log.parent.name, log.name) == (run.stderr.parent.name, run.stderr.name):  # a map, maybe under another name
        return {"stdout": run.stdout, "stderr": run.stderr}
    return {"log": log}


class _Log:
    """A file that is printed as it grows. A retried job renames it, and begins a new one of the same name."""

    def __init__(self) -> None:
        self.path = Path()
        self._file: int | None = None
        self._printed = 0

    @property
    def exists(self) -> bool:
        """Whether there has been such a file."""
        return self._file is not None

    def copy(self, out: BinaryIO) -> None:
        """Print what is new. Raises OSError if `out` cannot be written."""
        self._print(out)
        with suppress(OSError):  # not there yet, or not any more
            file = open_regular(self.path)
            if self._file is not None and os.path.sameopenfile(file, self._file):
                os.close(file)
            else:
                self.close()
                self._file, self._printed = file, 0
        self._print(out)
        out.flush()

    def _print(self, out: BinaryIO) -> None:
        if self._file is None:
            return
        if os.fstat(self._file).st_size < self._printed:
            self._printed = 0
        while part := os.pread(self._file, CHUNK, self._printed):
            out.write(part)
            self._printed += len(part)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
