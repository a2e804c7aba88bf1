"""Surveys the devices that the user names and the pool, and finds the processes of jobs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence

from gpu_launcher.allocation.readings import PoolWindow, measure, nvml_kept_open, put_together
from gpu_launcher.allocation.survey import Found, PoolSurvey
from gpu_launcher.devices import FixedProbe, Inventory, NvmlProbe, select_devices
from gpu_launcher.devices.specification import Auto, CpuSlots, SimulatedDevices, read_specification
from gpu_launcher.devices.visibility import VISIBLE, visible
from gpu_launcher.errors import DeviceError
from gpu_launcher.leases import LeaseView, leases_of
from gpu_launcher.model import Device
from gpu_launcher.processes.linux import children_of_all, descendants
from gpu_launcher.sizes import read_memory

OPTION = "--devices"
BUSY_MEMORY_OPTION = "--busy-memory"


def look(devices: str, busy_memory: str, pool_dir: str | None) -> PoolSurvey:
    """Survey devices and pool once. Raises OptionError and PoolDirectoryError."""
    most = read_busy_memory(busy_memory)
    with contextlib.closing(PoolWindow(pool_dir)) as pool, nvml_kept_open():
        found = find(devices, os.environ)
        conditions, notices = measure(found.measured)
        return put_together(found, conditions, pool.look(), most, notices)


def read_busy_memory(value: str) -> int | None:
    """Read a value as `hydra.launcher.busy_memory` does. Raises OptionError."""
    return None if value == "null" else read_memory(value, BUSY_MEMORY_OPTION)


def find(spec: str, environ: Mapping[str, str]) -> Found:
    """Find the devices that `spec` names, in the launcher's syntax. Raises OptionError."""
    specification = read_specification(spec, OPTION)
    if isinstance(specification, (CpuSlots, SimulatedDevices)):
        selection = select_devices(spec, environ, option=OPTION)
        return Found(selection.devices, known=_by_uuid(selection.devices), only=True)
    try:
        inventory = NvmlProbe().inventory()
    except DeviceError as error:
        if not isinstance(specification, Auto):
            raise
        return Found((), notices=(str(error),))
    known = _by_uuid(inventory.devices)
    if not isinstance(specification, Auto):
        names = list(specification.names)  # a list, because a single index would be read as a number of GPUs
        selection = select_devices(names, environ, FixedProbe(inventory), option=OPTION)
        return Found(selection.devices, known=known, notices=selection.notices, only=True)
    seen = visible(inventory, environ)
    if not seen.devices and not seen.unusable:
        selection = select_devices(spec, environ, FixedProbe(inventory), option=OPTION)
        return Found(selection.devices, known=known | _by_uuid(selection.devices), notices=selection.notices)
    return Found(seen.devices, seen.unusable, known, seen.notices + _hidden(inventory, len(seen.devices), environ))


def processes_of(leases: Iterable[LeaseView]) -> dict[str, list[int]]:
    """The process ids of jobs, by lease: the children of the supervisor that holds the lease.

    A lease has none if a program holds it for itself, or if /proc does not show its processes. The ids come from the
    kernel, because a lease's file is written before the job's process exists.
    """
    leases = list(leases)
    children = children_of_all()
    parent = {child: pid for pid, its_children in children.items() for child in its_children}
    holders: dict[str, set[int]] = {}
    for owner in {lease.owner.pid for lease in leases if lease.owner is not None}:
        for pid in descendants(owner, children):
            for lease_id in leases_of(pid):
                holders.setdefault(lease_id, set()).add(pid)
    found = {}
    for lease_id, pids in holders.items():
        above_the_jobs = {pid for pid in pids if parent[pid] not in pids}
        # The node also holds the lease that it was granted. It is an ancestor of the supervisor.
        nodes = {pid for pid in above_the_jobs if above_the_jobs & set(descendants(pid, children))}
        found[lease_id] = sorted(job for pid in above_the_jobs - nodes for job in children.get(pid, ()))
    return found


def _by_uuid(devices: Sequence[Device]) -> dict[str, Device]:
    return {device.uuid: device for device in devices}


def _hidden(inventory: Inventory, seen: int, environ: Mapping[str, str]) -> tuple[str, ...]:
    hidden = len(inventory.devices) - seen
    if not hidden:
        return ()
    devices = "1 device" if hidden == 1 else f"{hidden} devices"
    mask = f"{VISIBLE}={environ.get(VISIBLE)!r}"
    return (f"{mask} hides {devices} here; devices with leases or tickets are shown anyway",)
