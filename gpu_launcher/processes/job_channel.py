"""Lets a job's code exchange messages with the source of the job, over the job's channel.

A process has at most one such channel, from before the program's code runs until the process ends. A process
forked from the job has a copy of it, which it must not use; it follows the job's rank decisions instead.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_launcher.processes.messages import ChannelClosedError, JobMessage, JobReply, receive, send
from gpu_launcher.processes.rank_decisions import RankDecisions


@dataclass
class JobChannel:
    """The channel of a job's main process. It is safe to use from several threads."""

    channel: socket.socket
    decisions: RankDecisions
    """Data from the job's source and the job's decisions, for its other processes."""
    process: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, what: Any) -> bool:
        """Send a message to the source. Returns False if the node has ended; the supervisor then ends this process."""
        with self.lock:
            try:
                send(self.channel, JobMessage(what))
            except ChannelClosedError:
                return False
        return True

    def hear(self, patience: float) -> list[Any]:
        """Return all replies that have arrived. Waits at most `patience` seconds for the first."""
        answers = []
        deadline = time.monotonic() + patience
        with self.lock:
            poll = select.poll()
            poll.register(self.channel, select.POLLIN)
            while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                deadline = 0.0
                try:
                    message, _ = receive(self.channel)
                except ChannelClosedError:
                    break
                assert isinstance(message, JobReply), message
                answers.append(message.what)
        return answers


_current: JobChannel | None = None


def begin(channel: socket.socket, about: Any, decisions: Path) -> None:
    """Make `channel` the channel of this process. Call this in a job's main process before the program's code.

    Raises OSError if the file for the ranks cannot be written.
    """
    global _current
    _current = JobChannel(channel, RankDecisions.publish(decisions, about), os.getpid())


def current() -> JobChannel | None:
    """Return this process's channel; None outside a job's main process, or if its source does not take messages."""
    return _current if _current is not None and _current.process == os.getpid() else None


def runs_anew() -> bool:
    """Whether this process runs the program from its beginning. Call this outside the job's main process.

    False if the process was forked from the main process or started by multiprocessing.
    """
    return _current is None and multiprocessing.parent_process() is None
