"""The ledger that every process and user of the machine shares: locked files in the pool directory.

What holds a device is the lock (flock(2)) on a lease's file, alive as long as any process has a copy of the lease's
descriptor. File contents are notes; when they cannot be read, a locked lease counts as holding everything.

How the promise is kept that losing a file costs at most waiting:

- The mutex is the lock on the queue directory itself. It cannot be removed while it holds anything.
- A lease's file has two names. A lease counts as long as either is there.
- There is no counter to lose: a ticket's sequence is one more than the highest of the live ones.
- A ticket whose file is lost is written anew, with its old sequence, at its next claim.
- A queue directory that is removed or replaced makes every ledger that was open on it raise PoolDirectoryError.

Not promised:

- Safety against somebody who removes the whole queue directory, or both names of a lease, while jobs run, and starts
  new programs then; or who locks or unlocks the files by hand.
- Two directories, such as a container's own `/var/tmp` and the host's, are two pools.
- A process that is stopped (SIGSTOP) while it has the mutex, which is for about a millisecond at a time, stops
  everybody's claims until it goes on or is killed.
- A process that another thread forks while a ledger is at work inherits half-made tickets and leases: fork from the
  thread that uses the ledger, and call `close_in_child`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import inotify
from gpu_launcher.leases.directory import explained, make_queue
from gpu_launcher.leases.ledger import Lease, PoolView, Ticket, validated
from gpu_launcher.leases.policy import decide
from gpu_launcher.leases.records import Record, lease_names, ticket_name, unpublished_name
from gpu_launcher.leases.scan import Pool, probe, scan

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_launcher.model import Device, Owner, Request

FIRST_POLL = 0.002
"""Seconds. After an announced change: locks_remove_file() runs after fsnotify_close() in the kernel's __fput(), so
the close of a lease is heard just before its lock is gone."""
SLOWEST_POLL = 0.25
SLOWEST_POLL_WITHOUT_INOTIFY = 0.02

# Nothing that only makes things scarcer (a new ticket, a new lease) wakes anybody, and neither does the read-only
# probing of other waiters, who would else wake each other for ever.
_WATCHED = inotify.CLOSE_WRITE | inotify.DELETE | inotify.DELETE_SELF | inotify.MOVE_SELF


class FileLedger:
    """A `Ledger` on the files of a pool directory. `directory` is what `resolve_pool_directory` returned.

    Belongs to the process that made it: in a forked child every method raises RuntimeError, except `close_in_child`
    and `close`, which then means the same. Nothing is closed by garbage collection: call `close`.

    `wall_clock` is for the times that views show. `checkpoint` is called after each step that a crash could
    separate from the next, with its name, such as `claim: locked`; it is for tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        wall_clock: Callable[[], float] = time.time,
        checkpoint: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.directory = directory
        self._wall_clock = wall_clock
        self._checkpoint = checkpoint
        self._process = os.getpid()
        self._tickets: dict[str, _Waiting] = {}
        self._leases: dict[str, Lease] = {}
        self._records: dict[str, Record] = {}
        self._closed = False
        self._claims_in_vain = 0
        self._inotify: inotify.Inotify | None = None
        with contextlib.ExitStack() as undo:
            try:
                self._queue = make_queue(directory)
                self._guard = _open_directory(directory)
                undo.callback(os.close, self._guard)
                # Kept open so that no later directory can have the same inode number.
                self._pinned = _open_directory(self._queue)
                undo.callback(os.close, self._pinned)
            except OSError as error:
                raise explained(directory, error) from error
            # systemd-tmpfiles removes old files from /var/tmp, unless it finds a directory above them locked
            # (tmpfiles.d(5), since systemd 242).
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._guard, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                self._inotify = inotify.Inotify(self._queue, _WATCHED)
            undo.pop_all()

    @property
    def poll_interval(self) -> float:
        slowest = SLOWEST_POLL if self._inotify else SLOWEST_POLL_WITHOUT_INOTIFY
        return float(min(FIRST_POLL * 2 ** min(self._claims_in_vain, 16), slowest))

    def enqueue(self, request: Request, candidates: Sequence[Device], owner: Owner) -> Ticket:
        self._check_process()
        uuids = validated(request, candidates)
        record = Record(uuids=uuids, count=request.gpus, owner=owner, since=self._wall_clock())
        with self._mutex() as queue:
            sequences = [sequence for sequence, _ in self._scan(queue).tickets.values()]
            ticket = Ticket(
                id=uuid.uuid4().hex,
                sequence=max(sequences, default=0) + 1,
                candidates=uuids,
                count=request.gpus,
            )
            waiting = _Waiting(ticket, record)
            self._publish_ticket(queue, waiting)
            self._tickets[ticket.id] = waiting
        return ticket

    def claim(self, ticket: Ticket) -> Lease | None:
        self._check_process()
        waiting = self._tickets.get(ticket.id)
        if waiting is None:
            raise ValueError(f"ticket {ticket.id} is not waiting in this ledger")
        with self._mutex() as queue:
            pool = self._scan(queue)
            if ticket_name(ticket.sequence, ticket.id) not in pool.names:
                self._publish_ticket(queue, waiting)
            uuids = decide(pool.snapshot()).get(ticket.id)
            if uuids is None:
                self._claims_in_vain += 1
                return None
            self._claims_in_vain = 0
            record = Record(uuids=uuids, count=len(uuids), owner=waiting.record.owner, since=self._wall_clock())
            id = uuid.uuid4().hex
            lease = Lease(id, uuids, self._publish(queue, id, lease_names(id), record, "claim"))
            self._leases[id] = lease
            self._records[id] = record
            self._withdraw(queue, waiting, "claim")
            return lease

    def cancel(self, ticket: Ticket) -> None:
        self._check_process()
        waiting = self._tickets.get(ticket.id)
        if waiting is not None:
            with self._mutex() as queue:
                self._withdraw(queue, waiting, "cancel")

    def release(self, lease: Lease) -> None:
        self._check_process()
        if self._leases.pop(lease.id, None) is not None:
            self._close_leases([lease])

    def snapshot(self) -> PoolView:
        self._check_process()
        with self._mutex() as queue:
            return self._scan(queue).view()

    def fileno(self) -> int | None:
        return self._inotify.fileno() if self._inotify else None

    def drain(self) -> None:
        self._check_process()
        if self._inotify and self._inotify.drain():
            self._claims_in_vain = 0

    def close(self) -> None:
        if self._closed:
            return
        if os.getpid() == self._process:
            with contextlib.suppress(PoolDirectoryError):
                for waiting in list(self._tickets.values()):
                    self.cancel(waiting.ticket)
            leases = list(self._leases.values())
            self._leases.clear()
            if leases:
                self._close_leases(leases)
        self.close_in_child()

    def close_in_child(self) -> None:
        if self._closed:
            return
        self._closed = True
        for waiting in self._tickets.values():
            os.close(waiting.descriptor)
        for lease in self._leases.values():
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
    def _mutex(self) -> Iterator[int]:
        """Hold the pool's mutex; yield the queue directory's descriptor.

        Opened anew each time, so that a forked child that misuses the ledger would still exclude its parent.
        """
        descriptor = -1
        try:
            descriptor = _open_directory(self._queue)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            same = [os.fstat(descriptor), self._queue.stat(), os.fstat(self._pinned)]
            if len({(status.st_dev, status.st_ino) for status in same}) > 1:
                raise OSError(errno.ESTALE, "replaced")
            yield descriptor
        except FileNotFoundError as error:
            raise explained(self.directory, OSError(errno.ESTALE, "removed")) from error
        except OSError as error:
            raise explained(self.directory, error) from error
        finally:
            if descriptor >= 0:
                # Not just closed: a process forked meanwhile by another thread has a copy.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _publish_ticket(self, queue: int, waiting: _Waiting) -> None:
        ticket = waiting.ticket
        names = (ticket_name(ticket.sequence, ticket.id),)
        descriptor = self._publish(queue, ticket.id, names, waiting.record, "enqueue")
        if waiting.descriptor >= 0:
            os.close(waiting.descriptor)
        waiting.descriptor = descriptor

    def _publish(self, queue: int, id: str, names: tuple[str, ...], record: Record, operation: str) -> int:
        """Make a file that is complete and locked from the moment it has its names; return its descriptor."""
        hidden = unpublished_name(id)
        descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=queue)
        try:
            self._checkpoint(f"{operation}: created")
            os.fchmod(descriptor, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._checkpoint(f"{operation}: locked")
            _write(descriptor, record.encode())
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
        ticket = waiting.ticket
        with contextlib.suppress(OSError):
            os.unlink(ticket_name(ticket.sequence, ticket.id), dir_fd=queue)
        self._checkpoint(f"{operation}: ticket removed")
        del self._tickets[ticket.id]
        os.close(waiting.descriptor)
        self._checkpoint(f"{operation}: ticket closed")

    def _close_leases(self, leases: list[Lease]) -> None:
        for lease in leases:
            os.close(lease.detach())
            self._checkpoint("release: closed")
        # The devices are as free as they can be; what is left to do can only fail where the pool is gone.
        with contextlib.suppress(PoolDirectoryError), self._mutex() as queue:
            for lease in leases:
                for name in lease_names(lease.id):
                    probe(queue, name)
                    self._checkpoint("release: name removed")

    def _scan(self, queue: int) -> Pool:
        """Read the pool; what this ledger has itself, it knows better than the files."""
        pool = scan(queue, self._records)
        pool.tickets.update({id: (own.ticket.sequence, own.record) for id, own in self._tickets.items()})
        pool.leases.update({id: self._records[id] for id in self._leases})
        readable = {**{id: record for id, (_, record) in pool.tickets.items()}, **pool.leases}
        self._records = {id: record for id, record in readable.items() if record is not None}
        return pool


@dataclass
class _Waiting:
    """A ticket of this ledger."""

    ticket: Ticket
    record: Record
    descriptor: int = -1


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
