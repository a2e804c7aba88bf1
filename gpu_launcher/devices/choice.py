"""Ranks devices by their load and their connections, for the grant policy, which chooses. Pure."""

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
"""Number of steps of utilisation from idle to full."""


class LinkKind(IntEnum):
    """The kind of connection between two GPUs; higher is better. All but NVLink come from nvmlGpuTopologyLevel_t."""

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
    """The connections between devices, by UUID, the same in both directions. Missing ones are UNKNOWN."""

    pairs: Mapping[frozenset[str], LinkKind] = field(default_factory=dict)

    def between(self, one: str, other: str) -> LinkKind:
        return self.pairs.get(frozenset((one, other)), LinkKind.UNKNOWN)


def combinable(devices: Sequence[Device], count: int) -> tuple[Device, ...]:
    """The `devices` from which a job may get `count` at once. If `count` is above 1, MIG instances are excluded.

    CUDA shows a process at most one MIG instance, and then no other GPU (NVIDIA's MIG user guide, "CUDA Device
    Enumeration"). Raises RequestError if there are not enough devices without MIG instances.
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
    """The load of each device, by UUID, in steps from 0 (idle or unknown) to `LEVELS`.

    `before` is the previous result. A level then changes only when utilisation is clearly at another one, so that an
    order made of levels does not change with every measurement.
    """
    levels = {}
    for condition in conditions:
        load = (condition.utilisation or 0.0) * LEVELS
        level = (before or {}).get(condition.uuid)
        levels[condition.uuid] = level if level is not None and abs(load - level) <= 0.75 else round(load)
    return levels


def by_load(devices: Iterable[Device], levels: Mapping[str, int]) -> tuple[Device, ...]:
    """Sort `devices` by load, the least loaded first. Equally loaded devices keep their order."""
    return tuple(sorted(devices, key=lambda device: levels.get(device.uuid, 0)))
