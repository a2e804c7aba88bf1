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
from types import FrameType
from typing import Any

from rich.text import Text

from gpu_launcher.jobs.progress.terminal import ALTERNATE, NORMAL, Terminal, stop_until_continued
from gpu_launcher.processes.keyboard import Keyboard

_ENTER = f"{ALTERNATE}\x1b[?25l"
"""Shows the alternate screen and hides the cursor."""
_LEAVE = f"\x1b[?25h{NORMAL}"
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
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
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

    def paint(self, lines: Sequence[Text], below: Sequence[Text]) -> None:
        """Show the lines from the top, and `below` on the last lines. Lines that do not fit are not shown.

        Everything is written at once, so that no terminal shows a partial view. Lines do not reach the last column,
        because terminals differ in where they leave the cursor then.
        """
        width, height = self.size
        room = max(0, height - len(below))
        body = list(lines[:room])
        texts = [*body, *(Text() for _ in range(room - len(body))), *below][-height:]
        for text in texts:
            text.truncate(width - 1, overflow="ellipsis")
        self.show(texts)

    def show(self, lines: Sequence[Text]) -> None:
        """Replace all that the terminal shows."""
        self._write(self._terminal.whole_screen(lines, self.size))

    def wait(self, seconds: float, *descriptors: int) -> bytes:
        """Wait for keys and return them. Returns earlier if the size changes or a descriptor is ready."""
        keys = () if self._input is None else (self._input,)
        ready, _, _ = select.select([*keys, self._wake, *descriptors], [], [], max(0.0, seconds))
        self.changed = self._wake in ready
        if self.changed:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 1024)
        if self._input is None or self._input not in ready:
            return b""
        try:
            pressed = os.read(self._input, 1024)
        except OSError as error:
            raise HungUpError from error
        if not pressed:
            raise HungUpError
        return pressed

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
