"""What a probe of the machine's GPUs answers. Values only; nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class Unusable:
    """A GPU that is in the machine and cannot be given to jobs."""

    index: int
    """NVML index."""
    uuid: str | None
    """None where the device does not even tell that much, such as one that fell off the bus."""
    reason: str
    """Continues `GPU 1 ...`: what is wrong, and what to do, such as `is in MIG mode, which ...`."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All GPUs of the machine (or of the container), whatever any mask says."""

    devices: tuple[Device, ...] = ()
    """Ready for jobs, in the order of their indices."""
    unusable: tuple[Unusable, ...] = ()
    nothing_because: str | None = None
    """Where there is no GPU at all: why, such as `no NVIDIA driver found (...)`. None otherwise."""


class DeviceProbe(Protocol):
    """Looks what is in the machine. Asked anew for each launch: GPUs get lost, drivers get updated."""

    def inventory(self) -> Inventory:
        """The machine's GPUs, or why there is none. Raises DeviceError where the driver fails to answer."""


@dataclass(frozen=True, slots=True)
class FixedProbe:
    """A probe that always answers the same: a stand-in for tests and simulations."""

    answer: Inventory

    def inventory(self) -> Inventory:
        return self.answer
