"""Messages between the processes around a command. See `command_front`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from enum import Enum


class Word(bytes, Enum):
    """Kinds of messages. Each message carries a number."""

    PASS_ON = b"p"
    """To the supervisor: send this signal to the command."""
    ASK = b"a"
    """To the witness: has this signal just arrived? Its answer is the signal, or 0 if not."""
    FORGET = b"o"
    """To the witness: do not count this signal, if it has arrived, nor a SIGCONT before it."""
    STARTED = b"s"
    """The command runs with this process id."""
    FAILED = b"f"
    """The command could not be executed because of this error number."""
    STOPPED = b"z"
    """The command was stopped by this signal."""
    CONTINUED = b"c"
    """The command runs again."""
    TIME_OVER = b"t"
    """The command has reached its timeout and gets SIGTERM."""
    KILLED = b"k"
    """The command did not end within this many seconds of SIGTERM and gets SIGKILL."""
    GONE = b"g"
    """The command ended with this status, and everything that it started is gone."""


_MESSAGE = struct.Struct("=ci")


def channel() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, word: Word, number: int = 0) -> None:
    """Send a message. Does nothing if the other end is closed, which `receive` reports."""
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
    """Point `descriptors`, which this process shares with the command, at /dev/null.

    Otherwise the other end of a pipe would not notice that the command closed its end.
    """
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(devnull, descriptor)
    if devnull not in descriptors:
        os.close(devnull)
