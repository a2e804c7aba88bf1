"""Signals, handled in one of three ways.

- `uninterrupted` calls Python's handlers a little later, for code that no exception out of a handler may cut in two.
- `SignalPipe` makes signals do nothing but wake a loop. `StopSignals` is one that tells the loop of a sweep which of
  them count as a user's wish to stop.
- `SignalDescriptor` reads blocked signals with who sent them, which a handler does not learn (signalfd(2)).
  `CommandSignals` is one for a program that stands for another.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

SAME_SIGNAL_SECONDS = 0.3
"""Seconds within which signals count as one: programs that run others often pass on a Ctrl-C that those got, too, and
timeout(1) signals both its child and the process group."""

_libc = ctypes.CDLL(None, use_errno=True)
_SIGSET = 128
"""Bytes of a sigset_t, or more."""
_INFO = struct.Struct("=IiiI112x")
"""ssi_signo, ssi_errno, ssi_code, ssi_pid, and what is of no interest here."""
_PR_SET_DUMPABLE = 4
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
"""Those whose handlers are known to raise: Ctrl-C, programs that exit in order, time limits."""


class Deferred:
    """Signals that have arrived and whose handlers were not called yet."""

    def __init__(self) -> None:
        self.handlers: dict[signal.Signals, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take the place of their handlers."""
        self._arrived.append((number, frame))

    def end_in_child(self) -> None:
        """Restore the handlers in a process that was forked meanwhile. What has arrived was for its parent."""
        self._arrived.clear()
        _restore(self.handlers)

    def handle(self) -> None:
        """Call the handlers now, which may raise."""
        while self._arrived:
            number, frame = self._arrived.pop(0)
            self.handlers[signal.Signals(number)](number, frame)


@contextlib.contextmanager
def uninterrupted() -> Iterator[Deferred]:
    """Call Python's handlers of signals that arrive meanwhile at the end.

    For milliseconds only. Python runs handlers in the main thread, so elsewhere there is nothing to put off. Blocking
    the signals would not do: another thread would take them, and the handlers would run here all the same.
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
    """Every one of them, though those that are back already may raise before the others are."""
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
    """Those that this process does not ignore. Ignored ones stay so: SIGHUP under nohup(1), SIGINT after `&`."""
    return [signum for signum in signums if signal.getsignal(signum) is not signal.SIG_IGN]


class SignalPipe:
    """Makes signals do nothing but wake: `fileno()` is readable when one has arrived.

    It sets handlers, because exec resets those: a program that is executed would inherit that a signal is ignored.
    """

    def __init__(self, *signums: signal.Signals) -> None:
        """Take over `signums`. Of the main thread only."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self.take_over(*signums)

    def take_over(self, *signums: signal.Signals) -> None:
        """Have `signums` do nothing but wake, until `restore`. Call it once."""
        if signums:
            self._before = {signum: signal.signal(signum, self._note) for signum in signums}
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._read

    def read(self) -> list[int]:
        """What has arrived since the last call, and other signals that Python handles. Never waits."""
        with contextlib.suppress(BlockingIOError):
            return list(os.read(self._read, 4096))
        return []

    def restore(self) -> None:
        """Give signals the effect that they had before."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        while self._before:
            signum, handler = self._before.popitem()
            # None: the handler was not set from Python and cannot be restored from it
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def close(self) -> None:
        """Close the descriptors, in a forked child as well. Signals still do nothing."""
        if self._before:
            signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: Python writes to the wakeup descriptor only for signals that have a handler."""


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP do nothing but make `fileno()` readable.

    Ignored ones stay ignored. Outside the main thread, where Python allows no signal handlers, nothing changes, and
    signals keep their effect on the program.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create the descriptor. `clock` tells the time in seconds."""
        self._clock = clock
        self._pipe = SignalPipe()
        self.last: signal.Signals | None = None
        """The signal that counted last."""
        self._counted = -math.inf
        """When that was."""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._pipe.take_over(*not_ignored(*_STOPPING))
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.restore()
        self._pipe.close()

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._pipe.fileno()

    def take(self) -> int:
        """How many of the signals count that arrived since the last call.

        SIGHUP counts only as the first: the kernel, a shell and a session manager may each say that a terminal is gone.
        """
        arrived = [number for number in self._pipe.read() if number in _STOPPING]
        now = self._clock()
        if self.last is not None:
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
    """A signal that this process got."""

    signum: int
    by_kernel: bool
    """Whether the kernel sent it, as it does for keys pressed at the terminal, and not a process."""
    sender: int
    """Process id of who sent it; 0 where that is not known."""


class SignalDescriptor:
    """While open, signals that are blocked do nothing but make `fileno()` readable. Block them before."""

    def __init__(self, signums: Collection[int]) -> None:
        """Read `signums`. Raises OSError where the kernel refuses."""
        wanted = ctypes.create_string_buffer(_SIGSET)
        _libc.sigemptyset(wanted)
        for signum in signums:
            _libc.sigaddset(wanted, signum)
        self._descriptor: int = _libc.signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"signalfd: {os.strerror(error)}")

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._descriptor

    def read(self) -> list[ReceivedSignal]:
        """What has arrived since the last call. Never waits."""
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._descriptor, _INFO.size):
                signum, _, code, sender = _INFO.unpack(content)
                arrived.append(ReceivedSignal(signum, code > 0, sender))  # see sigaction(2), si_code
        return arrived

    def close(self) -> None:
        os.close(self._descriptor)


# Faults are this program's own. Python ignores the last two from its start, so that nothing is known of them.
_LEFT_ALONE = {signal.SIGKILL, signal.SIGSTOP}
_LEFT_ALONE |= {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_LEFT_ALONE |= {signal.SIGPIPE, signal.SIGXFSZ}
STOPS = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
"""What stops a process that does not mind it."""
HARMLESS = frozenset({signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH})
"""What does nothing to a process that does not mind it."""


class CommandSignals:
    """The signals of a program that stands for another, from the beginning to the end of this one.

    All that can be are blocked and read from a descriptor. Those that this program was started to ignore, as SIGHUP by
    nohup(1), stay ignored, and will be by the command.
    """

    def __init__(self) -> None:
        """Take over the signals of this process, for good. Of the main thread only."""
        heeded = {
            signum
            for signum in signal.valid_signals()
            if signum not in _LEFT_ALONE and signal.getsignal(signum) is not signal.SIG_IGN
        }
        self.heeded = frozenset({*heeded, signal.SIGCHLD})
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.heeded)
        self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, there would be nothing to wait for
        self._descriptor = SignalDescriptor(self.heeded)

    def fileno(self) -> int:
        """Readable when a signal has arrived."""
        return self._descriptor.fileno()

    def read(self) -> list[ReceivedSignal]:
        """What has arrived since the last call. Never waits."""
        return self._descriptor.read()

    def hand_over(self) -> None:
        """In a child that is about to become the command: have signals as this program was started with them.

        What arrived before is then delivered.
        """
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, self._on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def suspend(self, signum: int) -> None:
        """Be stopped by `signum`, as a program that knows nothing of signals; return when continued."""
        os.kill(os.getpid(), signum)
        if signum != signal.SIGSTOP:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
            signal.pthread_sigmask(signal.SIG_BLOCK, {signum})

    def die(self, signum: int) -> None:
        """Be ended by `signum`, without a core file. Returns where that cannot be: in a first process."""
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if signum not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
