"""What makes some devices a better choice: how loaded they are, how they are connected. Pure; the policy chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpu_launcher.devices.condition import Condition
    from gpu_launcher.model import Device

LEVELS = 4
"""Utilisation is told apart in so many steps from idle to full."""


class Connection(IntEnum):
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

    pairs: Mapping[frozenset[str], Connection] = field(default_factory=dict)

    def between(self, one: str, other: str) -> Connection:
        return self.pairs.get(frozenset((one, other)), Connection.UNKNOWN)


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
