"""A sweep's dealings with the pool: one job at a time waits for its devices, and the user is told for whom.

Everything here is asked by the loop and answers at once; what it needs to hear about is readable at `descriptors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from gpu_launcher.allocation.device_watch import DeviceWatch
from gpu_launcher.allocation.explain import WaitReason, describe_request, explain_wait
from gpu_launcher.allocation.feasibility import refusal
from gpu_launcher.debug_log import get_logger
from gpu_launcher.devices import combinable
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.jobs.events import JobWaiting, Notice, Progress
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.job_record import JobRun
from gpu_launcher.leases import HeldLease, Ledger, leases_of
from gpu_launcher.model import Device, Owner, Request

_log = get_logger("jobs.pool")

EXPLAIN = 1.0
"""Seconds between two looks at who holds the devices that a job waits for."""
BEARING = 60.0
"""Seconds for which a sweep of which nothing runs waits for an unusable pool directory."""


class PoolSide:
    """The devices of a sweep, and its place in line."""

    def __init__(
        self,
        devices: tuple[Device, ...],
        ledger: Ledger,
        watch: DeviceWatch,
        owner: Callable[[Job], Owner],
        progress: Progress,
        clock: Callable[[], float],
        program: int | None = None,
    ) -> None:
        """Deal with `ledger` for `devices`, and say on `progress` what the user should know.

        `program` is the process for which the jobs are run; None: this one.
        """
        self.devices = {device.uuid: device for device in devices}
        self._ledger = ledger
        self._watch = watch
        self._owner = owner
        self._progress = progress
        self._clock = clock
        self._program = os.getpid() if program is None else program
        self.waiting: int | None = None
        """The job whose ticket is out, or would be if the pool directory could be used."""
        self._announced: dict[str, str] = {}
        """Faults of devices that the user was told of, by UUID."""
        self._explain_at = 0.0
        self._explained = WaitReason("", ())
        self._trouble_since: float | None = None
        """When the pool directory became unusable; None while it is not."""

    def descriptors(self) -> list[tuple[int, Callable[[], None]]]:
        """What to watch, with what to call when it is readable."""
        watched = [(self._watch.fileno(), self._hear_of_devices)]
        if (descriptor := self._ledger.fileno()) is not None:
            watched.append((descriptor, self._hear_of_leases))
        return watched

    def begin(self) -> None:
        """Look at the devices for the first time."""
        self._watch.look_again(self._clock())

    def look(self) -> None:
        """Look at the devices if it is time to."""
        self._watch.look(self._clock(), waiting=self.waiting is not None)

    @property
    def patience(self) -> float | None:
        """Seconds until something must be asked though nothing calls; None if there is nothing to ask."""
        return None if self.waiting is None else self._ledger.poll_interval

    @property
    def faults(self) -> dict[str, str | None]:
        """What is wrong with devices, by UUID."""
        return {uuid: self._watch.faults.get(uuid) for uuid in self.devices}

    def idle(self) -> list[Device]:
        """The devices that could be granted now, and of which nobody has a share."""
        leases = self._ledger.snapshot().leases
        if any(lease.uuids is None for lease in leases):
            return []
        held = {uuid for lease in leases for uuid in lease.uuids or ()} | set(self._watch.unavailable)
        return [device for uuid, device in self.devices.items() if uuid not in held]

    def _hear_of_leases(self) -> None:
        self._ledger.drain()
        if self._watch.unavailable:
            # What ended may have been what looked like a stranger.
            self._watch.look_again(self._clock())

    def _hear_of_devices(self) -> None:
        self._watch.receive()
        faults = self._watch.faults
        for uuid, fault in faults.items():
            if self._announced.get(uuid) != fault:
                text = f"{self.devices[uuid].label} {fault}; it is set aside"
                _log.warning("%s", text)
                self._progress.handle(Notice(self._clock(), text))
        self._announced = dict(faults)

    # Getting devices

    def wait_for(self, number: int) -> None:
        """This job is the one that waits now."""
        self.waiting = number
        self._explained = WaitReason("", ())

    @property
    def ready(self) -> bool:
        """Whether it is known how the devices are."""
        return self._watch.ready

    def enqueue(self, job: JobRun, of: Job) -> None:
        """Get in line. Raises PoolDirectoryError."""
        assert job.request is not None
        devices = combinable(tuple(self.devices.values()), job.request.gpus)
        job.ticket = self._ledger.enqueue(job.request, devices, self._owner(of))

    def claim(self, job: JobRun, of: Job, running: Iterable[JobRun]) -> HeldLease | None:
        """Ask for the devices of the job that waits, and is in line.

        `running` are the sweep's jobs that have a process. Raises PoolDirectoryError.
        """
        assert job.ticket is not None
        lease = self._ledger.claim(job.ticket, self._watch.unavailable, self._watch.preference)
        if lease is None:
            self._explain(job, of, running)
        else:
            self.waiting = None
            job.ticket = None
        self._trouble_since = None
        return lease

    def drop(self, job: JobRun) -> None:
        """Give up the place in line."""
        if job.ticket is not None:
            self._ledger.cancel(job.ticket)
        job.ticket = None
        self.waiting = None

    def release(self, lease: HeldLease) -> None:
        """Give devices back."""
        self._ledger.release(lease)
        self._watch.released(lease.uuids, self._clock())

    def forget(self, job: JobRun) -> None:
        """Give back what a job has, whatever that is, because everything ends."""
        if job.lease is not None:
            self._ledger.release(job.lease)
        if job.ticket is not None:
            self._ledger.cancel(job.ticket)

    def bears(self, error: PoolDirectoryError) -> bool:
        """Whether the sweep can still wait for the pool directory to be mended."""
        now = self._clock()
        if self._trouble_since is None:
            self._trouble_since = now
            self._progress.handle(Notice(now, f"{error}. Jobs that run go on, the others wait for that to be mended"))
        return now - self._trouble_since <= BEARING

    def close_in_child(self) -> None:
        """In a fork of this process: leases and tickets are this process's alone."""
        self._ledger.close_in_child()
        self._watch.close_in_child()

    # Saying why not

    def _explain(self, job: JobRun, of: Job, running: Iterable[JobRun]) -> None:
        """Tell the user whom the sweep waits for, if that is not its own jobs."""
        now = self._clock()
        if now < self._explain_at:
            return
        self._explain_at = now + EXPLAIN
        assert job.ticket is not None
        own = {one.lease.id for one in running if one.lease is not None}
        devices = tuple(self.devices.values())
        wait = explain_wait(
            self._ledger.snapshot(),
            devices,
            own,
            job.ticket,
            self._watch.unavailable,
            mine=leases_of(self._program),
            program=self._program,
        )
        if wait != self._explained:
            _log.info("job %d waits: %s", of.number, wait.reason or "for its own jobs only")
            wanted = describe_request(job.request, devices) if job.request is not None else ""
            self._progress.handle(JobWaiting(now, of.number, of.label, wait.reason, wait.held_by_others, wanted))
            self._explained = wait

    def refusal(self, request: Request) -> str | None:
        """Why these devices could never grant a request, as a sentence that goes on from `is`."""
        return refusal(request, tuple(self.devices.values()))

    def refusal_now(self, request: Request) -> str | None:
        """The same of those that are not broken."""
        sound = tuple(device for device in self.devices.values() if not self._watch.faults.get(device.uuid))
        return refusal(request, sound)
