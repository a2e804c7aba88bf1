"""The ledger that every process and user of the machine shares: locked files in the pool directory.

Theory of operation. A device is held by the lock (flock(2)) on a lease's file. The lock lives as long as any process
has a copy of the lease's descriptor. File contents are only notes: if they cannot be read, a locked lease counts as
holding every device. `claim` grants a lease: under the mutex, it reads the pool, asks
`gpu_launcher.leases.grant_policy`, and publishes the locked file of the lease before it withdraws the ticket's file.

Losing a file costs at most waiting, for these reasons:

- The mutex is the lock on the queue directory itself, which cannot be removed while it contains anything. Only
  additions to the pool need the mutex: a new ticket or a lease. Finding that nothing can be granted yet, and releasing,
  do not.
- A lease's file has two names. A lease counts as long as either name exists.
- There is no counter to lose: a ticket's sequence is one more than the highest sequence of the live tickets.
- If a ticket's file is lost, its next claim writes it again with the same sequence. If a ticket could not be written
  because another process had the mutex, its next claim writes it at the end of the queue at that time.
- If a queue directory is removed or replaced, every ledger that has it open raises PoolDirectoryError.

Not promised:

- Safety against a user who removes the whole queue directory, or both names of a lease, while jobs run and then starts
  new programs; or who locks or unlocks the files by hand.
- One pool across two directories. A container's own `/var/tmp` and the host's are two pools.
- Grants while a process is stopped (SIGSTOP) with the mutex, which it has for about a millisecond at a time. Grants
  resume when it continues or is killed. The other processes stay responsive and say who it is.
- Strict order among tickets that could all be granted at one moment. Each process chooses among the devices that are
  free for it, so a later ticket may once take a device that an earlier one needs. The earlier one then waits and
  reserves.
- Backfill without delays for a process in its own time namespace (time_namespaces(7)). It may misread declared ends,
  so it may be delayed or may delay others.
- Forks by another thread while a ledger is in use. The child would inherit incomplete tickets and leases. Fork from the
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

from gpu_launcher.boot import Origin
from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import inotify
from gpu_launcher.leases.file_format import (
    MAX_SEQUENCE,
    LeaseRecord,
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
"""Shortest time between polls, in seconds, used after an announced change. In the kernel's __fput(),
locks_remove_file() runs after fsnotify_close(), so the close of a lease is announced just before its lock disappears.
"""
SLOWEST_POLL = 0.25
EAGER_TICKETS = 4
"""Number of tickets at the head of the queue that poll after a change. The others are notified again when one of these
is granted. If all of a long queue polled, it would only take CPU time from the ticket whose turn it is."""
SLOWEST_POLL_WITHOUT_INOTIFY = 0.02
SLOW_AFTER_CLAIMS = 16
"""Number of unsuccessful claims after which polling is slowest."""

# Events that only make devices scarcer (a new ticket, a new lease) wake no process. Neither does read-only probing,
# because waiting processes would otherwise wake each other for ever.
_WATCHED = inotify.CLOSE_WRITE | inotify.DELETE | inotify.DELETE_SELF | inotify.MOVE_SELF


def boot_time() -> float:
    """Seconds since the machine started.

    All processes share this clock. It cannot be set, and it continues while the machine is suspended, as the jobs' time
    limits do.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def to_stderr(text: str) -> None:
    """Print a notice on stderr."""
    print(f"gpu-launcher: {text}", file=sys.stderr, flush=True)


class FileLedger:
    """A `Ledger` on the files of a pool directory. `directory` is what `resolve_pool_directory` returned.

    Only the process that created it may use it. In a forked child, every method raises RuntimeError, except
    `close_in_child` and `close`, which there does the same. Garbage collection closes nothing, so call `close`.

    `warn` gets two notices, each once: who keeps the pool locked for seconds, and that a priority above 0 counts as 0,
    because only root and the pool's administrator may go before others.

    `wall_clock` gives the times that views show; `clock` and `origin` are for the times that the policy compares.
    `checkpoint` is for tests. It is called after each step that a crash could separate from the next, with the name of
    the step, such as `claim: locked`.
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
        """UUIDs of devices that leases without a name in the queue held at the last look."""
        self._nameless: set[str] = set()
        """Ids of this ledger's leases that have lost all names, which was already reported."""
        self._inotify: inotify.Inotify | None = None
        with contextlib.ExitStack() as undo:
            try:
                # Both are kept open, so that no later directory can get the same inode number.
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
            # A first claim often succeeds, so the pool is read under the mutex if that is free.
            waiting.untried = False
            with self._mutex(wait=False) as locked:
                if locked is not None:
                    lease = self._claim(locked, waiting, seen, preference)
            if locked is not None:
                return self._claimed(ticket, lease)
        changed = seen != waiting.record.demand.unavailable
        with self._directory() as queue:
            # Most claims find that the ticket must still wait, which needs no mutex.
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
        if lease is not None:  # logged without the mutex, because the log may be on a disk that hangs
            _log.debug("lease %s: granted to ticket %s: %s", lease.id, ticket.id, lease.shares)
        return lease

    def _claim(
        self, queue: int, waiting: _Waiting, unavailable: frozenset[str], preference: DevicePreference
    ) -> HeldLease | None:
        pool = self._scan(queue, mutex=True)
        if unavailable != waiting.record.demand.unavailable:
            # Others must know which devices this ticket can use. Otherwise they would reserve devices for it in vain.
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
        except PoolDirectoryError:  # the queue is gone, and the ticket with it
            self._tickets.pop(ticket.id, None)
            waiting.close()

    def release(self, lease: HeldLease) -> None:
        self._check_process()
        if self._leases.pop(lease.id, None) is not None:
            _log.debug("lease %s: released", lease.id)
            self._close_leases([lease])

    def snapshot(self, *, thorough: bool = False) -> PoolView:
        """Read the pool, for display. With `thorough`, also look for leases without a name in the queue."""
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
        """Yield a new descriptor of the queue directory, after checking that the directory was not replaced."""
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

        Without `wait`, yield None if another process has it now.

        Each call opens a new descriptor, so that the mutex works even between a parent and a forked child that misuses
        the ledger.
        """
        with self._directory() as descriptor:
            if not self._pool_mutex.lock(descriptor, wait=wait):
                yield None
                return
            try:
                # The directory may have been replaced while another process had the mutex.
                with self._directory():
                    yield descriptor
            finally:
                # Closing is not enough, because a process that another thread has forked since then has a copy.
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _in_its_place(self, request: Request) -> Request:
        """Return the request, with priority 0 instead of a higher one if this user may not use that."""
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
        """Write the ticket's file, or replace it by its next edition."""
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
        """Create a file that is complete and locked before it gets its names; return its descriptor."""
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
        # The leases are already closed here. Removing their names fails only if the pool is gone.
        with contextlib.suppress(PoolDirectoryError), self._directory() as queue:
            for lease in leases:
                for name in lease_names(lease.id):
                    remove_if_dead(queue, name)
                    self._checkpoint("release: name removed")

    def _find_lost(self, pool: PoolScan, uuids: Iterable[str]) -> frozenset[str]:
        """Find devices among `uuids` that leases without a name in the queue hold, and record them in `pool`."""
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
        """Warn, once per lease, that others can see the lease only in the kernel's table of locks."""
        new = [id for id in ids if id not in self._nameless]
        self._nameless.update(new)
        if new:
            uuids = dict.fromkeys(uuid for id in new for uuid in self._leases[id][0].uuids)
            self._warn(
                f"pool directory {self.directory}: the files of leases that this program has were removed or moved away"
                f"{why}: {', '.join(uuids)}. Only programs that can read /proc/locks still keep off these devices"
            )

    def _scan(self, queue: int, *, mutex: bool) -> PoolScan:
        """Read the pool. The ledger's own tickets and leases come from its records instead of the files."""
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
    """The name of its file; None until it is published."""
    descriptor: int = -1
    untried: bool = True
    """Whether it has not been claimed yet."""

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
