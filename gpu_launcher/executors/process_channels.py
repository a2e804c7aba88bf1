"""The program's channels to the processes of its jobs. What they exchange does not pass through the node.

For nodes on other machines, it is relayed (`nodes.channel_relay`). This side is the same.
"""

from __future__ import annotations

import contextlib
import select
import socket
from typing import TYPE_CHECKING, Any

from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.node_client import RemoteLoop
from gpu_launcher.jobs.source import Offer
from gpu_launcher.processes.messages import ChannelClosedError, channel, receive, send

if TYPE_CHECKING:
    from gpu_launcher.nodes.group_loop import GroupLoop


class ProcessChannels:
    """The channels of the offered jobs, by number."""

    def __init__(self, loop: RemoteLoop | GroupLoop) -> None:
        self._loop = loop
        self._channels: dict[int, socket.socket] = {}
        self.numbers: dict[int, int] = {}
        """Numbers of the jobs that may say more, by the descriptors of their channels."""
        self.poll = select.poll()
        """Waits for messages of the node and of the jobs."""
        self.poll.register(loop.fileno(), select.POLLIN)

    def offer(self, job: Job) -> None:
        """Offer a job that the node wanted, and open a channel to its process. Raises NodeDiedError, OSError.

        What the job says has arrived before its end is known. When it has ended, `receive` until there is nothing more.
        """
        mine, theirs = channel()
        with theirs:
            try:
                self._loop.say(Offer(job), (theirs.fileno(),))
            except BaseException:
                mine.close()
                raise
        self._channels[job.number] = mine
        self.numbers[mine.fileno()] = job.number
        self.poll.register(mine, select.POLLIN)

    def send(self, number: int, message: object) -> None:
        """Send a message to the process of a job, if it has not ended."""
        with contextlib.suppress(ChannelClosedError):  # the node will report that it has ended
            send(self._channels[number], message)

    def receive(self, number: int) -> Any:
        """Return the next message of a job's process, or None if there is none."""
        try:
            return receive(self._channels[number], wait=False)[0]
        except BlockingIOError:
            return None
        except ChannelClosedError:  # the node will report that it has ended
            self._unwatch(number)
            return None

    def close(self, number: int) -> None:
        """Close the channel of a job."""
        self._unwatch(number)
        self._channels.pop(number).close()

    def _unwatch(self, number: int) -> None:
        descriptor = self._channels[number].fileno()
        if self.numbers.pop(descriptor, None) is not None:
            self.poll.unregister(descriptor)
