"""The stream a person reads, which may vanish while the sweep goes on."""

from __future__ import annotations

import errno
from typing import TextIO

_NOBODY_READS = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET})
"""A closed pipe, a terminal that hung up (EIO), a closed descriptor, a device or socket that is gone."""
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN})
"""A redirection to a full disk; or a terminal that another program made non-blocking and that is busy (EAGAIN)."""


class Output:
    """Writes and flushes, and falls silent once nobody can read any more. Any other error is raised.

    A sweep of many hours must not end because the terminal it was started from did.
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
            elif error.errno not in _NO_ROOM:
                raise
