"""The output stream of a display, which may be closed while the sweep continues."""

from __future__ import annotations

import errno
import os
from typing import TextIO

_NOBODY_READS = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET})
"""Errors of a closed pipe, a terminal that hung up (EIO), a closed descriptor, or a lost device or socket."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN})
"""Errors of a full disk, or of a busy terminal that another program made non-blocking (EAGAIN)."""


class Output:
    """Writes and flushes text until the stream is closed or lost. Other errors are raised.

    A sweep of many hours must not end because its terminal does.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            return
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            stream.write(text)
            stream.flush()
        except ValueError:
            if not stream.closed:
                raise
            self._stream = None
        except OSError as error:
            if error.errno in _NOBODY_READS:
                self._stream = None
                _discard(stream, error)
            elif error.errno not in _NO_ROOM:
                raise


def _discard(stream: TextIO, error: OSError) -> None:
    """Let a lost stream accept everything, or else the interpreter could not flush it at the end, and exits with 120.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    if error.errno == errno.EBADF:  # the program closed the descriptor, and may open another file with its number
        return
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both: there is no descriptor
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
