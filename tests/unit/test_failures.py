"""What is done about failed jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_launcher.jobs.failures import FailurePolicy, roomier, set_aside
from gpu_launcher.jobs.job import Cause
from gpu_launcher.model import MILLIONTHS, WHOLE, Device, DeviceKind, Share
from gpu_launcher.processes.death import describe_exit
from gpu_launcher.processes.host_memory import oom_kills
from gpu_launcher.processes.memory_errors import is_out_of_gpu_memory

GIB = 1 << 30
SMALL = Device("a", 0, "small", DeviceKind.GPU, 16 * GIB)
LARGE = Device("b", 1, "large", DeviceKind.GPU, 80 * GIB)
HALF = Share(MILLIONTHS // 2, 4 * GIB)


def test_by_default_everything_but_an_exception_of_the_users_code_is_a_reason_to_try_again_once_one_may() -> None:
    assert not any(FailurePolicy().retries_after(cause, 1) for cause in Cause)
    policy = FailurePolicy(retries=2)
    assert {cause for cause in Cause if policy.retries_after(cause, 2)} == set(Cause) - {Cause.EXCEPTION}
    assert not any(policy.retries_after(cause, 3) for cause in Cause)
    assert not policy.retries_after(None, 1)


def test_after_memory_ran_out_a_job_gets_what_it_shared_for_itself_and_else_a_larger_device() -> None:
    assert roomier(HALF, [SMALL], {"a": HALF}) == Share(MILLIONTHS, 4 * GIB)
    assert roomier(WHOLE, [SMALL], {"a": WHOLE}) == Share(MILLIONTHS, 16 * GIB + 1)
    assert roomier(WHOLE, [SMALL, LARGE], {"a": WHOLE, "b": WHOLE}) == Share(MILLIONTHS, 80 * GIB + 1)


def test_the_log_of_an_attempt_gets_a_name_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "3.job.log"
    log.write_text("first")
    assert set_aside(str(log), 1) == str(tmp_path / "3.job.attempt-1.log")
    assert not log.exists()
    assert (tmp_path / "3.job.attempt-1.log").read_text() == "first"
    set_aside(str(log), 2)  # that one left none


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
    assert oom_kills(tmp_path) == 7
    assert oom_kills() >= 0
    assert "ran out of memory (see `dmesg`)" in describe_exit(9, out_of_memory=True)
