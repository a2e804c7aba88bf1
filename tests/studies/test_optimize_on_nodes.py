"""`gpu_launcher.optimize` on several nodes, each with a pool of its own: it does what it does on one machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.errors import NodeStartError, OptionError
from gpu_launcher.jobs.where import Where
from gpu_launcher.processes.exceptions import RemoteTraceback

TWO_EACH = Where("simulated:2")

# Objectives and what they use are defined inside functions: a node cannot import this module.


@pytest.fixture
def nodes(tmp_path: Path) -> list[str]:
    return [node(tmp_path, name) for name in "ab"]


def node(directory: Path, name: str) -> str:
    return f"command:env GPU_LAUNCHER_POOL_DIR={directory}/pool-{name}"


def new_study(**more: Any) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **more)


def devices(study: optuna.Study) -> set[str]:
    """The devices on which trials ran. A node is named after its command."""
    return {device for trial in study.trials for device in trial.user_attrs["gpu_launcher:job"]["devices"]}


def searching() -> Callable[[Any], float]:
    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", -10, 10)
        kind = trial.suggest_categorical("kind", ["plain", "deep", None])
        depth = trial.suggest_int(f"depth of {kind}", 1, 9, step=2) if kind == "deep" else 0
        for step in range(4):
            trial.report(abs(x) + depth + 1 / (step + 1), step)
            if trial.should_prune():
                raise optuna.TrialPruned(f"at step {step}")
        return float(abs(x) + depth)

    return objective


def essence(study: optuna.Study) -> list[Any]:
    return [
        (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.intermediate_values)
        for trial in study.trials
    ]


@pytest.mark.smoke
def test_trials_one_at_a_time_are_those_of_optuna(nodes: list[str]) -> None:
    here, there = (new_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=3)) for _ in range(2))
    here.optimize(searching(), n_trials=12)
    gpu_launcher.optimize(there, searching(), 12, n_jobs=1, pool=TWO_EACH, nodes=nodes)
    assert TrialState.PRUNED in {trial.state for trial in here.trials}
    assert essence(there) == essence(here)


@pytest.mark.parametrize("second", ["local", "another"])
def test_all_nodes_run_trials_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "pool"))

    def objective(trial: Any) -> float:
        (tmp_path / f"began-{trial.number}").touch()
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("began-*"))) < 4:
            assert time.monotonic() < deadline, "fewer than four trials run at the same time"
            time.sleep(0.01)
        return float(trial.number)

    study = new_study()
    both = [node(tmp_path, "a"), "local" if second == "local" else node(tmp_path, "b")]
    gpu_launcher.optimize(study, objective, 8, pool=TWO_EACH, nodes=both)  # a node asks for four ahead of the other
    assert [trial.values for trial in study.trials] == [[float(number)] for number in range(8)]
    names = ["env", "local" if second == "local" else "env-2"]
    assert devices(study) == {f"{name} simulated GPU {index}" for name in names for index in range(2)}
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(("began", "pool"))] == []


def test_an_exception_of_the_objective_is_raised_as_it_was(nodes: list[str]) -> None:
    class OwnError(Exception):
        pass

    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        raise OwnError("bad luck", trial.number)

    study = new_study()
    with pytest.raises(OwnError) as raised:
        gpu_launcher.optimize(study, objective, 1, pool=TWO_EACH, nodes=nodes)
    assert raised.value.args == ("bad luck", 0)
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    gpu_launcher.optimize(study, objective, 3, catch=OwnError, pool=TWO_EACH, nodes=nodes)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 4


def test_study_stop_on_a_node_ends_the_search_when_the_running_trials_have_ended(nodes: list[str]) -> None:
    def objective(trial: Any) -> float:
        if trial.number == 3:
            trial.study.stop()
        return 1.0

    study = new_study()
    gpu_launcher.optimize(study, objective, 100, pool=TWO_EACH, nodes=nodes)
    assert 4 <= len(study.trials) < 100
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_what_trials_print_is_shown_on_standard_error(nodes: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    def objective(trial: Any) -> float:
        print(f"this is trial {trial.number}")
        print("its last words", end="", file=sys.stderr)
        return 1.0

    gpu_launcher.optimize(new_study(), objective, 3, pool=TWO_EACH, nodes=nodes)
    shown = capfd.readouterr().err
    assert [f"this is trial {number}\n" in shown for number in range(3)] == [True] * 3
    assert shown.count("its last words") == 3


def test_program_without_a_script_runs_its_objective_by_value(tmp_path: Path, nodes: list[str]) -> None:
    program = f"""
import optuna, gpu_launcher
from gpu_launcher.jobs.where import Where
from pathlib import Path
class Own(Exception): pass
offset = 1
def objective(trial):
    if trial.number == 2:
        raise Own(offset)
    return trial.suggest_float("x", 1, 1) + offset
study = optuna.create_study()
try:
    gpu_launcher.optimize(study, objective, 3, n_jobs=1, pool=Where("simulated:2"), nodes={nodes!r})
except Own as error:
    Path("result").write_text(f"{{error}} {{[trial.value for trial in study.trials]}}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == "1 [2.0, 2.0, None]"


@pytest.mark.parametrize("wrong", [[], 3, ["ssh:"], ["slurm:many"], "nowhere"])
def test_invalid_nodes_are_refused_before_anything_starts(wrong: Any) -> None:
    study = new_study()
    with pytest.raises(OptionError) as raised:
        gpu_launcher.optimize(study, searching(), 1, nodes=wrong)
    assert raised.value.option == "nodes"
    assert study.trials == []


def test_objective_that_cannot_be_sent_is_refused(nodes: list[str]) -> None:
    lock = threading.Lock()

    def objective(trial: Any) -> float:
        with lock:
            return 1.0

    study = new_study()
    with pytest.raises(OptionError, match=r"or on other machines, to which it cannot be sent: .*lock") as raised:
        gpu_launcher.optimize(study, objective, 1, pool=TWO_EACH, nodes=nodes)
    assert raised.value.option == "objective"
    assert study.trials == []


def test_without_any_usable_node_the_error_says_why() -> None:
    study = new_study()
    with pytest.raises(NodeStartError, match=r"no node can run jobs: false .*exit status 1"):
        gpu_launcher.optimize(study, searching(), 1, pool=TWO_EACH, nodes="command:false")
    assert study.trials == []
    study.optimize(searching(), n_trials=1)
    assert len(study.trials) == 1
