"""Distinguishes signals for the whole process group from those for this program alone. See `command_front`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from gpu_launcher.processes.command_channel import Word, channel, receive, send, use_devnull
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.linux import die_with_parent
from gpu_launcher.processes.signals import STOPS, CommandSignals, SignalDescriptor

DELIVERY_SECONDS = 0.05
"""Seconds in which a sender has sent a signal to this program and to its whole group: timeout(1) does both."""
RECENT_SECONDS = 1.0
"""Seconds for which the witness remembers a signal: this program may ask that much later if the machine is busy."""
ANSWER_SECONDS = 5.0
"""Seconds to wait for the witness to answer. If it does not, it is stopped."""


class Witness:
    """A process in this program's process group that only says which signals it has received."""

    def __init__(self, signals: CommandSignals, in_child: Callable[[], None]) -> None:
        """Fork the witness. It calls `in_child` to close what it must not keep open."""
        self._ours, theirs = channel()
        self._answers = True
        here = os.getpid()

        def be_the_witness() -> None:
            self._ours.close()
            in_child()
            die_with_parent(here)
            use_devnull(0, 1, 2)
            _answer_questions(SignalDescriptor(signals.heeded), theirs)

        self._process: int | None = fork_child(be_the_witness)
        theirs.close()
        self._ours.setblocking(False)

    def saw(self, signum: int) -> bool:
        """Whether the whole process group has just received `signum`."""
        return self._ask(signum) or (self._process is not None and self._ask(signum, after=DELIVERY_SECONDS))

    def forget(self, signum: int) -> None:
        """Do not count what the process group has received of `signum` so far, nor a SIGCONT before it."""
        with contextlib.suppress(BlockingIOError):  # it is stopped
            send(self._ours, Word.FORGET, signum)

    def _ask(self, signum: int, after: float = 0.0) -> bool:
        time.sleep(after)
        with contextlib.suppress(BlockingIOError):
            while self._process is not None and receive(self._ours) is not None:
                self._answers = True  # late
        with contextlib.suppress(BlockingIOError):
            send(self._ours, Word.ASK, signum)
        if self._process is None or not select.select([self._ours], [], [], ANSWER_SECONDS * self._answers)[0]:
            self._answers = False
            return False
        answer = receive(self._ours)
        if answer is None:
            os.waitpid(self._process, 0)
            self._process = None
        return answer is not None and answer[1] == signum

    def close(self) -> None:
        """Kill the witness process."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = None
        self._ours.close()

    def close_in_child(self) -> None:
        """Close what a fork of this process must not keep open."""
        self._ours.close()


def _answer_questions(descriptor: SignalDescriptor, questions: socket.socket) -> None:
    """Answer questions until the other end is closed."""
    seen: dict[int, float] = {}
    while True:
        ready, _, _ = select.select([descriptor.fileno(), questions.fileno()], [], [])
        question = receive(questions) if questions.fileno() in ready else None
        now = time.monotonic()
        for arrived in descriptor.read():
            seen[arrived.signum] = now
            if arrived.signum in STOPS:  # it has discarded a SIGCONT that was not read yet: see signal(7)
                seen[signal.SIGCONT] = now
        if question is None:
            if questions.fileno() in ready:
                return
        else:
            kind, signum = question
            if kind == Word.ASK:
                recent = now - seen.get(signum, -RECENT_SECONDS) < RECENT_SECONDS
                send(questions, Word.ASK, signum if recent else 0)
            else:
                seen.pop(signum, None)
            if signum in STOPS:
                seen.pop(signal.SIGCONT, None)
