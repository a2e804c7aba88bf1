"""A second witness of each lease, which nobody can remove: marks in the kernel's table of locks.

A lease is found by the names of its file. Who owns the directory that they are in can remove or move them; the lock
stays, but nobody would find it. So for each of its devices a lease also locks one byte of its file through the same
open file description (an OFD lock, fcntl_locking(2)). That lives and dies with the description, as its flock(2) does,
and is in /proc/locks for every process to see, in other namespaces of process ids, too. Which byte it is says which
device of which pool, by a hash. Before a grant it is looked for marks of files that no name in the queue leads to.

The pool is meant by its path and, so that it is the same one in a container, by the inode of its directory: there are
two marks for each device. Anybody can make such marks. That keeps others off devices for as long as the process lives
that made them, as a lease does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import struct
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_launcher.leases.kernel import LockTable

FIRST_MARK = 1 << 62
"""No file of ours is that long."""


@functools.lru_cache(maxsize=16384)
def _mark(pool: str, uuid: str) -> int:
    digest = hashlib.sha256(f"{pool}\0{uuid}".encode(errors="surrogatepass")).digest()
    # Even, because the kernel joins locks that touch.
    return FIRST_MARK | int.from_bytes(digest[:7], "big") << 1


class Marks:
    """Makes and finds the marks of one pool."""

    def __init__(self, path: str, directory: os.stat_result) -> None:
        self._pools = (f"path {os.path.realpath(path)}", f"inode {directory.st_dev} {directory.st_ino}")

    def make(self, descriptor: int, uuids: Iterable[str]) -> None:
        """Mark the devices as held by the lease's file, open for writing. Does nothing where there are no OFD locks."""
        with contextlib.suppress(OSError, AttributeError):
            for uuid in uuids:
                for pool in self._pools:
                    lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _mark(pool, uuid), 1, 0)
                    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)

    def found(self, locks: LockTable, uuids: Iterable[str], known: Collection[int]) -> dict[str, int]:
        """Return which of the devices are marked by files other than `known`, and the inode number of one of those."""
        marked = locks.marked(FIRST_MARK)
        if not marked:
            return {}
        found = {}
        for uuid in uuids:
            for pool in self._pools:
                for inode in marked.get(_mark(pool, uuid), set()).difference(known):
                    found[uuid] = inode
        return found
