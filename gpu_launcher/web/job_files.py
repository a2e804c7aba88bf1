"""The files of one job: its logs, its config and what lies in its directory. Nothing outside the sweep's is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.manifest import Entry
from gpu_launcher.redaction import redact
from gpu_launcher.safe_files import open_beneath, read_all

MAX_LISTED = 1000
"""Maximum number of files that are listed of a directory."""
MAX_CONFIG_BYTES = 256 * 2**10
CONFIGS = ((".hydra", "overrides.yaml"), (".hydra", "config.yaml"), ("params.json",))
"""Files that say how a job was configured: Hydra's, and a map's."""

Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListedFile:
    name: str
    is_directory: bool
    is_link: bool
    """Links are listed, and not followed."""
    size: int
    modified: float


class JobFiles:
    """Opens files of one job, each beneath the sweep's directory and by no symbolic link."""

    def __init__(self, sweep: Path, entry: Entry) -> None:
        self._sweep = sweep
        self._log = None if entry.log is None else _beneath(sweep, Path(entry.log), entry.number)
        self.log_is_elsewhere = entry.log is not None and self._log is None
        """Whether its log is not in the sweep's directory, so it is not shown."""

    @property
    def directory(self) -> Parts | None:
        """The job's directory in the sweep's. None if it has none of its own."""
        return self._log[:-1] if self._log is not None and len(self._log) > 1 else None

    @property
    def logs(self) -> list[str]:
        """Names of its logs: first those of the last attempt. A map's job has two: stderr and stdout."""
        if self._log is None:
            return []
        name = self._log[-1]
        kinds = [name] if name != "stderr.txt" else [name, "stdout.txt"]
        listed = self.listed(()) or []
        names = [file.name for file in listed if not file.is_directory and not file.is_link]
        earlier = [
            found
            for kind in kinds
            for found in names
            if found.startswith(f"{Path(kind).stem}.attempt-") and found.endswith(Path(kind).suffix)
        ]
        # The listing ends at MAX_LISTED files, so it does not say whether these exist.
        return [*filter(self._has, kinds), *sorted(earlier, reverse=True)]

    def open(self, path: Sequence[str]) -> int:
        """Open a file of its directory. Raises OSError."""
        return open_beneath(self._sweep, self._path(path))

    def listed(self, path: Sequence[str]) -> Sequence[ListedFile] | None:
        """List a directory in its directory: at most MAX_LISTED files. None if it cannot be read."""
        with suppress(OSError):
            descriptor = open_beneath(self._sweep, self._path(path), directory=True)
            try:
                return _read_directory(descriptor)
            finally:
                os.close(descriptor)
        return None

    def configs(self) -> list[tuple[str, str]]:
        """Its config, as names and texts without secrets."""
        found = []
        for path in CONFIGS:
            with suppress(OSError):
                descriptor = self.open(path)
                try:
                    text = read_all(descriptor, MAX_CONFIG_BYTES).decode("utf-8", "replace")
                finally:
                    os.close(descriptor)
                found.append(("/".join(path), "\n".join(map(redact, text.splitlines()))))
        return found

    def _has(self, name: str) -> bool:
        with suppress(OSError):
            os.close(self.open((name,)))
            return True
        return False

    def _path(self, path: Sequence[str]) -> Parts:
        if self._log is None:
            raise FileNotFoundError("the job has no directory")
        whole = (*self._log[:-1], *path)
        if DIRECTORY in whole:  # reports, which are pickles, and the control socket
            raise PermissionError("not a job's file")
        return whole


def _beneath(sweep: Path, log: Path, number: int) -> Parts | None:
    """The path of a job's log in the sweep's directory. None if it lies elsewhere."""
    for root in (sweep.absolute(), sweep.resolve()):
        with suppress(ValueError):
            parts = log.relative_to(root).parts
            return parts if parts and ".." not in parts else None
    if log.parent.name == str(number):  # the sweep's directory was moved
        return (log.parent.name, log.name)
    return None


def _read_directory(descriptor: int) -> list[ListedFile]:
    found = []
    with os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_directory, is_link = stat.S_ISDIR(status.st_mode), stat.S_ISLNK(status.st_mode)
                found.append(ListedFile(entry.name, is_directory, is_link, status.st_size, status.st_mtime))
            if len(found) == MAX_LISTED:
                break
    return sorted(found, key=lambda file: (not file.is_directory, file.name))
