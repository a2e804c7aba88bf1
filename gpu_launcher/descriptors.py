"""Asks the kernel whether a descriptor is ready, without waiting. With poll: select fails for numbers above 1023."""

from __future__ import annotations

import select
import socket


def is_readable(file: int | socket.socket) -> bool:
    """Whether there is something to read: data, the end, or an error."""
    return _is_ready(file, select.POLLIN)


def has_room(file: int | socket.socket) -> bool:
    """Whether something can be written, or writing fails at once."""
    return _is_ready(file, select.POLLOUT)


def _is_ready(file: int | socket.socket, event: int) -> bool:
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(0))
