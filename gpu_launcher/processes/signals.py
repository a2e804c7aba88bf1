"""Handles signals in one of three ways.

- `uninterrupted` delays Python's handlers, for code that an exception from a handler must not interrupt.
- `SignalPipe` turns signals into wake-ups of a loop. `StopSignals` uses it to tell the loop of a sweep which signals
  count as a user's request to stop.
- `SignalDescriptor` reads blocked signals and their sender, which a handler does not get (signalfd(2)).
  `CommandSignals` uses it in a program that stands in for a command.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

SAME_SIGNAL_SECONDS = 0.3
"""Seconds within which signals count as one.

Programs that run others often pass on a Ctrl-C that the others got too, and timeout(1) signals both its child and the
process group.
"""

_libc = ctypes.CDLL(None, use_errno=True)
_SIGSET = 128
"""Size of a sigset_t in bytes, or more."""
_INFO = struct.Struct("=IiiI112x")
"""Layout of struct signalfd_siginfo: ssi_signo, ssi_errno, ssi_code, ssi_pid, and fields that are not used here."""
_PR_SET_DUMPABLE = 4
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
"""Signals whose handlers are known to raise: for Ctrl-C, for orderly exits, for time limits."""


class Deferred:
    """Signals that have arrived but whose handlers have not been called yet."""

    def __init__(self) -> None:
        self.handlers: dict[signal.Signals, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. This method is the signals' handler in the block."""
        self._arrived.append((number, frame))

    def end_in_child(self) -> None:
        """Restore the handlers in a process forked in the block. Drops signals that arrived for its parent."""
        self._arrived.clear()
        _restore(self.handlers)

    def handle(self) -> None:
        """Call the handlers of the signals that have arrived. Raises whatever they raise."""
        while self._arrived:
            number, frame = self._arrived.pop(0)
            self.handlers[signal.Signals(number)](number, frame)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Deferred]:
    """Delay Python's signal handlers until the end of the block.

    Use this for milliseconds only. It does nothing outside the main thread, because Python runs handlers only in the
    main thread. Blocking the signals would not help: another thread would take them, and the handlers would still run
    here.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    try:
        for signum in _DEFERRED:
            handler = signal.getsignal(signum)
            if callable(handler):
                deferred.handlers[signum] = handler
                signal.signal(signum, deferred.note)
        yield deferred
    finally:
        _restore(deferred.handlers)
        deferred.handle()


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    """Restore all handlers, even if a restored handler raises before the others are restored."""
    raised: BaseException | None = None
    while True:
        try:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            break
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def not_ignored(*signums: signal.Signals) -> list[signal.Signals]:
    """Return those signals that this process does not ignore.

    Ignored signals should stay ignored: SIGHUP under nohup(1), SIGINT after `&`.
    """
    return [signum for signum in signums if signal.getsignal(signum) is not signal.SIG_IGN]


class SignalPipe:
    """Replaces the effect of signals: `fileno()` becomes readable when one has arrived, and nothing else happens.

    It sets handlers instead of ignoring the signals. exec resets handlers, but an executed program would inherit an
    ignored signal.
    """

    def __init__(self, *signums: signal.Signals) -> None:
        """Take over `signums`. Call this in the main thread."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self.take_over(*signums)

    def take_over(self, *signums: signal.Signals) -> None:
        """Replace the effect of `signums` until `restore`. Call this only once."""
        if signums:
            self._before = {signum: signal.signal(signum, self._note) for signum in signums}
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._read

    def ignore(self, signum: signal.Signals) -> None:
        """Ignore a signal that was taken over from now on, also after `restore`."""
        if signum in self._before:
            signal.signal(signum, signal.SIG_IGN)
            self._before[signum] = signal.SIG_IGN

    def read(self) -> list[int]:
        """Return the signals that arrived since the last call, including others that Python handles. Never waits."""
        with contextlib.suppress(BlockingIOError):
            return list(os.read(self._read, 4096))
        return []

    def restore(self) -> None:
        """Restore the previous effect of the signals."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        while self._before:
            signum, handler = self._before.popitem()
            # None: the handler was not set from Python and cannot be restored from it
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def close(self) -> None:
        """Close the descriptors. This also works in a forked child. The signals still have no effect."""
        if self._before:
            signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: Python writes to the wakeup descriptor only for signals that have a handler."""


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGHUP only make `fileno()` readable.

    Ignored signals stay ignored. Python does not allow signal handlers outside the main thread; there, signals keep
    their effect on the program.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the descriptor. `clock` returns the time in seconds."""
        self._clock = clock
        self._pipe = SignalPipe()
        self.last: signal.Signals | None = None
        """The last signal that counted."""
        self._counted = -math.inf
        """Time of that signal."""
        self._ignores_hangups = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._pipe.take_over(*not_ignored(*_STOPPING))
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.restore()
        self._pipe.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._pipe.fileno()

    def note(self, signum: signal.Signals) -> None:
        """Take note of a request that ends the program as `signum` would, unless a signal does so already."""
        self.last = self.last or signum

    def ignore_hangups(self) -> None:
        """Ignore SIGHUP from now on, also one that has arrived and was not taken, and after this context."""
        self._ignores_hangups = True
        self._pipe.ignore(signal.SIGHUP)

    def take(self) -> int:
        """Return how many of the signals that arrived since the last call count.

        SIGHUP counts only if no signal has counted before: the kernel, a shell and a session manager may each send it
        when a terminal is gone.
        """
        arrived = [number for number in self._pipe.read() if number in _STOPPING]
        now = self._clock()
        if self.last is not None or self._ignores_hangups:
            arrived = [number for number in arrived if number != signal.SIGHUP]
        if not arrived or now - self._counted < SAME_SIGNAL_SECONDS:
            return 0
        self._counted = now
        self.last = signal.Signals(arrived[0])
        return 1

    def close(self) -> None:
        """Close the descriptors in a forked child."""
        self._pipe.close()


@dataclass(frozen=True, slots=True)
class ReceivedSignal:
    """A signal that this process received."""

    signum: int
    by_kernel: bool
    """Whether the kernel sent the signal, as it does for keys pressed at the terminal, and not a process."""
    sender: int
    """Process id of the sender; 0 if it is unknown."""


class SignalDescriptor:
    """Reads blocked signals: `fileno()` is readable when one has arrived. The caller must block them first."""

    def __init__(self, signums: Collection[int]) -> None:
        """Read `signums`. Raises OSError if the kernel refuses."""
        wanted = ctypes.create_string_buffer(_SIGSET)
        _libc.sigemptyset(wanted)
        for signum in signums:
            _libc.sigaddset(wanted, signum)
        self._descriptor: int = _libc.signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"signalfd: {os.strerror(error)}")

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._descriptor

    def read(self) -> list[ReceivedSignal]:
        """Return the signals that arrived since the last call. Never waits."""
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._descriptor, _INFO.size):
                signum, _, code, sender = _INFO.unpack(content)
                arrived.append(ReceivedSignal(signum, code > 0, sender))  # see sigaction(2), si_code
        return arrived

    def close(self) -> None:
        os.close(self._descriptor)


# Faults concern this program itself. Python ignores SIGPIPE and SIGXFSZ when it starts, which hides their state before.
_LEFT_ALONE = {signal.SIGKILL, signal.SIGSTOP}
_LEFT_ALONE |= {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_LEFT_ALONE |= {signal.SIGPIPE, signal.SIGXFSZ}
STOPS = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
"""Signals that stop a process by default."""
HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
"""Signals that do nothing to a process by default."""


class CommandSignals:
    """The signals of a program that stands in for a command, from the program's beginning to its end.

    All signals that can be blocked are blocked and read from a descriptor, except faults and some others. Signals that
    this program ignored from its start, such as SIGHUP under nohup(1), stay ignored, also in the command.
    """

    def __init__(self) -> None:
        """Take over the signals of this process permanently. Call this in the main thread."""
        heeded = {
            signum
            for signum in signal.valid_signals()
            if signum not in _LEFT_ALONE and signal.getsignal(signum) is not signal.SIG_IGN
        }
        self.heeded = frozenset({*heeded, signal.SIGCHLD})
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.heeded)
        self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, children could not be waited for
        self._descriptor = SignalDescriptor(self.heeded)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._descriptor.fileno()

    def read(self) -> list[ReceivedSignal]:
        """Return the signals that arrived since the last call. Never waits."""
        return self._descriptor.read()

    def hand_over(self) -> None:
        """Restore the signal settings that this program was started with, in a child that will become the command.

        Signals that arrived before are then delivered.
        """
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, self._on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def suspend(self, signum: int, unless: socket.socket | None = None) -> bool:
        """Stop this process with `signum`, as if it did not handle signals. Returns when the process is continued.

        Returns False at once if `unless` has something to receive. Who sends there and then sends SIGCONT is therefore
        never missed, except with SIGSTOP.
        """
        if signum == signal.SIGSTOP:
            if _is_readable(unless):
                return False
            os.kill(os.getpid(), signum)
            return True
        os.kill(os.getpid(), signum)  # It is blocked. From now on, SIGCONT discards it.
        if _is_readable(unless):
            signal.sigtimedwait({signum}, 0)
            return False
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
        signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
        return True

    def die(self, signum: int) -> None:
        """End this process with `signum`, without a core file. Returns only if that fails: in process 1."""
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if signum not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})


def _is_readable(connection: socket.socket | None) -> bool:
    return connection is not None and bool(select.select([connection], [], [], 0)[0])
