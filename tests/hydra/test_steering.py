"""Steers real sweeps of Hydra from another process: grids and searches."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

import gpu_launcher
from gpu_launcher import SteeringError, Sweep, load_results
from gpu_launcher.jobs.control import CancelJobs, ranges_of, spell, write_request
from gpu_launcher.jobs.control_socket import connect
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.manifest import State, read
from gpu_launcher.studies.trial_attrs import RETRY_OF
from tests.waiting import alive, until
from tests.warm import TextProgram

Start = Callable[..., TextProgram]

POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=sweep")


@pytest.fixture
def sweeping(start: Start, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a sweep of a program, and wait until two jobs run."""
    processes = []

    def sweep(program: str, *arguments: str) -> tuple[subprocess.Popen[str], Sweep]:
        process = start(tmp_path, program, "-m", *POOL, *arguments)
        processes.append(process)
        until(lambda: len(running(tmp_path)) == 2 or process.poll() is not None, "the sweep does not run")
        assert process.poll() is None, process.communicate()
        return process, Sweep(tmp_path / "sweep")

    yield sweep
    for process in processes:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def states(directory: Path) -> dict[int, State]:
    return {number: entry.state for number, entry in read(directory / "sweep").items()}


def running(directory: Path) -> list[int]:
    return [number for number, state in states(directory).items() if state is State.RUNNING]


def pids(directory: Path, job: int) -> list[int]:
    return [int(pid) for pid in (directory / "sweep" / str(job) / "pids").read_text().split()]


def suspend(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it is not suspended")


def fail(directory: Path, job: int) -> Path:
    """Let a running job of steered.py fail. Returns the file because of which it fails."""
    bad = directory / f"bad-{job}"
    bad.touch()
    until(lambda: states(directory)[job] is State.FAILED, "the job does not fail")
    return bad


def test_grid_is_steered(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("interrupted.py", "+manners=stubborn", "+x=0,1,2,3,4", "hydra.launcher.grace=60")
    first, second = running(tmp_path)  # whichever were prepared first
    early, late, later = sorted({*range(5)} - {first, second})
    until(lambda: (tmp_path / f"sweep/{first}/pids").exists(), "the first job has not begun")
    tree = pids(tmp_path, first)
    line = sweep.cancel(first, late)
    ending = f"job {first} cancelled: SIGTERM now, SIGKILL after 1m 00s"
    assert line == f"{ending}; job {late} cancelled before the start"
    until(lambda: states(tmp_path)[first] is State.CANCELLED, "the first job does not end")
    assert not any(map(alive, tree)), "nor does what it started"
    until(lambda: len(running(tmp_path)) == 2, "its device goes to the next job")
    with pytest.raises(SteeringError, match=rf"^job {first} has ended already: cancelled$"):
        sweep.cancel(first)
    (waits,) = {early, later} - {*running(tmp_path)}
    refusal = rf"^job {waits} cancelled before the start; .*sweep has no job 99 \(its 0-4\)$"
    with pytest.raises(SteeringError, match=refusal):
        sweep.cancel(waits, 99)
    status = sweep.status()
    assert (status["running"], status["total"], status["stopping"]) == (2, 5, None)
    until(lambda: sweep.status()["ended"] == {"cancelled": 3}, "the last job was prepared, and ends soon")
    assert "may take 1m 00s to end" in sweep.stop()
    sweep.stop(now=True)
    _, err = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT, "as after Ctrl-C"
    assert f"{spell(ranges_of([first, late]))} cancelled by `gpu-launcher cancel`" in err
    assert "(stopped by `gpu-launcher stop --now`: 0 of 5 finished)" in err
    assert "Traceback" not in err
    assert set(states(tmp_path).values()) == {State.CANCELLED}
    with pytest.raises(SteeringError, match=r"sweep has ended; to run the rest: cd .* hydra.launcher.resume=true$"):
        sweep.stop()


def test_grid_with_cancelled_jobs_fails_and_can_be_resumed(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "hydra/sweeper=grid_async", "x=0,1,2")
    sweep.cancel(0, 1)
    until(lambda: running(tmp_path) == [2], "jobs 0 and 1 do not end")
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "was cancelled by `gpu-launcher cancel`" in err
    assert "to run the rest:" in err
    assert states(tmp_path) == {0: State.CANCELLED, 1: State.CANCELLED, 2: State.COMPLETED}


def test_sweep_is_paused_limited_and_continued(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "x=0,1,2,3,4,5", "hydra.launcher.grace=60")
    assert sweep.pause() == f"{sweep.directory} is paused: no job is started, and 2 running jobs may continue"
    assert "is paused already" in sweep.pause()
    sweep.cancel(*running(tmp_path))
    until(lambda: not running(tmp_path), "the jobs do not end")
    assert sweep.status()["paused"] is True
    assert sweep.limit(1) == f"{sweep.directory} uses at most 1 device from now on; 0 jobs running"
    assert sweep.status()["running"] == 0
    assert sweep.resume() == f"{sweep.directory} continues"
    until(lambda: len(running(tmp_path)) == 1, "no job is started")
    sweep.limit(2)
    until(lambda: len(running(tmp_path)) == 2, "the limit is not raised")
    first, second = running(tmp_path)  # whichever were prepared first
    sweep.limit(None)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    started = rf"job(?= (?:{first}|{second}) .* started )"
    told = re.findall(rf"^\[gpu_pool\] (.* because of `.*`|{started})", err, re.MULTILINE)
    assert told == [
        "no job is started from now on, because of `gpu-launcher pause`",
        "at most 1 device from now on, because of `gpu-launcher limit`",
        "jobs are started again from now on, because of `gpu-launcher continue`",
        "job",
        "at most 2 devices from now on, because of `gpu-launcher limit`",
        "job",
        "no limit on devices from now on, because of `gpu-launcher limit`",
    ]
    assert set(states(tmp_path).values()) == {State.CANCELLED, State.COMPLETED}


def test_paused_sweep_stays_paused_in_its_next_batch(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "x=0,1,2,3", "hydra.sweeper.max_batch_size=2")
    sweep.limit(1)
    sweep.pause()
    (tmp_path / "go").touch()
    home = tmp_path / "sweep" / DIRECTORY
    until(lambda: 2 in states(tmp_path) and list(home.glob("launch-*.sock")), "the second batch does not begin")
    status = sweep.status()
    assert (status["paused"], status["devices"], status["running"]) == (True, 1, 0)
    sweep.resume()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "as in the batch before: no job is started before `gpu-launcher continue`" in err
    assert set(states(tmp_path).values()) == {State.COMPLETED}


def test_job_that_ignores_sigterm_is_killed_after_its_grace(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    _, sweep = sweeping("steered.py", "ignores=true,false", "hydra.launcher.grace=0.5")
    until(lambda: (tmp_path / "sweep/0/pids").exists(), "job 0 has not begun")
    assert "SIGKILL after 0.5 s" in sweep.cancel(0)
    until(lambda: states(tmp_path)[0] is State.CANCELLED, "job 0 is not killed")
    assert running(tmp_path) == [1]


@pytest.mark.parametrize(
    "arguments",
    [(), ("hydra/sweeper=grid_async",), ("hydra.launcher.nodes=[local]",)],
    ids=["basic", "grid_async", "nodes"],
)
def test_failed_and_cancelled_jobs_run_again_in_the_same_sweep(
    sweeping: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    process, sweep = sweeping("steered.py", "x=0,1,2,3", *arguments)
    failed, goes_on = running(tmp_path)  # whichever were prepared first
    bad = fail(tmp_path, failed)
    until(lambda: len(running(tmp_path)) == 2, "the others do not run")
    (waiting,) = {*range(4)} - {failed, *running(tmp_path)}
    with pytest.raises(SteeringError, match=rf"^job {goes_on} has not ended yet$"):
        sweep.retry(goes_on)
    with pytest.raises(SteeringError, match=r"^.*sweep has no job 9 \(its 0-3\)$"):
        sweep.retry(9)
    assert sweep.cancel(waiting) == f"job {waiting} cancelled before the start"
    until(lambda: sweep.status()["ended"] == {"failed": 1, "cancelled": 1}, "it does not end")
    assert sweep.retry(waiting) == f"job {waiting} runs again"
    bad.unlink()
    assert sweep.retry(failed=True) == f"job {failed} runs again"
    with pytest.raises(SteeringError, match=r"^.*sweep has no job that has failed$"):
        sweep.retry(failed=True)
    assert sweep.status()["ended"] == {}
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert f"job {failed} runs again, because of `gpu-launcher retry`" in err
    assert re.search(r"^\[gpu_pool\] 4 jobs: 4 completed in", err, re.MULTILINE)
    assert "to run the rest" not in err
    rows = load_results(tmp_path / "sweep")
    assert [(row.number, row.outcome, row.values) for row in rows] == [
        (number, "completed", {"value": float(number)}) for number in range(4)
    ]
    assert rows[failed].attempts == 2
    logs = tmp_path / f"sweep/{failed}"
    assert (logs / "job.attempt-1.log").read_text().startswith("attempt 1\n")
    assert (logs / "job.log").read_text() == "attempt 2\n"


def test_failure_of_a_job_that_runs_again_does_not_count(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "hydra/sweeper=grid_async", "x=0,1,2,3", "hydra.launcher.max_failures=2")
    first, _ = running(tmp_path)
    bad = fail(tmp_path, first)
    until(lambda: len(running(tmp_path)) == 2, "the others do not run")
    last = max({*range(4)} - {first, *running(tmp_path)})
    (tmp_path / f"bad-{last}").touch()
    bad.unlink()
    sweep.retry(first)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "stopping" not in err
    assert states(tmp_path) == {**dict.fromkeys(range(4), State.COMPLETED), last: State.FAILED}
    assert "4 jobs: 3 completed, 1 failed in" in err


def test_killed_sweep_resumes_jobs_that_were_to_run_again(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "x=0,1,2")
    failed, _ = running(tmp_path)
    bad = fail(tmp_path, failed)
    until(lambda: len(running(tmp_path)) == 2, "the third job does not run")
    sweep.retry(failed)  # it waits for a device
    process.kill()
    process.wait()
    assert states(tmp_path) == dict.fromkeys(range(3), State.LOST)
    with pytest.raises(SteeringError, match=r"sweep has ended; to run the rest: .*hydra.launcher.resume=true"):
        sweep.retry(failed)
    bad.unlink()
    resumed, _ = sweeping("steered.py", "x=0,1,2", "hydra.launcher.resume=true")
    (tmp_path / "go").touch()
    _, err = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, err
    assert [(row.number, row.outcome, row.values["value"]) for row in load_results(tmp_path / "sweep")] == [
        (number, "completed", float(number)) for number in range(3)
    ]


def test_trial_ends_once(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping(
        "steered.py", "hydra/sweeper=optuna_async", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=3"
    )
    sweep.cancel(0)
    until(lambda: running(tmp_path) == [1, 2], "no other trial runs")
    with pytest.raises(SteeringError, match=r"sweep: a trial of a search ends once: `gpu-launcher rerun 0` prints"):
        sweep.retry(0)
    (tmp_path / "go").touch()
    process.communicate(timeout=100)
    assert process.returncode == 0


def test_cancelled_job_is_not_retried(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping(
        "steered.py", "x=0,1", "hydra.launcher.retries=3", "hydra.launcher.retry_on=[exception,crash]"
    )
    until(lambda: (tmp_path / "sweep/0/pids").exists(), "job 0 has not begun")
    sweep.cancel(0)
    until(lambda: states(tmp_path)[0] is State.CANCELLED, "job 0 does not end")
    sweep.stop(now=True)
    process.communicate(timeout=100)
    assert {entry.attempts for entry in read(tmp_path / "sweep").values()} == {1}


def test_cancelled_trial_fails_and_is_not_queued_again(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping(
        "steered.py", "hydra/sweeper=optuna_async", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=3"
    )
    with pytest.raises(SteeringError, match=r"has no job 3 \(its 0-[12]\)"):  # the next trial may have been chosen
        sweep.cancel(3)
    sweep.cancel(0)
    until(lambda: running(tmp_path) == [1, 2], "no other trial runs")
    (tmp_path / "go").touch()
    process.communicate(timeout=100)
    assert process.returncode == 0
    study = optuna.load_study(study_name=None, storage=gpu_launcher.storage(f"sqlite:///{tmp_path}/sweep/study.db"))
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert not any(RETRY_OF in trial.user_attrs for trial in study.trials)


def test_suspended_sweep_does_not_answer_and_does_it_later(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "x=0,1,2")
    suspend(process)
    with pytest.raises(SteeringError, match=r"has not answered for 0.2 s: it may be suspended"):
        sweep.status(seconds=0.2)
    (path,) = (tmp_path / "sweep" / DIRECTORY).glob("launch-*.sock")
    with connect(path, 10.0) as killed:  # a command that is killed before it has its answer
        killed.sendall(write_request(CancelJobs(((1, 1),))))
    with connect(path, 10.0) as killed:  # and one that is killed before it has asked
        killed.sendall(write_request(CancelJobs(((0, 0),)))[:-1])
    process.send_signal(signal.SIGCONT)
    until(lambda: states(tmp_path)[1] is State.CANCELLED, "job 1 does not end")
    until(lambda: running(tmp_path) == [0, 2], "job 0 continues")


def test_killed_sweep_has_ended_and_can_be_resumed(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, sweep = sweeping("steered.py", "x=0,1")
    process.kill()
    process.wait()
    home = tmp_path / "sweep" / DIRECTORY
    (left,) = home.glob("launch-*.sock")
    with pytest.raises(SteeringError, match=r"sweep has ended; to run the rest: .*hydra.launcher.resume=true"):
        sweep.stop()
    resumed, _ = sweeping("steered.py", "x=0,1", "hydra.launcher.resume=true")
    assert sweep.status()["running"] == 2
    assert not left.exists()
    (tmp_path / "go").touch()
    resumed.communicate(timeout=100)
    assert resumed.returncode == 0
    assert not list(home.glob("launch-*"))


def test_head_that_dies_while_a_command_waits_is_noticed(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process, _ = sweeping("steered.py", "x=0,1")
    suspend(process)
    steering = subprocess.Popen(
        [sys.executable, "-m", "gpu_launcher.cli", "stop"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    until(lambda: psutil.Process(steering.pid).net_connections("unix"), "it does not connect")
    process.kill()
    _, err = steering.communicate(timeout=100)
    assert steering.returncode == 1
    assert err.startswith("gpu-launcher: sweep has ended; to run the rest: ")
