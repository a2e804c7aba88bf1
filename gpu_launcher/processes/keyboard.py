"""Keeps typed characters out of a live view: they are not echoed into it, and the shell does not get them afterwards.

A process that takes a terminal gives it back. After SIGKILL the guard does that (`processes/guard.py`). bash and zsh
also do it when they see that a program was killed or stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
from collections.abc import Iterator
from typing import Any

Modes = list[Any]
"""Terminal modes as `termios.tcgetattr` returns them."""

_INPUT, _LOCAL, _CONTROL = 0, 3, 6
_MAX_TYPED = 2**16
"""Maximum number of bytes that are read at once, or a few more."""


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
        control = after[_CONTROL]
        control[termios.VMIN], control[termios.VTIME] = 1, 1  # pagers set VTIME to 0, so these modes are ours
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
        self._ours: Modes | None = None
        """The modes that were set last."""
        self._typed: int | None = None
        """The terminal, opened for reading without waiting."""
        self._epoll: select.epoll | None = None

    def take(self) -> None:
        """Take the terminal, if this process is in its foreground.

        Call this again to retake a terminal whose modes a shell has restored. What was typed before is discarded: it
        was not meant for this process.
        """
        now = modes(self._descriptor)
        if now is None or not self._in_foreground() or self._is_anothers(now):
            return
        wanted = silent(now, keys=self._keys)
        if now != wanted:
            self._before = now
            self._set(wanted)
            self._ours = modes(self._descriptor)
            if self._keys:
                self._discard()

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when keys may have been typed. None if keys cannot be read."""
        if self._epoll is None and self._keys:
            try:
                # Not the descriptor itself: the shell shares its flags, and must not find it non-blocking.
                self._typed = os.open("/dev/tty", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            except OSError:
                self._keys = False
                return None
            self._epoll = select.epoll()
            # Edge-triggered: no busy loop over what is typed for another program.
            self._epoll.register(self._typed, select.EPOLLIN | select.EPOLLET)
        return None if self._epoll is None else self._epoll.fileno()

    def read(self) -> bytes:
        """Return what was typed since the last call, without waiting. Nothing while another program reads the keys."""
        if self._epoll is None or self._typed is None:
            return b""
        self._epoll.poll(0)
        if modes(self._descriptor) != self._ours or not self._in_foreground():
            return b""
        typed = b""
        with _not_stopped(), contextlib.suppress(OSError):  # no more was typed, or the terminal is gone
            # To the end: the rest of a long paste would otherwise count as typed after the next key.
            while len(typed) < _MAX_TYPED and (part := os.read(self._typed, _MAX_TYPED)):
                typed += part
        return typed

    def close(self) -> None:
        """Give the terminal back, and close the descriptors. Idempotent."""
        self.give_back()
        if self._epoll is not None and self._typed is not None:
            self._epoll.close()
            os.close(self._typed)
            self._epoll = self._typed = None

    def give_back(self) -> None:
        """Restore the terminal and discard what was typed since `take`.

        Does nothing in the background, because the terminal then belongs to the shell.
        """
        before, ours = self._before, self._ours
        self._before = self._ours = None
        if before is None or os.getpid() != self._process or not self._in_foreground():
            return
        now = modes(self._descriptor)
        if now is None or (now != ours and self._is_anothers(now)):
            return
        self._discard()
        self._set(before)

    def _is_anothers(self, now: Modes) -> bool:
        """Whether another program reads each key, such as a pager that shows our stdout."""
        return not now[_LOCAL] & termios.ICANON and now != self._ours

    def _discard(self) -> None:
        with _not_stopped(), contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcflush(self._descriptor, termios.TCIFLUSH)

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
    """Block SIGTTOU and SIGTTIN, which stop a background process that changes or reads its terminal.

    This process may just have moved to the background.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU, signal.SIGTTIN})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def give_back_after_death(descriptor: int, before: Modes | None) -> None:
    """Restore the modes `before` of a terminal after the process that had taken it was killed.

    Does nothing if another program has changed the modes since.
    """
    now = None if before is None else modes(descriptor)
    if before is not None and now in (silent(before), silent(before, keys=True)) and now != before:
        with contextlib.suppress(termios.error):
            termios.tcflush(descriptor, termios.TCIFLUSH)
            termios.tcsetattr(descriptor, termios.TCSANOW, before)
