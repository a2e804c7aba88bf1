"""Reads the queue directory: finds files that are live, left over, or not ours.

Reading needs no mutex. A file is locked before it gets its published name and is never locked again later, so a file
that is not locked is dead for ever. Only unpublished files must be judged under the mutex, before they are removed. A
reading without the mutex may miss files that were just published, or include files that were just withdrawn. It is
good enough for display and for finding that a claim would fail, but not for a grant.

Every user of the machine can put anything there. These rules apply:

- A file belongs to the owner that the kernel names (fstat(2)). `decode` decides which content is accepted.
- A locked lease that cannot be read may hold anything, so nothing is granted until it ends. A ticket only decides who
  goes first, so an unreadable one is ignored. Both are named, with their owner, in `PoolView.unreadable`.
- A lease's file that cannot even be opened (no permission, an fcntl file lease) is live if the kernel's table of locks
  has a lock on it. If the table is not visible, for example in a container, the file is live for `BLIND_SECONDS` after
  its last change. The time of the change comes from the kernel, and our programs never leave such a file.
- Each owner's first `MAX_ENTRIES` files count, with at most `MAX_BYTES` in them. Our programs never exceed this, so
  files beyond it need no protection. Root, the pool's administrator and this user are exempt.
- A lease's file has at most two names, both here. If it has more, a user has made hard links. It then counts only if it
  can be read.
- A name that turned out to be meaningless is not read again. Names are random, so no other file gets it.
- A priority above 0 is for root and the pool's administrator; others' tickets that claim it have priority 0. A ticket
  with a sequence higher than the pool can have reached is ignored.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum

from gpu_launcher.boot import Origin
from gpu_launcher.leases.file_format import (
    LEASE_NAME,
    MAX_ENTRY_BYTES,
    NORMAL,
    OUR_NAME,
    SEQUENCE,
    LeaseRecord,
    Record,
    TicketName,
    TicketRecord,
    decode,
    lease_names,
)
from gpu_launcher.leases.grant_policy import LeaseState, Snapshot, TicketState, waits
from gpu_launcher.leases.kernel import LockTable, Process, is_stopped, sees_all_locks
from gpu_launcher.leases.ledger import LeaseView, PoolView, TicketView, UnreadableFile
from gpu_launcher.model import WHOLE, Owner
from gpu_launcher.users import user_name, user_of

MAX_ENTRIES = 4096
"""Maximum number of files of one owner that count."""
MAX_BYTES = 8 << 20
"""Maximum number of bytes in these files."""
MAX_UNREADABLE = 16
"""Maximum number of unreadable entries that one scan records."""
MAX_UNPUBLISHED = 256
"""Maximum number of unpublished files that one scan examines."""
BLIND_SECONDS = 600.0
LOST = "lost-"
"""Prefix of the ids that stand for leases without a name in the queue."""
TICKETS_PER_SECOND = 10_000
"""Upper bound of the tickets that a pool can issue per second."""
FIRST_SEQUENCES = 10**6

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
_NOT_A_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR)


class Liveness(Enum):
    """Whether the process that published a file, or a process that inherited its lock, is alive."""

    LIVE = "live"
    """A process holds the lock."""
    STALE = "stale"
    """No process holds the lock. The file was removed if this user may do that."""
    ELSEWHERE = "elsewhere"
    """Another machine wrote it, and that machine's locks are not visible here."""
    FOREIGN = "foreign"
    """The file is gone or not ours: a directory, a FIFO, a link, or a file beyond its owner's limits."""


@dataclass(slots=True)
class QueueFile:
    """A file of the queue: the kernel's facts about it, and its content."""

    uid: int
    inode: int
    links: int
    changed: int
    """The file's ctime in nanoseconds."""
    size: int
    record: Record | None
    """The decoded content; None if it is invalid."""
    problem: str = "its content is not what this version of gpu-launcher writes"
    """The problem, if there is no record."""

    def same(self, status: os.stat_result) -> bool:
        """Whether the file has not changed since it was read."""
        return (self.inode, self.changed, self.size) == (status.st_ino, status.st_ctime_ns, status.st_size)


class Index:
    """A ledger's knowledge of the names in the queue directory. All of it can be read again."""

    def __init__(self, administrators: Collection[int] = (0,), guard: os.stat_result | None = None) -> None:
        """`administrators` have no limits, and may use a priority above 0. `guard` is the status of a locked file."""
        self.administrators = frozenset(administrators)
        self.guard = guard
        self._trusted = self.administrators | {os.geteuid()}
        self.names: set[str] = set()
        self.tickets: set[str] = set()
        self.leases: dict[str, list[str]] = {}
        """Names of the leases' files, by id."""
        self.unpublished: set[str] = set()
        self.passed_by: set[str] = set()
        """Meaningless names, which are not read again."""
        self.entries: dict[str, QueueFile] = {}
        """The files that were read, by name."""
        self.stale: dict[str, str] = {}
        """Names of files that dead processes left and this user may not remove, with the ids in them."""
        self.excessive: set[int] = set()
        """Owners of more files than count."""
        self._ordered: list[str] | None = None
        self._counted: dict[str, tuple[tuple[int, bool], int]] = {}
        """The account and size of each file that was counted, by name."""
        self._full: set[tuple[int, bool]] = set()
        """Accounts that have reached their limit."""
        self._files: Counter[tuple[int, bool]] = Counter()
        self._bytes: Counter[tuple[int, bool]] = Counter()

    def update(self, names: set[str], directory: int) -> None:
        """Record the names that are now in the directory, which is open as `directory`."""
        if names == self.names:
            return
        self._ordered = None
        for name in self.names - names:
            self._forget(name)
        new = [name for name in names - self.names if OUR_NAME.fullmatch(name)]
        if len(names) > MAX_ENTRIES:
            new = self._within_limits(new, names, directory)
        for name in new:
            if name.startswith("ticket-"):
                self.tickets.add(name)
            elif name.startswith("."):
                self.unpublished.add(name)
            else:
                self.leases.setdefault(name[-32:], []).append(name)
        self.names = names

    def _within_limits(self, new: list[str], names: set[str], directory: int) -> list[str]:
        """Return those of many new names that may count. Uses stat, because opening all files would take seconds."""
        found = []
        for name in new:
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except OSError:
                continue
            expected = sum(one in names for one in lease_names(name[-32:])) or 1
            if (status.st_uid, status.st_nlink > expected) in self._full:
                self.passed_by.add(name)
            elif self.admits(name, status, expected):
                found.append(name)
        return found

    def add(self, name: str) -> None:
        """Add a ticket that this process has just published."""
        self._ordered = None
        self.names.add(name)
        self.tickets.add(name)

    def ordered(self) -> list[str]:
        """Return the sorted names of tickets."""
        if self._ordered is None:
            self._ordered = sorted(self.tickets)
        return self._ordered

    def pass_by(self, name: str) -> None:
        """Ignore this name from now on."""
        self._ordered = None
        self.passed_by.add(name)
        self.entries.pop(name, None)
        self._drop(name)

    def _drop(self, name: str) -> None:
        self.tickets.discard(name)
        self.unpublished.discard(name)
        siblings = self.leases.get(name[-32:])
        if siblings and name in siblings:
            siblings.remove(name)
            if not siblings:
                del self.leases[name[-32:]]

    def admits(self, name: str, status: os.stat_result, names: int) -> bool:
        """Whether a file is within its owner's limits. If it is, it is counted.

        Files with more names than the `names` here have a separate account, because any user may have made the links.
        """
        self._discount(name)
        account = status.st_uid, status.st_nlink > names
        size = 0 if status.st_size > MAX_ENTRY_BYTES else status.st_size
        if account[0] not in self._trusted and (
            self._files[account] >= MAX_ENTRIES or self._bytes[account] + size > MAX_BYTES
        ):
            self.excessive.add(account[0])
            self._full.add(account)
            self.pass_by(name)
            return False
        self._counted[name] = account, size
        self._files[account] += 1
        self._bytes[account] += size
        return True

    def _forget(self, name: str) -> None:
        self._drop(name)
        self.passed_by.discard(name)
        self.stale.pop(name, None)
        self.entries.pop(name, None)
        self._discount(name)

    def _discount(self, name: str) -> None:
        if name in self._counted:
            account, size = self._counted.pop(name)
            self._files[account] -= 1
            self._bytes[account] -= size
            self._full.discard(account)


@dataclass
class PoolScan:
    """The contents of the queue directory.

    All leases are read at once. Tickets may be many, so each is read only when its turn in the queue comes.
    """

    directory: int
    """The descriptor of the queue directory."""
    origin: Origin
    index: Index
    last_possible: int
    """The highest sequence that the pool can have reached."""
    leases: dict[str, LeaseRecord | None] = field(default_factory=dict)
    """The live leases, by id; None for a lease that cannot be read."""
    holders: dict[str, QueueFile] = field(default_factory=dict)
    """The files of the live leases, by id."""
    own: dict[str, TicketRecord] = field(default_factory=dict)
    """This process's tickets, by name. They are live without a look at their files."""
    stale: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    unreadable: dict[str, QueueFile] = field(default_factory=dict)
    """Live entries that cannot be read, by name."""
    lost: dict[str, int] = field(default_factory=dict)
    """Inode numbers of leases without a name in the queue, by the UUID of a device that they hold."""
    _locks: tuple[LockTable | None, ...] = ()
    _exclusive: dict[int, int] | None = None
    """The processes that took exclusive locks, by the files' inode numbers."""
    _owners: dict[tuple[int, int, str], Owner] = field(default_factory=dict)
    _users: dict[int, int | None] = field(default_factory=dict)
    """The users of processes, by process id."""
    _stopped: dict[int, bool] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The names of all ticket files."""
        return self.index.tickets

    def lease_states(self) -> list[LeaseState]:
        """Return the leases in the form that the policy takes."""
        states = [
            LeaseState(id, record.shares, record.started_here(self.origin), record.ends_here(self.origin))
            if record
            else LeaseState(id, shares=None)
            for id, record in self.leases.items()
        ]
        # Their shares are unknown, so they count as holding whole devices.
        return states + [LeaseState(f"{LOST}{inode}-{uuid}", {uuid: WHOLE}) for uuid, inode in self.lost.items()]

    def wanted(self) -> set[str]:
        """Return the UUIDs of all devices that are held or waited for."""
        held = {uuid for record in self.leases.values() if record for uuid in record.shares}
        return held.union(*(record.demand.able for _, record, _ in self.tickets()))

    def queue(self) -> Iterator[TicketState]:
        """Yield the live tickets in queue order. Each file is read only when its turn comes."""
        return (TicketState(name.sequence, name.id, record.demand, name.priority) for name, record, _ in self.tickets())

    def tickets(self) -> Iterator[tuple[TicketName, TicketRecord, QueueFile | None]]:
        """Yield the live tickets in queue order, with their allowed priority. Those of this process have no file."""
        last = ""
        texts, demoted = self._ordered()
        for text in texts:
            name = TicketName.parse(text)
            # While a ticket is published again, two editions exist for a moment.
            if name is None or name.id == last:
                if name is None:
                    self.index.pass_by(text)
                continue
            record, entry = self.own.get(text), None
            if record is None:
                record, entry = self._ticket(text, name)
            if record is not None:
                last = name.id
                yield (name._replace(priority=0) if text in demoted else name), record, entry

    def last_sequence(self) -> int:
        """Return the highest sequence of all live tickets, 0 if there are none."""
        for text in sorted(self.names | self.own.keys(), key=SEQUENCE, reverse=True):
            name = TicketName.parse(text)
            if name is not None and (text in self.own or self._ticket(text, name)[0] is not None):
                return name.sequence
        return 0

    def ahead_of(self, name: TicketName) -> int:
        """Return the number of tickets, live or dead, with an earlier place."""
        return bisect_left(self.index.ordered(), str(name))

    def look_at_leases(self) -> None:
        """Find the live leases."""
        for id, names in list(self.index.leases.items()):
            seen = None
            for name in list(names):
                known = self.index.entries.get(name)
                if seen is not None and known is not None and known.inode == seen:
                    continue
                if known is not None and known.record is None and len(self.unreadable) >= MAX_UNREADABLE:
                    continue  # nothing is granted anyway
                liveness, entry = self._look(name)
                if liveness is not Liveness.LIVE or entry is None or entry.inode == seen:
                    continue
                record = entry.record if isinstance(entry.record, LeaseRecord) else None
                if record is None and entry.links > len(names):
                    self.index.pass_by(name)  # a hard link to an unrelated file
                    continue
                if record is None:
                    self.unreadable[name] = entry
                seen = entry.inode
                self.leases[id] = record if self.leases.get(id, record) == record else None
                self.holders[id] = entry

    def sweep_up(self) -> None:
        """Remove abandoned files that were never published. Only under the mutex."""
        for number, name in enumerate(list(self.index.unpublished)):
            if number >= MAX_UNPUBLISHED:
                break
            self._look(name)

    def view(self, now: float) -> PoolView:
        """Return the pool's state for display."""
        leases = self.lease_states()
        shown = []
        for state in leases:
            record = self.leases.get(state.id)
            left = None if state.ends is None else state.ends - now
            owner, since = self._owner(self.holders.get(state.id), record), record.since if record else None
            if state.id.startswith(LOST):
                owner = self._owner_of_lost(int(state.id.split("-")[1]))
            shown.append(LeaseView(state.id, state.shares, owner, since, left))
        listed = list(self.tickets())
        states = tuple(TicketState(name.sequence, name.id, record.demand, name.priority) for name, record, _ in listed)
        reasons = waits(Snapshot(tuple(leases), states, now))
        return PoolView(
            tickets=tuple(
                TicketView(
                    name.id,
                    name.sequence,
                    name.priority,
                    record.demand,
                    self._owner(entry, record),
                    record.since,
                    reasons.get(name.id),
                )
                for name, record, entry in listed
            ),
            leases=tuple(sorted(shown, key=lambda lease: (lease.since or 0.0, lease.id))),
            stale=len(self.stale.union(self.index.stale.values())),
            elsewhere=tuple(sorted(self.elsewhere)),
            unreadable=tuple(
                UnreadableFile(name, user_name(entry.uid), entry.problem, lease=LEASE_NAME.fullmatch(name) is not None)
                for name, entry in sorted(self.unreadable.items())
            ),
            excessive=tuple(user_name(uid) for uid in sorted(self.index.excessive)),
        )

    def _owner(self, entry: QueueFile | None, record: Record | None) -> Owner:
        """Return the owner of a lease or ticket. Without an `entry`, it is this process's and has just lost its name.

        The process that the file names is accepted only if it runs as the file's owner.
        """
        uid = os.geteuid() if entry is None else entry.uid
        if record is not None and self._user(record.pid) == uid:
            known = self._owners.get((uid, record.pid, record.command))
            if known is None:
                known = Owner(record.pid, user_name(uid), record.command, self._is_stopped(record.pid))
                self._owners[uid, record.pid, record.command] = known
            return known
        stranger = None if entry is None else self._stranger(entry)
        if stranger is not None:
            process = Process.of(stranger)
            text = f"keeps a file of {user_name(uid)} locked: {process.command or 'unknown command'}"
            return Owner(stranger, process.user or "unknown", text)
        if record is not None:
            return Owner(0, user_name(uid), record.command)
        pid = self._who_locked().get(entry.inode, 0) if entry else 0
        return Owner(pid if self._user(pid) == uid else 0, user_name(uid), "a file that cannot be read")

    def _stranger(self, entry: QueueFile) -> int | None:
        """Return the process that has locked the file, if it runs as another user than the file's owner."""
        pid = self._who_locked().get(entry.inode)
        if pid is None or self._user(pid) in (None, entry.uid):
            return None
        return pid

    def _owner_of_lost(self, inode: int) -> Owner:
        """Return the owner of a lease without a name: the process that took the lock on its file."""
        pid = self._who_locked().get(inode, 0)
        process = Process.of(pid)
        return Owner(pid if process.user else 0, process.user or "unknown", "a lease whose file was removed")

    def _who_locked(self) -> dict[int, int]:
        if self._exclusive is None:
            locks = self.locks()
            self._exclusive = {} if locks is None else locks.holders(os.fstat(self.directory))
        return self._exclusive

    def _is_stopped(self, pid: int) -> bool:
        if pid not in self._stopped:
            self._stopped[pid] = is_stopped(pid)
        return self._stopped[pid]

    def _user(self, pid: int) -> int | None:
        if pid not in self._users:
            self._users[pid] = user_of(pid)
        return self._users[pid]

    def locks(self) -> LockTable | None:
        """Return the kernel's table of locks, read at the first call; None if it cannot be read."""
        if not self._locks:
            self._locks = (LockTable.read(),)
        return self._locks[0]

    def _ordered(self) -> tuple[list[str], set[str]]:
        """Return the tickets' names in queue order, and the names that claim a priority they may not have."""
        texts = self.index.ordered()
        if not self.own.keys() <= self.names:
            texts = sorted(self.names | self.own.keys())
        urgent = [text for text in texts[: bisect_left(texts, NORMAL)] if text not in self.own]
        demoted = {text for text in urgent if not self._may_go_first(text)}
        if demoted:
            texts = sorted(texts, key=lambda text: NORMAL + text[len(NORMAL) :] if text in demoted else text)
        return texts, demoted

    def _may_go_first(self, text: str) -> bool:
        if text not in self.index.entries:
            self._look(text)
        entry = self.index.entries.get(text)
        return entry is not None and entry.uid in self.index.administrators

    def _ticket(self, text: str, name: TicketName) -> tuple[TicketRecord | None, QueueFile | None]:
        """Return a ticket's record and file; (None, None) if it is not live or has no place in the queue."""
        liveness, entry = self._look(text)
        if liveness is not Liveness.LIVE or entry is None or name.sequence > self.last_possible:
            return None, None
        if isinstance(entry.record, TicketRecord):
            return entry.record, entry
        if len(self.unreadable) < MAX_UNREADABLE:
            self.unreadable[text] = entry
        return None, None

    def _look(self, name: str) -> tuple[Liveness, QueueFile | None]:
        """Probe a file, and update the index with the result."""
        index = self.index
        if name in index.passed_by:
            return Liveness.FOREIGN, None
        liveness, entry = self._probe(name)
        if liveness is Liveness.LIVE and entry is not None:
            index.entries[name] = entry
        elif liveness is Liveness.ELSEWHERE and entry is not None and entry.record is not None:
            index.entries[name] = entry
            self.elsewhere.add(entry.record.origin.machine)
        elif liveness is Liveness.STALE:
            self.stale.add(id_in(name))
        elif entry is None:
            index.pass_by(name)
        return liveness, entry

    def _probe(self, name: str) -> tuple[Liveness, QueueFile | None]:
        """Return whether a process holds the file's lock, and the file's content. Removes the file if none does.

        The file is opened only for reading, so that closing it wakes no watcher (see `file_ledger`). It is locked in
        shared mode, so that two probing processes do not take each other for holders.
        """
        try:
            descriptor = os.open(name, _FLAGS, dir_fd=self.directory)
        except OSError as error:
            if error.errno in _OURS:
                raise
            return (Liveness.FOREIGN, None) if error.errno in _NOT_A_FILE else self._unopenable(name, error)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return Liveness.FOREIGN, None
            live = not _lock_shared(descriptor)
            known = self.index.entries.get(name)
            if known is not None and known.same(status):
                known.links = status.st_nlink
                entry = known
            elif not self._admits(name, status):
                return Liveness.FOREIGN, None
            else:
                entry = _entry(status, decode(name, _content(descriptor)))
            if live:
                return Liveness.LIVE, entry
            if entry.record is not None and _of_another_machine(entry.record.origin, self.origin):
                return Liveness.ELSEWHERE, entry
            # In a sticky directory, only the owners of the file and of the directory may remove it. Others ignore it.
            try:
                os.unlink(name, dir_fd=self.directory)
            except OSError:
                self.index.pass_by(name)
                self.index.stale[name] = id_in(name)
            return Liveness.STALE, None
        finally:
            os.close(descriptor)

    def _unopenable(self, name: str, error: OSError) -> tuple[Liveness, QueueFile | None]:
        """Judge a file that cannot be opened by this user or at this time, without removing it."""
        try:
            status = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
        except OSError:
            return Liveness.FOREIGN, None
        if not stat.S_ISREG(status.st_mode) or not self._admits(name, status):
            return Liveness.FOREIGN, None
        known = self.index.entries.get(name)
        if known is not None and known.same(status):
            entry = known
        else:
            problem = "this user may not open it" if error.errno in (errno.EACCES, errno.EPERM) else error.strerror
            entry = _entry(status, None, f"it cannot be opened ({problem})")
        return (Liveness.LIVE if self._locked(status) else Liveness.STALE), entry

    def _admits(self, name: str, status: os.stat_result) -> bool:
        return self.index.admits(name, status, len(self.index.leases.get(name[-32:], ())) or 1)

    def _locked(self, status: os.stat_result) -> bool:
        """Whether a file has a lock, by the kernel's table; if the table is not visible, whether it may have one."""
        locks, guard = self.locks(), self.index.guard
        if locks is None or guard is None or not sees_all_locks() or not locks.on(guard):
            return abs(time.time() - status.st_ctime) < BLIND_SECONDS
        if not locks.on(status):
            locks.read_again()
        return bool(locks.on(status))


def scan(directory: int, origin: Origin, index: Index, now: float, *, mutex: bool) -> PoolScan:
    """Read the queue directory, open as `directory`, and remove stale leases. `now` is on the policy's clock.

    With the `mutex`, abandoned files that were never published are removed, too.
    """
    index.update(set(os.listdir(directory)), directory)
    pool = PoolScan(directory, origin, index, last_possible=int(max(now, 0.0) * TICKETS_PER_SECOND) + FIRST_SEQUENCES)
    pool.look_at_leases()
    if mutex:
        pool.sweep_up()
    return pool


def remove_if_dead(directory: int, name: str) -> None:
    """Remove a lease's name if no process has a descriptor of it any more."""
    PoolScan(directory, Origin("", ""), Index(), 0)._probe(name)


def id_in(name: str) -> str:
    """Return the id in the name of a file of ours."""
    ticket = TicketName.parse(name)
    return ticket.id if ticket else name[-32:]


def _entry(status: os.stat_result, record: Record | None, *problem: str) -> QueueFile:
    return QueueFile(
        status.st_uid, status.st_ino, status.st_nlink, status.st_ctime_ns, status.st_size, record, *problem
    )


def _content(descriptor: int) -> bytes:
    """Return a file's whole content; empty if it is too long or cannot be read."""
    with contextlib.suppress(OSError):
        content = os.read(descriptor, MAX_ENTRY_BYTES + 1)
        return content if len(content) <= MAX_ENTRY_BYTES else b""
    return b""


def _lock_shared(descriptor: int) -> bool:
    """Lock a file in shared mode. Return False if another process holds an exclusive lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _of_another_machine(its: Origin, ours: Origin) -> bool:
    """Whether another machine wrote a file: boot id and host name both differ.

    Containers share the boot id but have their own host names; a restart keeps the host name.
    """
    return bool(its.boot and ours.boot) and its.boot != ours.boot and its.machine != ours.machine
