"""The answers of a probe of the machine's GPUs. Values only; nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from gpu_launcher.devices.choice import Links
from gpu_launcher.devices.condition import Condition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class UnusableGpu:
    """A GPU that is in the machine and cannot be given to jobs."""

    index: int
    """NVML index."""
    uuid: str | None
    """None where the device does not even tell that much, such as one that fell off the bus."""
    reason: str
    """Continues `GPU 1 ...`: what is wrong, and what to do, such as `is in MIG mode and ...`."""
    broken: bool = False
    """Whether it fails. Otherwise its settings make it unavailable to jobs."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All GPUs of the machine (or of the container), whatever any mask says; of those in MIG mode, the instances."""

    devices: tuple[Device, ...] = ()
    """Ready for jobs, in the order of their indices."""
    unusable: tuple[UnusableGpu, ...] = ()
    nothing_because: str | None = None
    """Where there is no GPU at all: why, such as `no NVIDIA driver found (...)`. None otherwise."""


class DeviceProbe(Protocol):
    """Says what is in the machine. Asked anew for each launch, because GPUs get lost and drivers get updated."""

    def inventory(self) -> Inventory:
        """The machine's GPUs, or why there is none. Raises DeviceError where the driver fails to answer."""

    def conditions(self, devices: Sequence[Device]) -> tuple[Condition, ...]:
        """How each of `devices` is doing now, in their order. Raises DeviceError where the driver fails to answer."""

    def links(self, devices: Sequence[Device]) -> Links:
        """How `devices` are connected. Raises DeviceError where the driver fails to answer."""


@dataclass(frozen=True, slots=True)
class FixedProbe:
    """A probe that always answers the same: a stand-in for tests and simulations."""

    answer: Inventory
    doing: tuple[Condition, ...] = ()
    wired: Links = field(default_factory=Links)

    def inventory(self) -> Inventory:
        return self.answer

    def conditions(self, devices: Sequence[Device]) -> tuple[Condition, ...]:
        known = {condition.uuid: condition for condition in self.doing}
        return tuple(known.get(device.uuid, Condition(device.uuid)) for device in devices)

    def links(self, devices: Sequence[Device]) -> Links:
        return self.wired
