"""What is done about failed jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.failures import FailurePolicy, NextAttempt, RetryState, larger_share, set_aside
from gpu_launcher.jobs.job import Cause, JobResult
from gpu_launcher.jobs.job_record import JobRun
from gpu_launcher.model import MILLIONTHS, WHOLE, Device, DeviceKind, Request, Share
from gpu_launcher.processes.exit_status import describe_exit
from gpu_launcher.processes.out_of_memory import is_out_of_gpu_memory, oom_kills

GIB = 1 << 30
SMALL = Device("a", 0, "small", DeviceKind.GPU, 16 * GIB)
LARGE = Device("b", 1, "large", DeviceKind.GPU, 80 * GIB)
HALF = Share(MILLIONTHS // 2, 4 * GIB)


def attempts(retries: int, retry_on: set[Cause] | None = None, before: int = 0) -> RetryState:
    policy = FailurePolicy(retries) if retry_on is None else FailurePolicy(retries, frozenset(retry_on))
    return RetryState(policy, before)


def failed(cause: Cause | None, attempt: int = 1, **more: object) -> JobResult:
    payload = b"" if cause in (Cause.OOM, Cause.EXCEPTION) else None
    return JobResult(0, "", Outcome.FAILED, payload, "failed", (), None, None, cause, attempt, **more)


def ran(device: Device | None = SMALL, share: Share = WHOLE, **more: object) -> JobRun:
    """How a job ran that asked for one `share` of a device."""
    process: Any = None
    running = JobRun(process, server=0, request=Request(1, share), started=1.0, **more)
    if device is not None:
        running.devices = (device,)
        running.shares = {device.uuid: share.of(device.memory)}
    return running


def never(request: Request) -> None:
    return None


def test_by_default_everything_but_an_exception_of_the_users_code_is_a_reason_to_try_again_once_one_may() -> None:
    assert not any(attempts(0).next(failed(cause), ran(LARGE, HALF), never) for cause in Cause)
    again = {cause for cause in Cause if attempts(2).next(failed(cause), ran(LARGE, HALF), never)}
    assert again == set(Cause) - {Cause.EXCEPTION}
    assert attempts(2).next(failed(None), ran(), never) is None


def test_attempts_are_counted_over_all_launches_and_retries_in_this_one() -> None:
    made = attempts(2, before=3)
    assert made.attempt == 4
    first, second, third = (made.next(failed(Cause.CRASH, 4 + n), ran(), never) for n in range(3))
    assert (first, second, third) == (NextAttempt(5, 6, 1, last=False), NextAttempt(6, 6, 2, last=False), None)
    assert made.attempt == 6
    assert made.latest_failure == failed(Cause.CRASH, 5)


def test_after_memory_ran_out_more_is_asked_for_with_patience_and_only_if_it_is_to_be_had() -> None:
    made = attempts(1)
    assert made.next(failed(Cause.OOM), ran(LARGE, HALF), never) == NextAttempt(2, 2, 1, last=True)
    assert made.request(Request(1, HALF, priority=3)) == Request(1, Share(MILLIONTHS, 4 * GIB), priority=3)
    asked: list[Request] = []

    def refuse(request: Request) -> str:
        asked.append(request)
        return "for more than there is"

    assert attempts(1).next(failed(Cause.OOM), ran(SMALL), refuse) is None
    assert asked == [Request(1, Share(MILLIONTHS, 16 * GIB + 1))]
    assert attempts(1).next(failed(Cause.OOM), ran(Device("c", 2, "silent", DeviceKind.GPU, None)), never) is None


def test_what_would_be_no_use_or_would_do_finished_work_twice_is_not_tried_again() -> None:
    assert attempts(1).next(failed(Cause.CRASH), ran(final=True), never) is None
    assert attempts(1).next(failed(Cause.DEVICE_LOST), ran(), lambda request: "all devices are broken") is None
    unborn = ran(None)
    unborn.started = None
    assert attempts(1, {Cause.EXCEPTION}).next(failed(Cause.EXCEPTION), unborn, never) is None
    assert attempts(1).next(failed(Cause.CRASH), unborn, never) is not None


def test_job_that_was_packed_too_tightly_runs_again_whole_and_once_without_a_retry() -> None:
    share, auto = Share(0, 4 * GIB), Request(1, auto_memory=True)
    packed, whole = ran(LARGE, share), ran(LARGE)
    packed.request = Request(1, share, auto_memory=True)
    whole.request = auto
    made = attempts(0, set())
    assert made.next(failed(Cause.OOM), packed, never) == NextAttempt(2, 2, 0, last=True)
    assert made.request(auto) == Request(1, Share(MILLIONTHS, 4 * GIB)), "and later peaks do not change that"
    assert made.next(failed(Cause.OOM, 2), ran(LARGE, Share(MILLIONTHS, 4 * GIB)), never) is None
    assert attempts(0).next(failed(Cause.OOM), whole, never) is None, "it had a whole device"
    assert attempts(0).next(failed(Cause.EXCEPTION), packed, never) is None
    assert attempts(0).next(failed(Cause.OOM), ran(LARGE, share), never) is None, "the user declared that share"
    later = attempts(1)
    assert later.next(failed(Cause.OOM), packed, never) == NextAttempt(2, 3, 0, last=True)
    assert later.next(failed(Cause.CRASH, 2), ran(LARGE), never) == NextAttempt(3, 3, 1, last=False)
    assert later.next(failed(Cause.CRASH, 3), ran(LARGE), never) is None


def test_after_memory_ran_out_a_job_gets_what_it_shared_for_itself_and_else_a_larger_device() -> None:
    assert larger_share(HALF, [SMALL], {"a": HALF}) == Share(MILLIONTHS, 4 * GIB)
    assert larger_share(WHOLE, [SMALL], {"a": WHOLE}) == Share(MILLIONTHS, 16 * GIB + 1)
    assert larger_share(WHOLE, [Device("c", 2, "silent", DeviceKind.GPU, None)], {"c": WHOLE}) is None
    assert larger_share(WHOLE, [SMALL, LARGE], {"a": WHOLE, "b": WHOLE}) == Share(MILLIONTHS, 80 * GIB + 1)


def test_the_log_of_an_attempt_gets_a_name_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "3.job.log"
    log.write_text("first")
    assert set_aside(str(log), 1) == str(tmp_path / "3.job.attempt-1.log")
    assert not log.exists()
    assert (tmp_path / "3.job.attempt-1.log").read_text() == "first"
    assert set_aside(str(log), 2) == str(log), "that one left none"
    log.write_text("another sweep's")
    assert set_aside(str(log), 1) == str(tmp_path / "3.job.attempt-1-2.log")
    assert set_aside(str(tmp_path / "3.job.attempt-1.log"), 1) == str(tmp_path / "3.job.attempt-1.log")
    (tmp_path / "file").touch()
    assert set_aside(str(tmp_path / "file" / "job.log"), 1) == str(tmp_path / "file" / "job.log")


def named(name: str, module: str) -> type[Exception]:
    return type(name, (RuntimeError,), {"__module__": module})


@pytest.mark.parametrize(
    "error",
    [
        named("OutOfMemoryError", "torch")("..."),
        named("OutOfMemoryError", "torch.cuda")("..."),
        named("ResourceExhaustedError", "tensorflow.python.framework.errors_impl")("..."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        named("XlaRuntimeError", "jaxlib.xla_extension")(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8"
        ),
        named("XlaRuntimeError", "jaxlib.xla_extension")("RESOURCE_EXHAUSTED: Failed to allocate 8 bytes"),
    ],
)
def test_a_gpu_that_ran_out_of_memory_is_recognised_also_behind_other_exceptions(error: Exception) -> None:
    assert is_out_of_gpu_memory(error)
    outer = ValueError("training failed")
    outer.__cause__ = error
    assert is_out_of_gpu_memory(outer)
    error.__context__ = outer  # a circle
    assert is_out_of_gpu_memory(outer)


class Odd(Exception):
    exceptions: Any = ["not", None, 5]


def test_an_exception_with_odd_attributes_hides_nothing() -> None:
    odd = Odd()
    assert not is_out_of_gpu_memory(odd)
    odd.exceptions = None
    assert not is_out_of_gpu_memory(odd)
    odd.exceptions = (RuntimeError("CUDA out of memory"),)
    assert is_out_of_gpu_memory(odd)
    odd = Odd()
    odd.__context__ = RuntimeError("CUDA out of memory")
    assert is_out_of_gpu_memory(odd)
    odd.__suppress_context__ = True
    assert not is_out_of_gpu_memory(odd)


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("CUDA out of memory"),
        RuntimeError("RESOURCE_EXHAUSTED: too many requests"),
        named("OutOfMemoryError", "mine")("..."),
        KeyboardInterrupt(),
        Wordless(),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_gpu_memory(error)


def test_the_kernels_count_of_processes_killed_for_want_of_memory_is_read(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    for file, text in {
        "proc/vmstat": "nr_free_pages 5\noom_kill 3\n",
        "proc/self/cgroup": "1:name=systemd:/\n0::/lab/session\n",
        "sys/fs/cgroup/lab/session/memory.events": "low 0\noom 9\noom_kill 4\noom_group_kill 0\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert oom_kills(tmp_path) == 4, "of its own cgroup"
    (tmp_path / "sys/fs/cgroup/lab/session/memory.events").unlink()
    assert oom_kills(tmp_path) == 3
    assert oom_kills() >= 0
    assert "because the host ran out of memory" in describe_exit(9, out_of_memory=True)


def test_attempts_that_failed_on_another_node_use_up_retries() -> None:
    made = RetryState(FailurePolicy(2), 3, failed=1)
    assert made.attempt == 4
    assert made.next(failed(Cause.CRASH, 4), ran(), never) == NextAttempt(5, 5, 2, last=False)
    assert made.next(failed(Cause.CRASH, 5), ran(), never) is None
