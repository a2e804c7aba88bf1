"""Tests that failed jobs are run again, or end the sweep, as the options say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.sweep import Options
from hydra_plugins.gpu_pool_launcher._launch import LaunchError, _with_failures_so_far

Run = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = "retries.py"


def sweep(run: Run, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(directory, PROGRAM, "-m", "hydra.sweep.dir=sweep", "hydra.launcher.devices=simulated:2", *arguments)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("signal", "was killed by SIGKILL"),
        ("exit", "ended with exit code 3"),
        ("timeout", "ran longer than its timeout of 3.0 s"),
        ("oom", "raised RuntimeError: training failed"),
    ],
)
@pytest.mark.smoke
def test_a_failed_job_is_run_again_in_its_directory_and_each_log_is_kept(
    run: Run, tmp_path: Path, kind: str, why: str, method: str
) -> None:
    limit = ("hydra.launcher.timeout=3",) if kind == "timeout" else ()
    smaller = ("hydra.launcher.gpus=0.5",) if kind == "oom" else ()
    options = ("hydra.launcher.retries=2", f"hydra.launcher.start_method={method}", *limit, *smaller)
    done = sweep(run, tmp_path, f"kind={kind}", *options)
    assert done.returncode == 0, done.stderr
    assert "1 job: 1 completed" in done.stderr
    assert "1 attempt repeated" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "attempt 2 of 3 follows" in line]
    assert why in line
    job = tmp_path / "sweep" / "0"
    assert f"log: {job / 'job.attempt-1.log'}" in line
    assert "attempt 1 with" in (job / "job.attempt-1.log").read_text()
    assert (job / "job.log").read_text().startswith("attempt 2 with")


def test_a_job_that_shared_a_device_when_memory_ran_out_gets_a_whole_one(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "kind=oom", "hydra.launcher.retries=1", "hydra.launcher.memory=8GiB")
    assert done.returncode == 0, done.stderr
    job = tmp_path / "sweep" / "0"
    assert "attempt 1 with 1 of" not in (job / "job.attempt-1.log").read_text()
    assert "attempt 2 with 1 of" in (job / "job.log").read_text()


def test_a_job_for_which_no_larger_device_is_to_be_had_is_not_run_again(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "kind=oom", "hydra.launcher.retries=1")
    assert done.returncode == 1
    assert "follows" not in done.stderr
    assert "1 job: 1 failed" in done.stderr


def test_attempts_are_counted_and_the_last_failure_is_the_result(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "kind=signal,exit", "good=9", "hydra.launcher.retries=2")
    assert done.returncode == 1
    assert done.stderr.count("attempt 3 of 3 follows") == 2
    assert "2 jobs: 2 failed" in done.stderr
    for number in range(2):
        logs = sorted(path.name for path in (tmp_path / "sweep" / str(number)).glob("job*.log"))
        assert logs == ["job.attempt-1.log", "job.attempt-2.log", "job.log"]


@pytest.mark.parametrize(
    ("options", "again"),
    [
        (("kind=exception",), False),
        (("kind=exception", "hydra.launcher.retry_on=[exception,crash]"), True),
        (("kind=signal", "hydra.launcher.retry_on=oom"), False),
        (("kind=signal", "hydra.launcher.retry_on='oom,crash'"), True),
        (("kind=signal", "hydra.launcher.retries=0"), False),
    ],
)
def test_only_what_the_user_names_is_a_reason_to_try_again(
    run: Run, tmp_path: Path, options: tuple[str, ...], again: bool
) -> None:
    done = sweep(run, tmp_path, "hydra.launcher.retries=1", *options)
    assert ("attempt 2 of 2 follows" in done.stderr) is again
    assert (done.returncode == 0) is again


@pytest.mark.parametrize(
    ("option", "failed"), [("hydra.launcher.on_failure=stop", 1), ("hydra.launcher.max_failures=2", 2)]
)
def test_so_many_failures_end_the_sweep_and_the_rest_is_not_run(
    run: Run, tmp_path: Path, option: str, failed: int
) -> None:
    options = ("hydra.launcher.max_parallel=1", "hydra.launcher.retries=1", "hydra.launcher.retry_on=crash", option)
    done = sweep(run, tmp_path, "n=range(6)", "good=2", *options)
    assert done.returncode == 1
    # The next job may have started before the last job's result was processed.
    summary = re.search(r"6 jobs: (\d) failed, (?:(\d) cancelled, )?(\d) not run", done.stderr)
    assert summary is not None, done.stderr
    assert int(summary[1]) == failed
    assert int(summary[2] or 0) <= 1
    assert re.search(rf"stopped by {failed} failures?: {failed} of 6 finished", done.stderr)


def test_a_stop_by_failures_says_so_and_hydra_names_the_job_that_failed(run: Run, tmp_path: Path) -> None:
    options = ("hydra.launcher.on_failure=stop", "hydra.launcher.grace=20")
    done = sweep(run, tmp_path, "kind=hang,after_hang", *options)
    assert done.returncode == 1
    assert "stopping after 1 failure: waiting up to 20 s for 1 job" in done.stderr
    assert "2 jobs: 1 failed, 1 cancelled" in done.stderr
    closing = done.stderr.partition("Error executing job with overrides: ")[2]
    assert closing.startswith("['kind=after_hang']")
    assert "ValueError: a late mistake" in closing


@pytest.mark.parametrize(
    ("sweeper", "kind", "death"),
    [
        ("basic", "signal", "was killed by SIGKILL"),
        ("grid_async", "signal", "was killed by SIGKILL"),
        ("basic", "sys_exit", "called sys.exit(3)"),
    ],
)
def test_hydra_does_not_advise_a_stack_trace_after_a_message_of_ours(
    run: Run, tmp_path: Path, sweeper: str, kind: str, death: str
) -> None:
    done = sweep(run, tmp_path, f"kind={kind},exit", "+same=1", f"hydra/sweeper={sweeper}")
    assert done.returncode == 1
    closing = done.stderr.partition("Error executing job with overrides: ")[2].splitlines()
    assert closing[0] == f"['kind={kind}', '+same=1']"
    assert closing[1].startswith(f"job 0 (kind={kind}) {death}")
    assert len(closing) == 2


def test_failures_of_all_batches_of_a_sweep_count() -> None:
    def options(most: int | None) -> Options:
        policy = FailurePolicy(most=most)
        return Options("cpu", None, None, 1.0, None, None, DeviceEnvironment(), policy)

    assert _with_failures_so_far(options(None), 9).failures.most is None
    assert _with_failures_so_far(options(3), 0).failures.most == 3
    assert _with_failures_so_far(options(3), 2).failures.most == 1
    with pytest.raises(LaunchError, match=r"4 jobs of this sweep failed: hydra\.launcher\.max_failures="):
        _with_failures_so_far(options(3), 4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("retries=-1", "must be an integer >= 0, got -1"),
        ("retry_on=[cosmic_rays]", "must be one of exception, crash, oom, timeout, device_lost, got 'cosmic_rays'"),
        ("retry_on=5", "is not a list: give some of [exception, crash, oom, timeout, device_lost]"),
        ("max_failures=2 hydra.launcher.on_failure=stop", "on_failure=stop is max_failures=1: leave one of them out"),
        ("on_failure=panic", "must be one of continue, stop, got 'panic'"),
        ("max_failures=0", "must be an integer >= 1, or null for no limit, got 0"),
    ],
)
def test_nonsense_is_refused_with_the_option_and_the_remedy(
    run: Run, tmp_path: Path, option: str, message: str
) -> None:
    done = sweep(run, tmp_path, *f"hydra.launcher.{option}".split())
    assert done.returncode == 1
    assert f"hydra.launcher.{option.partition('=')[0]}" in done.stderr
    assert message in done.stderr
