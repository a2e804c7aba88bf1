"""Directories for the files of a program's jobs, which are gone when the program is, or at the next start of any.

Each is locked by its program and that program's node. If both are killed together nobody is left to remove it, and
its lock is free: so whoever makes one removes what it finds unlocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = f"gpu-launcher-jobs-{os.uname().nodename}-"
"""Names the machine, because locks that another machine holds on a shared directory may be invisible here."""


class Scratch:
    """A temporary directory for one program."""

    def __init__(self) -> None:
        """Make the directory, after removing those that dead programs left. Raises OSError."""
        _sweep(Path(tempfile.gettempdir()))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks, on which nobody removes anything
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)  # somebody thought it was left there, before it could be locked

    def remove(self) -> None:
        """Remove the directory and its contents. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _sweep(parent: Path) -> None:
    """Remove the directories that no process has locked."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):  # somebody has it, or it is another user's, or gone
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)
