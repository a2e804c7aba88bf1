"""Distinguishes signals for the whole process group from those for this program alone. See `command_front`."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from gpu_launcher.processes.command_channel import Word, channel, receive, send, use_devnull
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.linux import die_with_parent
from gpu_launcher.processes.signals import SAME_SIGNAL_SECONDS, CommandSignals, SignalDescriptor

DELIVERY_SECONDS = 0.05
"""Longest time in which the kernel has sent a signal to all processes of a group."""
ANSWER_SECONDS = 5.0
"""Seconds to wait for a witness that does not answer, for example because only it is stopped."""


class Witness:
    """A process in this program's process group that only reports which signals it gets."""

    def __init__(self, signals: CommandSignals, in_child: Callable[[], None]) -> None:
        """Fork the witness. It calls `in_child` to close what it must not keep open."""
        self._ours, theirs = channel()
        self._seen: dict[int, float] = {}
        self._asked = 0
        here = os.getpid()

        def be_the_witness() -> None:
            self._ours.close()
            in_child()
            die_with_parent(here)
            use_devnull(0, 1, 2)
            descriptor = SignalDescriptor(signals.heeded)
            while True:
                ready, _, _ = select.select([descriptor.fileno(), theirs.fileno()], [], [])
                asked = receive(theirs) if theirs.fileno() in ready else None
                for arrived in descriptor.read():
                    send(theirs, Word.PASS_ON, arrived.signum)
                if asked is not None:
                    send(theirs, *asked)
                elif theirs.fileno() in ready:  # this program has ended
                    return

        self._process: int | None = fork_child(be_the_witness)
        theirs.close()

    def saw(self, signum: int) -> bool:
        """Whether the whole process group has just received `signum`."""
        for seconds in (0.0, DELIVERY_SECONDS):
            time.sleep(seconds)
            self._ask()
            if time.monotonic() - self._seen.get(signum, -SAME_SIGNAL_SECONDS) < SAME_SIGNAL_SECONDS:
                return True
        return False

    def _ask(self) -> None:
        """Note which signals the witness has received, however long it has to wait for a processor."""
        if self._process is None:
            return
        self._asked += 1
        send(self._ours, Word.ASK, self._asked)
        end = time.monotonic() + ANSWER_SECONDS
        while select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0]:
            message = receive(self._ours)
            if message is None:
                os.waitpid(self._process, 0)
                self._process = None
                return
            if message[0] == Word.PASS_ON:
                self._seen[message[1]] = time.monotonic()
            elif message[1] == self._asked:
                return

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
