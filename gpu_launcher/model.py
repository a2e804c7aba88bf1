"""The words of the project as frozen types. See docs/architecture.md for their definitions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DeviceKind(str, Enum):
    """What a device is made of."""

    GPU = "gpu"
    """A whole NVIDIA GPU, found through NVML."""
    MIG = "mig"
    """A MIG instance: a part of an NVIDIA GPU that the driver keeps apart from its other parts."""
    SIMULATED = "simulated"
    """A made-up GPU, for demonstrations and tests."""
    CPU = "cpu"
    """A slot to run one job on the CPU."""


@dataclass(frozen=True, slots=True)
class Device:
    """One allocatable accelerator. `uuid` is its identity on the machine, `index` is for display.

    Two devices are the same device exactly if their UUIDs are equal.
    """

    uuid: str
    index: int
    """NVML index, which is the order of PCI bus ids; for CPU slots and simulated devices, counted from 0. A MIG
    instance has its GPU's."""
    name: str
    """Product name, such as `NVIDIA H100 80GB HBM3`, with the profile of a MIG instance: `... MIG 1g.10gb`."""
    kind: DeviceKind
    memory: int | None = None
    """Total memory in bytes; None where the device does not report it (CPU slots, unified memory)."""
    exclusive: bool = False
    """Compute mode EXCLUSIVE_PROCESS: one process at a time can use it, so it takes no fractions."""
    parent: str | None = None
    """UUID of the GPU that a MIG instance is part of, which is no device itself; None for other devices."""
    instance: int | None = None
    """Number of a MIG instance on its GPU, for display; None for other devices."""
    numa_node: int | None = None
    """NUMA node of the host that it is attached to, where that is known."""
    cpus: tuple[int, ...] = ()
    """CPUs of the host near it, in ascending order; none where that is not known."""

    @property
    def label(self) -> str:
        """How messages and views call it: `GPU 2`, `MIG 2:0`, `simulated GPU 2`, `CPU slot 2`."""
        if self.kind is DeviceKind.MIG:
            return f"MIG {self.index}:{self.instance}"
        prefix = {DeviceKind.GPU: "GPU", DeviceKind.SIMULATED: "simulated GPU", DeviceKind.CPU: "CPU slot"}
        return f"{prefix[self.kind]} {self.index}"


@dataclass(frozen=True, slots=True)
class Request:
    """What one job needs."""

    gpus: int
    """Number of whole devices; 0 needs no lease."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who asks for or holds devices, for display only: liveness is never judged by it."""

    pid: int
    user: str
    command: str
    """A short description, such as `train.py #7 lr=0.1`."""
