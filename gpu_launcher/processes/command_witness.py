"""Distinguishes signals for the whole process group from those for this program alone. See `command_front`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from gpu_launcher.processes.command_channel import Word, channel, receive, send, use_devnull
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.linux import die_with_parent
from gpu_launcher.processes.signals import SAME_SIGNAL_SECONDS, CommandSignals, SignalDescriptor

WITNESS_SECONDS = 0.05
"""Seconds to wait for the witness to report the same signal."""


class Witness:
    """A process in this program's process group that only reports which signals it gets."""

    def __init__(self, signals: CommandSignals, in_child: Callable[[], None]) -> None:
        """Fork the witness. It calls `in_child` to close what it must not keep open."""
        self._ours, theirs = channel()
        self._seen: dict[int, float] = {}
        here = os.getpid()

        def be_the_witness() -> None:
            self._ours.close()
            in_child()
            die_with_parent(here)
            use_devnull(0, 1, 2)
            descriptor = SignalDescriptor(signals.heeded)
            while True:
                select.select([descriptor], [], [])
                for arrived in descriptor.read():
                    send(theirs, Word.PASS_ON, arrived.signum)

        self._process: int | None = fork_child(be_the_witness)
        theirs.close()
        self._ours.setblocking(False)

    def saw(self, signum: int) -> bool:
        """Whether the whole process group has just received `signum`."""
        end = time.monotonic() + WITNESS_SECONDS
        while True:
            self._listen()
            now = time.monotonic()
            if now - self._seen.get(signum, -SAME_SIGNAL_SECONDS) < SAME_SIGNAL_SECONDS:
                return True
            if self._process is None or now >= end:
                return False
            select.select([self._ours], [], [], end - now)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._process is not None:
                message = receive(self._ours)
                if message is None:
                    os.waitpid(self._process, 0)
                    self._process = None
                    return
                self._seen[message[1]] = time.monotonic()

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
