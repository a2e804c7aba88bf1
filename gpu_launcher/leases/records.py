"""What the files of a pool say, and how they are named. Liveness is by lock alone.

ticket-<rank>-<sequence>-<id>-<edition>   a waiting request; sorted by name they are in queue order
lease-<id>, twin-<id>                     one granted lease: two names of one file, so that losing one is losing nothing
.new-<id>                                 not yet published

What a file says never changes: a ticket that has something new to say is published again, as its next edition.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpu_launcher.leases.policy import Candidate, Demand
from gpu_launcher.model import MOST_PRIORITY, Owner, Request, Share

FORMAT = 2
"""Files of another format belong to another version of gpu-launcher, and are respected unread."""
SIZE_LIMIT = 1 << 22
"""Bytes; a longer file is not ours."""
MOST_SEQUENCE = 10**12 - 1

LEASE_NAME = re.compile(r"(?:lease|twin)-([0-9a-f]{32})")
TICKET_NAME = re.compile(r"ticket-([0-9]{6})-([0-9]{12})-([0-9a-f]{32})-([0-9]{6})")
SEQUENCE = operator.itemgetter(slice(14, 26))
"""Of a ticket's name, as text."""
UNPUBLISHED_NAME = re.compile(r"\.new-[0-9a-f]{32}")

_LOWEST_RANK = MOST_PRIORITY + 1


class TicketName(NamedTuple):
    """The place of a ticket in the queue, which can be told without opening its file."""

    priority: int
    sequence: int
    id: str
    edition: int

    def __str__(self) -> str:
        return f"ticket-{_LOWEST_RANK - self.priority:06}-{self.sequence:012}-{self.id}-{self.edition:06}"

    @classmethod
    def parse(cls, name: str) -> TicketName | None:
        """Return None if it is not a ticket's name."""
        match = TICKET_NAME.fullmatch(name)
        return match and cls(_LOWEST_RANK - int(match[1]), int(match[2]), match[3], int(match[4]))


def lease_names(id: str) -> tuple[str, str]:
    return f"lease-{id}", f"twin-{id}"


def unpublished_name(id: str) -> str:
    return f".new-{id}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and when a file was written.

    A boot id is random, and the same in all containers of a machine; locks and CLOCK_BOOTTIME mean something within
    one boot only. A file of another boot and the same machine is left over from before a restart; one of another
    machine is that machine's affair.
    """

    boot: str
    """Empty where the kernel does not tell."""
    machine: str
    """Host name."""

    @classmethod
    def here(cls) -> Origin:
        """Of what this process writes now."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, os.uname().nodename)


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """The content of a ticket's file."""

    demand: Demand
    owner: Owner
    since: float
    """Wall-clock seconds since the epoch."""
    origin: Origin

    def encode(self) -> bytes:
        request = self.demand.request
        return _encoded(
            self,
            candidates=[[one.uuid, one.memory, one.exclusive] for one in self.demand.candidates],
            unavailable=sorted(self.demand.unavailable),
            count=request.gpus,
            share=[request.share.millionths, request.share.memory],
            priority=request.priority,
            timeout=request.timeout,
            stagger=request.stagger,
        )

    @classmethod
    def checked(cls, content: Any) -> TicketRecord:
        candidates = tuple(Candidate(_text(u), _none_or_count(m), bool(e)) for u, m, e in content["candidates"])
        request = Request(
            gpus=_count(content["count"]),
            share=_share(content["share"]),
            priority=int(content["priority"]),
            timeout=_none_or_number(content["timeout"]),
            stagger=float(content["stagger"]),
        )
        unavailable = frozenset(_text(uuid) for uuid in content["unavailable"])
        if request.gpus < 1 or not candidates:
            raise ValueError
        return cls(Demand(request, candidates, unavailable), *_common(content))


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The content of a lease's file."""

    shares: Mapping[str, Share]
    """By device UUID."""
    started: float
    """CLOCK_BOOTTIME at the grant, which all processes of a boot share and nobody sets."""
    timeout: float | None
    """Seconds after that at which the devices are free at the latest; None where not declared."""
    owner: Owner
    since: float
    """Wall-clock seconds since the epoch, for display."""
    origin: Origin

    def encode(self) -> bytes:
        shares = [[uuid, share.millionths, share.memory] for uuid, share in self.shares.items()]
        return _encoded(self, shares=shares, started=self.started, timeout=self.timeout)

    @classmethod
    def checked(cls, content: Any) -> LeaseRecord:
        shares = {_text(uuid): _share(share) for uuid, *share in content["shares"]}
        if not shares or len(shares) != len(content["shares"]) or not all(one.millionths for one in shares.values()):
            raise ValueError
        started, timeout = float(content["started"]), _none_or_number(content["timeout"])
        return cls(shares, started, timeout, *_common(content))

    def started_here(self, origin: Origin) -> float | None:
        """When it was granted, on the clock of `origin`; None where that cannot be compared."""
        return self.started if self.origin.boot == origin.boot else None

    def ends_here(self, origin: Origin) -> float | None:
        """When its devices are free at the latest, on the clock of `origin`; None where that is not known."""
        started = self.started_here(origin)
        return None if started is None or self.timeout is None else started + self.timeout


Record = TicketRecord | LeaseRecord


def decode(content: bytes) -> Record | None:
    """Return None for anything that this version did not write as it stands."""
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            return None
        return TicketRecord.checked(fields) if "candidates" in fields else LeaseRecord.checked(fields)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _encoded(record: Record, **fields: object) -> bytes:
    owner = {"pid": record.owner.pid, "user": record.owner.user, "command": record.owner.command}
    origin = {"boot": record.origin.boot, "machine": record.origin.machine}
    return json.dumps({"format": FORMAT, **fields, "owner": owner, "since": record.since, **origin}).encode() + b"\n"


def _common(content: Any) -> tuple[Owner, float, Origin]:
    owner = content["owner"]
    known = Owner(pid=int(owner["pid"]), user=str(owner["user"]), command=str(owner["command"]))
    return known, float(content["since"]), Origin(_text(content["boot"]), _text(content["machine"]))


def _share(content: Any) -> Share:
    millionths, memory = content
    return Share(_count(millionths), _count(memory))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _none_or_count(value: Any) -> int | None:
    return None if value is None else _count(value)


def _none_or_number(value: Any) -> float | None:
    return None if value is None else float(value)
