"""Messages over a pair of byte streams, such as the standard input and output of `ssh`.

Each message is pickled behind its length. Both ends are processes of one user, connected by a program that this user
started, so pickle is safe here. Neither end ever waits for the other: what does not fit into the stream is kept.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from typing import Any

from gpu_launcher.processes.messages import ChannelClosedError

MAGIC = b"\n\0gpu-launcher agent\0\n"
"""Precedes the first message of an agent. What comes before it was printed by a shell's start-up files."""
MAX_NOISE = 64 * 1024
"""Maximum number of bytes kept of what comes before MAGIC."""
READ_BYTES = 256 * 1024
"""Maximum number of bytes that one call of `receive` reads."""

_LENGTH = struct.Struct(">Q")


class FrameStream:
    """One end of a connection."""

    def __init__(self, reads: int, writes: int, *, after_magic: bool = False) -> None:
        """Take over two descriptors. If `after_magic`, what comes before MAGIC is kept as `noise`."""
        self._reads = reads
        self._writes = writes
        self._unread = bytearray()
        self._unsent = bytearray()
        self._in_frames = not after_magic
        self._ended = False
        self.noise = b""
        """The end of what came before MAGIC."""
        for descriptor in (reads, writes):
            os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to receive."""
        return self._reads

    @property
    def writes(self) -> int:
        """The descriptor that is writable when `flush` can continue."""
        return self._writes

    @property
    def pending(self) -> int:
        """Number of bytes that wait to be sent."""
        return len(self._unsent)

    def greet(self) -> None:
        """Send MAGIC."""
        self._unsent += MAGIC
        self.flush()

    def send(self, message: object) -> None:
        """Send a message as soon as there is room. If the other end is gone, `receive` will say so."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._unsent += _LENGTH.pack(len(data))
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what there is room for."""
        try:
            while self._unsent:
                with memoryview(self._unsent) as view:
                    sent = os.write(self._writes, view[:READ_BYTES])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()

    def receive(self) -> list[Any]:
        """Return the messages that have arrived. Raises ChannelClosedError once the other end has closed."""
        if not self._ended:
            with contextlib.suppress(BlockingIOError):
                data = os.read(self._reads, READ_BYTES)
                self._ended = not data
                self._unread += data
        messages = []
        if not self._in_frames:
            self._find_magic()
        while self._in_frames and len(self._unread) >= _LENGTH.size:
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
            self.noise = (self.noise + noise)[-MAX_NOISE:]
            self._unread[:] = rest
            self._in_frames = True
        elif len(self._unread) > MAX_NOISE:
            del self._unread[:-MAX_NOISE]
        if self._ended and not self._in_frames:
            self.noise = bytes(self._unread)

    def close(self) -> None:
        """Close both descriptors. Idempotent."""
        if self._reads >= 0:
            for descriptor in {self._reads, self._writes}:
                os.close(descriptor)
        self._reads = self._writes = -1
