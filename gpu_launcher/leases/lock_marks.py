"""Marks leases in the kernel's table of locks, where no user can remove them.

A lease is found by the names of its file. The owner of the directory can remove or move these names. The lock then
still exists, but no name leads to it. So a lease also locks bytes of its file that stand for its devices, through the
same open file description (OFD locks, fcntl_locking(2)). Like the flock(2) of the lease, such a lock lives and dies
with the description. Every process sees it in /proc/locks, even in another PID namespace. The byte's offset is a hash
of the pool and the device. Before a grant, the ledger looks for marks whose files have no name in the queue.

There are two marks for each device: one names the pool by its path, the other by the inode of its directory, which is
the same in a container. Every user can make such marks. They keep others off devices as long as their process lives,
as a lease does.
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
"""Smallest offset of a mark, beyond the end of any file of ours."""


@functools.lru_cache(maxsize=16384)
def _mark(pool: str, uuid: str) -> int:
    digest = hashlib.sha256(f"{pool}\0{uuid}".encode(errors="surrogatepass")).digest()
    # Even, because the kernel merges adjacent locks.
    return FIRST_MARK | int.from_bytes(digest[:7], "big") << 1


class Marks:
    """The marks of one pool."""

    def __init__(self, path: str, directory: os.stat_result) -> None:
        self._pools = (f"path {os.path.realpath(path)}", f"inode {directory.st_dev} {directory.st_ino}")

    def make(self, descriptor: int, uuids: Iterable[str]) -> None:
        """Mark the devices as held by the lease's file, which is open for writing. Does nothing without OFD locks."""
        with contextlib.suppress(OSError, AttributeError):
            for uuid in uuids:
                for pool in self._pools:
                    lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _mark(pool, uuid), 1, 0)
                    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)

    def found(self, locks: LockTable, uuids: Iterable[str], known: Collection[int]) -> dict[str, int]:
        """Return the devices marked by files that are not in `known`, each with the inode number of such a file."""
        marked = locks.marked(FIRST_MARK)
        if not marked:
            return {}
        found = {}
        for uuid in uuids:
            for pool in self._pools:
                for inode in marked.get(_mark(pool, uuid), set()).difference(known):
                    found[uuid] = inode
        return found
