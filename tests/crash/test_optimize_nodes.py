"""`gpu_launcher.optimize` on nodes that are lost: each trial is told once, and `n_trials` counts what ran."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

import gpu_launcher
from tests.waiting import alive, until
from tests.warm import Program, Warm

PATIENCE = 200.0
"""Seconds until a test gives up on what should happen soon."""

# The program and its agents lose patience with each other sooner than usual.
SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path

import optuna
import gpu_launcher
from gpu_launcher.jobs.where import Where

HERE = Path(__file__).parent
OPTIONS = json.loads(sys.argv[1])


def write(**entry):
    with open(HERE / "witness.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\\n")


def linger():
    while not (HERE / "leave").exists():
        time.sleep(0.01)


def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.report(x, 0)
    trial.should_prune()
    write(began=trial.number, x=x, pid=os.getpid())
    if OPTIONS.get("lingers") == trial.number:
        threading.Thread(target=linger).start()
        return x
    while not (HERE / f"finish-{trial.number}").exists():
        time.sleep(0.01)
    trial.report(x + 1, 1)
    return x


def callback(study, trial):
    write(told=trial.number, state=trial.state.name)


if __name__ == "__main__":
    from gpu_launcher.nodes import node_group
    from gpu_launcher.nodes.agent_messages import Timing

    timing = Timing(beat=0.2, quiet=2.0, silence=3.0, lost=7.0)
    node_group.NodeGroup.__init__.__kwdefaults__["timing"] = timing
    study = optuna.create_study(
        study_name="shared",
        storage=gpu_launcher.storage("sqlite:///study.db"),
        sampler=optuna.samplers.RandomSampler(),
        pruner=optuna.pruners.ThresholdPruner(upper=5.0),
    )
    gpu_launcher.optimize(
        study,
        objective,
        OPTIONS["n_trials"],
        n_jobs=OPTIONS.get("n_jobs"),
        callbacks=[callback],
        pool=Where("simulated:2"),
        nodes=[f"command:env GPU_LAUNCHER_POOL_DIR={HERE}/pool-{name} {OPTIONS.get('words', '')}" for name in "ab"],
    )
"""


class World:
    """A program that runs a search on two nodes with two devices each."""

    def __init__(self, directory: Path, warm: Warm) -> None:
        self.directory = directory
        self._warm = warm
        self.program: Program
        (directory / "script.py").write_text(SCRIPT)

    def start(self, n_trials: int = 8, **options: Any) -> None:
        """Start the program. With eight trials, a node that is ready first leaves some for the other one."""
        command = ["script.py", json.dumps({"n_trials": n_trials, **options})]
        with (self.directory / "output.txt").open("wb") as output:
            streams = {"stdout": output.fileno(), "stderr": output.fileno()}
            self.program = self._warm.start(command, os.environ, **streams, cwd=self.directory)

    @property
    def output(self) -> str:
        return (self.directory / "output.txt").read_text()

    def witness(self, what: str) -> list[dict[str, Any]]:
        file = self.directory / "witness.jsonl"
        entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [entry for entry in entries if what in entry]

    def running(self, count: int) -> dict[int, psutil.Process]:
        """Wait until so many trials have begun. Returns the process of each trial, the newest if it began again."""
        until(lambda: len(self.witness("began")) >= count, f"not {count} trials begin: {self.output}", PATIENCE)
        return {entry["began"]: psutil.Process(entry["pid"]) for entry in self.witness("began")}

    def agent_of(self, job: psutil.Process) -> psutil.Process:
        """The agent above a job: the child of the program."""
        *_, agent = [parent for parent in job.parents() if self.program.pid in [p.pid for p in parent.parents()]]
        return agent

    def finish(self, *numbers: int) -> None:
        for number in numbers:
            (self.directory / f"finish-{number}").touch()

    def ends_with(self, status: int) -> None:
        assert self.program.wait(PATIENCE) == status, self.output

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = gpu_launcher.storage(f"sqlite:///{self.directory}/study.db")
        return optuna.load_study(study_name="shared", storage=storage).trials

    def assert_each_completed_once(self, count: int) -> None:
        told = Counter((entry["told"], entry["state"]) for entry in self.witness("told"))
        assert told == {(number, "COMPLETE"): 1 for number in range(count)}
        assert [trial.state for trial in self.trials] == [TrialState.COMPLETE] * count
        for trial in self.trials:
            assert {entry["x"] for entry in self.witness("began") if entry["began"] == trial.number} == {trial.value}


@pytest.fixture
def world(tmp_path: Path, warm: Warm) -> Iterator[World]:
    world = World(tmp_path, warm)
    yield world
    tree = []
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(world.program.pid).children(recursive=True)
    world.program.kill()
    world.program.wait()
    until(lambda: not any(map(alive, tree)), "processes outlive their program")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("n_jobs", [None, 1])
def test_trials_of_a_lost_node_run_again_on_another_one(world: World, signum: int, n_jobs: int | None) -> None:
    world.start(n_jobs=n_jobs)
    count = n_jobs or 4
    jobs = world.running(count)
    agent = world.agent_of(jobs[0])
    moved = [number for number, job in jobs.items() if agent in job.parents()]
    assert len(moved) == (n_jobs or 2)
    agent.send_signal(signum)
    until(lambda: not any(alive(jobs[number]) for number in moved), "jobs outlive their agent", PATIENCE)
    assert {trial.state for trial in world.trials} == {TrialState.RUNNING}
    world.finish(*range(8))
    world.ends_with(0)
    world.assert_each_completed_once(8)
    began = Counter(entry["began"] for entry in world.witness("began"))
    assert began == {number: 2 if number in moved else 1 for number in range(8)}
    assert [trial.intermediate_values for trial in world.trials] == [
        {0: trial.value, 1: trial.value + 1} for trial in world.trials
    ]


def test_a_trial_that_was_told_before_its_node_was_lost_does_not_run_again(world: World) -> None:
    world.start(lingers=0)
    jobs = world.running(4)
    until(lambda: world.witness("told"), "the trial is not told", PATIENCE)
    agent = world.agent_of(jobs[0])
    agent.kill()
    until(lambda: not alive(jobs[0]), "the job outlives its agent", PATIENCE)
    world.finish(*range(1, 8))
    world.ends_with(0)
    world.assert_each_completed_once(8)
    assert [entry["began"] for entry in world.witness("began")].count(0) == 1


def test_ctrl_c_interrupts_trials_on_all_nodes(world: World) -> None:
    world.start()
    jobs = world.running(4)
    world.program.send_signal(signal.SIGINT)
    world.ends_with(-signal.SIGINT)
    assert "KeyboardInterrupt" in world.output
    assert not any(map(alive, jobs.values()))
    assert {trial.user_attrs["gpu_launcher:failure"] for trial in world.trials} == {"was interrupted"}
    assert [trial.state for trial in world.trials] == [TrialState.FAIL] * 4
    assert world.witness("told") == []


def test_nothing_is_left_when_the_program_is_killed(world: World) -> None:
    world.start()
    world.running(4)
    tree = psutil.Process(world.program.pid).children(recursive=True)
    world.program.kill()
    world.program.wait()
    until(lambda: not any(map(alive, tree)), "processes outlive their program", PATIENCE)


def test_without_any_node_left_the_search_ends_and_says_why(world: World) -> None:
    (world.directory / "once.sh").write_text('f=$GPU_LAUNCHER_POOL_DIR.used; [ -e $f ] && exit 3; : > $f; exec "$@"\n')
    world.start(words=f"sh {world.directory}/once.sh")
    jobs = world.running(4)
    for agent in {world.agent_of(job) for job in jobs.values()}:
        agent.kill()
    world.ends_with(1)
    assert "NodeDiedError: no node is left (" in world.output
    assert "exit status 3" in world.output
    assert [trial.state for trial in world.trials] == [TrialState.FAIL] * 4
    until(lambda: not any(map(alive, jobs.values())), "jobs outlive their agents", PATIENCE)
