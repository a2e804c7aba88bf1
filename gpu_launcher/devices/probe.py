"""The interface of a probe of the machine's GPUs, and its answers. Nothing here touches a device."""

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
    """A GPU of the machine that cannot be given to jobs."""

    index: int
    """NVML index."""
    uuid: str | None
    """None if the device does not tell its UUID, for example because it fell off the bus."""
    reason: str
    """What is wrong and what to do; continues `GPU 1 ...`, such as `is in MIG mode and ...`."""
    broken: bool = False
    """Whether it is faulty. Otherwise its settings make it unavailable to jobs."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """All GPUs of the machine or container, regardless of masks. A GPU in MIG mode is replaced by its instances."""

    devices: tuple[Device, ...] = ()
    """The devices that jobs can use, in the order of their indices."""
    unusable: tuple[UnusableGpu, ...] = ()
    nothing_because: str | None = None
    """Why there is no GPU at all, such as `no NVIDIA driver found (...)`; None if there is one."""


class DeviceProbe(Protocol):
    """Reads the machine's devices. It is asked again for each launch, because GPUs get lost and drivers get updated."""

    def inventory(self) -> Inventory:
        """The machine's GPUs, or why there are none. Raises DeviceError if the driver does not answer."""

    def conditions(self, devices: Sequence[Device]) -> tuple[Condition, ...]:
        """The current condition of each of `devices`, in their order. Raises DeviceError if the driver is silent."""

    def links(self, devices: Sequence[Device]) -> Links:
        """The connections between `devices`. Raises DeviceError if the driver does not answer."""


@dataclass(frozen=True, slots=True)
class FixedProbe:
    """A probe with fixed answers, for tests and simulations and where an inventory was already read."""

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
