"""How a job's end is classified."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.failures import FailurePolicy, RetryState
from gpu_launcher.jobs.job import Cause, Job, Refusal
from gpu_launcher.jobs.job_record import JobRecord, JobRun
from gpu_launcher.jobs.machine import Conclude
from gpu_launcher.jobs.outcome import classify_exit, killed_for_memory, result_of
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import oom_kills

DONE = Report(True, None, b"")
RAISED = Report(False, "raised ValueError", b"")
NO_MEMORY = Report(False, "raised OutOfMemoryError", b"", out_of_memory=True)
PRUNED = Report(False, "was pruned", b"", pruned=True)
KILLED = Report(False, "was killed by SIGTERM", b"{}", killed=True)
SILENT = None


@pytest.mark.parametrize(
    ("report", "facts", "outcome", "cause"),
    [
        (DONE, "", Outcome.COMPLETED, None),
        (DONE, "unwanted timed_out device_lost", Outcome.COMPLETED, None),
        (PRUNED, "unwanted timed_out device_lost", Outcome.PRUNED, None),
        (RAISED, "unwanted", Outcome.CANCELLED, None),
        (SILENT, "unwanted timed_out", Outcome.CANCELLED, None),
        (RAISED, "timed_out device_lost", Outcome.FAILED, Cause.TIMEOUT),
        (NO_MEMORY, "device_lost", Outcome.FAILED, Cause.DEVICE_LOST),
        (NO_MEMORY, "", Outcome.FAILED, Cause.OOM),
        (SILENT, "out_of_memory", Outcome.FAILED, Cause.OOM),
        (RAISED, "", Outcome.FAILED, Cause.EXCEPTION),
        (KILLED, "", Outcome.FAILED, Cause.CRASH),
        (KILLED, "unwanted", Outcome.CANCELLED, None),
        (SILENT, "", Outcome.FAILED, Cause.CRASH),
    ],
)
def test_first_fact_that_matches_decides_outcome_and_cause(
    report: Report | None, facts: str, outcome: Outcome, cause: Cause | None
) -> None:
    names = ("unwanted", "timed_out", "device_lost", "out_of_memory")
    assert classify_exit(report, **{name: name in facts.split() for name in names}) == (outcome, cause)


def record(**run: Any) -> JobRecord:
    made = JobRecord(Job(0, "lr=1", None), RetryState(FailurePolicy(), 0))
    if run:
        made.begin(JobRun(None, 0, **run))  # type: ignore[arg-type]
    return made


def ended(problem: str | None = None, *, stopped: bool = False, cancelled: bool = False) -> Conclude:
    return Conclude(0, stopped, problem, cancelled=cancelled)


def test_job_without_a_process_fails_only_for_a_reason() -> None:
    def how(conclusion: Conclude) -> tuple[Outcome, str | None]:
        result = result_of(record(), conclusion, None, {})
        return result.outcome, result.message

    assert how(ended(stopped=True)) == (Outcome.CANCELLED, "was not started")
    assert how(ended("was pruned", cancelled=True)) == (Outcome.CANCELLED, "was pruned")
    assert how(ended("could not be started")) == (Outcome.FAILED, "could not be started")


def test_message_names_broken_devices_and_what_was_printed_before_the_log() -> None:
    result = result_of(record(status=9, printed="no such module"), ended(), None, {"GPU 1": "is lost", "GPU 2": None})
    assert result.message is not None
    assert result.message.startswith("was killed by SIGKILL while it prepared itself")
    assert result.message.endswith("It had printed:\nno such module (GPU 1 is lost)")
    assert result.cause is Cause.DEVICE_LOST


def test_reason_of_the_machine_comes_before_that_of_the_job() -> None:
    assert result_of(record(status=15), ended("timed out"), RAISED, {}).message == "timed out"
    assert result_of(record(status=0), ended("timed out"), DONE, {}).message is None


def test_sigkill_is_blamed_on_memory_only_if_the_kernel_killed_meanwhile() -> None:
    before = oom_kills() - 1
    assert killed_for_memory(record(status=9, oom_kills=before).attempt)
    assert not killed_for_memory(record(status=15, oom_kills=before).attempt)
    assert not killed_for_memory(record(status=9, oom_kills=before + 1).attempt)
    assert not killed_for_memory(record(status=9, oom_kills=before, problem="its supervisor died").attempt)


@pytest.mark.parametrize("why", Refusal)
def test_result_says_why_the_node_cannot_run_the_job_unless_it_was_cancelled(why: Refusal) -> None:
    for cancelled, refused in ((False, why), (True, None)):
        conclusion = Conclude(0, False, "cannot be run", refused=why, cancelled=cancelled)
        assert result_of(record(status=9), conclusion, None, {}).refused is refused


def test_report_of_an_earlier_version_says_that_no_signal_ended_its_command():
    header, payload = KILLED.dump(7).split(b"\n", 1)
    fields = json.loads(header)
    del fields["killed"]
    assert Report.load(json.dumps(fields).encode() + b"\n" + payload) == replace(KILLED, killed=False)
