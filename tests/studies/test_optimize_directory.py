"""`optimize(directory=...)`: a real search in a real program, which other processes see, steer and read."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher import ManifestError, OptionError, SteeringError, Sweep, load_results
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.manifest import State, read, read_manifest
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.where import Where
from tests.small_disk import fill, mounted_tmpfs
from tests.waiting import alive, until

PROGRAM = """
import os
import sys
import time
from pathlib import Path

import optuna
import gpu_launcher

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    kind = trial.suggest_categorical("kind", ["plain", None])
    print(f"trial {trial.number} begins")
    Path(f"pid-{trial.number}").write_text(str(os.getpid()))
    try:
        while not (Path("go").exists() or Path(f"go-{trial.number}").exists()):
            if Path(f"bad-{trial.number}").exists():
                raise RuntimeError("bad luck")
            time.sleep(0.02)
    except KeyboardInterrupt:
        if Path("stubborn").exists():
            time.sleep(600)
        raise
    return x

if __name__ == "__main__":
    storage = gpu_launcher.storage("sqlite:///study.db") if "--stored" in sys.argv else None
    study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True)
    pool = gpu_launcher.Pool("simulated:2", "pool")
    trials = 4
    kept = gpu_launcher.optimize(
        study, objective, trials, pool=pool, catch=RuntimeError, directory="search", retry_stale=1
    )
    print("states:", *(trial.state.name for trial in study.trials))
"""

Start = Callable[..., tuple["subprocess.Popen[str]", Sweep]]


def states(directory: Path) -> dict[int, State]:
    return {number: entry.state for number, entry in read(directory / "search").items()}


def running(directory: Path) -> list[int]:
    return [number for number, state in states(directory).items() if state is State.RUNNING]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the program, and wait until two trials run."""
    (tmp_path / "program.py").write_text(PROGRAM)
    processes = []

    def begin(*arguments: str) -> tuple[subprocess.Popen[str], Sweep]:
        process = subprocess.Popen(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)

        def two_run() -> bool:
            return len([one for one in running(tmp_path) if (tmp_path / f"pid-{one}").exists()]) == 2

        until(lambda: two_run() or process.poll() is not None, "the search does not run")
        assert process.poll() is None, process.communicate()
        return process, Sweep(tmp_path / "search")

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def command(directory: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gpu_launcher.cli", *words], cwd=directory, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.smoke
def test_search_is_seen_steered_and_read_from_other_processes(start: Start, tmp_path: Path) -> None:
    process, sweep = start()
    assert sorted(running(tmp_path)) == [0, 1]
    (listed,) = json.loads(command(tmp_path, "sweeps", "--json"))["sweeps"]
    assert (listed["state"], listed["total"], listed["jobs"]["running"]) == ("running", 4, 2)
    assert listed["command"] == "program.py"
    assert command(tmp_path, "log", "1") == "trial 1 begins\n"
    until(lambda: all("x" in entry.spec for entry in read(tmp_path / "search").values()), "parameters are not recorded")
    watch = sweep.watch()
    assert sweep.limit(1).endswith("uses at most 1 device from now on; 2 jobs running")
    assert "is paused: no job is started, and 2 running jobs may continue" in sweep.pause()
    tree = int((tmp_path / "pid-0").read_text())
    assert sweep.cancel(0) == "job 0 cancelled: SIGTERM now, SIGKILL after 10.0 s"
    until(lambda: states(tmp_path)[0] is State.CANCELLED, "trial 0 does not end")
    assert not alive(tree)
    with pytest.raises(SteeringError, match="job 0 has ended already: cancelled"):
        sweep.cancel(0)
    for refused in (lambda: sweep.retry(0), lambda: sweep.retry(failed=True)):
        with pytest.raises(SteeringError, match=r"a trial ends once.*study\.enqueue_trial"):
            refused()
    with pytest.raises(SteeringError, match="job 1 has not ended yet"):
        sweep.retry(1)
    with pytest.raises(SteeringError, match=r"has no job 9 \(its 0-1\)"):
        sweep.cancel(9)
    status = sweep.status()
    assert (status["paused"], status["devices"], status["running"]) == (True, 1, 1)
    assert running(tmp_path) == [1], "no trial is started while it is paused"
    sweep.limit(None)
    assert sweep.resume().endswith("continues")
    until(lambda: running(tmp_path) == [1, 2] and (tmp_path / "pid-2").exists(), "no trial is started")
    (tmp_path / "bad-1").touch()
    until(lambda: states(tmp_path)[1] is State.FAILED, "trial 1 does not fail")
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out == "states: FAIL FAIL COMPLETE COMPLETE\n", "a cancelled trial fails, and is not queued again"
    assert "at most 1 device from now on, because of `gpu-launcher limit`" in err
    assert "job 0 cancelled by `gpu-launcher cancel`" in err
    assert "results: gpu-launcher results search" in err
    until(lambda: any("SweepEnded" in type(event).__name__ for event in watch.receive()) or watch.is_over, "no end")
    watch.close()
    assert "RuntimeError: bad luck" in command(tmp_path, "log", "1")
    table = load_results(tmp_path / "search")
    assert [row.outcome for row in table] == ["cancelled", "failed", "completed", "completed"]
    assert table.directions == {"value": "minimize"}
    assert table.best is not None
    for row in table:
        assert {*row.params} == {"x", "kind"}
        assert row.directory == str(tmp_path / "search" / str(row.number))
        assert row.devices
        assert row.values == ({"value": row.params["x"]} if row.outcome == "completed" else {})
        assert row.duration is not None
    rows = list(csv.DictReader((tmp_path / "search/results.csv").read_text().splitlines()))
    assert [row["outcome"] for row in rows] == [row.outcome for row in table]
    summary = "4 jobs (2 completed, 1 failed, 1 cancelled)"
    assert command(tmp_path, "wait") == f"search has ended with exit code 0. {summary}\n"
    assert not list((tmp_path / "search" / DIRECTORY).glob("launch-*"))


@pytest.mark.thorough
def test_stop_is_ctrl_c_and_the_search_continues_in_its_directory(start: Start, tmp_path: Path) -> None:
    process, sweep = start("--stored")
    assert sweep.stop().endswith("search stops: 2 running jobs may take 10.0 s to end")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (-signal.SIGINT, ""), "as after Ctrl-C"
    assert "stopping after `gpu-launcher stop`: waiting up to 10 s for 2 jobs" in err
    assert set(states(tmp_path).values()) == {State.CANCELLED}
    assert read_manifest(tmp_path / "search").exit_code == 128 + signal.SIGINT
    (tmp_path / "go").touch()
    process = subprocess.Popen([sys.executable, "program.py", "--stored"], cwd=tmp_path, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=200)
    assert out == b"states: FAIL FAIL COMPLETE COMPLETE COMPLETE COMPLETE\n", "interrupted trials are queued again"
    assert [*states(tmp_path).values()] == 2 * [State.CANCELLED] + 4 * [State.COMPLETED]
    params = [row.params for row in load_results(tmp_path / "search")]
    assert all(one in params[2:4] for one in params[:2])


@pytest.mark.thorough
@pytest.mark.parametrize("stopping", [True, False])
def test_stop_now_does_not_wait_for_trials(start: Start, tmp_path: Path, stopping: bool) -> None:
    process, sweep = start()
    (tmp_path / "stubborn").touch()
    if stopping:
        sweep.stop()
        assert "is stopping already: 2 running jobs" in sweep.stop()
        with pytest.raises(SteeringError, match="it is stopping, so no more jobs are started"):
            sweep.limit(1)
    assert sweep.stop(now=True).endswith("search stops: 2 running jobs killed")
    _, err = process.communicate(timeout=100)
    assert "stopping after `gpu-launcher stop --now`: killing 2 jobs" in err
    assert set(states(tmp_path).values()) == {State.CANCELLED}


@pytest.mark.thorough
def test_killed_search_is_lost_and_its_directory_is_free(start: Start, tmp_path: Path) -> None:
    process, sweep = start("--stored")
    processes = [int((tmp_path / f"pid-{number}").read_text()) for number in (0, 1)]
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, processes)), "the trials do not end")
    assert set(states(tmp_path).values()) == {State.LOST}
    with pytest.raises(SteeringError, match="search has ended"):
        sweep.cancel(0)
    (tmp_path / "go").touch()
    subprocess.run([sys.executable, "program.py", "--stored"], cwd=tmp_path, check=True, timeout=200)
    assert [*states(tmp_path).values()] == 2 * [State.LOST] + 4 * [State.COMPLETED]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_new_study_begins_its_directory_anew_and_keeps_the_old_logs(tmp_path: Path, pool: Where) -> None:
    def objective(trial: Any) -> tuple[float, float]:
        print("printed")
        os.write(2, b"written\n")
        return trial.suggest_float("x", 0, 1), 2.0

    for trials in (3, 2):
        study = optuna.create_study(directions=["minimize", "maximize"])
        study.set_metric_names(["loss", "accuracy"])
        gpu_launcher.optimize(study, objective, trials, pool=pool, directory=tmp_path / "search")
        table = load_results(tmp_path / "search")
        assert len(table) == trials
        assert table.directions == {"loss": "minimize", "accuracy": "maximize"}
        assert [[*row.values.values()] for row in table] == [trial.values for trial in study.trials]
    assert (tmp_path / "search/0/job.log").read_text() == "printed\nwritten\n"
    assert (tmp_path / "search/0/job.attempt-1.log").read_text() == "printed\nwritten\n"


def test_no_directory_is_made_unless_it_is_asked_for(
    tmp_path: Path, pool: Where, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def objective(trial: Any) -> float:
        os.write(1, b"to the terminal\n")
        return 1.0

    gpu_launcher.optimize(optuna.create_study(), objective, 1, pool=pool)
    assert list(Path().iterdir()) == []
    assert "to the terminal" in capfd.readouterr().out


def test_directory_that_cannot_be_used_is_refused(tmp_path: Path, pool: Where) -> None:
    (tmp_path / "file").touch()
    refused: dict[object, str] = {"": "'' is not a path", 7: "7 is not a path", "a\0b": r"'a\\x00b' is not a path"}
    refused[tmp_path / "file"] = "cannot be written"
    for directory, why in refused.items():
        with pytest.raises(OptionError, match=f"^directory: .*{why}"):
            gpu_launcher.optimize(optuna.create_study(), lambda trial: 1.0, 1, pool=pool, directory=directory)  # type: ignore[arg-type]


def test_a_table_that_cannot_be_written_is_said_to_users_who_silence_optuna(
    tmp_path: Path, pool: Where, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "optuna")
    (tmp_path / "search/results.csv").mkdir(parents=True)
    study = optuna.create_study()
    gpu_launcher.optimize(study, lambda trial: 1.0, 1, pool=pool, directory=tmp_path / "search")
    (said,) = [record.getMessage() for record in caplog.records if "results.csv" in record.getMessage()]
    assert said.startswith(f"{tmp_path}/search/results.csv cannot be written (")
    assert said.endswith(f": to print the table: gpu-launcher results {tmp_path}/search --csv")


def test_directory_of_a_map_is_refused_and_keeps_its_record(tmp_path: Path, pool: Where) -> None:
    Recorder(
        tmp_path, [Job(0, "n=0", {"n": 0})], "gpu-launcher map", how_to_resume="gpu-launcher map --resume x"
    ).close()
    with pytest.raises(OptionError, match=r"^directory: .* has the results of a Hydra sweep or a map: give another"):
        gpu_launcher.optimize(optuna.create_study(), lambda trial: 1.0, 1, pool=pool, directory=tmp_path)
    assert [entry.spec for entry in read(tmp_path).values()] == [{"n": 0}]


def test_directory_in_use_is_refused(tmp_path: Path, pool: Where) -> None:
    study = optuna.create_study()
    where = tmp_path / "search"
    raised: list[str] = []

    def again(study: optuna.Study, trial: Any) -> None:
        other = optuna.create_study()
        study._thread_local.in_optimize_loop = other._thread_local.in_optimize_loop = False
        try:
            gpu_launcher.optimize(other, lambda trial: 1.0, 1, pool=pool, directory=where)
        except ManifestError as error:
            raised.append(str(error))

    gpu_launcher.optimize(study, lambda trial: 1.0, 1, pool=pool, directory=where, callbacks=[again])
    (why,) = raised
    assert f"{where} is being run by process {os.getpid()}" in why
    assert why.endswith("give another directory, or wait for it")
    assert [entry.state for entry in read(where).values()] == [State.COMPLETED]


def test_directory_that_another_thread_has_just_taken_is_refused(tmp_path: Path, pool: Where) -> None:
    lock = DirectoryLock.take(tmp_path, "train.py", "")  # its launch is not recorded until its node is there
    study = optuna.create_study()
    with pytest.raises(ManifestError, match=f"is being run by process {os.getpid()}"):
        gpu_launcher.optimize(study, lambda trial: 1.0, 1, pool=pool, directory=tmp_path)
    lock.close()
    gpu_launcher.optimize(study, lambda trial: 1.0, 1, pool=pool, directory=tmp_path)
    assert len(study.trials) == 1


def test_trial_whose_process_dies_has_a_log_and_is_recorded(tmp_path: Path, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        print("last words", flush=True)
        os._exit(3)

    study = optuna.create_study()
    with pytest.raises(gpu_launcher.JobError, match="exit") as caught:
        gpu_launcher.optimize(study, objective, 2, n_jobs=1, pool=pool, directory=tmp_path / "search")
    log = tmp_path / "search/0/job.log"
    assert (caught.value.log, log.read_text()) == (str(log), "last words\n")
    (row,) = load_results(tmp_path / "search")
    assert (row.outcome, {*row.params}) == ("failed", {"x"})
    assert "exit" in (row.message or "")
    assert read_manifest(tmp_path / "search").exit_code == 1


@pytest.mark.thorough
def test_trials_fail_if_the_process_that_starts_jobs_is_killed(tmp_path: Path, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        node = os.getpid()
        while (parent := psutil.Process(node).ppid()) != program:
            node = parent
        os.kill(node, signal.SIGKILL)
        time.sleep(600)
        return 1.0

    program = os.getpid()
    with pytest.raises(gpu_launcher.NodeDiedError):
        gpu_launcher.optimize(optuna.create_study(), objective, 1, pool=pool, directory=tmp_path)
    (row,) = load_results(tmp_path)
    assert (row.outcome, row.message) == ("failed", "its search ended before it did")


@pytest.mark.thorough
def test_spawned_trials_have_logs(tmp_path: Path, pool: Where) -> None:
    def objective(trial: Any) -> float:
        print("hello")
        return 1.0

    where = tmp_path / "search"
    gpu_launcher.optimize(optuna.create_study(), objective, 1, pool=pool, directory=where, start_method="spawn")
    assert "hello\n" in (where / "0/job.log").read_text()


@pytest.mark.thorough
def test_trials_on_several_nodes_are_recorded(tmp_path: Path) -> None:
    def objective(trial: Any) -> float:
        print("on a node")
        return float(trial.suggest_float("x", 0, 1))

    nodes = [f"command:env GPU_LAUNCHER_POOL_DIR={tmp_path}/pool-{name}" for name in "ab"]
    study, where = optuna.create_study(), tmp_path / "search"
    gpu_launcher.optimize(study, objective, 4, pool=Where("simulated:1"), nodes=nodes, directory=where)
    table = load_results(where)
    assert [row.values["value"] for row in table] == [trial.value for trial in study.trials]
    assert all(row.node for row in table)
    assert [(where / str(row.number) / "job.log").read_text() for row in table] == 4 * ["on a node\n"]


@pytest.mark.root
@pytest.mark.thorough
def test_search_continues_when_the_disk_of_its_directory_is_full(
    tmp_path: Path, pool: Where, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"

    def objective(trial: Any) -> float:
        x: float = trial.suggest_float("x", 0, 1)
        if trial.number == 2:
            fill(disk)
        return x

    study = optuna.create_study()
    with mounted_tmpfs(disk, "size=256k"):
        gpu_launcher.optimize(study, objective, 6, pool=pool, directory=disk / "search")
        assert f"{disk}/search/results.csv cannot be written (No space left on device)" in caplog.text
        (disk / "filler").unlink()
        outcomes = {number: entry.state for number, entry in read(disk / "search").items()}
        found = {row.number: row.params.get("x") for row in load_results(disk / "search")}
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    assert [outcomes[number] for number in (0, 1)] == [State.COMPLETED] * 2
    assert all(found[number] == study.trials[number].params["x"] for number in (0, 1))
