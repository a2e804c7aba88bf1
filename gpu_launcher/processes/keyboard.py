"""Keeps typed characters out of a live view: they are not echoed into it, and the shell does not get them afterwards.

A process that takes a terminal gives it back. After SIGKILL the guard does that (`processes/guard.py`). bash and zsh
also do it when they see that a program was killed or stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator
from typing import Any

Modes = list[Any]
"""Terminal modes as `termios.tcgetattr` returns them."""

_INPUT, _LOCAL = 0, 3


def modes(descriptor: int) -> Modes | None:
    """Return the modes of a terminal; None if the descriptor is not a terminal."""
    try:
        return termios.tcgetattr(descriptor)
    except (termios.error, ValueError):  # ValueError: a negative descriptor
        return None


def silent(before: Modes, *, keys: bool = False) -> Modes:
    """Return the modes `before` without echo. Ctrl-C and Ctrl-Z work; Ctrl-S does not stop the view.

    With `keys`, each key can be read immediately instead of at the end of the line.
    """
    after: Modes = [list(one) if isinstance(one, list) else one for one in before]
    after[_INPUT] &= ~termios.IXON
    after[_LOCAL] &= ~(termios.ECHO | termios.ECHONL)
    if keys:
        after[_LOCAL] &= ~termios.ICANON
        control = after[6]
        control[termios.VMIN], control[termios.VTIME] = 1, 0
    return after


class Keyboard:
    """A terminal whose typed characters this process can take."""

    def __init__(self, descriptor: int, *, keys: bool = False) -> None:
        """Use the terminal at `descriptor`. With `keys`, its reader gets each key at once."""
        self._descriptor = descriptor
        self._keys = keys
        self._process = os.getpid()
        self._before: Modes | None = None
        """Modes of the terminal before it was taken; None while it is not taken."""

    def take(self) -> None:
        """Take the terminal, if this process is in its foreground.

        Call this again to retake a terminal whose modes a shell has restored.
        """
        now = modes(self._descriptor)
        if now is None or not self._in_foreground() or self._is_anothers(now):
            return
        wanted = silent(now, keys=self._keys)
        if now != wanted:
            self._before = now
            self._set(wanted)

    def give_back(self) -> None:
        """Restore the terminal and discard what was typed since `take`.

        Does nothing in the background, because the terminal then belongs to the shell.
        """
        before, self._before = self._before, None
        if before is None or os.getpid() != self._process or not self._in_foreground():
            return
        now = modes(self._descriptor)
        if now is None or self._is_anothers(now):
            return
        with _not_stopped(), contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcflush(self._descriptor, termios.TCIFLUSH)
        self._set(before)

    def _is_anothers(self, now: Modes) -> bool:
        """Whether another program reads each key, such as a pager that shows our stdout."""
        return not self._keys and not now[_LOCAL] & termios.ICANON

    def _set(self, wanted: Modes) -> None:
        with _not_stopped(), contextlib.suppress(termios.error):
            termios.tcsetattr(self._descriptor, termios.TCSANOW, wanted)

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # not this process's controlling terminal, or the terminal is gone
            return False


@contextlib.contextmanager
def _not_stopped() -> Iterator[None]:
    """Block SIGTTOU, which stops a background process that changes its terminal.

    This process may just have moved to the background.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def give_back_after_death(descriptor: int, before: Modes | None) -> None:
    """Restore the modes `before` of a terminal after the process that had taken it was killed.

    Does nothing if another program has changed the modes since.
    """
    now = None if before is None else modes(descriptor)
    if before is not None and now is not None and now == silent(before) != before:
        with contextlib.suppress(termios.error):
            termios.tcflush(descriptor, termios.TCIFLUSH)
            termios.tcsetattr(descriptor, termios.TCSANOW, before)
