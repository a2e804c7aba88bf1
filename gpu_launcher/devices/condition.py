"""The condition of a device, and whether a program outside the pool uses it. Pure: measurements come as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_launcher.sizes import MIB, show_memory

if TYPE_CHECKING:
    from collections.abc import Collection

BUSY_MEMORY = 512 * MIB
"""More memory than this in use beyond what is leased means that a program outside the pool uses the device.

It must be above what is not called use: the driver's own (which older drivers count as used: 300 to 600 MiB of a
large GPU), a desktop (100 to 400 MiB), a job's CUDA context (200 to 500 MiB, which those who declare memory forget).
And it has to be below what any training holds, which torch's context and cached kernels alone are.
"""

_SERVERS = ("nvidia-cuda-mps-server",)
"""Programs that compute for others: those others are who uses the device."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that computes on a device."""

    pid: int
    """As NVML reports it, which in a container may be the host's number."""
    memory: int | None = None
    """Bytes of the device's memory; None where the driver does not say."""
    user: str | None = None
    command: str | None = None
    ancestors: tuple[int, ...] | None = None
    """Pids of its parent, that one's parent and so on. None if it cannot be attributed: /proc does not show it, or the
    pid may be one of another namespace."""
    draws: bool = False
    """It also uses the device for graphics, as display servers and their clients do."""

    @property
    def described(self) -> str:
        """`train.py (pid 4711, anna, 3.2 GiB)`, as much as is known."""
        facts = [f"pid {self.pid}", self.user, None if self.memory is None else show_memory(self.memory)]
        return f"{self.command or 'a process'} ({', '.join(fact for fact in facts if fact)})"


@dataclass(frozen=True, slots=True)
class Condition:
    """The condition of a device at one moment. A value of None was not available, and nothing follows from it."""

    uuid: str
    utilisation: float | None = None
    """Part of the last second or so in which it computed, 0 to 1. MIG instances do not report it."""
    memory_used: int | None = None
    """Bytes, where the driver can tell without what it keeps for itself."""
    processes: tuple[GpuProcess, ...] | None = None
    """Those that compute, by pid. Programs that only draw are not among them."""
    fault: str | None = None
    """Continues `GPU 1 ...`: why it is to be set aside, and the remedy, such as `has fallen off the bus: ...`."""


def foreign_processes(condition: Condition, owners: Collection[int] | None) -> tuple[GpuProcess, ...]:
    """The processes on a device that provably do not belong to the pool.

    `owners` are the pids of all programs that hold leases or wait for them, this one included: what they started
    belongs to the pool. None if some lease on the device is of a program whose pid means nothing here, such as one in
    a container: then nothing can be proved.

    Not among them, and so judged by memory alone: processes that cannot be attributed, and programs that also draw.
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
    """Why no share of the device should be granted: a program outside the pool uses it. None if none is seen to.

    `owners` as for `foreign_processes`. `leased` is the memory, in bytes, of all live leases on the device (of a
    fraction without declared memory, that fraction of the device's), and `leases` is their number. `busy_memory` None
    means not to look.

    - A foreign compute process means busy, however small.
    - More memory in use than leased means busy, beyond `busy_memory`, and as much again for each lease: a job's CUDA
      context comes on top of what it declared. Memory that an owner itself holds (a program that used CUDA before it
      launched) counts as leased, or it would wait for itself.

    The reason continues `GPU 1 ...`. A wholly leased device need not be judged.

    Not promised: to see a stranger who cannot be attributed and holds less memory than is leased and not yet used; to
    tell jobs that use more than they declared from strangers, for whom, on purpose, the same follows; to see who came
    after `condition` was measured.
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
