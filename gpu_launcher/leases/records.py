"""What the files of a pool say, and how they are named. For display and policy; liveness is by lock alone.

ticket-<sequence>-<id>   a waiting request
lease-<id>, twin-<id>    one granted lease: two names of one file, so that losing one is losing nothing
.new-<id>                not yet published
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gpu_launcher.model import Owner

FORMAT = 1
"""Files of another format belong to another version of gpu-launcher, and are respected unread."""
SIZE_LIMIT = 1 << 20
"""Bytes; a longer file is not ours."""

LEASE_NAME = re.compile(r"(?:lease|twin)-([0-9a-f]{32})")
TICKET_NAME = re.compile(r"ticket-([0-9]{1,18})-([0-9a-f]{32})")
UNPUBLISHED_NAME = re.compile(r"\.new-[0-9a-f]{32}")


def lease_names(id: str) -> tuple[str, str]:
    return f"lease-{id}", f"twin-{id}"


def ticket_name(sequence: int, id: str) -> str:
    return f"ticket-{sequence:012}-{id}"


def unpublished_name(id: str) -> str:
    return f".new-{id}"


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a ticket's or a lease's file."""

    uuids: tuple[str, ...]
    """A lease's devices, or a ticket's candidates, best first."""
    count: int
    """Number of whole devices asked for, or held."""
    owner: Owner
    since: float
    """Wall-clock seconds since the epoch."""

    def encode(self) -> bytes:
        owner = {"pid": self.owner.pid, "user": self.owner.user, "command": self.owner.command}
        content = {
            "format": FORMAT,
            "uuids": self.uuids,
            "count": self.count,
            "owner": owner,
            "since": self.since,
        }
        return json.dumps(content).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> Record | None:
        """Return None for anything that this version did not write as it stands."""
        try:
            return cls._checked(json.loads(content))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None

    @classmethod
    def _checked(cls, content: Any) -> Record:
        uuids, count, owner, since = content["uuids"], content["count"], content["owner"], content["since"]
        if content["format"] != FORMAT or type(uuids) is not list or type(count) is not int or count < 1:
            raise ValueError
        if not uuids or not all(type(uuid) is str for uuid in uuids):
            raise ValueError
        known = Owner(pid=int(owner["pid"]), user=str(owner["user"]), command=str(owner["command"]))
        return cls(uuids=tuple(uuids), count=count, owner=known, since=float(since))
