"""CPU slots: devices for jobs that need no GPU, so that the pool also limits how many of those run at once."""

from __future__ import annotations

import os
from pathlib import Path

from gpu_launcher.model import Device, DeviceKind


def cpu_slots(count: int) -> tuple[Device, ...]:
    """CPU slots 0 to `count` - 1. A slot is a right to run one job, not a particular core."""
    return tuple(Device(f"CPU-{index}", index, "CPU slot", DeviceKind.CPU) for index in range(count))


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of CPUs that this process may use, at least 1: the smaller of its affinity and its cgroup's quota.

    A quota of 2.5 CPUs counts as 2. `root` contains /proc and /sys.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(root)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """The CPU time per second that the tightest cgroup above this process allows; None if there is no limit.

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
        # Any ancestor may have a limit. In a container the path may lie outside the mounted part. Then only the mount
        # itself, which is the container's own group, has the files.
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
    """Read a quota: `200000 100000` is 2.0; `max 100000`, `-1 100000` and an empty text mean no limit."""
    match text.split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period):
            return int(quota) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
