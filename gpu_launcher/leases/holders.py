"""Which leases a process has, as the kernel knows it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from gpu_launcher.leases.records import LEASE_NAME


def leases_of(pid: int) -> set[str]:
    """Ids of the leases of which the process has a descriptor; none where that cannot be seen. For display."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if match := LEASE_NAME.fullmatch(descriptor.readlink().name):
                    found.add(match[1])
    return found
