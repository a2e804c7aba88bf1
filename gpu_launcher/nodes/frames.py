"""Messages over a pair of byte streams, such as the standard input and output of `ssh`.

Each message is pickled behind its length. Both ends are processes of one user, connected by a program that this user
started, so pickle is safe here. Neither end ever waits for the other: what does not fit into the stream is kept.
"""

from __future__ import annotations

import os
import pickle
import struct
import threading
from typing import Any

from gpu_launcher.descriptors import is_readable
from gpu_launcher.processes.messages import ChannelClosedError

MAGIC = b"\n\0gpu-launcher agent\0\n"
"""Precedes the first message of an agent. What comes before it was printed by a shell's start-up files."""
MAX_NOISE = 64 * 1024
"""Maximum number of bytes kept of what comes before MAGIC."""
READ_BYTES = 256 * 1024
"""Maximum number of bytes that one call of `receive` reads."""

_LENGTH = struct.Struct(">Q")


class FrameStream:
    """One end of a connection. One thread may receive while others send."""

    def __init__(self, reads: int, writes: int, *, after_magic: bool = False) -> None:
        """Take over two descriptors. If `after_magic`, what comes before MAGIC is kept as `noise`."""
        self._reads = reads
        self.writes = writes
        """The descriptor that is writable when `flush` can continue."""
        self._unread = bytearray()
        self._unsent = bytearray()
        self._sending = threading.RLock()
        self.greeted = not after_magic
        """Whether MAGIC has arrived, if it was to be waited for."""
        self._ended = False
        self.received = 0
        """Number of bytes that have arrived."""
        self._noise = b""
        for descriptor in (reads, writes):
            os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to receive."""
        return self._reads

    @property
    def noise(self) -> bytes:
        """The end of what came before MAGIC, or of all that has arrived while MAGIC has not."""
        return self._noise if self.greeted else bytes(self._unread)

    @property
    def pending(self) -> int:
        """Number of bytes that wait to be sent."""
        return len(self._unsent)

    @property
    def readable(self) -> bool:
        """Whether something has arrived that was not received. False once the stream is closed, by any thread."""
        with self._sending:
            return self._reads >= 0 and is_readable(self._reads)

    def greet(self) -> None:
        """Send MAGIC."""
        with self._sending:
            self._unsent += MAGIC
            self.flush()

    def send(self, message: object) -> None:
        """Send a message as soon as there is room. If the other end is gone, `receive` will say so."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._unsent += _LENGTH.pack(len(data))
            self._unsent += data
            self.flush()

    def flush(self) -> None:
        """Send what there is room for. Does nothing once the stream is closed."""
        with self._sending:
            try:
                while self._unsent and self.writes >= 0:
                    with memoryview(self._unsent) as view:
                        sent = os.write(self.writes, view[:READ_BYTES])
                    del self._unsent[:sent]
            except BlockingIOError:
                pass
            except ConnectionError:  # a broken pipe, or a reset connection
                self._unsent.clear()

    def receive(self) -> list[Any]:
        """Return the messages that have arrived. Raises ChannelClosedError once the other end has closed."""
        if not self._ended:
            try:
                data = os.read(self._reads, READ_BYTES)
                self._ended = not data
                self._unread += data
                self.received += len(data)
            except BlockingIOError:
                pass
            except ConnectionResetError:  # a socket whose other end has closed without reading everything
                self._ended = True
        messages = []
        if not self.greeted:
            self._find_magic()
        while self.greeted and len(self._unread) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread)
            end = _LENGTH.size + length
            if len(self._unread) < end:
                break
            messages.append(pickle.loads(memoryview(self._unread)[_LENGTH.size : end].tobytes()))
            del self._unread[:end]
        if self._ended and not messages:
            raise ChannelClosedError("the other end is closed")
        return messages

    def _find_magic(self) -> None:
        noise, magic, rest = bytes(self._unread).partition(MAGIC)
        if magic:
            self._noise = noise[-MAX_NOISE:]
            self._unread[:] = rest
            self.greeted = True
        elif len(self._unread) > MAX_NOISE:
            del self._unread[:-MAX_NOISE]

    def close(self) -> None:
        """Close both descriptors. Idempotent."""
        with self._sending:
            if self._reads >= 0:
                for descriptor in {self._reads, self.writes}:
                    os.close(descriptor)
            self._reads = self.writes = -1
