"""Finds the host's CPUs near a device, on which its job should run. Reads /sys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from gpu_launcher.model import Device

_BUS_ID = re.compile(r"([0-9a-f]+):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


def neighbourhood(bus_id: str, root: Path = Path("/")) -> tuple[int | None, tuple[int, ...]]:
    """The NUMA node of a PCI device and the CPUs near it; None and () if the kernel does not know them.

    `bus_id` has NVML's form, `00000000:3B:00.0`. Source: sysfs-bus-pci in the kernel's ABI documentation.
    """
    match = _BUS_ID.fullmatch(bus_id.strip().lower())
    if match is None:
        return None, ()
    device = root / "sys/bus/pci/devices" / f"{int(match[1], 16):04x}:{match[2]}"
    try:
        node = int((device / "numa_node").read_text())
        cpus = _cpu_list((device / "local_cpulist").read_text())
    except (OSError, ValueError):
        return None, ()
    return (node if node >= 0 else None), cpus  # -1: the firmware does not say


def cpus_near(devices: Sequence[Device], allowed: Collection[int]) -> frozenset[int] | None:
    """The CPUs of `allowed` that a job on `devices` should be pinned to; None if it should not be pinned.

    A job is not pinned if the CPUs near a device are unknown, if none of them is allowed, or if all allowed CPUs are
    near.
    """
    if not devices or not all(device.cpus for device in devices):
        return None
    near = frozenset(allowed) & {cpu for device in devices for cpu in device.cpus}
    return None if not near or near == frozenset(allowed) else near


def _cpu_list(text: str) -> tuple[int, ...]:
    """Read a list of CPUs: `0-3,8` is 0, 1, 2, 3, 8."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))
