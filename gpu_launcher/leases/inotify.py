"""An inotify watch on one directory, through the C library. Linux only; see inotify(7)."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CLOSE_WRITE = 0x00000008
DELETE = 0x00000200
DELETE_SELF = 0x00000400
MOVE_SELF = 0x00000800


class Inotify:
    """A watch that becomes readable when an event of `mask` happens in `directory`.

    Raises OSError if the kernel has no inotify or the user has too many instances (`fs.inotify.*`).
    """

    def __init__(self, directory: Path, mask: int) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        try:
            init, add_watch = library.inotify_init1, library.inotify_add_watch
        except AttributeError as error:
            raise OSError("the C library has no inotify") from error
        self._descriptor = _checked(init(os.O_NONBLOCK | os.O_CLOEXEC))
        try:
            _checked(add_watch(self._descriptor, os.fsencode(directory), ctypes.c_uint32(mask)))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._descriptor

    def drain(self) -> bool:
        """Discard all pending events; return whether there were any."""
        found = False
        while True:
            try:
                os.read(self._descriptor, 65536)
            except BlockingIOError:
                return found
            found = True

    def close(self) -> None:
        os.close(self._descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
