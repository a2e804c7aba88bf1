"""Relays the channels between a head and the processes of its jobs over the connection to an agent.

Theory of operation. Head and job each have a socket pair's end, and exchange messages as they would on one machine. The
far ends are here, one `ChannelRelay` at each end of the connection:

    head ══ socket pair ══ relay of its RemoteNode ── connection ── relay of the agent ══ socket pair ══ job

A message is sent in chunks, the channels take turns, and nothing is read from a socket while much waits to be sent. So
a large message delays others, and the signs of life, only for a moment. Each channel may have `WINDOW` bytes under way:
the receiver says what it has taken (`ChannelRead`), but takes nothing behind a message that its reader has no room for.
So both ends together keep at most one message and a window for each direction of a channel.

The agent says `Ended` at once, and `ChannelEnd` when it has sent all that the job said. The head's side keeps `Ended`
back until that has been delivered: when a job is known to have ended, its last words are in the socket.
"""

from __future__ import annotations

import errno
import select
from collections import deque
from dataclasses import dataclass, field
from socket import socket

from gpu_launcher.descriptors import has_room
from gpu_launcher.nodes.agent_messages import ChannelData, ChannelEnd, ChannelRead
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.processes.messages import ChannelClosedError, receive_data, send_data

WINDOW = 256 * 1024
"""Maximum number of bytes of a channel that are under way in one direction."""
CHUNK_BYTES = 64 * 1024
"""Maximum number of bytes that are sent together."""
MAX_PENDING = 256 * 1024
"""Number of unsent bytes of the connection at which nothing more is read from the sockets."""


@dataclass(slots=True)
class FarEnd:
    """The end of a channel's socket pair that is relayed."""

    socket: socket
    has_delivered: bool = False
    """Whether any message was delivered to it."""


@dataclass(slots=True, eq=False)
class _Relayed:
    """One channel over this connection."""

    number: int
    """The number of its job."""
    end: FarEnd
    watched: int = 0
    """The events for which the socket is watched."""
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    """The unsent rest of the message that is being sent."""
    credit: int = WINDOW
    """How many more bytes may be sent."""
    ending: bool = False
    """Whether the job has ended, so that the socket gets no more messages."""
    at_end: bool = False
    """Whether the socket has no more messages, and will get none."""
    incoming: bytearray = field(default_factory=bytearray)
    """What has arrived of the next message."""
    ready: deque[bytes] = field(default_factory=deque)
    """Messages that wait until the socket has room."""
    taken: int = 0
    """How many bytes have arrived that the sender was not told about."""
    ended: bool = False
    """Whether ChannelEnd has arrived."""


class ChannelRelay:
    """The channels over one connection, at one of its ends. All methods are called from one thread."""

    def __init__(self, stream: FrameStream, poll: select.epoll) -> None:
        """Relay over `stream`, without channels at first. `poll` gets ready when `deliver` or `send` can continue."""
        self._stream = stream
        self._poll = poll
        self._channels: dict[int, _Relayed] = {}
        """Channels by number. Those that have waited longest to send come first."""
        self._by_job: dict[int, int] = {}
        """The channel of each job."""
        self._next = 0

    def open(self, number: int, end: FarEnd, channel: int | None = None) -> int:
        """Relay a job's channel. The caller closes the socket after `forget`. Returns the number of the channel.

        The head's side chooses that number, and the agent is told.
        """
        if channel is None:
            channel = self._next
            self._next += 1
        self._by_job[number] = channel
        self._channels[channel] = _Relayed(number, end)
        self._watch(self._channels[channel], sending=True)
        return channel

    @property
    def is_idle(self) -> bool:
        """Whether there are no channels."""
        return not self._channels

    def has(self, number: int) -> bool:
        """Whether the channel of a job is relayed."""
        return number in self._by_job

    def has_ended(self, number: int) -> bool:
        """Whether everything that a job said was delivered, and it has ended."""
        channel = self._channels[self._by_job[number]]
        return channel.ended and not channel.ready

    def end(self, number: int) -> None:
        """Send ChannelEnd when everything that a job has said is sent: it has ended."""
        if number in self._by_job:
            self._channels[self._by_job[number]].ending = True

    def forget(self, number: int) -> None:
        """Relay the channel of a job no more."""
        channel = self._channels.pop(self._by_job.pop(number))
        self._set_watched(channel, 0)

    def take(self, frame: ChannelData | ChannelRead | ChannelEnd) -> None:
        """Take note of what has arrived. Follow with `deliver`."""
        channel = self._channels.get(frame.channel)
        if channel is None:
            return  # it was forgotten meanwhile
        match frame:
            case ChannelData(_, data, last):
                channel.incoming += data
                channel.taken += len(data)
                if last:
                    channel.ready.append(bytes(channel.incoming))
                    channel.incoming.clear()
            case ChannelRead(_, count):
                channel.credit += count
            case ChannelEnd():
                channel.ended = True

    def deliver(self) -> None:
        """Pass what has arrived to the sockets, as far as these have room."""
        for channel in self._channels.values():
            while channel.ready and has_room(channel.end.socket):  # else a large message is copied in vain
                try:
                    send_data(channel.end.socket, channel.ready[0], wait=False)
                except BlockingIOError:
                    break
                except ChannelClosedError:
                    pass  # nothing reads it any more
                except OSError as error:  # a large message takes a descriptor, and may get one later
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    break
                channel.ready.popleft()
                channel.end.has_delivered = True

    def send(self) -> list[int]:
        """Send what the sockets have, and what was taken from the connection, as far as there is room.

        Returns the jobs that have ended and whose last words were sent.
        """
        if not self._channels:
            return []
        for number, channel in self._channels.items():
            if channel.taken and not channel.ready:
                self._stream.send(ChannelRead(number, channel.taken))
                channel.taken = 0
        readable = {descriptor for descriptor, _ in self._poll.poll(0)}
        active = deque(
            (number, channel)
            for number, channel in self._channels.items()
            if channel.ending or not channel.watched & select.EPOLLIN or channel.end.socket.fileno() in readable
        )
        while active and self._stream.pending < MAX_PENDING:
            number, channel = active.popleft()
            if self._send_chunk(number, channel):
                active.append((number, channel))
                self._channels[number] = self._channels.pop(number)  # the next call begins with the others
        over: list[int] = []
        for number, channel in self._channels.items():
            if channel.ending and channel.at_end and not channel.outgoing:
                self._stream.send(ChannelEnd(number))
                over.append(channel.number)
            self._watch(channel, sending=self._stream.pending < MAX_PENDING)
        return over

    def rest(self) -> None:
        """Do not watch what the sockets have, because nothing may be sent now. Ends with the next `send`."""
        for channel in self._channels.values():
            self._watch(channel, sending=False)

    def close(self) -> None:
        """Relay nothing any more. Idempotent."""
        for channel in self._channels.values():
            self._set_watched(channel, 0)
        self._channels.clear()
        self._by_job.clear()

    def _send_chunk(self, number: int, channel: _Relayed) -> bool:
        """Send a part of a channel's next message. Returns whether there was one, and room for it."""
        if not channel.outgoing:
            self._read(channel)
        size = min(len(channel.outgoing), channel.credit, CHUNK_BYTES)
        if not size:
            return False
        data = bytes(channel.outgoing[:size])
        channel.outgoing = channel.outgoing[size:]
        channel.credit -= size
        self._stream.send(ChannelData(number, data, last=not channel.outgoing))
        return True

    @staticmethod
    def _read(channel: _Relayed) -> None:
        """Take the next message from a socket, if there is one."""
        if channel.at_end:
            return
        try:
            data, _ = receive_data(channel.end.socket, wait=False)
        except BlockingIOError:
            channel.at_end = channel.ending
        except ChannelClosedError:
            channel.at_end = True
        else:
            channel.outgoing = memoryview(data)

    def _watch(self, channel: _Relayed, *, sending: bool) -> None:
        """Watch a socket for what can be done with it."""
        events = select.EPOLLIN if sending and not channel.at_end and not channel.outgoing else 0
        self._set_watched(channel, events | (select.EPOLLOUT if channel.ready else 0))

    def _set_watched(self, channel: _Relayed, events: int) -> None:
        if events == channel.watched:
            return
        if not channel.watched:
            self._poll.register(channel.end.socket, events)
        elif events:
            self._poll.modify(channel.end.socket, events)
        else:  # without any event, the end of the other side would still be reported
            self._poll.unregister(channel.end.socket)
        channel.watched = events
