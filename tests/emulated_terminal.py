"""A program in a terminal that pyte emulates, with an alternate screen, which pyte lacks."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from fcntl import ioctl
from pathlib import Path

import pyte

START = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Makes stdin the controlling terminal, and becomes the command. Python warns of `pty.fork` beside other threads."""


PART = 256
"""Bytes after which a terminal looks at its screen: less than a program writes between two states of the screen."""


class AlternatingScreen(pyte.Screen):
    """A screen with an alternate one."""

    def __init__(self, columns: int, lines: int) -> None:
        self._normal: tuple[object, int, int] | None = None
        super().__init__(columns, lines)

    @property
    def is_alternate(self) -> bool:
        return self._normal is not None

    def set_mode(self, *modes: int, **keywords: bool) -> None:
        super().set_mode(*modes, **keywords)
        if keywords.get("private") and 1049 in modes and self._normal is None:
            self._normal = ({row: dict(line) for row, line in self.buffer.items()}, self.cursor.y, self.cursor.x)
            self.erase_in_display(2)

    def reset_mode(self, *modes: int, **keywords: bool) -> None:
        super().reset_mode(*modes, **keywords)
        if keywords.get("private") and 1049 in modes and self._normal is not None:
            buffer, y, x = self._normal
            self._normal = None
            self.erase_in_display(2)
            for row, line in buffer.items():  # type: ignore[attr-defined]
                self.buffer[row].update(line)
            self.cursor.y, self.cursor.x = min(y, self.lines - 1), min(x, self.columns - 1)


class EmulatedTerminal:
    """A command in its own terminal. What it shows is in `screen`."""

    def __init__(
        self, command: Sequence[str], environ: dict[str, str], directory: Path, size: tuple[int, int] = (80, 24)
    ) -> None:
        self.screen = AlternatingScreen(*size)
        self.written = b""
        self.status: int | None = None
        self._stream = pyte.ByteStream(self.screen)
        self.master, slave = os.openpty()
        self.initial_modes: object = termios.tcgetattr(self.master)
        """Its modes before the command was started."""
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", START, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env=environ,
            start_new_session=True,
        )
        os.close(slave)
        self.pid = self._process.pid

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def modes(self) -> object:
        return termios.tcgetattr(self.master)

    def until(self, holds: str | Callable[[], bool], seconds: float = 120) -> None:
        """Read what the program writes until the screen has a text, or something holds.

        A text counts even if the program has removed it before it is looked for.
        """
        end = time.monotonic() + seconds
        shown = False

        def look() -> None:
            nonlocal shown
            shown = shown or (isinstance(holds, str) and holds in self.text)

        while not (shown or (holds in self.text if isinstance(holds, str) else holds())):
            assert time.monotonic() < end, f"{holds!r} is not on the screen:\n{self.text}"
            if not self._read(look) and self.status is not None:
                assert holds in self.text if isinstance(holds, str) else holds(), self.text

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end, and return the exit code, or the negative number of the signal."""
        end = time.monotonic() + seconds
        while self.status is None or self._read():
            assert time.monotonic() < end, self.text
            self._read()
            self.status = self._process.poll()
        return self.status

    def _read(self, look: Callable[[], None] = lambda: None) -> bool:
        if not select.select([self.master], [], [], 0.05)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # no process has the other end open
            return False
        self.written += data
        for start in range(0, len(data), PART):
            self._stream.feed(data[start : start + PART])
            look()
        return True

    def close(self) -> None:
        """Close the terminal, which ends what runs in it."""
        os.close(self.master)
        self._process.wait()
