"""Signals read from a descriptor, with who sent them, which a Python handler does not learn. Linux: signalfd(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Collection
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_SIGSET = 128
"""Bytes of a sigset_t, or more."""
_INFO = struct.Struct("=IiiI112x")
"""ssi_signo, ssi_errno, ssi_code, ssi_pid, and what is of no interest here."""


@dataclass(frozen=True, slots=True)
class Arrived:
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

    def read(self) -> list[Arrived]:
        """What has arrived since the last call. Never waits."""
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._descriptor, _INFO.size):
                signum, _, code, sender = _INFO.unpack(content)
                arrived.append(Arrived(signum, code > 0, sender))  # see sigaction(2), si_code
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

    def read(self) -> list[Arrived]:
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


_PR_SET_DUMPABLE = 4
