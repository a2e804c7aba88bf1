"""Gets the names of users, and describes this process to other users."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from gpu_launcher.model import Owner
from gpu_launcher.text import one_line

MAX_PID = 1 << 22
"""Largest process id, which is the kernel's own limit (PID_MAX_LIMIT)."""
MAX_COMMAND = 1000
"""Maximum number of characters shown of a command."""


@functools.lru_cache(maxsize=1024)
def user_name(uid: int) -> str:
    """Return a user's name, or `uid 1234` if the user database has no entry."""
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def user_of(pid: int) -> int | None:
    """Return the user that a process runs as; None if it does not exist or is not visible."""
    if pid <= 0:
        return None
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def this_user(command: str, pid: int) -> Owner:
    """Describe a process of this user that runs `command` to other users. Secrets in the command are hidden."""
    return Owner(pid, user_name(os.getuid()), one_line(command, MAX_COMMAND))


def this_process(command: str) -> Owner:
    """Describe this process, which runs `command`, to other users."""
    return this_user(command, os.getpid())
