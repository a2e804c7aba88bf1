"""The vocabulary of the project as frozen types. See docs/architecture.md for definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from gpu_launcher.sizes import MIB

BUSY_MEMORY = 512 * MIB
"""If more memory than this is in use beyond what is leased, a program outside the pool uses the device.

It must be above memory that does not count as use: the driver's own (which older drivers count as used: 300 to 600 MiB
of a large GPU), a desktop (100 to 400 MiB), and a job's CUDA context (200 to 500 MiB, which users who declare memory
forget). It must be below the memory of any training, for which torch's context and cached kernels are enough.
"""
LOCAL = "local"
"""Name of this machine among the nodes of a sweep."""


class DeviceKind(str, Enum):
    """The kind of a device."""

    GPU = "gpu"
    """A whole NVIDIA GPU, found through NVML."""
    MIG = "mig"
    """A MIG instance: a part of an NVIDIA GPU that the driver isolates from its other parts."""
    SIMULATED = "simulated"
    """A made-up GPU, for demonstrations and tests."""
    CPU = "cpu"
    """A slot to run one job on the CPU."""


@dataclass(frozen=True, slots=True)
class Device:
    """One allocatable accelerator. `uuid` is its identity on the machine; `index` is for display.

    Two devices are the same device exactly if their UUIDs are equal.
    """

    uuid: str
    index: int
    """The NVML index, in the order of PCI bus ids. CPU slots and simulated devices are counted from 0. A MIG instance
    has its GPU's index."""
    name: str
    """Product name, such as `NVIDIA H100 80GB HBM3`, with the profile of a MIG instance: `... MIG 1g.10gb`."""
    kind: DeviceKind
    memory: int | None = None
    """Total memory in bytes; None if the device does not report it (CPU slots, unified memory)."""
    exclusive: bool = False
    """Whether the compute mode is EXCLUSIVE_PROCESS: one process at a time can use it, so it takes no fractions."""
    parent: str | None = None
    """UUID of the GPU that a MIG instance is part of; None for other devices. That GPU is not a device itself."""
    instance: int | None = None
    """Number of a MIG instance on its GPU, for display; None for other devices."""
    numa_node: int | None = None
    """NUMA node of the host that the device is attached to; None if unknown."""
    cpus: tuple[int, ...] = ()
    """Nearby CPUs of the host, in ascending order; empty if unknown."""
    node: str = ""
    """Name of the node that has it, if a sweep runs on several nodes; otherwise empty."""

    @property
    def label(self) -> str:
        """The name in messages and views: `GPU 2`, `MIG 2:0`, `simulated GPU 2`, `CPU slot 2`, `gpu1 GPU 2`."""
        return f"{self.node} {self._label}" if self.node else self._label

    @property
    def _label(self) -> str:
        if self.kind is DeviceKind.MIG:
            return f"MIG {self.index}:{self.instance}"
        prefix = {DeviceKind.GPU: "GPU", DeviceKind.SIMULATED: "simulated GPU", DeviceKind.CPU: "CPU slot"}
        return f"{prefix[self.kind]} {self.index}"


MILLIONTHS = 1_000_000
"""Millionths in a whole device. Fractions are counted in them, so that sums are exact in any order."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of one device. Shares fit on a device together if neither of their sums exceeds the device.

    Raises ValueError if it is empty or more than the whole device.
    """

    millionths: int
    """Millionths of the device; `MILLIONTHS` is the whole device. In a request, 0 means that `memory` alone decides."""
    memory: int = 0
    """Declared memory in bytes; 0 if none is declared."""

    def __post_init__(self) -> None:
        if not 0 <= self.millionths <= MILLIONTHS or self.memory < 0 or not (self.millionths or self.memory):
            raise ValueError(f"not a part of a device: {self.millionths} millionths, {self.memory} bytes")

    @property
    def whole(self) -> bool:
        """Whether it is the whole device, so that nothing else fits beside it."""
        return self.millionths == MILLIONTHS

    def of(self, total: int | None) -> Share:
        """Return this share of a device with `total` bytes of memory.

        A share by memory alone becomes the same fraction of the device, at most the whole, so that it combines with
        fractions. If a device does not report its memory (`total` is None), no memory is counted, and a share by memory
        alone is the whole device.
        """
        if total is None:
            return Share(self.millionths or MILLIONTHS)
        if self.millionths:
            return self
        return Share(min(max(1, self.memory * MILLIONTHS // max(1, total)), MILLIONTHS), self.memory)


WHOLE = Share(MILLIONTHS)


MAX_PRIORITY = 499_999
ENDING = 5.0
"""Seconds within which the processes of a killed job have ended."""


@dataclass(frozen=True, slots=True)
class Request:
    """The devices that one job needs. `Request.of` creates one from the numbers that users write."""

    gpus: int
    """Number of devices. A job with 0 needs no lease."""
    share: Share = WHOLE
    """Share needed of each device. For whole devices, `share.memory` is the memory that each must have."""
    priority: int = 0
    """Priority from -MAX_PRIORITY to MAX_PRIORITY. Requests with a higher priority go first."""
    timeout: float | None = None
    """Seconds after the grant within which its devices are free again, including the time to end the job."""
    stagger: float = 0.0
    """Minimum seconds between this job's start on a device and the start of another running job there."""
    auto_memory: bool = False
    """Whether it gets, instead of a whole device, the memory that earlier jobs of its sweep needed, once that is known.
    The pool does not see this."""

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ValueError(f"{self.gpus} devices")
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"priority {self.priority} is not between {-MAX_PRIORITY} and {MAX_PRIORITY}")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ValueError(f"a timeout of {self.timeout} s")
        if not 0 <= self.stagger < math.inf:
            raise ValueError(f"a stagger of {self.stagger} s")

    @classmethod
    def of(
        cls,
        gpus: float | None,
        memory: int | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        stagger: float = 0.0,
    ) -> Request:
        """Return the request for `gpus` devices, or for a fraction of one, with `memory` bytes on each.

        If `gpus` is None, `memory` decides which fraction of one device is needed. Raises ValueError for numbers above
        1 that are not whole, for negative numbers, for neither `gpus` nor `memory`, and for memory on no device.
        """
        if gpus is None:
            count, millionths = 1, 0
        elif 0 < gpus < 1:
            # Rounded down, so that six sixths are at most 1. But 0.57 * MILLIONTHS is slightly less than 570000.
            count, millionths = 1, max(1, math.floor(gpus * MILLIONTHS + 1e-6))
        elif gpus >= 0 and float(gpus).is_integer():
            count, millionths = int(gpus), MILLIONTHS
        else:
            raise ValueError(f"{gpus} is neither a number of devices nor a fraction of one")
        if memory is not None and memory <= 0:
            raise ValueError(f"{memory} bytes of memory")
        if memory is not None and count == 0:
            raise ValueError(f"{memory} bytes of memory on 0 devices")
        share = Share(millionths, memory or 0)
        return cls(gpus=count, share=share, priority=priority, timeout=timeout, stagger=stagger)


@dataclass(frozen=True, slots=True)
class Owner:
    """The user and process that request or hold devices. For display only: it never decides who is alive."""

    pid: int
    """Process id; 0 if unknown."""
    user: str
    command: str
    """A short description, such as `train.py #7 lr=0.1`."""
    suspended: bool = False
    """Whether the process is known to be suspended, by Ctrl-Z or SIGSTOP."""
