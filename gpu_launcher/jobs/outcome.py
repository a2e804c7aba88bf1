"""The result of a job: outcome, cause and message, from its report, its exit status and what else is known.

Memory that ran out is recognised in two ways. A job that reports an exception says itself whether a GPU's memory ran
out (`processes/out_of_memory.py`). A job that was killed without a report is compared with the kernel's count of
processes killed because the host's memory ran out (`killed_for_memory`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from signal import SIGKILL

from gpu_launcher.jobs.events import JobStarted, Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.job_record import JobRecord, JobRun
from gpu_launcher.jobs.machine import Conclude
from gpu_launcher.processes.exit_status import describe_exit
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import oom_kills
from gpu_launcher.wording import device_names, duration


def classify_exit(
    report: Report | None, *, unwanted: bool, timed_out: bool, device_lost: bool, out_of_memory: bool
) -> tuple[Outcome, Cause | None]:
    """Return the outcome of a job whose process ended, and the cause if it failed. The first rule that matches holds.

    `report` is None if the job left none. `unwanted`: the job was cancelled, or its sweep was stopped.
    """
    if report is not None and report.pruned:
        return Outcome.PRUNED, None
    if report is not None and report.ok:
        return Outcome.COMPLETED, None
    if unwanted:
        return Outcome.CANCELLED, None
    if timed_out:
        return Outcome.FAILED, Cause.TIMEOUT
    if device_lost:
        return Outcome.FAILED, Cause.DEVICE_LOST
    if out_of_memory or (report is not None and report.out_of_memory):
        return Outcome.FAILED, Cause.OOM
    return Outcome.FAILED, Cause.CRASH if report is None or report.killed else Cause.EXCEPTION


def result_of(
    record: JobRecord, conclusion: Conclude, report: Report | None, faults: Mapping[str, str | None]
) -> JobResult:
    """Return the result of a job's latest attempt. `faults` says what is wrong with its devices, by label."""
    if record.run is None:
        return not_started(record.job, record.retries.attempt, conclusion.problem, cancelled=conclusion.cancelled)
    run = record.run
    broken = [f"{label} {fault}" for label, fault in faults.items() if fault]
    out_of_memory = report is None and killed_for_memory(run)
    outcome, cause = classify_exit(
        report,
        unwanted=conclusion.stopped or conclusion.cancelled,
        timed_out=conclusion.timed_out,
        device_lost=bool(broken),
        out_of_memory=out_of_memory,
    )
    message = _message(run, conclusion.problem, report, out_of_memory=out_of_memory)
    if broken and (report is None or not (report.ok or report.pruned)):
        message = f"{message} ({'; '.join(broken)})"
    return JobResult(
        number=record.job.number,
        label=record.job.label,
        outcome=outcome,
        payload=None if report is None else report.payload,
        message=message,
        devices=run.devices,
        duration=run.duration,
        log=run.log,
        cause=cause,
        attempts=record.retries.attempt,
        unsupervised=run.unsupervised and cause is Cause.CRASH,
        origin="" if report is None else report.origin,
        left_behind=run.left_behind,
        figures=Figures({} if report is None else report.values, run.peak_memory, run.peak_device_memory),
        refused=conclusion.refused if outcome is Outcome.FAILED else None,
    )


def left_by(job: Job, report: Report, started: JobStarted | None, attempts: int, *, unwanted: bool) -> JobResult:
    """Return the result of a job that wrote its report before its node was lost.

    `started` is its latest start, if that is known, and `attempts` the number of its starts. `unwanted`: the job was
    cancelled, or its sweep was stopped.
    """
    outcome, cause = classify_exit(report, unwanted=unwanted, timed_out=False, device_lost=False, out_of_memory=False)
    return JobResult(
        number=job.number,
        label=job.label,
        outcome=outcome,
        payload=report.payload,
        message=None if report.ok else report.message,
        devices=() if started is None else started.devices,
        duration=None if started is None else time.monotonic() - started.time,
        log=None if started is None else started.log,
        cause=cause,
        attempts=attempts,
        origin=report.origin,
        figures=Figures(report.values),
    )


def not_started(job: Job, attempt: int, problem: str | None, *, cancelled: bool = False) -> JobResult:
    """Return the result of a job whose `attempt` never had a process. It failed if there was a `problem`."""
    failed = problem is not None and not cancelled
    outcome = Outcome.FAILED if failed else Outcome.CANCELLED
    message = problem or ("was not started" if attempt == 1 else "was not started again")
    return JobResult(job.number, job.label, outcome, None, message, (), None, None, attempts=attempt)


def _message(run: JobRun, problem: str | None, report: Report | None, *, out_of_memory: bool) -> str | None:
    if report is not None:
        if report.pruned:
            return report.message
        return None if report.ok else problem or report.message
    message = problem or run.problem
    if message is None:
        assert run.status is not None, "without a problem, its supervisor told how it ended"
        message = describe_exit(run.status, _circumstances(run), out_of_memory=out_of_memory)
    if run.log is None and run.printed:
        message = f"{message}. It had printed:\n{run.printed}"
    return message


def killed_for_memory(run: JobRun) -> bool:
    """Whether the kernel killed the job because the host's memory ran out.

    This is assumed if the job died of SIGKILL and the kernel has killed a process for that reason since its start.
    """
    if run.problem is not None or run.status is None:
        return False
    return os.WIFSIGNALED(run.status) and os.WTERMSIG(run.status) == SIGKILL and oom_kills() > run.oom_kills


def _circumstances(run: JobRun) -> str:
    if run.duration is None:
        return " while it prepared itself"
    where = f" on {device_names(run.devices)}" if run.devices else ""
    return f" after {duration(run.duration)}{where}"
