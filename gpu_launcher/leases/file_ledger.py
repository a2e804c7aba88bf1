"""The ledger that every process and user of the machine shares: locked files in the pool directory.

Theory of operation. What holds a device is the lock (flock(2)) on a lease's file, alive as long as any process has a
copy of the lease's descriptor. File contents are notes; if they cannot be read, a locked lease counts as holding every
device. `claim` grants a lease: under the mutex, it reads the pool, asks `gpu_launcher.leases.grant_policy`, and
publishes the lease's file, locked, before it withdraws the ticket's.

How the promise is kept that losing a file costs at most waiting:

- The mutex is the lock on the queue directory itself. It cannot be removed while it holds anything. Only what adds to
  the pool needs it: a new ticket, a lease. Seeing that nothing can be granted yet, and giving back, do not.
- A lease's file has two names. A lease counts as long as either is there.
- There is no counter to lose: a ticket's sequence is one more than the highest of the live ones.
- A ticket whose file is lost is written anew, with its old sequence, at its next claim. So is one that could not be
  written because another process had the mutex, at the end of the queue of then.
- A queue directory that is removed or replaced makes every ledger that was open on it raise PoolDirectoryError.

Not promised:

- Safety against a user who removes the whole queue directory, or both names of a lease, while jobs run, and starts new
  programs then; or who locks or unlocks the files by hand.
- Two directories, such as a container's own `/var/tmp` and the host's, are two pools.
- A process that is stopped (SIGSTOP) while it has the mutex, which is for about a millisecond at a time, stops all
  grants until it continues or is killed. The others stay responsive, and say who it is.
- Which devices a process gets is its own choice among those that are free for it. Of tickets that could all be granted
  in one moment, a later one may therefore once get in an earlier one's way: that waits then, and reserves.
- In a time namespace of its own (time_namespaces(7)), a process may take declared ends for earlier or later ones, and
  so be delayed, or delay others, by backfill.
- A process that another thread forks while a ledger is at work inherits half-made tickets and leases: fork from the
  thread that uses the ledger, and call `close_in_child`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import inotify
from gpu_launcher.leases.file_format import (
    MAX_SEQUENCE,
    LeaseRecord,
    Origin,
    Record,
    TicketName,
    TicketRecord,
    lease_names,
    unpublished_name,
)
from gpu_launcher.leases.grant_policy import NO_PREFERENCE, DevicePreference, Grant, TicketState, grant
from gpu_launcher.leases.ledger import HeldLease, PoolView, Ticket, demanded
from gpu_launcher.leases.lock_marks import Marks
from gpu_launcher.leases.mutex import PoolMutex
from gpu_launcher.leases.pool_directory import administrators, explained, open_directory, open_queue
from gpu_launcher.leases.scan import Index, PoolScan, remove_if_dead, scan
from gpu_launcher.users import user_name

_log = get_logger("leases.file_ledger")

if TYPE_CHECKING:
    from gpu_launcher.model import Device, Owner, Request

FIRST_POLL = 0.002
"""Seconds. After an announced change: locks_remove_file() runs after fsnotify_close() in the kernel's __fput(), so
the close of a lease is heard just before its lock is gone."""
SLOWEST_POLL = 0.25
EAGER_TICKETS = 4
"""Only so many tickets at the head of the queue poll after a change. What the others wait for is announced again, when
one of those is granted; all of a long queue would only take the CPU from the one whose turn it is."""
SLOWEST_POLL_WITHOUT_INOTIFY = 0.02
SLOW_AFTER_CLAIMS = 16
"""Claims in vain after which the slowest poll is reached."""

# Nothing that only makes things scarcer (a new ticket, a new lease) wakes anybody, and neither does the read-only
# probing of other waiters, who would else wake each other for ever.
_WATCHED = inotify.CLOSE_WRITE | inotify.DELETE | inotify.DELETE_SELF | inotify.MOVE_SELF


def boot_time() -> float:
    """Seconds since the machine started: one clock for all processes, which cannot be set, and does not stop in
    suspend, as jobs' time limits do not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def to_stderr(text: str) -> None:
    """Print a notice."""
    print(f"gpu-launcher: {text}", file=sys.stderr, flush=True)


class FileLedger:
    """A `Ledger` on the files of a pool directory. `directory` is what `resolve_pool_directory` returned.

    Belongs to the process that made it: in a forked child every method raises RuntimeError, except `close_in_child`
    and `close`, which then means the same. Nothing is closed by garbage collection: call `close`.

    `warn` is told, once each, whom it waits for if somebody keeps the pool locked for seconds, and that a priority
    above 0 counts as 0: to go before others is for root and for the owner of the pool directory.

    `wall_clock` is for the times that views show, `clock` and `origin` for those that policy compares. `checkpoint` is
    called after each step that a crash could separate from the next, with its name, such as `claim: locked`; it is
    for tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        warn: Callable[[str], None] = to_stderr,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = boot_time,
        origin: Origin | None = None,
        checkpoint: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.directory = directory
        self._wall_clock = wall_clock
        self._clock = clock
        self._origin = origin or Origin.here()
        self._checkpoint = checkpoint
        self._process = os.getpid()
        self._pool_mutex = PoolMutex(directory, warn)
        self._tickets: dict[str, _Waiting] = {}
        self._leases: dict[str, tuple[HeldLease, LeaseRecord]] = {}
        self._closed = False
        self._claims_in_vain = 0
        self._warn = warn
        self._warn_of_priority = True
        self._lost: frozenset[str] = frozenset()
        """UUIDs of devices that were last found held by leases without a name in the queue."""
        self._nameless: set[str] = set()
        """Ids of leases of this ledger of which that was said."""
        self._inotify: inotify.Inotify | None = None
        with contextlib.ExitStack() as undo:
            try:
                # Both are kept open so that no later directory can have the same inode number.
                self._guard = open_directory(directory)
                undo.callback(os.close, self._guard)
                self._pinned = open_queue(self._guard, directory, make=True)
                undo.callback(os.close, self._pinned)
                self._administrators = administrators(self._guard)
            except OSError as error:
                raise explained(directory, error) from error
            self._identity = _identity(os.fstat(self._guard)), _identity(os.fstat(self._pinned))
            self._marks = Marks(str(directory), os.fstat(self._guard))
            # systemd-tmpfiles removes old files from /var/tmp, unless it finds a directory above them locked
            # (tmpfiles.d(5), since systemd 242).
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._guard, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                self._inotify = inotify.Inotify(Path(f"/proc/self/fd/{self._pinned}"), _WATCHED)
            self._index = Index(self._administrators, os.fstat(self._guard))
            undo.pop_all()

    @property
    def poll_interval(self) -> float:
        slowest = SLOWEST_POLL if self._inotify else SLOWEST_POLL_WITHOUT_INOTIFY
        return float(min(FIRST_POLL * 2 ** min(self._claims_in_vain, SLOW_AFTER_CLAIMS), slowest))

    def enqueue(self, request: Request, candidates: Sequence[Device], owner: Owner) -> Ticket:
        self._check_process()
        request = self._in_its_place(request)
        demand = demanded(request, candidates)
        record = TicketRecord(demand, owner.pid, owner.command, since=self._wall_clock(), origin=self._origin)
        ticket = Ticket(uuid.uuid4().hex, request, tuple(candidate.uuid for candidate in demand.candidates))
        waiting = _Waiting(ticket, record)
        with self._mutex() as queue:
            if queue is not None:
                self._publish_ticket(waiting, self._scan(queue, mutex=True))
        self._tickets[ticket.id] = waiting
        _log.debug("ticket %s: enqueued for %s", ticket.id, request)
        return ticket

    def claim(
        self, ticket: Ticket, unavailable: Iterable[str] = (), preference: DevicePreference = NO_PREFERENCE
    ) -> HeldLease | None:
        self._check_process()
        waiting = self._tickets.get(ticket.id)
        if waiting is None:
            raise ValueError(f"ticket {ticket.id} is not waiting in this ledger")
        seen = frozenset(unavailable).intersection(ticket.candidates)
        if waiting.untried:
            # It may well be granted, so this one reading is done under the mutex if that is free.
            waiting.untried = False
            with self._mutex(wait=False) as locked:
                if locked is not None:
                    lease = self._claim(locked, waiting, seen, preference)
            if locked is not None:
                return self._claimed(ticket, lease)
        changed = seen != waiting.record.demand.unavailable
        with self._directory() as queue:
            # Waiting is what a ticket does most of the time, and needs no mutex.
            pool = self._scan(queue, mutex=False)
            self._find_lost(pool, self._lost)
            in_vain = not changed and str(waiting.name) in pool.names and not self._decide(pool, waiting, preference)
        if in_vain:
            assert waiting.name is not None
            self._claims_in_vain += 1 if pool.ahead_of(waiting.name) < EAGER_TICKETS else SLOW_AFTER_CLAIMS
            return None
        with self._mutex() as locked:
            lease = None if locked is None else self._claim(locked, waiting, seen, preference)
        return self._claimed(ticket, lease)

    def _claimed(self, ticket: Ticket, lease: HeldLease | None) -> HeldLease | None:
        self._claims_in_vain = 0 if lease else self._claims_in_vain + 1
        if lease is not None:  # not under the mutex: the log may be on a disk that hangs
            _log.debug("lease %s: granted to ticket %s: %s", lease.id, ticket.id, lease.shares)
        return lease

    def _claim(
        self, queue: int, waiting: _Waiting, unavailable: frozenset[str], preference: DevicePreference
    ) -> HeldLease | None:
        pool = self._scan(queue, mutex=True)
        if unavailable != waiting.record.demand.unavailable:
            # Others must know what this one can use, or they would keep for it what it does not take.
            demand = replace(waiting.record.demand, unavailable=unavailable)
            waiting.record = replace(waiting.record, demand=demand)
            self._publish_ticket(waiting, pool)
        elif str(waiting.name) not in pool.names:
            self._publish_ticket(waiting, pool)
        shares = self._decide(pool, waiting, preference)
        self._lost = frozenset()
        while shares is not None and (lost := self._find_lost(pool, shares)):
            self._lost |= lost
            shares = self._decide(pool, waiting, preference)
        if shares is None:
            return None
        record = LeaseRecord(
            shares=shares,
            started=self._clock(),
            timeout=waiting.ticket.request.timeout,
            pid=waiting.record.pid,
            command=waiting.record.command,
            since=self._wall_clock(),
            origin=self._origin,
        )
        id = uuid.uuid4().hex
        lease = HeldLease(id, shares, self._publish(queue, id, lease_names(id), record, "claim"))
        self._leases[id] = lease, record
        self._withdraw(queue, waiting, "claim")
        return lease

    def cancel(self, ticket: Ticket) -> None:
        self._check_process()
        waiting = self._tickets.get(ticket.id)
        if waiting is None:
            return
        _log.debug("ticket %s: cancelled", ticket.id)
        try:
            with self._directory() as queue:
                self._withdraw(queue, waiting, "cancel")
        except PoolDirectoryError:  # then it is in no queue any more
            self._tickets.pop(ticket.id, None)
            waiting.close()

    def release(self, lease: HeldLease) -> None:
        self._check_process()
        if self._leases.pop(lease.id, None) is not None:
            _log.debug("lease %s: released", lease.id)
            self._close_leases([lease])

    def snapshot(self, *, thorough: bool = False) -> PoolView:
        """As `Ledger.snapshot` says. `thorough`: look for leases without a name in the queue, too."""
        self._check_process()
        with self._directory() as queue:
            pool = self._scan(queue, mutex=False)
            self._find_lost(pool, pool.wanted() if thorough else self._lost)
            return pool.view(self._clock())

    def fileno(self) -> int | None:
        return self._inotify.fileno() if self._inotify else None

    def drain(self) -> None:
        self._check_process()
        if self._inotify and self._inotify.drain():
            self._claims_in_vain = 0
            if self._leases:
                try:
                    with self._directory() as queue:
                        self._keep_names(queue)
                except PoolDirectoryError as error:
                    self._warn_of_lost_names(self._leases, f" ({error.problem.partition(':')[0]})")

    def close(self) -> None:
        if self._closed:
            return
        if os.getpid() == self._process:
            with contextlib.suppress(PoolDirectoryError):
                for waiting in list(self._tickets.values()):
                    self.cancel(waiting.ticket)
            leases = [lease for lease, _ in self._leases.values()]
            self._leases.clear()
            if leases:
                self._close_leases(leases)
        self.close_in_child()

    def close_in_child(self, keep: Collection[HeldLease] = ()) -> None:
        if self._closed:
            return
        self._closed = True
        for waiting in self._tickets.values():
            waiting.close()
        for lease, _ in self._leases.values():
            if lease not in keep:
                os.close(lease.detach())
        self._tickets.clear()
        self._leases.clear()
        os.close(self._guard)
        os.close(self._pinned)
        if self._inotify:
            self._inotify.close()
            self._inotify = None

    def __enter__(self) -> FileLedger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_process(self) -> None:
        if self._closed:
            raise ValueError("this ledger is closed")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this ledger belongs to process {self._process}, from which this one was forked: "
                "call close_in_child() and open another"
            )

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int]:
        """Yield the queue directory's descriptor, opened anew and proven to be the one it was."""
        descriptor = -1
        try:
            descriptor = open_queue(self._guard, self.directory, make=False)
            if (_identity(self.directory.stat()), _identity(os.fstat(descriptor))) != self._identity:
                raise OSError(errno.ESTALE, "replaced")
            yield descriptor
        except FileNotFoundError as error:
            raise explained(self.directory, OSError(errno.ESTALE, "removed")) from error
        except OSError as error:
            raise explained(self.directory, error) from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @contextlib.contextmanager
    def _mutex(self, *, wait: bool = True) -> Iterator[int | None]:
        """Hold the pool's mutex; yield the queue directory's descriptor, or None if another process keeps it too long.

        Without `wait`, None if another process has it now.

        The descriptor is a new one each time, so that a forked child that misuses the ledger would still exclude its
        parent.
        """
        with self._directory() as descriptor:
            if not self._pool_mutex.lock(descriptor, wait=wait):
                yield None
                return
            try:
                # It may have been replaced while another process had the mutex.
                with self._directory():
                    yield descriptor
            finally:
                # Not just closed: a process forked meanwhile by another thread has a copy.
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _in_its_place(self, request: Request) -> Request:
        """Leave a priority above 0 only to those who may go before others."""
        if request.priority <= 0 or os.geteuid() in self._administrators:
            return request
        if self._warn_of_priority:
            owner = os.fstat(self._guard).st_uid
            who = f"root and for {user_name(owner)}, the owner of {self.directory}"
            if owner == 0 or owner not in self._administrators:
                who = f"root: {self.directory} has no other administrator"
            self._warn(f"priority {request.priority} counts as 0: above 0 is for {who}")
            self._warn_of_priority = False
        return replace(request, priority=0)

    def _decide(self, pool: PoolScan, waiting: _Waiting, preference: DevicePreference) -> Grant | None:
        name = waiting.name
        assert name is not None
        state = TicketState(name.sequence, name.id, waiting.record.demand, name.priority)
        return grant(pool.lease_states(), pool.queue(), state, self._clock(), preference)

    def _publish_ticket(self, waiting: _Waiting, pool: PoolScan) -> None:
        """Write the ticket's file, or its next edition in place of it."""
        ticket, old = waiting.ticket, waiting.name
        if old is None:
            sequence = min(pool.last_sequence() + 1, MAX_SEQUENCE)
            new = TicketName(ticket.request.priority, sequence, ticket.id, edition=0)
        else:
            new = old._replace(edition=(old.edition + 1) % 10**6)
        descriptor = self._publish(pool.directory, ticket.id, (str(new),), waiting.record, "enqueue")
        if old is not None:
            with contextlib.suppress(OSError):
                os.unlink(str(old), dir_fd=pool.directory)
            self._checkpoint("claim: old edition removed")
            pool.own.pop(str(old), None)
        waiting.close()
        waiting.descriptor, waiting.name = descriptor, new
        pool.index.pass_by(str(old))
        pool.index.add(str(new))
        pool.own[str(new)] = waiting.record

    def _publish(self, queue: int, id: str, names: tuple[str, ...], record: Record, operation: str) -> int:
        """Make a file that is complete and locked from the moment it has its names; return its descriptor."""
        hidden = unpublished_name(id)
        descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=queue)
        try:
            self._checkpoint(f"{operation}: created")
            os.fchmod(descriptor, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._checkpoint(f"{operation}: locked")
            if isinstance(record, LeaseRecord):
                self._marks.make(descriptor, record.shares)
            _write(descriptor, record.encode(id))
            self._checkpoint(f"{operation}: written")
            for name in names[1:]:
                os.link(hidden, name, src_dir_fd=queue, dst_dir_fd=queue)
                self._checkpoint(f"{operation}: linked")
            os.rename(hidden, names[0], src_dir_fd=queue, dst_dir_fd=queue)
            self._checkpoint(f"{operation}: published")
        except BaseException:
            for name in (hidden, *names):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=queue)
            os.close(descriptor)
            raise
        return descriptor

    def _withdraw(self, queue: int, waiting: _Waiting, operation: str) -> None:
        if waiting.name is not None:
            with contextlib.suppress(OSError):
                os.unlink(str(waiting.name), dir_fd=queue)
            self._checkpoint(f"{operation}: ticket removed")
        del self._tickets[waiting.ticket.id]
        waiting.close()
        self._checkpoint(f"{operation}: ticket closed")

    def _close_leases(self, leases: list[HeldLease]) -> None:
        for lease in leases:
            os.close(lease.detach())
            self._checkpoint("release: closed")
        # The devices are as free as they can be; what is left to do can only fail where the pool is gone.
        with contextlib.suppress(PoolDirectoryError), self._directory() as queue:
            for lease in leases:
                for name in lease_names(lease.id):
                    remove_if_dead(queue, name)
                    self._checkpoint("release: name removed")

    def _find_lost(self, pool: PoolScan, uuids: Iterable[str]) -> frozenset[str]:
        """Look for devices among `uuids` held by leases without a name in the queue, and note them in the pool."""
        uuids = [uuid for uuid in uuids if uuid not in pool.lost]
        locks = pool.locks() if uuids else None
        if locks is None:
            return frozenset()
        known = {entry.inode for entry in pool.holders.values()}
        known.update(os.fstat(lease.fileno()).st_ino for lease, _ in self._leases.values())
        lost = self._marks.found(locks, uuids, known)
        pool.lost.update(lost)
        return frozenset(lost)

    def _keep_names(self, queue: int) -> None:
        """Restore names of this ledger's lease files that a user has removed."""
        nameless = []
        for id, (lease, _) in self._leases.items():
            status = os.fstat(lease.fileno())
            if status.st_nlink == 1:
                for name, other in zip(lease_names(id), reversed(lease_names(id)), strict=True):
                    with contextlib.suppress(OSError):
                        if os.stat(name, dir_fd=queue, follow_symlinks=False).st_ino == status.st_ino:
                            os.link(name, other, src_dir_fd=queue, dst_dir_fd=queue, follow_symlinks=False)
            elif not status.st_nlink:
                nameless.append(id)
        self._warn_of_lost_names(nameless)

    def _warn_of_lost_names(self, ids: Iterable[str], why: str = "") -> None:
        """Say, once of each, that others can see leases of this ledger only in the kernel's table of locks."""
        new = [id for id in ids if id not in self._nameless]
        self._nameless.update(new)
        if new:
            uuids = dict.fromkeys(uuid for id in new for uuid in self._leases[id][0].uuids)
            self._warn(
                f"pool directory {self.directory}: the files of leases that this program has were removed or moved away"
                f"{why}: {', '.join(uuids)}. Only programs that can read /proc/locks still keep off these devices"
            )

    def _scan(self, queue: int, *, mutex: bool) -> PoolScan:
        """Read the pool; what this ledger has itself, it knows better than the files."""
        self._keep_names(queue)
        pool = scan(queue, self._origin, self._index, self._clock(), mutex=mutex)
        pool.own = {str(own.name): own.record for own in self._tickets.values() if own.name is not None}
        pool.leases.update({id: record for id, (_, record) in self._leases.items()})
        return pool


@dataclass
class _Waiting:
    """A ticket of this ledger."""

    ticket: Ticket
    record: TicketRecord
    name: TicketName | None = None
    """None as long as it could not be published."""
    descriptor: int = -1
    untried: bool = True
    """Whether it was never claimed."""

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
