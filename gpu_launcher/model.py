"""The words of the project as frozen types. See docs/architecture.md for their definitions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DeviceKind(str, Enum):
    """What a device is made of."""

    GPU = "gpu"
    """A whole NVIDIA GPU, found through NVML."""
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
    """NVML index, which is the order of PCI bus ids; for CPU slots and simulated devices, counted from 0."""
    name: str
    """Product name, such as `NVIDIA H100 80GB HBM3`."""
    kind: DeviceKind
    memory: int | None = None
    """Total memory in bytes; None where the device does not report it (CPU slots, unified memory)."""

    @property
    def label(self) -> str:
        """How messages and views call it: `GPU 2`, `simulated GPU 2`, `CPU slot 2`."""
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
