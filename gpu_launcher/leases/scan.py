"""Reading the queue directory: what lives, what is left over, what is not ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from gpu_launcher.leases.ledger import LeaseView, PoolView, TicketView
from gpu_launcher.leases.policy import LeaseState, Snapshot, TicketState
from gpu_launcher.leases.records import LEASE_NAME, SIZE_LIMIT, TICKET_NAME, UNPUBLISHED_NAME, Record


class Liveness(Enum):
    """What became of the process that published a file."""

    LIVE = "live"
    """Somebody holds the lock."""
    STALE = "stale"
    """Nobody does; the file was removed, if this user may do that."""
    UNKNOWN = "unknown"
    """This user may not even open it."""
    FOREIGN = "foreign"
    """It is gone, or was never ours: a directory, a FIFO, a link."""


@dataclass
class Pool:
    """The live tickets and leases, by id. A record is None where it cannot be read."""

    tickets: dict[str, tuple[int, Record | None]] = field(default_factory=dict)
    """With the sequence number."""
    leases: dict[str, Record | None] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    """Of all files found."""

    def snapshot(self) -> Snapshot:
        """Return what the policy wants to know."""
        leases = [LeaseState(id, record.uuids if record else None) for id, record in self.leases.items()]
        tickets = [
            TicketState(sequence, id, record.uuids, record.count)
            if record
            else TicketState(sequence, id, candidates=None, count=0)
            for id, (sequence, record) in self.tickets.items()
        ]
        return Snapshot(leases=tuple(leases), tickets=tuple(tickets))

    def view(self) -> PoolView:
        """Return what a person wants to know."""
        leases = [
            LeaseView(id, record.uuids, record.owner, record.since)
            if record
            else LeaseView(id, uuids=None, owner=None, since=None)
            for id, record in self.leases.items()
        ]
        tickets = [
            TicketView(id, sequence, record.uuids, record.count, record.owner, record.since)
            if record
            else TicketView(id, sequence, candidates=None, count=0, owner=None, since=None)
            for id, (sequence, record) in self.tickets.items()
        ]
        return PoolView(
            tickets=tuple(sorted(tickets, key=lambda ticket: (ticket.sequence, ticket.id))),
            leases=tuple(sorted(leases, key=lambda lease: (lease.since or 0.0, lease.id))),
            stale=len(self.stale),
        )


def scan(queue: int, known: dict[str, Record]) -> Pool:
    """Read the queue directory, open as `queue`, and remove what is stale. To be called under the mutex.

    Contents never change once published, so those in `known`, by id, are not read again.
    """
    pool = Pool()
    live: set[tuple[str, int]] = set()
    for name, inode in _entries(queue):
        pool.names.add(name)
        if match := TICKET_NAME.fullmatch(name):
            liveness, record = probe(queue, name, known.get(match[2]))
            if liveness is Liveness.LIVE:
                pool.tickets[match[2]] = int(match[1]), record
            elif liveness is not Liveness.FOREIGN:
                pool.stale.add(match[2])
        elif match := LEASE_NAME.fullmatch(name):
            id = match[1]
            if (id, inode) in live:
                continue
            liveness, record = probe(queue, name, known.get(id))
            if liveness in (Liveness.LIVE, Liveness.UNKNOWN):
                live.add((id, inode))
                pool.leases[id] = record if pool.leases.get(id, record) == record else None
            elif liveness is Liveness.STALE:
                pool.stale.add(id)
        elif UNPUBLISHED_NAME.fullmatch(name):
            probe(queue, name)
    return pool


def probe(queue: int, name: str, known: Record | None = None) -> tuple[Liveness, Record | None]:
    """Tell whether somebody holds the lock of the file, and what it says. Removes it if nobody does.

    Opened for reading only, so that closing it again wakes no watcher (see `FileLedger`), and locked in shared mode,
    so that two that probe are not taken for holders by each other.
    """
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
        descriptor = os.open(name, flags, dir_fd=queue)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return (Liveness.UNKNOWN if _is_file(queue, name) else Liveness.FOREIGN), None
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return Liveness.FOREIGN, None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Liveness.FOREIGN, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Liveness.LIVE, known or Record.decode(os.read(descriptor, SIZE_LIMIT))
        # In a sticky directory only the file's owner and the directory's may remove it; others pass it by.
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=queue)
        return Liveness.STALE, None
    finally:
        os.close(descriptor)


def _entries(queue: int) -> Iterator[tuple[str, int]]:
    with os.scandir(queue) as entries:
        for entry in entries:
            yield entry.name, entry.inode()


def _is_file(queue: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=queue, follow_symlinks=False).st_mode)
    except OSError:
        return False
