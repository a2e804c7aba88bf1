"""A node and a display that a test plays, for the head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.events import Event, JobStarted, Notice
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.node_messages import Message, Opened
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import Device

OPTIONS = Options(
    devices=None,
    request=None,
    max_parallel=None,
    grace=10.0,
    pool_dir=None,
    busy_memory=None,
    device_environment=DeviceEnvironment(),
)


class PlayedNode:
    """A node with two devices, and always something to receive."""

    def __init__(self) -> None:
        self.early: list[Message] = []
        self.closed = False
        self._readable = os.eventfd(1, os.EFD_CLOEXEC)

    def open(self) -> Opened:
        return Opened(simulated_devices(2), 2, "fork")

    def fileno(self) -> int:
        return self._readable

    def tick(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            os.close(self._readable)
        self.closed = True


class PlayedSource:
    """A source that remembers the results of its jobs."""

    def __init__(self) -> None:
        self.results: dict[int, JobResult] = {}
        self._readable = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._readable

    def coming(self) -> range:
        return range(0)

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        pass

    def on_message(self, number: int, what: Any) -> None:
        pass

    def ended(self, result: JobResult) -> None:
        self.results[result.number] = result

    def retry(self, jobs: Sequence[Job]) -> None:
        pass

    def tick(self) -> None:
        pass

    def close(self) -> None:
        os.close(self._readable)


class Display:
    """Remembers the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> None:
        self.events.append(event)

    def tick(self, now: float) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]


def listed(jobs: int) -> list[Job]:
    return [Job(number, f"n={number}", None) for number in range(jobs)]


def started(number: int) -> JobStarted:
    return JobStarted(0.0, number, f"n={number}", simulated_devices(1), None)
