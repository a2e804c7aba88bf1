"""Converts a survey of the pool to JSON. docs/status.md documents the fields; incompatible changes increase SCHEMA."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from gpu_launcher.allocation.survey import label
from gpu_launcher.model import MILLIONTHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu_launcher.allocation.survey import DeviceSeen, PoolSurvey
    from gpu_launcher.devices import GpuProcess
    from gpu_launcher.jobs.node_devices import NodeDevice
    from gpu_launcher.leases import LeaseView, TicketView
    from gpu_launcher.model import Owner, Share

SCHEMA = 1


def to_json(survey: PoolSurvey, processes: Mapping[str, Sequence[int]], nodes: Sequence[NodeDevice]) -> dict[str, Any]:
    """Convert a survey and the `nodes` of running sweeps to JSON data. `processes` are those of jobs, by lease."""
    view = survey.view
    return {
        "schema": SCHEMA,
        "version": installed_version("gpu-launcher"),
        "time": survey.time,
        "machine": survey.machine,
        "pool": {
            "directory": str(survey.pool.directory),
            "exists": survey.pool.view is not None,
            "other_machines": list(view.elsewhere),
        },
        "devices": [_device(seen) for seen in survey.devices],
        "leases": [_lease(lease, processes.get(lease.id, ()), survey.time) for lease in view.leases],
        "queue": [
            _ticket(position, ticket, why, survey.time)
            for position, (ticket, why) in enumerate(zip(view.tickets, survey.reasons, strict=True), 1)
        ],
        "nodes": [_node_device(seen) for seen in nodes],
        "notices": list(survey.notices),
    }


def installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _node_device(seen: NodeDevice) -> dict[str, Any]:
    device = seen.device
    return {
        "node": device.node,
        "uuid": device.uuid,
        "label": device.label,
        "kind": device.kind.value,
        "name": device.name,
        "memory": device.memory,
        "in_contact": not seen.is_silent,
        "sweep": str(seen.sweep.absolute()),
        "jobs": [
            {"number": job.number, "label": job.label, "seconds": seconds}
            for job, seconds in zip(seen.jobs, seen.seconds, strict=True)
        ],
    }


def _device(seen: DeviceSeen) -> dict[str, Any]:
    device, condition = seen.device, seen.condition
    processes = None if condition is None else condition.processes
    known = device.index >= 0
    return {
        "uuid": device.uuid,
        "label": label(device),
        "kind": device.kind.value,
        "index": device.index if known else None,
        "instance": device.instance,
        "name": device.name or None,
        "memory": {"total": device.memory, "used": None if condition is None else condition.memory_used},
        "utilisation": None if condition is None else condition.utilisation,
        "state": seen.state.value,
        "reason": seen.reason,
        "leases": [hold.lease.id for hold in seen.holds],
        "processes": None if processes is None else [_process(one, one in seen.strangers) for one in processes],
    }


def _process(process: GpuProcess, foreign: bool) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "user": process.user,
        "command": process.command,
        "memory": process.memory,
        "foreign": foreign,
    }


def _lease(lease: LeaseView, processes: Sequence[int], now: float) -> dict[str, Any]:
    shares = None if lease.shares is None else [_share(uuid, share) for uuid, share in lease.shares.items()]
    return {
        "id": lease.id,
        **_owner(lease.owner),
        **_since(lease.since, now),
        "seconds_left": lease.left,
        "processes": list(processes),
        "shares": shares,
    }


def _share(uuid: str, share: Share) -> dict[str, Any]:
    return {"device": uuid, "fraction": share.millionths / MILLIONTHS, "memory": share.memory or None}


def _ticket(position: int, ticket: TicketView, why: str, now: float) -> dict[str, Any]:
    request = None if ticket.demand is None else ticket.demand.request
    return {
        "position": position,
        "id": ticket.id,
        "priority": ticket.priority,
        **_owner(ticket.owner),
        **_since(ticket.since, now),
        "request": request
        and {
            "devices": request.gpus,
            "fraction": request.share.millionths / MILLIONTHS or None,
            "memory": request.share.memory or None,
            "timeout": request.timeout,
        },
        "candidates": None if ticket.candidates is None else list(ticket.candidates),
        "reason": why,
    }


def _owner(owner: Owner | None) -> dict[str, Any]:
    if owner is None:
        return {"user": None, "pid": None, "command": None, "suspended": None}
    return {"user": owner.user, "pid": owner.pid or None, "command": owner.command, "suspended": owner.suspended}


def _since(since: float | None, now: float) -> dict[str, Any]:
    return {"since": since, "seconds": None if since is None else max(0.0, now - since)}
