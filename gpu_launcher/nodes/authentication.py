"""Proves to both ends of a connection that the other end has the same key, and protects every frame after that. Pure.

Theory of operation. The end that listens and the end that connects prove that they know the key, without showing it:

    listener → connector   MAGIC, its nonce
    connector → listener   its nonce, HMAC(key, "connector", both nonces)
    listener → connector   HMAC(key, "listener", both nonces)

A proof names its side, so it cannot be sent back to the end that made it, and depends on a nonce of the other end, so
one that was recorded earlier is worthless. The listener reveals nothing but a random number to an end without the key.

Each direction then has a key of its own, made from both nonces. A frame is its length, its content, and an HMAC of its
number and content. So a frame that was changed, repeated, left out, reordered, or returned to its sender is refused.
The length is bounded before anything is kept in memory.

The frames are not encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from dataclasses import dataclass
from enum import Enum

MAGIC = b"gpu-launcher connection 1\n"
"""The first bytes of a connection. The number changes with the protocol."""
KEY_BYTES = 32
MAX_CONTENT = 64 * 1024
"""Maximum number of bytes in a frame."""

_NONCE_BYTES = 32
_TAG_BYTES = 32
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")


class AuthenticationError(Exception):
    """The other end does not have the key, or what has arrived is not what it sent."""


class Side(Enum):
    """The end of a connection."""

    LISTENER = b"listener"
    CONNECTOR = b"connector"

    @property
    def other(self) -> Side:
        """The other end."""
        return Side.CONNECTOR if self is Side.LISTENER else Side.LISTENER


@dataclass(frozen=True, slots=True)
class Session:
    """What a handshake leads to: both directions of a connection."""

    sealer: FrameSealer
    opener: FrameOpener


def new_key() -> bytes:
    """Return a random key."""
    return secrets.token_bytes(KEY_BYTES)


class Handshake:
    """One end of a handshake. Send `greeting`, and then what `receive` returns, until there is a `session`."""

    def __init__(self, key: bytes, side: Side) -> None:
        self._key = key
        self._side = side
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._transcript = b""
        """The nonces of both sides, once they are known."""
        self._arrived = b""
        self.greeting = MAGIC + self._nonce if side is Side.LISTENER else b""
        self.missing = (_NONCE_BYTES + _TAG_BYTES) if side is Side.LISTENER else len(MAGIC) + _NONCE_BYTES
        """How many bytes the next message still needs. No more must be received at a time."""
        self.session: Session | None = None

    def receive(self, data: bytes) -> bytes:
        """Take bytes that have arrived, at most `missing`. Return what to send. Raises AuthenticationError."""
        self._arrived += data
        self.missing -= len(data)
        if self.missing:
            return b""
        arrived, self._arrived = self._arrived, b""
        if self._side is Side.LISTENER:
            self._transcript = self._nonce + arrived[:_NONCE_BYTES]
            self._verify(arrived[_NONCE_BYTES:])
            return self._proof(self._side)
        if self._transcript:
            self._verify(arrived)
            return b""
        if not arrived.startswith(MAGIC):
            raise AuthenticationError("the other end is not gpu-launcher, or another version of it")
        self._transcript = arrived[len(MAGIC) :] + self._nonce
        self.missing = _TAG_BYTES
        return self._nonce + self._proof(self._side)

    def _verify(self, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._proof(self._side.other)):
            raise AuthenticationError("the other end does not have the key")
        self.session = Session(FrameSealer(self._direction(self._side)), FrameOpener(self._direction(self._side.other)))

    def _proof(self, side: Side) -> bytes:
        return _tag(self._key, b"proof of the " + side.value + b"\0" + MAGIC + self._transcript)

    def _direction(self, side: Side) -> bytes:
        """Return the key of frames from one side."""
        return _tag(self._key, b"frames of the " + side.value + b"\0" + MAGIC + self._transcript)


class FrameSealer:
    """Makes the frames of one direction."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def seal(self, content: bytes) -> bytes:
        """Return the next frame."""
        assert 0 < len(content) <= MAX_CONTENT
        tag = _tag(self._key, _NUMBER.pack(self._number) + content)
        self._number += 1
        return _LENGTH.pack(len(content)) + content + tag


class FrameOpener:
    """Reads the frames of one direction. Keeps at most one frame in memory, and what `open` is given."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0
        self._arrived = bytearray()

    def open(self, data: bytes) -> list[bytes]:
        """Take bytes that have arrived, and return the contents of the frames that are complete.

        Raises AuthenticationError. The connection must then be closed.
        """
        self._arrived += data
        contents = []
        while len(self._arrived) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._arrived)
            if not 0 < length <= MAX_CONTENT:
                raise AuthenticationError(f"a frame has {length} bytes, but must have 1 to {MAX_CONTENT}")
            end = _LENGTH.size + length + _TAG_BYTES
            if len(self._arrived) < end:
                break
            content, tag = bytes(self._arrived[_LENGTH.size : end - _TAG_BYTES]), self._arrived[end - _TAG_BYTES : end]
            if not hmac.compare_digest(tag, _tag(self._key, _NUMBER.pack(self._number) + content)):
                raise AuthenticationError("a frame is not the next one that the other end sent")
            del self._arrived[:end]
            self._number += 1
            contents.append(content)
        return contents


def _tag(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")
