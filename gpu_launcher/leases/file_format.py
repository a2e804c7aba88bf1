"""The names and contents of a pool's files. Only locks decide which files are live.

ticket-<rank>-<sequence>-<id>-<edition>   a waiting request; sorted by name they are in queue order
lease-<id>, twin-<id>                     one granted lease: two names of one file, so that it outlasts the loss of one
.new-<id>                                 not yet published

The content of a file never changes. If a ticket changes, it is published again as its next edition.

Every user of the machine can write such files, so `decode` accepts only what this version could have written: known
types, finite numbers within bounds, and texts and lists of bounded length. A file repeats the id in its name, and a
ticket also its priority, so a second name (a hard link) never makes a second entry. A file does not name its owner;
only the kernel does.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpu_launcher.boot import Origin
from gpu_launcher.leases.grant_policy import Candidate, Demand
from gpu_launcher.model import MAX_PRIORITY, MILLIONTHS, Request, Share
from gpu_launcher.text import one_line
from gpu_launcher.users import MAX_PID

FORMAT = 3
"""Version of the format. Leases in other formats, from other gpu-launcher versions, count as holding everything."""
MAX_ENTRY_BYTES = 512 << 10
"""Largest size of a file in bytes. A longer file is not ours."""
MAX_CANDIDATES = 4096
MAX_NAME = 200
"""Maximum number of characters of a device's UUID, a boot id or a host name."""
MAX_COMMAND = 2000
"""Maximum number of characters of a command. Longer ones are cut before they are written."""
MAX_SECONDS = 1e10
MAX_BYTES_OF_DEVICE = 1 << 60
MAX_DIGITS = 20
MAX_SEQUENCE = 10**12 - 1

LEASE_NAME = re.compile(r"(?:lease|twin)-([0-9a-f]{32})")
TICKET_NAME = re.compile(r"ticket-([0-9]{6})-([0-9]{12})-([0-9a-f]{32})-([0-9]{6})")
SEQUENCE = operator.itemgetter(slice(14, 26))
"""Gets the sequence, as text, from a ticket's name."""
OUR_NAME = re.compile(r"(?:lease|twin|\.new)-[0-9a-f]{32}|ticket-(?!0{6})[0-9]{6}-[0-9]{12}-[0-9a-f]{32}-[0-9]{6}")

_LOWEST_RANK = MAX_PRIORITY + 1
NORMAL = f"ticket-{_LOWEST_RANK:06}"
"""Beginning of the names of tickets with priority 0. Smaller names belong to tickets with a higher priority."""


class TicketName(NamedTuple):
    """The name of a ticket's file, which contains its place in the queue."""

    priority: int
    sequence: int
    id: str
    edition: int

    def __str__(self) -> str:
        return f"ticket-{_LOWEST_RANK - self.priority:06}-{self.sequence:012}-{self.id}-{self.edition:06}"

    @classmethod
    @functools.lru_cache(maxsize=4096)  # the same names are read again and again
    def parse(cls, name: str) -> TicketName | None:
        """Parse a file's name; return None if it is not a ticket's."""
        match = TICKET_NAME.fullmatch(name)
        if match is None or not int(match[1]):  # rank 0 would be above MAX_PRIORITY
            return None
        return cls(_LOWEST_RANK - int(match[1]), int(match[2]), match[3], int(match[4]))


def lease_names(id: str) -> tuple[str, str]:
    return f"lease-{id}", f"twin-{id}"


def unpublished_name(id: str) -> str:
    return f".new-{id}"


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """The content of a ticket's file."""

    demand: Demand
    pid: int
    """Id of its process, as claimed by that process."""
    command: str
    since: float
    """Wall-clock seconds since the epoch."""
    origin: Origin

    def encode(self, id: str) -> bytes:
        request = self.demand.request
        return _encoded(
            self,
            id,
            candidates=[[one.uuid, one.memory, one.exclusive] for one in self.demand.candidates],
            unavailable=sorted(self.demand.unavailable),
            count=request.gpus,
            share=[request.share.millionths, min(request.share.memory, MAX_BYTES_OF_DEVICE)],
            priority=request.priority,
            timeout=_writable(request.timeout),
            stagger=min(request.stagger, MAX_SECONDS / 2),
        )

    @classmethod
    def checked(cls, content: dict[str, Any]) -> TicketRecord:
        """Check and convert a ticket's content. Raises one of `_INVALID` if it is invalid."""
        candidates = tuple(
            Candidate(_name(uuid), _none_or_bytes(memory), _flag(exclusive))
            for uuid, memory, exclusive in _list(content["candidates"], MAX_CANDIDATES)
        )
        request = Request(
            gpus=_whole(content["count"], 1, len(candidates)),
            share=_share(content["share"], 0),
            priority=_whole(content["priority"], -MAX_PRIORITY, MAX_PRIORITY),
            timeout=_none_or_seconds(content["timeout"]),
            stagger=_seconds(content["stagger"]),
        )
        uuids = {candidate.uuid for candidate in candidates}
        unavailable = frozenset(_name(uuid) for uuid in _list(content["unavailable"], MAX_CANDIDATES))
        if len(uuids) != len(candidates) or not unavailable <= uuids:
            raise ValueError("candidates")
        return cls(Demand(request, candidates, unavailable), *_common(content))


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The content of a lease's file."""

    shares: Mapping[str, Share]
    """The shares, by device UUID."""
    started: float
    """Time of the grant on CLOCK_BOOTTIME, a clock that all processes of a boot share and none can set."""
    timeout: float | None
    """Seconds after `started` at which the devices are free at the latest; None if not declared."""
    pid: int
    """Id of its process, as claimed by that process."""
    command: str
    since: float
    """Wall-clock seconds since the epoch, for display."""
    origin: Origin

    def encode(self, id: str) -> bytes:
        shares = [[uuid, share.millionths, share.memory] for uuid, share in self.shares.items()]
        return _encoded(self, id, shares=shares, started=self.started, timeout=_writable(self.timeout))

    @classmethod
    def checked(cls, content: dict[str, Any]) -> LeaseRecord:
        """Check and convert a lease's content. Raises one of `_INVALID` if it is invalid."""
        listed = _list(content["shares"], MAX_CANDIDATES)
        shares = {_name(uuid): _share(share, 1) for uuid, *share in listed}
        if not shares or len(shares) != len(listed):
            raise ValueError("shares")
        started, timeout = _seconds(content["started"]), _none_or_seconds(content["timeout"])
        return cls(shares, started, timeout, *_common(content))

    def started_here(self, origin: Origin) -> float | None:
        """The time of the grant on the clock of `origin`; None if the clocks cannot be compared."""
        return self.started if self.origin.boot == origin.boot else None

    def ends_here(self, origin: Origin) -> float | None:
        """The time when its devices are free at the latest, on the clock of `origin`; None if unknown."""
        started = self.started_here(origin)
        return None if started is None or self.timeout is None else started + self.timeout


Record = TicketRecord | LeaseRecord

_INVALID = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


def decode(name: str, content: bytes) -> Record | None:
    """Decode the content of the file `name`; return None if this version would not write it."""
    try:
        if len(content) > MAX_ENTRY_BYTES:
            raise ValueError("size")
        fields = _DECODER.decode(content.decode())
        if type(fields) is not dict or fields["format"] != FORMAT or type(fields["id"]) is not str:
            raise ValueError("format")
        ticket = TicketName.parse(name)
        if ticket is None:
            match = LEASE_NAME.fullmatch(name)
            return LeaseRecord.checked(fields) if match and match[1] == fields["id"] else None
        record = TicketRecord.checked(fields)
        return record if (ticket.id, ticket.priority) == (fields["id"], record.demand.request.priority) else None
    except _INVALID:
        return None


def _digits(text: str) -> int:
    """Read an integer of limited length, because converting a long text takes quadratic time."""
    if len(text) > MAX_DIGITS:
        raise ValueError(text[:MAX_DIGITS])
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(text)


_DECODER = json.JSONDecoder(parse_int=_digits, parse_constant=_no_constant)


def _encoded(record: Record, id: str, **fields: object) -> bytes:
    common = {
        "pid": record.pid,
        "command": record.command[:MAX_COMMAND],
        "since": record.since,
        "boot": record.origin.boot,
        "machine": record.origin.machine,
    }
    return json.dumps({"format": FORMAT, "id": id, **fields, **common}).encode() + b"\n"


def _writable(timeout: float | None) -> float | None:
    """The time limit to write: None if it is longer than `decode` accepts."""
    return timeout if timeout is not None and timeout < MAX_SECONDS else None


def _common(content: dict[str, Any]) -> tuple[int, str, float, Origin]:
    origin = Origin(_text(content["boot"], MAX_NAME), one_line(_text(content["machine"], MAX_NAME)))
    pid, command = _whole(content["pid"], 0, MAX_PID), one_line(_text(content["command"], MAX_COMMAND))
    return pid, command, _seconds(content["since"]), origin


def _share(content: Any, least: int) -> Share:
    millionths, memory = content
    return Share(_whole(millionths, least, MILLIONTHS), _whole(memory, 0, MAX_BYTES_OF_DEVICE))


def _list(value: Any, longest: int) -> list[Any]:
    if type(value) is not list or len(value) > longest:
        raise ValueError("list")
    return value


def _text(value: Any, longest: int) -> str:
    if type(value) is not str or len(value) > longest:
        raise ValueError("text")
    return value


def _name(value: Any) -> str:
    """Check a device's UUID: it must be printable and not empty."""
    if not _text(value, MAX_NAME) or not value.isprintable():
        raise ValueError("name")
    return str(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("flag")
    return value


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("number")
    return value


def _none_or_bytes(value: Any) -> int | None:
    return None if value is None else _whole(value, 0, MAX_BYTES_OF_DEVICE)


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < MAX_SECONDS:
        raise ValueError("seconds")
    return float(value)


def _none_or_seconds(value: Any) -> float | None:
    if value is None:
        return None
    if not _seconds(value):
        raise ValueError("seconds")
    return float(value)
