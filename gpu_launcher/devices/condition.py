"""The condition of a device, and the rules for whether a program outside the pool uses it.

Pure: measurements are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.model import BUSY_MEMORY
from gpu_launcher.sizes import show_memory

if TYPE_CHECKING:
    from collections.abc import Collection

_SERVERS = ("nvidia-cuda-mps-server",)
"""Programs that compute on behalf of others. Their clients count as the device's users."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a device."""

    pid: int
    """Process id as NVML reports it. In a container it may be the host's number."""
    memory: int | None = None
    """Device memory that it uses, in bytes; None if the driver does not tell."""
    user: str | None = None
    command: str | None = None
    ancestors: tuple[int, ...] | None = None
    """Process ids of its ancestors, the parent first. None if it cannot be attributed: /proc does not show it, or the
    process id may belong to another namespace."""
    draws: bool = False
    """Whether it also uses the device for graphics, like display servers and their clients."""

    @property
    def described(self) -> str:
        """A description such as `train.py (pid 4711, anna, 3.2 GiB)`; unknown facts are left out."""
        facts = [f"pid {self.pid}", self.user, None if self.memory is None else show_memory(self.memory)]
        return f"{self.command or 'a process'} ({', '.join(fact for fact in facts if fact)})"


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of a device at one moment. None means that a value is not available."""

    uuid: str
    utilisation: float | None = None
    """Fraction of the last second or so in which it computed, 0 to 1. MIG instances do not report it."""
    memory_used: int | None = None
    """Used memory in bytes. Excludes the driver's own memory if the driver can tell."""
    processes: tuple[GpuProcess, ...] | None = None
    """The processes that compute, by process id. Programs that only draw are not included."""
    fault: str | None = None
    """Why it must be set aside, and the remedy; continues `GPU 1 ...`, such as `has fallen off the bus: ...`."""


def memory_of(pid: int, condition: Condition) -> int | None:
    """The bytes that a process and its descendants use on a device; None if none of them can be seen on it."""
    seen = [
        process.memory
        for process in condition.processes or ()
        if process.ancestors is not None and process.memory is not None and pid in (process.pid, *process.ancestors)
    ]
    return sum(seen) if seen else None


def foreign_processes(condition: Condition, owners: Collection[int] | None) -> tuple[GpuProcess, ...]:
    """The processes on a device that provably do not belong to the pool.

    `owners` are the process ids of all programs that hold leases or wait for them, including this one. Their
    descendants belong to the pool. `owners` is None if a lease on the device belongs to a program whose process id has
    no meaning here, for example in a container; then nothing can be proved.

    Processes that cannot be attributed and programs that also draw are never returned. They are judged by memory alone.
    """
    if owners is None:
        return ()
    pool = frozenset(owners)
    return tuple(
        process
        for process in condition.processes or ()
        if process.ancestors is not None
        and not process.draws
        and pool.isdisjoint((process.pid, *process.ancestors))
        and not (process.command or "").split(" ")[0].endswith(_SERVERS)
    )


def why_busy(
    condition: Condition,
    *,
    owners: Collection[int] | None,
    leased: int = 0,
    leases: int = 0,
    busy_memory: int | None = BUSY_MEMORY,
) -> str | None:
    """Say why no share of the device should be granted: a program outside the pool uses it. None if none is seen.

    `owners` is as for `foreign_processes`. `leased` is the memory in bytes of all live leases on the device, and
    `leases` is their number; a lease of a fraction without declared memory counts as that fraction of the device's. If
    `busy_memory` is None, no device counts as busy.

    - A foreign compute process makes a device busy, however little memory it uses.
    - Memory in use beyond what is leased makes a device busy if it exceeds `busy_memory` plus `busy_memory` for each
      lease, because a job's CUDA context adds to its declared memory. Memory that an owner itself holds (a program that
      used CUDA before it launched) counts as leased, because the program would otherwise wait for itself.

    The reason continues `GPU 1 ...`. A wholly leased device need not be judged.

    Not promised: a stranger is not seen if it cannot be attributed and uses less memory than is leased but unused, or
    if it started after `condition` was measured. Jobs that use more than they declared are not distinguished from
    strangers; on purpose, the effect is the same.
    """
    if busy_memory is None:
        return None
    if strangers := foreign_processes(condition, owners):
        return f"is used by {' and '.join(process.described for process in strangers)}"
    if condition.memory_used is None:
        return None
    held_by_owners = sum(process.memory or 0 for process in condition.processes or () if process.pid in (owners or ()))
    beyond = condition.memory_used - max(leased, held_by_owners)
    if beyond <= busy_memory * (1 + leases):
        return None
    used = show_memory(condition.memory_used)
    if leases:
        return f"has {used} in use where {show_memory(leased)} are leased"
    return f"has {used} in use by processes that cannot be told from here"
