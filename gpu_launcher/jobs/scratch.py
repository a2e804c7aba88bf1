"""Temporary directories for the files of a program's jobs.

Each directory is locked by its program and by that program's node, and is removed when the node ends. If both are
killed together, the directory stays, but its lock is free. So a program that creates such a directory first removes
those that are not locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = f"gpu-launcher-jobs-{os.uname().nodename}-"
"""Prefix of the directories. It names the machine, because locks held by another machine may be invisible here."""


class Scratch:
    """A temporary directory for one program."""

    def __init__(self) -> None:
        """Create the directory, and remove those that dead programs left. Raises OSError."""
        _sweep(Path(tempfile.gettempdir()))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue  # another process took it for a leftover before it was opened
            with contextlib.suppress(OSError):  # a file system without locks: leftovers are not removed there
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)  # another process took it for a leftover before it was locked

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
                with contextlib.suppress(OSError):  # in use, another user's, or gone
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)
