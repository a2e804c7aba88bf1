"""A view that takes over the terminal, and restores it however the view ends: by a key, a signal or an error.

Not promised: the terminal is not restored after SIGKILL; `reset` restores it then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from gpu_launcher.cli.printing import to_text
from gpu_launcher.cli.table import Line
from gpu_launcher.jobs.progress.terminal import Size, Terminal, stop_until_continued
from gpu_launcher.processes.keyboard import Keyboard

_ENTER = "\x1b[?1049h\x1b[?25l"
"""xterm's control sequences that show the alternate screen and hide the cursor. The normal screen stays intact."""
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HUNG_UP = (errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO)


class HungUpError(Exception):
    """The terminal was closed."""


class Screen:
    """Paints lines on stdout and reads keys from stdin. Use it in a `with` block in the main thread."""

    def __init__(self) -> None:
        self._output = sys.stdout.fileno()
        self._input: int | None = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._keyboard = None if self._input is None else Keyboard(self._input, keys=True)
        self._shown = False
        self.changed = False
        """Whether a signal ended the last `wait`, for example because the terminal's size changed."""
        self._handlers: dict[signal.Signals, Any] = {}
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._terminal = Terminal(sys.stdout)

    def __enter__(self) -> Screen:
        ours = {
            signal.SIGTERM: self._end,
            signal.SIGHUP: self._end,
            signal.SIGTSTP: self._suspend,
            signal.SIGWINCH: lambda signum, frame: None,
        }
        self._handlers = {signum: signal.signal(signum, handler) for signum, handler in ours.items()}
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        try:
            self._show()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in self._handlers:  # no signal may interrupt this
            signal.signal(signum, signal.SIG_IGN)
        with contextlib.suppress(HungUpError):
            self._hide()
        signal.set_wakeup_fd(-1)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        os.close(self._wake)
        os.close(self._woken)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the terminal, in characters."""
        return self._terminal.size()

    def paint(self, lines: Sequence[Line], footer: Line) -> None:
        """Show the lines from the top, and `footer` on the last line. Lines that do not fit are not shown.

        Everything is written at once, so that no terminal shows a partial view. Lines do not reach the last column,
        because terminals differ in where they leave the cursor then.
        """
        width, height = self.size
        body = list(lines[: height - 1])
        body += [[] for _ in range(height - 1 - len(body))]
        self._write(
            "\x1b[H"
            + "\r\n".join(f"{self._rendered(line, (width, height))}\x1b[K" for line in [*body, footer])
            + "\x1b[J"
        )

    def wait(self, seconds: float, *descriptors: int) -> str:
        """Wait for keys and return them. Returns earlier if the size changes or a descriptor is ready."""
        keys = () if self._input is None else (self._input,)
        ready, _, _ = select.select([*keys, self._wake, *descriptors], [], [], max(0.0, seconds))
        self.changed = self._wake in ready
        if self.changed:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 1024)
        if self._input is None or self._input not in ready:
            return ""
        try:
            pressed = os.read(self._input, 1024)
        except OSError as error:
            raise HungUpError from error
        if not pressed:
            raise HungUpError
        return pressed.decode(errors="replace")

    def _show(self) -> None:
        if self._keyboard is not None:
            self._keyboard.take()
        self._shown = True
        self._write(_ENTER)

    def _hide(self) -> None:
        if self._shown:
            self._shown = False
            try:
                self._write(_LEAVE)
            finally:
                if self._keyboard is not None:
                    self._keyboard.give_back()

    def _end(self, signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    def _suspend(self, signum: int, frame: FrameType | None) -> None:
        """Restore the terminal for the shell, stop, and show the view again when continued (Ctrl-Z)."""
        self._hide()
        stop_until_continued()
        self._show()

    def _rendered(self, line: Line, size: Size) -> str:
        text = to_text(line)
        text.truncate(size[0] - 1, overflow="ellipsis")
        return self._terminal.render(text, size)

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._output, data) :]
        except BlockingIOError:
            return  # another program made the terminal non-blocking, and it is busy; the next `paint` shows the rest
        except OSError as error:
            if error.errno in _HUNG_UP:
                raise HungUpError from error
            raise
