"""The terminal of the live views of a sweep and of `gpu-launcher top`: its size, its colours, Ctrl-Z.

rich formats and colours lines; the views paint them. `rich.live.Live` is not suitable: it redirects stdout and stderr
(which forked jobs would inherit), hides the cursor (which a killed process would leave hidden), loses its position when
a terminal becomes narrower, and starts a thread to refresh.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, ConsoleDimensions
from rich.text import Text

Size = tuple[int, int]
"""Columns and rows."""
ALTERNATE = "\x1b[?1049h"
"""xterm's control sequence that shows the alternate screen. The normal screen and its scrollback stay intact."""
NORMAL = "\x1b[?1049l"


class Terminal:
    """Formats lines for the terminal that a stream writes to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # rich does not write to the stream: each view writes a whole frame at once and handles errors.
        self._console = Console(file=io.StringIO(), force_terminal=True, force_jupyter=False)

    def size(self) -> Size:
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        return (columns or 80, rows or 24)

    def render(self, line: Text, size: Size) -> str:
        """Return the line with control sequences for its colours. A long line is not wrapped."""
        self._console.size = ConsoleDimensions(*size)
        with self._console.capture() as capture:
            self._console.print(line, soft_wrap=True, end="", highlight=False)
        return capture.get()

    def whole_screen(self, lines: Sequence[Text], size: Size) -> str:
        """Return what replaces all that the alternate screen shows. The cursor stays behind the last line."""
        return "\x1b[H" + "\r\n".join(f"{self.render(line, size)}\x1b[K" for line in lines) + "\x1b[J"


def stop_until_continued() -> None:
    """Stop this process as Ctrl-Z does if SIGTSTP is not handled. Returns after `fg`."""
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, handler)
