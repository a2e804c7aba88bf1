"""A job while it has a process, and the verdict when it has none any more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from signal import SIGKILL

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.leases import HeldLease, Ticket
from gpu_launcher.model import Device, Request, Share
from gpu_launcher.processes.exit_status import describe_exit
from gpu_launcher.processes.fork_server_client import JobProcess
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import oom_kills
from gpu_launcher.wording import device_names, duration


@dataclass(slots=True)
class Running:
    """What belongs to a job's process."""

    process: JobProcess
    server: int
    """Which fork server started it: how many were lost before."""
    unsupervised: bool = False
    """Its supervisor is gone, and the fork server will say more, unless it is dead, too."""
    log: str | None = None
    pid: int | None = None
    """Of its main process, once it has prepared itself."""
    device_environment: DeviceEnvironment | None = None
    """How it is told of its devices; None: as the sweep's jobs are."""
    status: int | None = None
    """How its main process ended, as `os.waitpid` gives it; None if nobody could tell."""
    printed: str = ""
    """The end of what it printed before it had a log."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived it and had to be ended."""
    problem: str | None = None
    """What went wrong around it, as a sentence without a subject."""
    report_digest: bytes | None = None
    """SHA-256 of its report's file, once it has said so."""
    final: bool = False
    """Trying again would be no use, or would do finished work twice."""
    request: Request | None = None
    """What it needs, from when it may get in line."""
    ticket: Ticket | None = None
    lease: HeldLease | None = None
    devices: tuple[Device, ...] = ()
    shares: Mapping[str, Share] = field(default_factory=dict)
    """What it had of each of its devices, by UUID."""
    oom_kills: int = 0
    """How many processes the kernel had killed for want of memory when it was started."""
    started: float | None = None
    """When its devices were granted; None before."""
    ended: float | None = None
    """When its process tree was known to be gone."""

    @property
    def duration(self) -> float | None:
        """Seconds from grant to end; None if it never ran."""
        if self.started is None or self.ended is None:
            return None
        return self.ended - self.started


def judge(
    job: Job,
    ran: Running | None,
    report: Report | None,
    *,
    stopped: bool,
    problem: str | None,
    timed_out: bool = False,
    faults: Mapping[str, str | None] | None = None,
    attempts: int = 1,
    cancelled: bool = False,
) -> JobResult:
    """How a job ended.

    `ran` is None if it never had a process, `problem` is what the machine found wrong with it, such as that it
    `timed_out`, `faults` are what is wrong with its devices, by label; `cancelled` if it was not wanted any more.
    """
    message: str | None
    if ran is None and problem is not None:
        outcome = Outcome.CANCELLED if cancelled else Outcome.FAILED
        return JobResult(job.number, job.label, outcome, None, problem, (), None, None, attempts=attempts)
    if ran is None:
        message = "was not started" if attempts == 1 else "was not started again"
        return JobResult(job.number, job.label, Outcome.CANCELLED, None, message, (), None, None, attempts=attempts)
    out_of_memory = report is None and _killed_for_want_of_memory(ran)
    if report is not None:
        outcome = Outcome.COMPLETED if report.ok else Outcome.FAILED
        message = None if report.ok else problem or report.message
        if report.pruned:
            outcome, message = Outcome.PRUNED, report.message
    else:
        outcome = Outcome.FAILED
        message = problem or ran.problem
        if message is None:
            assert ran.status is not None, "without a problem, its supervisor told how it ended"
            message = describe_exit(ran.status, _circumstances(ran), out_of_memory=out_of_memory)
        if ran.log is None and ran.printed:
            message = f"{message}. It had printed:\n{ran.printed}"
    broken = [f"{label} {fault}" for label, fault in (faults or {}).items() if fault]
    if outcome is Outcome.FAILED and broken:
        message = f"{message} ({'; '.join(broken)})"
    if (stopped or cancelled) and outcome is Outcome.FAILED:
        outcome = Outcome.CANCELLED
    cause = None
    if outcome is Outcome.FAILED:
        cause = _cause(report, timed_out=timed_out, broken=bool(broken), out_of_memory=out_of_memory)
    payload = None if report is None else report.payload
    return JobResult(
        number=job.number,
        label=job.label,
        outcome=outcome,
        payload=payload,
        message=message,
        devices=ran.devices,
        duration=ran.duration,
        log=ran.log,
        cause=cause,
        attempts=attempts,
        unsupervised=ran.unsupervised and cause is Cause.CRASH,
        origin=report.origin if report is not None else "",
    )


def _cause(report: Report | None, *, timed_out: bool, broken: bool, out_of_memory: bool) -> Cause:
    if timed_out:
        return Cause.TIMEOUT
    if broken:
        return Cause.DEVICE_LOST
    if out_of_memory or (report is not None and report.out_of_memory):
        return Cause.OOM
    return Cause.CRASH if report is None else Cause.EXCEPTION


def _killed_for_want_of_memory(ran: Running) -> bool:
    """Whether the kernel killed it: it died of SIGKILL, and the kernel has killed somebody for that meanwhile."""
    if ran.problem is not None or ran.status is None:
        return False
    return os.WIFSIGNALED(ran.status) and os.WTERMSIG(ran.status) == SIGKILL and oom_kills() > ran.oom_kills


def _circumstances(ran: Running) -> str:
    if ran.duration is None:
        return " while it prepared itself"
    where = f" on {device_names(ran.devices)}" if ran.devices else ""
    return f" after {duration(ran.duration)}{where}"
