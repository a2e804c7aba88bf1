"""Whether the kernel has killed processes because the host, or this container, ran out of memory."""

from __future__ import annotations

from pathlib import Path


def oom_kills(root: Path = Path("/")) -> int:
    """How many there were since the machine started, of the machine and of this process's cgroup (version 2).

    0 where that cannot be known. The sources: `oom_kill` in proc_vmstat(5) and in `memory.events`
    (Documentation/admin-guide/cgroup-v2.rst in the kernel's source).
    """
    total = _counter(root / "proc/vmstat")
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return total
    for line in lines:
        if line.startswith("0::"):
            total += _counter(root / "sys/fs/cgroup" / line[3:].lstrip("/") / "memory.events")
    return total


def _counter(file: Path) -> int:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
