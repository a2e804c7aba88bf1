"""CPU slots: devices for jobs that need no GPU, so that the same pool limits how many run at once."""

from __future__ import annotations

import os
from pathlib import Path

from gpu_launcher.model import Device, DeviceKind


def cpu_slots(count: int) -> tuple[Device, ...]:
    """CPU slots 0 to `count` - 1. A slot is a right to run one job, not a particular core."""
    return tuple(Device(f"CPU-{index}", index, "CPU slot", DeviceKind.CPU) for index in range(count))


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: its affinity, or its cgroup's quota where that is less. At least 1.

    A quota of 2.5 CPUs counts as 2. `root` is where /proc and /sys are looked for.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(root)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup above this process allows, or None where none limits it.

    Sources: cgroups(7) for /proc/self/cgroup, the kernel's cgroup-v2.rst for `cpu.max`, sched-bwc.rst for v1.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path:
            continue
        if controllers == "":
            mount, read_quota = root / "sys/fs/cgroup", _v2_quota
        elif "cpu" in controllers.split(","):
            mount, read_quota = root / "sys/fs/cgroup/cpu", _v1_quota
        else:
            continue
        group = mount / path.lstrip("/")
        # A limit may be set on any ancestor. In a container the path may lie outside what is mounted: then
        # only the mount itself, which is the container's own group, has the files.
        for directory in (group, *group.parents):
            if (quota := read_quota(directory)) is not None:
                quotas.append(quota)
            if directory == mount:
                break
    return min(quotas, default=None)


def _v2_quota(directory: Path) -> float | None:
    return _ratio(_read(directory / "cpu.max"))


def _v1_quota(directory: Path) -> float | None:
    return _ratio(f"{_read(directory / 'cpu.cfs_quota_us')} {_read(directory / 'cpu.cfs_period_us')}")


def _ratio(text: str) -> float | None:
    """`200000 100000` is 2.0; `max 100000`, `-1 100000` and nothing at all are no limit."""
    match text.split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
            return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
