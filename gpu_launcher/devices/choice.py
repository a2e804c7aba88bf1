"""Which devices are a better choice, by their load and their connections. Pure; the grant policy chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from gpu_launcher.errors import RequestError
from gpu_launcher.model import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpu_launcher.devices.condition import Condition
    from gpu_launcher.model import Device

LEVELS = 4
"""Utilisation is told apart in so many steps from idle to full."""


class LinkKind(IntEnum):
    """How two GPUs reach each other: higher is better. All but NVLink are NVML's nvmlGpuTopologyLevel_t."""

    UNKNOWN = 0
    SYSTEM = 1
    """Over the link between two NUMA nodes."""
    NODE = 2
    """Within a NUMA node, over the link between its PCIe host bridges."""
    HOST_BRIDGE = 3
    SEVERAL_SWITCHES = 4
    SWITCH = 5
    """Over one PCIe switch."""
    BOARD = 6
    NVLINK = 7


@dataclass(frozen=True, slots=True)
class Links:
    """The connections between devices, by UUID. What is not there is UNKNOWN, and the same in both directions."""

    pairs: Mapping[frozenset[str], LinkKind] = field(default_factory=dict)

    def between(self, one: str, other: str) -> LinkKind:
        return self.pairs.get(frozenset((one, other)), LinkKind.UNKNOWN)


def combinable(devices: Sequence[Device], count: int) -> tuple[Device, ...]:
    """The `devices` from which a job may get `count` at once: of several, none may be a MIG instance.

    CUDA shows a process one MIG instance at most, and no other GPU beside it (NVIDIA's MIG user guide, "CUDA Device
    Enumeration"). Raises RequestError where only MIG instances would make up the number.
    """
    if count < 2:
        return tuple(devices)
    whole = tuple(device for device in devices if device.kind is not DeviceKind.MIG)
    if len(whole) < count <= len(devices):
        raise RequestError(
            f"the request is for {count} devices, and here that takes MIG instances, of which CUDA lets a job use one: "
            "ask for one device, or have the administrator make whole GPUs of them (nvidia-smi -mig 0)"
        )
    return whole


def load_levels(conditions: Iterable[Condition], before: Mapping[str, int] | None = None) -> dict[str, int]:
    """How loaded each device is, by UUID, in steps from 0 (idle) to `LEVELS`; idle where that is not known.

    Give what was returned last as `before`: a level then stays until utilisation is clearly at another one, so that
    an order made of levels does not change with every measurement.
    """
    levels = {}
    for condition in conditions:
        load = (condition.utilisation or 0.0) * LEVELS
        level = (before or {}).get(condition.uuid)
        levels[condition.uuid] = level if level is not None and abs(load - level) <= 0.75 else round(load)
    return levels


def by_load(devices: Iterable[Device], levels: Mapping[str, int]) -> tuple[Device, ...]:
    """`devices`, the least loaded first; in the order given where they are equally loaded."""
    return tuple(sorted(devices, key=lambda device: levels.get(device.uuid, 0)))
