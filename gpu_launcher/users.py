"""Users, and this process as other users see it."""

from __future__ import annotations

import functools
import os

from gpu_launcher.model import Owner
from gpu_launcher.text import one_line

MAX_COMMAND = 1000
"""Characters of a command that others see."""


@functools.lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    """What people call the user with this id; `uid 1234` for one without an entry in the user database."""
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def this_user(command: str, pid: int) -> Owner:
    """Return what others are told of a process of this user, which runs `command`; secrets in it are hidden."""
    return Owner(pid, user_name(os.getuid()), one_line(command, MAX_COMMAND))


def this_process(command: str) -> Owner:
    """Return what others are told of this process."""
    return this_user(command, os.getpid())
