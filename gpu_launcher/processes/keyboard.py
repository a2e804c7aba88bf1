"""Keeps typed characters out of a live view: they are neither echoed into it nor left for the shell.

A process that takes a terminal gives it back; after SIGKILL the guard does that (`processes/guard.py`). bash and zsh do
so as well when they see that a program was killed or stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator
from typing import Any

Modes = list[Any]
"""As `termios.tcgetattr` returns them."""

_INPUT, _LOCAL = 0, 3


def modes(descriptor: int) -> Modes | None:
    """The modes of a terminal; None for anything else."""
    try:
        return termios.tcgetattr(descriptor)
    except (termios.error, ValueError):  # ValueError: a negative descriptor
        return None


def silent(before: Modes, *, keys: bool = False) -> Modes:
    """Without echo, and with `keys` each key by itself. Ctrl-C and Ctrl-Z work; Ctrl-S does not stop the view."""
    after: Modes = [list(one) if isinstance(one, list) else one for one in before]
    after[_INPUT] &= ~termios.IXON
    after[_LOCAL] &= ~(termios.ECHO | termios.ECHONL)
    if keys:
        after[_LOCAL] &= ~termios.ICANON
        control = after[6]
        control[termios.VMIN], control[termios.VTIME] = 1, 0
    return after


class Keyboard:
    """A terminal from which typed characters can be taken away."""

    def __init__(self, descriptor: int, *, keys: bool = False) -> None:
        """Of the terminal at `descriptor`. With `keys` whoever reads it gets each key at once."""
        self._descriptor = descriptor
        self._keys = keys
        self._process = os.getpid()
        self._before: Modes | None = None
        """How it was when it was taken; None while it is not."""

    def take(self) -> None:
        """Take it, if it is a terminal with this process in the foreground. Again, it takes what a shell put back."""
        now = modes(self._descriptor)
        if now is None or not self._in_foreground() or self._is_anothers(now):
            return
        wanted = silent(now, keys=self._keys)
        if now != wanted:
            self._before = now
            self._set(wanted)

    def give_back(self) -> None:
        """Put it back as it was, without what was typed meanwhile. In the background it is the shell's already."""
        before, self._before = self._before, None
        if before is None or os.getpid() != self._process or not self._in_foreground():
            return
        now = modes(self._descriptor)
        if now is None or self._is_anothers(now):
            return
        with _not_stopped(), contextlib.suppress(termios.error):  # there is no terminal any more
            termios.tcflush(self._descriptor, termios.TCIFLUSH)
        self._set(before)

    def _is_anothers(self, now: Modes) -> bool:
        """Whether a program such as a pager, which reads what we print to stdout, gets each key by itself."""
        return not self._keys and not now[_LOCAL] & termios.ICANON

    def _set(self, wanted: Modes) -> None:
        with _not_stopped(), contextlib.suppress(termios.error):
            termios.tcsetattr(self._descriptor, termios.TCSANOW, wanted)

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # not the terminal that this process is controlled by, or none any more
            return False


@contextlib.contextmanager
def _not_stopped() -> Iterator[None]:
    """Block SIGTTOU, which stops a background process that changes its terminal. This one may just have become one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def give_back_after_death(descriptor: int, before: Modes | None) -> None:
    """Put a terminal back as it was `before` a process that had taken it was killed, unless something else has."""
    now = None if before is None else modes(descriptor)
    if before is not None and now is not None and now == silent(before) != before:
        with contextlib.suppress(termios.error):
            termios.tcflush(descriptor, termios.TCIFLUSH)
            termios.tcsetattr(descriptor, termios.TCSANOW, before)
