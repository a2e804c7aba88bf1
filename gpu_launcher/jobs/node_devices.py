"""The devices of other machines that running sweeps have, for those who look at the pool of this one."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.launches import launches_in
from gpu_launcher.model import LOCAL, Device

if TYPE_CHECKING:
    from gpu_launcher.jobs.events import JobStarted
    from gpu_launcher.jobs.progress.tally import SweepTally

_log = get_logger("jobs.node_devices")

STATE_SECONDS = 0.5
"""Maximum seconds to wait for the state of a sweep, whose head answers at once unless it is suspended."""


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device of another machine, which a running sweep has."""

    device: Device
    sweep: Path
    jobs: Sequence[JobStarted]
    """The sweep's jobs on it."""
    seconds: Sequence[float]
    """How long each of them has run."""
    is_silent: bool
    """Whether its node has not been heard for a while."""


def node_devices(sweep: Path, tally: SweepTally) -> Iterator[NodeDevice]:
    """Return the devices of other machines that the sweep has."""
    for device in tally.devices:
        if device.node in ("", LOCAL):
            continue
        jobs = [
            job
            for job in tally.running.values()
            if any((one.node, one.uuid) == (device.node, device.uuid) for one in job.devices)
        ]
        seconds = [max(0.0, tally.now - job.time) for job in jobs]
        yield NodeDevice(device, sweep, jobs, seconds, device.node in tally.silent_nodes)


def nodes_of_running(directories: Sequence[Path]) -> list[NodeDevice]:
    """Return the devices of other machines that the sweeps in `directories` have now, as far as this user may ask."""
    found: list[NodeDevice] = []
    for directory in directories:
        if any(launch.is_alive for launch in launches_in(directory)):
            try:
                tally = _state_of(directory)
            except SteeringError as error:  # another user's, suspended, or without a socket
                _log.debug("the devices of %s are not known: %s", directory, error)
                continue
            if tally is not None:
                found += node_devices(directory, tally)
    return found


def _state_of(directory: Path) -> SweepTally | None:
    from gpu_launcher.jobs.progress.tally import SweepTally
    from gpu_launcher.jobs.steering import Sweep  # `status` starts sooner if no sweep runs

    end = time.monotonic() + STATE_SECONDS
    with closing(Sweep(directory).watch(seconds=STATE_SECONDS)) as watch:
        while not watch.is_over:
            for one in watch.receive():
                if isinstance(one, SweepTally):
                    return one
            left = end - time.monotonic()
            if left <= 0 or not select.select([watch], [], [], left)[0]:
                break
    return None
