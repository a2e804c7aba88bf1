"""What the processes around a command say to each other. See `command_front`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from enum import Enum


class Word(bytes, Enum):
    """The kinds of messages. Each carries a number."""

    PASS_ON = b"p"
    """To the supervisor: send this signal to the command. From the witness: this signal came."""
    STARTED = b"s"
    """The command runs, with this process id."""
    FAILED = b"f"
    """The command could not be executed: error number."""
    STOPPED = b"z"
    """The command was stopped by this signal."""
    CONTINUED = b"c"
    """The command runs again."""
    TIME_OVER = b"t"
    """The command has run for too long and gets SIGTERM."""
    KILLED = b"k"
    """The command did not end within this many seconds of SIGTERM and gets SIGKILL."""
    GONE = b"g"
    """The command and all that it started are gone: status of the command."""


_MESSAGE = struct.Struct("=ci")


def channel() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, word: Word, number: int = 0) -> None:
    """Send a message. If the other end is closed, nothing happens: `receive` tells."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        to.send(_MESSAGE.pack(word.value, number))


def receive(channel: socket.socket) -> tuple[Word, int] | None:
    """Return the next message, or None when the other end is closed."""
    try:
        content = channel.recv(_MESSAGE.size)
    except ConnectionResetError:
        return None
    if not content:
        return None
    word, number = _MESSAGE.unpack(content)
    return Word(word), number


def use_devnull(*descriptors: int) -> None:
    """Stop using what the command uses: the other end of a pipe should notice when the command closes its own."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(devnull, descriptor)
    if devnull not in descriptors:
        os.close(devnull)
