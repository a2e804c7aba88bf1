"""Tests `hydra/sweeper=optuna_async` in real sweeps: the studies that they leave, and how later sweeps continue."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.studies.trial_attrs import JOB, RETRY_OF
from tests.waiting import until
from tests.warm import TextProgram

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

PROGRAM = "trials.py"
SWEEPER = ("hydra/sweeper=optuna_async", "hydra.sweep.dir=sweep")
POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2")
RANDOM = "hydra/sweeper/sampler=random"
SPACE = "x=interval(-2.0,2.0)"


def study(directory: Path, name: str = "trials", url: str | None = None) -> optuna.Study:
    url = url or f"sqlite:///{directory / 'sweep' / 'study.db'}"
    return optuna.load_study(study_name=name, storage=gpu_launcher.storage(url))


def trials(directory: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials; empty until the study exists."""
    if not (directory / "sweep" / "study.db").exists():
        return []
    try:
        return study(directory).trials
    except KeyError:
        return []


def states(of: optuna.Study) -> list[str]:
    return [trial.state.name for trial in of.trials]


def stopped(of: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that were stopped with their sweep. Each must be queued again.

    A trial that was still being sampled may be missing, because it has no complete parameters to run.
    """
    failed = [trial for trial in of.trials if trial.state is TrialState.FAIL]
    waiting = [trial for trial in of.trials if trial.state is TrialState.WAITING]
    assert [*failed, *waiting] == of.trials
    copied = {trial.user_attrs[RETRY_OF][-1] for trial in waiting}
    assert len(copied) == len(waiting) >= 2
    others = [trial for trial in failed if trial.number not in copied]
    assert len(others) <= 1
    assert all(JOB not in trial.user_attrs for trial in others), "it had begun"
    return [trial for trial in failed if trial.number in copied]


def witness(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "witness.jsonl").read_text().splitlines()]


def began(directory: Path) -> dict[int, dict[str, Any]]:
    return {entry["began"]: entry for entry in witness(directory) if "began" in entry}


def sweep(run: Run, directory: Path, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = run(directory, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, *arguments)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


def importances(stdout: str) -> dict[str, list[float]]:
    """The importances of each parameter, from the table at the end of a sweep."""
    lines = [line.partition("[HYDRA] ")[2] for line in stdout.splitlines()]
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("parameter importances"))
    rows = [line.split() for line in lines[begin + 1 :] if line.startswith("  ")]
    return {name: [float(part) for part in parts] for name, *parts in rows}


# Features of the official sweeper


@pytest.mark.smoke
def test_the_best_trial_is_found_shown_and_saved(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "y=choice(0.0,5.0)", "hydra.sweeper.n_trials=12")
    trials = study(tmp_path).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    best = min(trials, key=lambda trial: trial.values[0])
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert found == {"name": "optuna", "best_params": best.params, "best_value": best.values[0]}
    assert f"trial {best.number} (x={best.params['x']}" in done.stdout
    assert str(tmp_path / "sweep" / str(best.number)) in done.stdout
    assert importances(done.stdout).keys() == {"x", "y"}
    assert sum(first for (first,) in importances(done.stdout).values()) == pytest.approx(1, abs=0.02)


def test_every_job_runs_with_its_trials_number_and_values(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "y=7", "hydra.sweeper.n_trials=6")
    jobs = began(tmp_path)
    for trial in study(tmp_path).trials:
        job = jobs[trial.number]
        assert (job["x"], job["y"], job["trial"]) == (trial.params["x"], 7, trial.number)
        overrides = yaml.safe_load((tmp_path / "sweep" / str(trial.number) / ".hydra" / "overrides.yaml").read_text())
        assert overrides == [f"x={trial.params['x']}", "y=7"]
        described = trial.user_attrs["gpu_launcher:job"]
        assert described["directory"] == str(tmp_path / "sweep" / str(trial.number))
        assert described["devices"][0].startswith("simulated GPU ")
        assert described["started"] <= described["ended"]
        assert trial.user_attrs["gpu_launcher:owner"]["host"] == os.uname().nodename == described["host"]


def test_values_reach_the_jobs_as_they_were_written(run: Run, tmp_path: Path) -> None:
    odd = ["a,b", "it's", '"quoted"', "{a: b}", " spaced ", "[1]", "two\nlines", "true", "1e-3", "", "back\\slash"]
    choices = ",".join("'" + text.replace("'", "\\'") + "'" for text in odd)
    sweep(run, tmp_path, f"value=choice({choices},3,3.5,true,[1,2])", "hydra/sweeper/sampler=grid")
    seen = [job["value"] for job in began(tmp_path).values()]
    assert sorted(map(repr, seen)) == sorted(map(repr, [*odd, 3, 3.5, True, [1, 2]]))


def test_params_in_the_config_are_searched_and_the_command_line_goes_before_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "conf" / "more").mkdir(parents=True)
    params = "{x: 'interval(0.0, 1.0)', y: 'interval(0.0, 1.0)'}"
    (tmp_path / "conf" / "more" / "space.yaml").write_text(
        f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n"
    )
    space = ("+more=space", "y=3", "hydra.sweeper.n_trials=3")
    done = run(tmp_path, PROGRAM, "--config-dir=conf", "-m", *SWEEPER, *POOL, RANDOM, *space)
    assert done.returncode == 0, done.stderr
    assert all(list(trial.params) == ["x"] for trial in study(tmp_path).trials)
    assert {job["y"] for job in began(tmp_path).values()} == {3}


def test_a_function_can_add_to_the_search_space(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "hydra.sweeper.custom_search_space=__main__.more", "hydra.sweeper.n_trials=4")
    jobs = began(tmp_path)
    for trial in study(tmp_path).trials:
        assert 0 <= trial.params["y"] - trial.params["x"] <= 1
        assert jobs[trial.number]["y"] == trial.params["y"]


def test_several_objectives_give_a_pareto_front(run: Run, tmp_path: Path) -> None:
    directions = "hydra.sweeper.direction=[minimize,maximize]"
    space = (SPACE, "y=interval(0.0,1.0)")
    done = sweep(run, tmp_path, *space, "does=two", directions, "hydra.sweeper.n_trials=6")
    table = importances(done.stdout)
    assert {name: len(parts) for name, parts in table.items()} == {"x": 2, "y": 2}
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    best = study(tmp_path).best_trials
    assert found["solutions"] == [{"params": trial.params, "values": trial.values} for trial in best]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            ("does=reports", "y=interval(0.0,1.0)"),
            ["intermediate_values", "optimization_history", "parallel_coordinate", "param_importances", "slice"],
        ),
        (("does=two", "hydra.sweeper.direction=[minimize,maximize]"), ["pareto_front"]),
    ],
)
def test_plots_are_written_where_they_are_wanted(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], names: list[str]
) -> None:
    done = sweep(run, tmp_path, SPACE, *arguments, "hydra.sweeper.n_trials=6", "hydra.sweeper.plots=true")
    assert sorted(plot.stem for plot in (tmp_path / "sweep" / "plots").glob("*.html")) == names
    assert f"are in {tmp_path / 'sweep' / 'plots'}" in done.stdout


# Asynchronous


def test_no_trial_waits_for_a_slower_one(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "does=first_waits", "last=7", "hydra.sweeper.n_trials=8")
    entries = witness(tmp_path)
    ends = [entry["ended"] for entry in entries if "ended" in entry]
    assert ends.index(0) >= 6, "all but perhaps the last one ended before the first one did"


def test_sampling_does_not_keep_jobs_from_starting(run: Run, tmp_path: Path) -> None:
    """Sampling of trial 2 ends only when trial 1 runs, and trial 1 starts only when trial 0 has ended."""
    slow = ("does=second_ends_sampling", "hydra.sweeper.custom_search_space=__main__.as_long_as_trial_1_runs")
    sweep(run, tmp_path, SPACE, *slow, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1")
    assert states(study(tmp_path)) == ["COMPLETE"] * 3


def test_at_most_n_jobs_run_at_the_same_time(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "seconds=0.5", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=1")
    kinds = ["began" if "began" in entry else "ended" for entry in witness(tmp_path)]
    assert kinds == ["began", "ended"] * 5
    assert done.stderr.count("hydra.sweeper.n_jobs=1 leaves 1 of 2 devices idle: raise or remove it") == 1


JOBLIB = importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is not None
needs_joblib = pytest.mark.skipif(not JOBLIB, reason="hydra-joblib-launcher is not installed")


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=needs_joblib)])
def test_with_another_launcher_it_works_in_batches_and_says_so(run: Run, tmp_path: Path, launcher: str) -> None:
    options = (f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=3")
    done = run(tmp_path, PROGRAM, "--multirun", *SWEEPER, RANDOM, SPACE, "does=odd_ones_raise", *options)
    assert done.returncode == 0, done.stderr
    assert f"{launcher.capitalize()}Launcher takes jobs in batches of 3" in done.stdout
    found = study(tmp_path)
    assert states(found) == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert found.trials[1].user_attrs["gpu_launcher:failure"] == "raised ValueError: 1 was meant to fail"
    jobs = began(tmp_path)
    for trial in found.trials:
        directory = tmp_path / "sweep" / str(trial.number)
        assert (directory / ".hydra").is_dir()
        assert trial.user_attrs["gpu_launcher:job"]["directory"] == str(directory)
        assert jobs[trial.number]["x"] == trial.params["x"]
    assert f" in {tmp_path / 'sweep' / str(found.best_trial.number)}\n" in done.stdout


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=needs_joblib)])
def test_ctrl_c_in_a_batch_leaves_no_trial_running_and_says_how_to_go_on(
    start: Start, tmp_path: Path, launcher: str
) -> None:
    options = (f"hydra/launcher={launcher}", "hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=2", "seconds=600")
    program = start(tmp_path, PROGRAM, "--multirun", *SWEEPER, RANDOM, SPACE, *options)
    until(lambda: (tmp_path / "witness.jsonl").exists())
    program.send_signal(signal.SIGINT)
    out, _ = program.communicate(timeout=500)
    assert program.returncode in (130, -signal.SIGINT)
    assert f"run the same command with hydra.sweep.dir={tmp_path / 'sweep'} hydra.sweeper.n_trials=5" in out
    assert sorted(states(study(tmp_path))) == ["FAIL", "FAIL", "WAITING", "WAITING"]


# Pruning


@pytest.mark.smoke
def test_a_pruned_trial_counts_as_pruned_with_its_last_value(run: Run, tmp_path: Path) -> None:
    options = ("hydra.sweeper.pruner={name: threshold, upper: 3.0}", "hydra.sweeper.n_jobs=1")
    done = sweep(run, tmp_path, SPACE, "does=reports_until_pruned", "hydra.sweeper.n_trials=5", *options)
    trials = study(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3 + ["PRUNED"] * 2
    for trial in trials[3:]:
        assert trial.intermediate_values
        assert trial.values == [trial.intermediate_values[max(trial.intermediate_values)]]
    assert "5 jobs: 3 completed, 2 pruned" in done.stderr
    assert "Traceback" not in (tmp_path / "sweep" / "4" / "job.log").read_text()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reports_of_all_steps_are_stored(run: Run, tmp_path: Path, method: str) -> None:
    start_method = f"hydra.launcher.start_method={method}"
    sweep(run, tmp_path, SPACE, "does=reports", "steps=50", "hydra.sweeper.n_trials=3", start_method)
    for trial in study(tmp_path).trials:
        assert trial.intermediate_values == {step: trial.number + 1 / (step + 1) for step in range(50)}


def test_a_job_that_never_asks_is_stopped_with_kill_pruned(run: Run, tmp_path: Path) -> None:
    options = ("hydra.sweeper.pruner={name: threshold, upper: 0.5}", "hydra.sweeper.kill_pruned=true")
    done = sweep(run, tmp_path, SPACE, "does=reports_and_ignores", "hydra.sweeper.n_trials=3", *options)
    assert states(study(tmp_path)) == ["COMPLETE", "PRUNED", "PRUNED"]
    assert "3 jobs: 1 completed, 2 pruned" in done.stderr


def test_outside_a_sweep_reports_go_nowhere(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path, PROGRAM, "does=reports").returncode == 0


def test_what_a_job_says_right_before_its_end_is_not_lost(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "does=says_much", "steps=1000", "hydra.sweeper.n_trials=3")
    for trial in study(tmp_path).trials:
        assert len(trial.intermediate_values) == 1000
        assert trial.user_attrs["said"] == "everything"


def test_a_verdict_on_an_attempt_that_crashed_does_not_reach_the_next_one(run: Run, tmp_path: Path) -> None:
    options = ("hydra.launcher.retries=1", "hydra.launcher.retry_on=[crash]", "hydra.sweeper.pruner=median")
    slow = "hydra.sweeper.custom_search_space=__main__.slowly"
    sweep(run, tmp_path, SPACE, "does=crashes_at_first", slow, *options, "hydra.sweeper.n_trials=8")
    assert states(study(tmp_path)) == ["COMPLETE"] * 8


def test_a_job_can_annotate_its_trial(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "does=annotates", "hydra.sweeper.n_trials=2")
    assert all(trial.user_attrs["pid"] > 0 for trial in study(tmp_path).trials)


# Failures


def test_what_a_job_does_wrong_fails_its_trial_alone(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "does=odd_ones_raise", "hydra.sweeper.n_trials=4")
    trials = study(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"] * 2
    assert trials[1].user_attrs["gpu_launcher:failure"] == "raised ValueError: 1 was meant to fail"


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("nan", "returned nan, which no search can use"),
        ("inf", "returned inf, which no search can use"),
        ("none", "returned None (does the task function return its value?), which is not a number"),
        ("text", "returned 'good', which is not a number"),
        ("two", "which is not a number"),
        ("huge", "which is not a number"),
        ("odd_float", "returned an OddFloat, which is not a number"),
        ("annotates_oddly", "raised TypeError: Object of type complex is not JSON serializable"),
        ("reports_oddly", "raised ValueError: The `step` argument is"),
        ("kills_itself", "was killed by SIGKILL after"),
        ("raises", "raised ValueError: 0 was meant to fail"),
    ],
)
def test_a_sweep_whose_trials_all_failed_says_why(run: Run, tmp_path: Path, does: str, says: str) -> None:
    done = sweep(run, tmp_path, SPACE, f"does={does}", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", ok=False)
    assert states(study(tmp_path)) == ["FAIL", "FAIL"]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("no trial of study"))
    assert f"no trial of study 'trials' completed, so there is no best trial; the first: trial 0 {says}" in line or (
        says in line
    )
    assert "Traceback" not in done.stderr.split("2 jobs: ")[1]


def test_a_sweep_whose_function_returns_nothing_ends_after_a_few_trials(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "does=none", "hydra.sweeper.n_trials=40", ok=False)
    found = states(study(tmp_path))
    assert set(found) == {"FAIL"}
    assert 3 <= len(found) < 20
    assert "the task function must return a number for each direction" in done.stderr
    assert "returned None (does the task function return its value?)" in done.stderr


def test_the_wrong_number_of_objectives_fails_the_trial(run: Run, tmp_path: Path) -> None:
    directions = "hydra.sweeper.direction=[minimize,maximize]"
    done = sweep(run, tmp_path, SPACE, "does=three", directions, "hydra.sweeper.n_trials=1", ok=False)
    assert "trial 0 returned 3 values, and the sweep has 2 directions" in done.stderr


def test_an_error_of_the_search_space_leaves_no_trial_untold(run: Run, tmp_path: Path) -> None:
    broken = ("hydra.sweeper.custom_search_space=__main__.broken_for_trial_2", "seconds=600")
    done = sweep(run, tmp_path, SPACE, *broken, "hydra.sweeper.n_trials=5", ok=False)
    assert "the search failed: ZeroDivisionError" in done.stderr
    assert "RUNNING" not in states(study(tmp_path))
    assert "to continue the study" in done.stdout


def test_too_many_failures_end_the_sweep(run: Run, tmp_path: Path) -> None:
    limit = ("hydra.sweeper.max_failure_rate=0.0", "hydra.sweeper.n_jobs=1")
    done = sweep(run, tmp_path, SPACE, "does=odd_ones_raise", "hydra.sweeper.n_trials=50", *limit, ok=False)
    assert "trials failed, more than max_failure_rate=0.0 allows. The first: trial 1 raised ValueError" in done.stderr
    assert len(study(tmp_path).trials) < 6


def test_a_failure_ends_the_sweep_if_the_launcher_says_so(run: Run, tmp_path: Path) -> None:
    stop = ("hydra.launcher.on_failure=stop", "hydra.sweeper.n_jobs=1")
    done = sweep(run, tmp_path, SPACE, "does=odd_ones_raise", "hydra.sweeper.n_trials=50", *stop, ok=False)
    assert "the sweep was stopped because hydra.launcher.on_failure or max_failures says so" in done.stderr
    assert "RUNNING" not in states(study(tmp_path))
    assert (tmp_path / "sweep" / "optimization_results.yaml").exists()


def test_a_node_that_is_killed_ends_the_sweep_and_the_next_one_goes_on(run: Run, start: Start, tmp_path: Path) -> None:
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, "seconds=600")
    assert program.stderr is not None
    for line in program.stderr:
        if "job 1 " in line and "started" in line:
            break
    children = psutil.Process(program.pid).children()
    (node,) = children
    node.kill()
    _, err = program.communicate(timeout=500)
    assert program.returncode == 1
    assert "the process that starts jobs was killed" in err
    assert not [child for child in children if child.is_running()]
    lost = stopped(study(tmp_path))
    sweep(run, tmp_path, SPACE, f"hydra.sweeper.n_trials={len(lost)}")
    again = [trial for trial in study(tmp_path).trials if trial.state is TrialState.COMPLETE]
    assert sorted(trial.params["x"] for trial in again) == sorted(trial.params["x"] for trial in lost)
    assert "RUNNING" not in states(study(tmp_path))


@contextmanager
def full(file: Path, program: psutil.Process) -> Iterator[None]:
    """Make writes of a process fail, as on a full disk."""
    before = program.rlimit(psutil.RLIMIT_FSIZE)
    program.rlimit(psutil.RLIMIT_FSIZE, (1, before[1]))
    yield
    program.rlimit(psutil.RLIMIT_FSIZE, before)


@contextmanager
def locked(file: Path, program: psutil.Process) -> Iterator[None]:
    """Lock the database, as another writer does."""
    with closing(sqlite3.connect(file, timeout=100, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.execute("COMMIT")


@pytest.mark.parametrize("trouble", [full, locked])
def test_a_sweep_bears_a_database_that_cannot_be_used_for_a_while(
    start: Start, tmp_path: Path, trouble: Callable[..., AbstractContextManager[None]]
) -> None:
    options = ("does=reports_later", "steps=10", "hydra.sweeper.n_trials=12")
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, *options)
    wait_for_line(program, "(2/12 done)")
    with trouble(tmp_path / "sweep" / "study.db", psutil.Process(program.pid)):
        (tmp_path / "sweep" / "go").touch()
        if trouble is full:
            wait_for_line(program, "study database unavailable (", "running jobs continue, retrying")
        before = len(witness(tmp_path))
        time.sleep(2)
        assert len(witness(tmp_path)) - before < 12, "no trials are asked for meanwhile"
    out, err = program.communicate(timeout=500)
    assert program.returncode == 0, out + err
    assert ("study database available again" in err) is (trouble is full)
    for trial in study(tmp_path).trials:
        assert trial.state is TrialState.COMPLETE
        assert trial.values == [float(trial.number)]
        assert trial.intermediate_values == {step: trial.number + 1 / (step + 1) for step in range(10)}
    assert sorted(began(tmp_path)) == list(range(12)), "nothing was asked for twice"


def test_retries_of_the_launcher_are_one_trial(run: Run, tmp_path: Path) -> None:
    retries = ("hydra.launcher.retries=1", "hydra.launcher.retry_on=[crash]")
    done = sweep(run, tmp_path, SPACE, "does=kills_itself", "hydra.sweeper.n_trials=1", *retries, ok=False)
    assert "1 attempt repeated" in done.stderr
    assert states(study(tmp_path)) == ["FAIL"]


@pytest.mark.parametrize(
    "storage", ["journal:///study.log", "{_target_: optuna.storages.InMemoryStorage}", "study.sqlite3"]
)
def test_other_storages_work_as_optuna_offers_them(run: Run, tmp_path: Path, storage: str) -> None:
    url = storage.replace("journal:///", f"journal:///{tmp_path}/")
    done = sweep(run, tmp_path, SPACE, "does=reports", f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=3")
    assert (tmp_path / "sweep" / "optimization_results.yaml").exists()
    assert not (tmp_path / "sweep" / "study.db").exists()
    if "Memory" not in storage:
        name = f"trials-{tmp_path.name}-sweep"
        found = study(tmp_path, name, url if "journal" in storage else str(tmp_path / storage))
        assert states(found) == ["COMPLETE"] * 3, done.stdout


# Continuing


def test_total_trials_runs_what_the_study_lacks(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=3")
    sweep(run, tmp_path, SPACE, "hydra.sweeper.total_trials=5")
    assert states(study(tmp_path)) == ["COMPLETE"] * 5
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.total_trials=5")
    assert len(study(tmp_path).trials) == 5
    assert "best: " in done.stdout


def test_resume_of_the_launcher_is_answered_with_what_happens_instead(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=1", "hydra.launcher.resume=true")
    assert "hydra.launcher.resume is ignored: a study always continues" in done.stdout
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=1")
    assert "hydra.launcher.resume" not in done.stdout
    assert states(study(tmp_path)) == ["COMPLETE"] * 2


@pytest.mark.smoke
def test_ctrl_c_leaves_no_trial_running_and_the_next_sweep_runs_those_again(
    run: Run, start: Start, tmp_path: Path
) -> None:
    slow = (SPACE, "seconds=600", "hydra.sweeper.n_trials=8")
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, *slow)
    assert program.stderr is not None
    for line in program.stderr:
        if "job 1 " in line and "started" in line:
            break
    program.send_signal(signal.SIGINT)
    out, _ = program.communicate(timeout=500)
    assert program.returncode == 130 or program.returncode == -signal.SIGINT
    assert f"to continue the study, run the same command with hydra.sweep.dir={tmp_path / 'sweep'}" in out
    interrupted = stopped(study(tmp_path))
    sweep(run, tmp_path, SPACE, f"hydra.sweeper.n_trials={len(interrupted)}")
    again = [trial for trial in study(tmp_path).trials if trial.state is TrialState.COMPLETE]
    assert sorted(trial.params["x"] for trial in again) == sorted(trial.params["x"] for trial in interrupted)
    assert sorted(trial.user_attrs["gpu_launcher:retry_of"] for trial in again) == [[t.number] for t in interrupted]


def wait_for_line(program: subprocess.Popen[str], *words: str) -> None:
    assert program.stderr is not None
    lines = []
    for line in program.stderr:
        if all(word in line for word in words):
            return
        lines.append(line)
    pytest.fail(f"ended without a line with {words}:\n{''.join(lines)}")


def test_sigterm_leaves_no_trial_running_and_the_next_sweep_runs_those_again(
    run: Run, start: Start, tmp_path: Path
) -> None:
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, "seconds=600", "hydra.sweeper.n_trials=8")
    wait_for_line(program, "job 1 ", "started")
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=500)
    assert program.returncode == 128 + signal.SIGTERM
    assert "to continue the study" in out
    assert "Traceback" not in err
    interrupted = stopped(study(tmp_path))
    sweep(run, tmp_path, SPACE, f"hydra.sweeper.n_trials={len(interrupted)}", "hydra.sweeper.retry_stale=0")
    again = [trial for trial in study(tmp_path).trials if trial.state is TrialState.COMPLETE]
    assert sorted(trial.params["x"] for trial in again) == sorted(trial.params["x"] for trial in interrupted)


def test_a_second_ctrl_c_kills_jobs_that_do_not_end_and_their_trials_are_told(
    run: Run, start: Start, tmp_path: Path
) -> None:
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, "does=clings", "hydra.launcher.grace=600")
    until(lambda: (tmp_path / "witness.jsonl").exists() and sum("clings" in e for e in witness(tmp_path)) == 2)
    program.send_signal(signal.SIGINT)
    wait_for_line(program, "stopping: ")
    time.sleep(0.5)  # an earlier signal counts as the same Ctrl-C
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=500)
    assert program.returncode in (130, -signal.SIGINT)
    assert "to continue the study" in out
    assert "Traceback" not in err
    assert stopped(study(tmp_path))
    sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=2")


def sampling_trial_1(directory: Path) -> bool:
    return any(trial.number == 1 and trial.params for trial in trials(directory))


def test_ctrl_c_while_the_sampler_samples_does_not_wait_for_it(run: Run, start: Start, tmp_path: Path) -> None:
    custom = "hydra.sweeper.custom_search_space=__main__.hangs_in_trial_1"
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, custom, "seconds=600")
    until(lambda: sampling_trial_1(tmp_path))
    wait_for_line(program, "job 0 ", "started")
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=500)
    assert "was abandoned" not in out + err, "it was not waited for"
    assert program.returncode in (130, -signal.SIGINT)
    assert "to continue the study" in out
    assert "Traceback" not in err
    assert states(study(tmp_path)) == ["FAIL", "FAIL", "WAITING"]
    again = ("y=interval(0.0,2.0)", "hydra.sweeper.n_trials=1", "hydra.sweeper.retry_stale=0")
    sweep(run, tmp_path, SPACE, *again)
    assert study(tmp_path).trials[2].state is TrialState.COMPLETE
    assert study(tmp_path).trials[2].params["x"] == study(tmp_path).trials[0].params["x"]


def test_a_second_ctrl_c_does_not_wait_for_a_sampler_that_nothing_ends(run: Run, start: Start, tmp_path: Path) -> None:
    custom = "hydra.sweeper.custom_search_space=__main__.clings_in_trial_1"
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, custom, "seconds=600")
    until(lambda: sampling_trial_1(tmp_path))
    wait_for_line(program, "job 0 ", "started")
    program.send_signal(signal.SIGINT)
    wait_for_line(program, "jobs: 1 cancelled")
    time.sleep(0.5)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=500)
    assert "was abandoned" not in out + err, "it was not waited for"
    assert program.returncode in (130, -signal.SIGINT)
    assert "to continue the study" in out
    assert "Traceback" not in err
    sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=1")
    assert "RUNNING" not in states(study(tmp_path))


def running_trials(directory: Path, pid: int) -> list[optuna.trial.FrozenTrial]:
    """The running trials of a program whose jobs have started."""
    return [
        trial
        for trial in trials(directory)
        if trial.state is TrialState.RUNNING
        and "gpu_launcher:job" in trial.user_attrs
        and trial.user_attrs["gpu_launcher:owner"]["pid"] == pid
    ]


def test_trials_of_a_killed_sweep_fail_and_are_queued_again_once(run: Run, start: Start, tmp_path: Path) -> None:
    x: list[list[float]] = []
    for _ in range(2):
        program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, "seconds=600")
        until(lambda: len(running_trials(tmp_path, program.pid)) == 2)  # noqa: B023
        program.kill()
        program.communicate(timeout=500)
        x.append([trial.params["x"] for trial in running_trials(tmp_path, program.pid)])
    assert sorted(x[0]) == sorted(x[1]), "queued again"
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=4")
    assert "of a dead sweep as failed" in done.stdout
    completed = [trial for trial in study(tmp_path).trials if trial.state is TrialState.COMPLETE]
    assert len(completed) == 4
    assert not {trial.params["x"] for trial in completed} & set(x[0]), "not a second time"
    assert "RUNNING" not in states(study(tmp_path))


def test_two_sweeps_work_on_one_study(start: Start, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    shared = (f"hydra.sweeper.storage={url}", "hydra.sweeper.study_name=shared", "hydra.sweeper.n_trials=8")
    directories = [f"hydra.sweep.dir=sweep{number}" for number in range(2)]
    programs = [start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, *shared, one) for one in directories]
    for program in programs:
        out, err = program.communicate(timeout=500)
        assert program.returncode == 0, out + err
    found = study(tmp_path, "shared", url)
    assert states(found) == ["COMPLETE"] * 16
    assert sorted(entry["began"] for entry in witness(tmp_path) if "began" in entry) == list(range(16))
    owners = [trial.user_attrs["gpu_launcher:owner"]["pid"] for trial in found.trials]
    assert sorted(owners.count(owner) for owner in set(owners)) == [8, 8]


def test_a_trial_that_is_failed_from_elsewhere_is_cancelled(start: Start, tmp_path: Path) -> None:
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, "does=hangs", "hydra.sweeper.n_trials=1")
    assert program.stderr is not None
    for line in program.stderr:
        if "job 0 " in line and "started" in line:
            break
    elsewhere = study(tmp_path)
    elsewhere.tell(0, state=TrialState.FAIL)  # as optuna-dashboard does
    _, err = program.communicate(timeout=500)
    assert program.returncode == 1
    assert "1 job: 1 cancelled" in err
    assert states(elsewhere) == ["FAIL"]


def test_known_points_are_tried_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    new = optuna.create_study(study_name="trials", storage=gpu_launcher.storage(tmp_path / "sweep" / "study.db"))
    new.enqueue_trial({"x": 0.125})  # a study with only waiting trials accepts any search space
    (tmp_path / "points.yaml").write_text("- x: 0.25\n- x: 0.75\n")
    sweep(run, tmp_path, SPACE, "hydra.sweeper.enqueue=points.yaml", "hydra.sweeper.n_trials=3")
    assert [trial.params["x"] for trial in study(tmp_path).trials][:3] == [0.125, 0.25, 0.75]
    sweep(run, tmp_path, SPACE, "hydra.sweeper.enqueue=[{x: 0.75},{x: 1.5}]", "hydra.sweeper.n_trials=1")
    assert study(tmp_path).trials[-1].params["x"] == 1.5, "what the study has is not tried again"


@pytest.mark.parametrize("launcher", [POOL, ("hydra/launcher=basic",)], ids=["gpu_pool", "batches"])
def test_a_point_queued_elsewhere_that_is_not_in_the_space_fails_alone(
    run: Run, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    (tmp_path / "sweep").mkdir()
    new = optuna.create_study(study_name="trials", storage=gpu_launcher.storage(tmp_path / "sweep" / "study.db"))
    for x in (99.0, "none", 1.0):
        new.enqueue_trial({"x": x})
    done = run(
        tmp_path, PROGRAM, "--multirun", *SWEEPER, *launcher, RANDOM, "x=choice(0.0,1.0)", "hydra.sweeper.n_trials=3"
    )
    assert done.returncode == 0, done.stderr
    assert states(study(tmp_path)) == ["FAIL", "FAIL"] + ["COMPLETE"] * 3
    assert study(tmp_path).trials[2].params["x"] == 1.0
    for number, x in enumerate((99.0, "none")):
        said = f"trial {number} failed: it was queued with x={x!r}, which do not define a job: "
        assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_sweeps_that_begin_together_try_each_known_point_once(start: Start, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    points = "hydra.sweeper.enqueue=[{x: 0.25},{x: 0.5},{x: 0.75},{x: 1.0}]"
    shared = (f"hydra.sweeper.storage={url}", "hydra.sweeper.study_name=shared", "hydra.sweeper.n_trials=4", points)
    options = (*SWEEPER, *POOL, RANDOM, SPACE, *shared)
    programs = [start(tmp_path, PROGRAM, "-m", *options, f"hydra.sweep.dir=sweep{n}") for n in range(3)]
    for program in programs:
        out, err = program.communicate(timeout=500)
        assert program.returncode == 0, out + err
    tried = [trial.params["x"] for trial in study(tmp_path, "shared", url).trials]
    assert len(tried) == 12
    assert sorted(x for x in tried if x in (0.25, 0.5, 0.75, 1.0)) == [0.25, 0.5, 0.75, 1.0]


def test_a_sweep_that_was_killed_while_it_defined_a_trial_goes_on(run: Run, start: Start, tmp_path: Path) -> None:
    custom = "hydra.sweeper.custom_search_space=__main__.hangs_in_trial_1"
    program = start(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, SPACE, custom)
    until(lambda: any(trial.number == 1 and trial.params for trial in trials(tmp_path)))
    program.kill()
    program.communicate(timeout=500)
    sweep(run, tmp_path, SPACE, "y=interval(0.0,1.0)", "hydra.sweeper.n_trials=2")
    assert sorted(states(study(tmp_path))).count("COMPLETE") == 2


def test_a_point_with_an_unknown_parameter_is_refused(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.enqueue=[{xx: 0.5}]", ok=False)
    assert "hydra.sweeper.enqueue: xx is not a parameter of this search: it has x" in done.stderr


def test_the_gp_sampler_works_beside_a_program_that_has_used_torch(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    options = ("hydra/sweeper/sampler=gp", "hydra.sweeper.sampler.n_startup_trials=2", "hydra.sweeper.n_trials=4")
    done = run(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, SPACE, *options, USE_TORCH="1")
    assert done.returncode == 0, done.stderr
    assert states(study(tmp_path)) == ["COMPLETE"] * 4


def test_a_timeout_ends_the_asking(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, "seconds=0.2", "hydra.sweeper.n_trials=500", "hydra.sweeper.timeout=2")
    assert "no more trials are asked for: the timeout has passed" in done.stderr
    assert set(states(study(tmp_path))) == {"COMPLETE"}
    assert len(study(tmp_path).trials) < 100


def test_patience_ends_the_asking(run: Run, tmp_path: Path) -> None:
    first = ("hydra.sweeper.enqueue=[{x: 0.5}]", "hydra.sweeper.n_jobs=1")
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=50", "hydra.sweeper.patience=3", *first)
    # One more trial may have been prepared, and may end before the next one is asked for.
    said = r"no more trials are asked for: [34] trials in a row completed without improving on the best"
    assert re.search(said, done.stderr), done.stderr
    assert len(study(tmp_path).trials) in (4, 5)


@pytest.mark.parametrize("sampler", ["grid", "bruteforce"])
def test_a_sampler_that_has_tried_everything_ends_the_sweep(run: Run, tmp_path: Path, sampler: str) -> None:
    everything = ("x=choice(0.0,1.0,2.0)", "y=0.0,1.0", f"hydra/sweeper/sampler={sampler}", "hydra.sweeper.n_trials=40")
    sweep(run, tmp_path, *everything, "hydra.sweeper.n_jobs=1")
    tried = [tuple(trial.params.values()) for trial in study(tmp_path).trials]
    assert sorted(set(tried)) == sorted((x, y) for x in (0.0, 1.0, 2.0) for y in (0.0, 1.0))
    assert len(tried) <= 7
    before = len(tried)
    sweep(run, tmp_path, *everything)
    assert len(study(tmp_path).trials) == before, "and nothing is left for another"


# Bad input


def test_a_sweep_with_nothing_to_search_says_so(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, "x=1", "hydra.sweeper.n_trials=2")
    assert "there is nothing to search, and all trials are the same: name a parameter" in done.stdout
    assert states(study(tmp_path)) == ["COMPLETE"] * 2


def test_known_points_from_a_file_with_something_else_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "points.yaml").write_text("5\n")
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.enqueue=points.yaml", ok=False)
    assert f"hydra.sweeper.enqueue: {tmp_path / 'points.yaml'} cannot be read: " in done.stderr
    assert "read: None" not in done.stderr


BAD = [
    (("x=interval(0,1)", "x=0.5"), "x=interval(0,1): x=0.5 fixes what this searches: leave out one of them"),
    (("x=interval(1,1)",), "x=interval(1,1): the interval from 1.0 to 1.0 has no size: give two bounds"),
    (("x=tag(log,interval(0,1))",), "x=tag(log,interval(0,1)): a logarithmic interval cannot start at 0.0"),
    ((SPACE, "hydra.sweeper.direction=up"), "hydra.sweeper.direction: must be minimize, maximize"),
    ((SPACE, "hydra.sweeper.pruner=medain"), "hydra.sweeper.pruner: 'medain' is unknown: did you mean median?"),
    ((SPACE, "hydra.sweeper.sampler={name: tpu}"), "hydra.sweeper.sampler: 'tpu' is unknown: did you mean tpe?"),
    ((SPACE, "hydra.sweeper.n_trials=0"), "hydra.sweeper.n_trials: must be an integer >= 1, or null, got 0"),
    ((SPACE, "hydra.sweeper.storage=sqlit:///study.db"), "there is no database 'sqlit': is it sqlite://?"),
    (
        (SPACE, "hydra.sweeper.storage=sqlite:///no/such/directory/study.db"),
        "no/such/directory does not exist: make it",
    ),
    ((SPACE, "hydra.sweeper.enqueue=missing.yaml"), "missing.yaml cannot be read"),
    ((SPACE, "hydra.sweeper.enqueue=[{x: 7.0}]"), "x=7.0: is not in float from -2.0 to 2.0"),
    ((SPACE, "hydra.sweeper.custom_search_space=no.such.function"), "no.such.function cannot be imported"),
    ((SPACE, "hydra/sweeper/sampler=grid"), "hydra.sweeper.sampler: x is continuous, and this sampler needs an end"),
    ((SPACE, "hydra.sweeper.patience=3", "hydra.sweeper.direction=[minimize,maximize]"), "hydra.sweeper.patience"),
]


@pytest.mark.parametrize(("arguments", "names"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_gets_one_message_before_any_job_starts(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], names: str
) -> None:
    done = run(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, RANDOM, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.split("\n\n")[0]
    # Hydra 1.4 itself refuses a key that is not in the chosen sampler's config.
    assert names in message or ("name: tpu" in arguments[-1] and "Key 'name' not in" in message), message
    assert not (tmp_path / "witness.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((SPACE, "hydra.sweeper.direction=maximize"), "has the direction minimize"),
        (("x=interval(0.0,1.0)",), "has another search space (x is"),
        ((SPACE, "y=interval(0.0,1.0)"), "has another search space (the study does not search y)"),
    ],
)
def test_a_study_of_another_search_is_refused(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=1")
    done = sweep(run, tmp_path, *arguments, "hydra.sweeper.n_trials=1", ok=False)
    assert says in done.stderr
    assert "or another hydra.sweeper.study_name" in done.stderr
    assert len(study(tmp_path).trials) == 1


def test_a_file_that_is_no_database_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "study.db").write_bytes(b"no database" * 1000)
    done = sweep(run, tmp_path, SPACE, "hydra.sweeper.n_trials=1", ok=False)
    assert str(tmp_path / "sweep" / "study.db") in done.stderr
    assert "Traceback" not in done.stderr


def test_trials_of_a_zip_that_do_not_satisfy_the_filter_do_not_run(run: Run, tmp_path: Path) -> None:
    space = ("x=choice(0,1,2,3)", '+pair="zip(y=[1,2], last=[10,20])"', 'hydra.sweeper.filter="x * last <= 30"')
    every = ("hydra/sweeper/sampler=bruteforce", "hydra.sweeper.n_trials=99")
    done = run(tmp_path, PROGRAM, "-m", *SWEEPER, *POOL, *space, *every)
    assert done.returncode == 0, done.stderr
    ran = sorted((entry["x"], entry["y"]) for entry in began(tmp_path).values())
    assert ran == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (3, 1)]
    assert states(study(tmp_path)).count("PRUNED") == 2
    assert "2 proposals did not satisfy hydra.sweeper.filter, and did not run" in done.stdout + done.stderr
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())["best_params"]
    assert best["pair"] == {"y": 1, "last": 10}


def test_a_search_whose_filter_leaves_out_everything_ends_and_says_so(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, 'hydra.sweeper.filter="x > 5"', "hydra.sweeper.n_trials=3", ok=False)
    assert done.returncode == 1
    assert "100 proposals in a row were left out" in done.stdout + done.stderr
    assert "so there is no best trial" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "witness.jsonl").exists()


def test_a_filter_that_allows_little_is_satisfied_by_random_points(run: Run, tmp_path: Path) -> None:
    sweep(run, tmp_path, SPACE, 'hydra.sweeper.filter="x < -1.9"', "hydra.sweeper.n_trials=3")
    assert len(began(tmp_path)) == 3
    assert all(entry["x"] < -1.9 for entry in began(tmp_path).values())


def test_a_filter_with_an_unknown_key_is_answered_before_any_trial(run: Run, tmp_path: Path) -> None:
    done = sweep(run, tmp_path, SPACE, 'hydra.sweeper.filter="z > 5"', ok=False)
    assert done.returncode == 1
    assert "hydra.sweeper.filter: z > 5: z is not the key of an override (there are: x)" in done.stderr
    assert not (tmp_path / "sweep" / "study.db").exists()
