"""Whether the kernel has killed processes because the host, or this container, ran out of memory."""

from __future__ import annotations

from pathlib import Path


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for it so far: of this process's cgroup, or else of the machine.

    0 where that cannot be known. The sources: `oom_kill` in `memory.events` of a cgroup of version 2
    (Documentation/admin-guide/cgroup-v2.rst in the kernel's source) and in proc_vmstat(5).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("0::"):
            count = _counter(root / "sys/fs/cgroup" / line[3:].lstrip("/") / "memory.events")
            if count is not None:
                return count
    return _counter(root / "proc/vmstat") or 0


def _counter(file: Path) -> int | None:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return None
