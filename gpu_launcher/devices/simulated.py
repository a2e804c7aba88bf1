"""Simulated GPUs for demonstrations and tests. Their UUIDs are the same in every process."""

from __future__ import annotations

from gpu_launcher.model import Device, DeviceKind

MEMORY = 80 * 2**30


def simulated_devices(count: int) -> tuple[Device, ...]:
    """Simulated GPUs 0 to `count` - 1 with 80 GiB each. All processes mean the same device by GPU 3."""
    return tuple(
        Device(f"SIMULATED-{index}", index, "Simulated GPU", DeviceKind.SIMULATED, MEMORY) for index in range(count)
    )
