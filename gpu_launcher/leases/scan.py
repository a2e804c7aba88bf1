"""Reading the queue directory: what lives, what is left over, what is not ours.

Reading needs no mutex. A file is locked before it gets its published name and nobody locks it again later, so one that
is not locked is dead for ever; only unpublished ones must be judged under the mutex, by whoever would remove them. Read
without it, a pool may lack what was published meanwhile, or still have what was withdrawn: good for display, and for
seeing that a claim would be in vain, but not for a grant.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from gpu_launcher.leases.ledger import LeaseView, PoolView, TicketView, with_waits
from gpu_launcher.leases.policy import LeaseState, Snapshot, TicketState
from gpu_launcher.leases.records import (
    LEASE_NAME,
    SEQUENCE,
    SIZE_LIMIT,
    TICKET_NAME,
    UNPUBLISHED_NAME,
    LeaseRecord,
    Origin,
    Record,
    TicketName,
    TicketRecord,
    decode,
)


class Liveness(Enum):
    """What became of the process that published a file."""

    LIVE = "live"
    """Somebody holds the lock."""
    STALE = "stale"
    """Nobody does; the file was removed, if this user may do that."""
    UNKNOWN = "unknown"
    """This user may not even open it."""
    ELSEWHERE = "elsewhere"
    """Another machine wrote it, whose locks cannot be seen here."""
    FOREIGN = "foreign"
    """It is gone, or was never ours: a directory, a FIFO, a link."""


@dataclass
class Pool:
    """What was found in the queue directory. A record is None where it cannot be read.

    All leases have been looked at. Tickets can be many, so they are looked at only when `queue` comes to them.
    """

    directory: int
    """Descriptor of the queue directory."""
    origin: Origin
    leases: dict[str, LeaseRecord | None] = field(default_factory=dict)
    """The live ones, by id."""
    names: set[str] = field(default_factory=set)
    """Of all tickets' files found."""
    known: dict[str, Record] = field(default_factory=dict)
    """What files say, by ticket's name or lease's id."""
    own: dict[str, TicketRecord] = field(default_factory=dict)
    """Tickets that are alive because this process has them, by name."""
    stale: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)

    def lease_states(self) -> list[LeaseState]:
        """Return what the policy wants to know of the leases."""
        return [
            LeaseState(id, record.shares, record.started_here(self.origin), record.ends_here(self.origin))
            if record
            else LeaseState(id, shares=None)
            for id, record in self.leases.items()
        ]

    def queue(self) -> Iterator[TicketState]:
        """Go through the live tickets in queue order, looking at each only when its turn comes."""
        return (
            TicketState(name.sequence, name.id, record.demand if record else None, name.priority)
            for name, record in self.tickets()
        )

    def tickets(self) -> Iterator[tuple[TicketName, TicketRecord | None]]:
        """Go through the live tickets in queue order. Sorted by name, they are in queue order."""
        last = ""
        for text in sorted(self.names | self.own.keys()):
            name = TicketName.parse(text)
            # Two editions of one ticket are there for a moment, while it is published again.
            if name is None or name.id == last:
                continue
            if text in self.own:
                last = name.id
                yield name, self.own[text]
                continue
            liveness, record = self._look(text, name.id, self.known.get(text))
            if liveness is Liveness.LIVE:
                last = name.id
                if record is not None:
                    self.known[text] = record
                yield name, record if isinstance(record, TicketRecord) else None

    def last_sequence(self) -> int:
        """Return the highest sequence of all live tickets, 0 if there are none."""
        for text in sorted(filter(TICKET_NAME.fullmatch, self.names | self.own.keys()), key=SEQUENCE, reverse=True):
            if text in self.own or self._look(text, text, self.known.get(text))[0] is Liveness.LIVE:
                return int(SEQUENCE(text))
        return 0

    def ahead_of(self, name: TicketName) -> int:
        """Return how many tickets have a better place, whether they live or not."""
        text = str(name)
        return sum(other < text for other in self.names)

    def look_at_leases(self, names: Mapping[str, int]) -> None:
        """Tell which of the leases with these names and inode numbers live."""
        live: set[tuple[str, int]] = set()
        for name, inode in names.items():
            match = LEASE_NAME.fullmatch(name)
            if match is None or (match[1], inode) in live:
                continue
            id = match[1]
            liveness, found = self._look(name, id, self.known.get(id))
            if liveness in (Liveness.LIVE, Liveness.UNKNOWN):
                live.add((id, inode))
                record = found if isinstance(found, LeaseRecord) else None
                self.leases[id] = record if self.leases.get(id, record) == record else None
        self.known.update({id: record for id, record in self.leases.items() if record is not None})

    def view(self, now: float) -> PoolView:
        """Return what a person wants to know."""
        leases = self.lease_states()
        shown = []
        for state in leases:
            record = self.leases[state.id]
            left = None if state.ends is None else state.ends - now
            shown.append(
                LeaseView(state.id, record.shares, record.owner, record.since, left)
                if record
                else LeaseView(state.id, shares=None, owner=None, since=None)
            )
        tickets = [
            TicketView(name.id, name.sequence, name.priority, record.demand, record.owner, record.since)
            if record
            else TicketView(name.id, name.sequence, name.priority, demand=None, owner=None, since=None)
            for name, record in self.tickets()
        ]
        states = tuple(TicketState(view.sequence, view.id, view.demand, view.priority) for view in tickets)
        return PoolView(
            tickets=with_waits(Snapshot(tuple(leases), states, now), tickets),
            leases=tuple(sorted(shown, key=lambda lease: (lease.since or 0.0, lease.id))),
            stale=len(self.stale),
            elsewhere=tuple(sorted(self.elsewhere)),
        )

    def _look(self, name: str, id: str, known: Record | None) -> tuple[Liveness, Record | None]:
        liveness, record = probe(self.directory, name, self.origin, known)
        if liveness is Liveness.STALE:
            self.stale.add(id)
        elif liveness is Liveness.ELSEWHERE and record is not None:
            self.elsewhere.add(record.origin.machine)
        return liveness, record


def scan(directory: int, origin: Origin, known: dict[str, Record], *, mutex: bool) -> Pool:
    """Read the queue directory, open as `directory`, and remove stale leases.

    Contents never change once published, so those in `known`, by ticket's name or lease's id, are not read again. What
    is read is added there, also when the pool that is returned reads it later, and what is gone is removed.
    With the `mutex`, what was never published and never will be is removed as well.
    """
    pool = Pool(directory, origin, known=known)
    leases: dict[str, int] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("ticket-"):
                pool.names.add(name)
            elif name.startswith(("lease-", "twin-")):
                leases[name] = entry.inode()
            elif mutex and UNPUBLISHED_NAME.fullmatch(name):
                probe(directory, name, origin)
    pool.look_at_leases(leases)
    for gone in known.keys() - pool.names - pool.leases.keys():
        del known[gone]
    return pool


def probe(directory: int, name: str, origin: Origin, known: Record | None = None) -> tuple[Liveness, Record | None]:
    """Tell whether somebody holds the lock of the file, and what it says. Removes it if nobody does.

    Opened for reading only, so that closing it again wakes no watcher (see `FileLedger`), and locked in shared mode,
    so that two that probe are not taken for holders by each other.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return (Liveness.UNKNOWN if _is_file(directory, name) else Liveness.FOREIGN), None
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return Liveness.FOREIGN, None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Liveness.FOREIGN, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Liveness.LIVE, known or decode(os.read(descriptor, SIZE_LIMIT))
        record = known or decode(os.read(descriptor, SIZE_LIMIT))
        if record is not None and _of_another_machine(record.origin, origin):
            return Liveness.ELSEWHERE, record
        # In a sticky directory only the file's owner and the directory's may remove it; others pass it by.
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
        return Liveness.STALE, None
    finally:
        os.close(descriptor)


def _of_another_machine(its: Origin, ours: Origin) -> bool:
    """Containers have host names of their own but one boot id, and after a restart the host name is the same."""
    return bool(its.boot and ours.boot) and its.boot != ours.boot and its.machine != ours.machine


def _is_file(directory: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False
