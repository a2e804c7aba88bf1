"""Finds the directories of sweeps and maps, and the one that the user means."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST, launches_in

MAX_DIRECTORIES = 5000
"""Maximum number of directories that a search for sweeps looks into."""
DEPTH = 4
"""Number of levels that a search for sweeps goes down: those of `logs/train/multiruns/<date>`, which templates use."""


def sweeps_below(*roots: Path) -> list[Path]:
    """Return the directories of sweeps at most DEPTH levels below `roots`; first the one that was written to last."""
    found: dict[Path, float] = {}
    for root in roots:
        for directory in itertools.islice(_directories(root), MAX_DIRECTORIES):
            with suppress(OSError):
                found[directory] = (directory / DIRECTORY / MANIFEST).stat().st_mtime
    return sorted(found, key=lambda directory: (found[directory], directory), reverse=True)


def newest_sweep(*roots: Path) -> Path | None:
    """Return the sweep below `roots` that was written to last."""
    return next(iter(sweeps_below(*roots)), None)


def running_sweep(root: Path) -> Path | None:
    """Return the sweep below `root` that was started last, of those that run. None if none runs.

    Unlike the sweep that was written to last, it does not change while several run.
    """
    begun: dict[Path, float] = {}
    for directory in sweeps_below(root):
        for launch in launches_in(directory):
            if launch.is_alive:
                with suppress(OSError):
                    begun[directory] = launch.file.stat().st_mtime
    return max(begun, key=lambda directory: (begun[directory], directory), default=None)


def chosen_sweep(directory: Path | None) -> Path:
    """Return `directory`, or the newest sweep below the working directory if it is None. Raises ManifestError."""
    if directory is not None:
        return directory
    newest = newest_sweep(Path())
    if newest is None:
        raise ManifestError("there is no sweep below the current directory: give the directory of a sweep")
    return newest


def _directories(root: Path) -> Iterator[Path]:
    """Yield directories that may belong to a sweep, breadth first. Subdirectories of a sweep's belong to its jobs.

    Hidden directories are left out: `.git` and `.venv` have thousands.
    """
    waiting = deque([(root, 0)])
    while waiting:
        directory, level = waiting.popleft()
        yield directory
        with suppress(OSError):
            if level == DEPTH or (directory / DIRECTORY / MANIFEST).exists():
                continue
            with os.scandir(directory) as entries:
                below = [
                    entry.path
                    for entry in entries
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                ]
            # Names are often dates, so in reverse order the newest sweeps come first.
            waiting.extend((Path(path), level + 1) for path in sorted(below, reverse=True))
