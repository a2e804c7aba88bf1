"""Whoever dies while `gpu_launcher.optimize` runs: no job outlives it, no trial is left running, each is told once."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.studies.trial_attrs import RETRY_OF
from tests.waiting import alive, until
from tests.warm import Program, Warm

PATIENCE = 100.0
"""Seconds until a test gives up on what should happen soon."""

SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path

import optuna
import gpu_launcher
from gpu_launcher.jobs.where import Where
from gpu_launcher.studies import stale_trials

HERE = Path(__file__).parent
OPTIONS = json.loads(sys.argv[1])


def write(**entry):
    with open(HERE / "witness.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\\n")


def objective(trial):
    if OPTIONS.get("stubborn"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    x = trial.suggest_float("x", 0, 1)
    try:
        write(began=trial.number, x=x, pid=os.getpid())
        deadline = time.monotonic() + OPTIONS.get("seconds", 600)
        step = 0
        while time.monotonic() < deadline and not (HERE / f"finish-{trial.number}").exists():
            trial.report(x, step)
            step += 1
            time.sleep(0.02 * random.random())
    finally:
        write(cleaned=trial.number)
    write(ended=trial.number, x=x)
    return x


def callback(study, trial):
    write(told=trial.number, state=trial.state.name)


def slowly(storage, id, message):
    time.sleep(0.05)
    return fail(storage, id, message)


if __name__ == "__main__":
    fail = stale_trials.fail
    if OPTIONS.get("slow_disk"):
        stale_trials.fail = slowly
    study = optuna.create_study(
        study_name="shared",
        storage=gpu_launcher.storage("sqlite:///study.db"),
        sampler=optuna.samplers.RandomSampler(),
        load_if_exists=True,
    )
    try:
        gpu_launcher.optimize(
            study,
            objective,
            OPTIONS.get("n_trials"),
            n_jobs=OPTIONS.get("n_jobs"),
            callbacks=[callback],
            catch=eval(OPTIONS.get("catch", "()")),
            retry_stale=OPTIONS.get("retry_stale", 0),
            pool=Where(OPTIONS.get("devices", "simulated:2"), "pool"),
        )
    finally:
        write(returned=os.getpid())
"""


class World:
    """A study in a file, and programs that work on it."""

    def __init__(self, directory: Path, warm: Warm) -> None:
        self.directory = directory
        self._warm = warm
        self.programs: list[Program] = []
        (directory / "script.py").write_text(SCRIPT)

    def start(self, **options: Any) -> Program:
        command = ["script.py", json.dumps(options)]
        with self.output(len(self.programs)).open("wb") as output:
            streams = {"stdout": output.fileno(), "stderr": output.fileno()}
            program = self._warm.start(command, os.environ, **streams, cwd=self.directory)
        self.programs.append(program)
        return program

    def output(self, number: int = 0) -> Path:
        return self.directory / f"output-{number}.txt"

    def run(self, **options: Any) -> int:
        return self.start(**options).wait(PATIENCE)

    def witness(self, what: str) -> list[dict[str, Any]]:
        file = self.directory / "witness.jsonl"
        entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [entry for entry in entries if what in entry]

    def running(self, count: int) -> list[psutil.Process]:
        """Wait until so many trials have begun; return their processes."""
        until(lambda: len(self.witness("began")) >= count, f"not {count} trials begin: {self.output().read_text()}")
        return [psutil.Process(entry["pid"]) for entry in self.witness("began")]

    def finish(self, number: int) -> None:
        (self.directory / f"finish-{number}").touch()

    @property
    def study(self) -> optuna.Study:
        storage = gpu_launcher.storage(f"sqlite:///{self.directory}/study.db")
        return optuna.load_study(study_name="shared", storage=storage)

    def states(self) -> list[str]:
        return [trial.state.name.lower() for trial in self.study.trials]


@pytest.fixture
def world(tmp_path: Path, warm: Warm) -> Iterator[World]:
    world = World(tmp_path, warm)
    yield world
    for program in world.programs:
        program.kill()
        program.wait()


def family(program: Program) -> list[psutil.Process]:
    """Its node first, then fork server, supervisors and jobs."""
    return psutil.Process(program.pid).children(recursive=True)


@pytest.mark.smoke
def test_a_killed_program_leaves_no_process_and_its_trials_fail_with_the_next_one(world: World) -> None:
    program = world.start()
    world.running(2)
    processes = family(program)
    assert len(processes) >= 4
    program.kill()
    program.wait()
    until(lambda: not any(map(alive, processes)), "its processes outlive it", seconds=60)
    assert world.states() == ["running", "running"]
    assert world.run(n_trials=2, seconds=0) == 0
    assert world.states() == ["fail", "fail", "complete", "complete"]
    why = {trial.user_attrs.get("gpu_launcher:failure") for trial in world.study.trials[:2]}
    assert why == {"its program ended before the trial did"}
    assert "marked 2 trials of a dead program as failed" in world.output(1).read_text()


def test_lost_trials_are_queued_again_if_that_is_wanted(world: World) -> None:
    program = world.start(retry_stale=1)
    world.running(2)
    program.kill()
    program.wait()
    lost = {trial.params["x"] for trial in world.study.trials}
    assert world.run(n_trials=2, seconds=0, retry_stale=1) == 0
    assert world.states() == ["fail", "fail", "complete", "complete"]
    assert {trial.params["x"] for trial in world.study.trials[2:]} == lost


def test_programs_that_start_together_queue_a_lost_trial_once(world: World) -> None:
    program = world.start(devices="simulated:12")
    world.running(12)
    program.kill()
    program.wait()
    lost = {trial.params["x"] for trial in world.study.trials}
    options = {"n_trials": 8, "seconds": 0, "devices": "simulated:4", "retry_stale": 1, "slow_disk": True}
    both = [world.start(**options) for _ in range(2)]
    assert [program.wait(PATIENCE) for program in both] == [0, 0], world.output(1).read_text()
    trials = world.study.trials
    assert world.states() == ["fail"] * 12 + ["complete"] * 16
    repeated = Counter(trial.user_attrs["gpu_launcher:retry_of"][-1] for trial in trials[12:24])
    assert repeated == Counter(range(12))
    assert {trial.params["x"] for trial in trials[12:24]} == lost
    assert max(Counter(trial.params["x"] for trial in trials[12:]).values()) == 1, "no parameters ran twice"


def test_trials_of_a_living_program_are_left_alone(world: World) -> None:
    program = world.start(n_trials=1, n_jobs=1)
    world.running(1)
    assert world.run(n_trials=2, n_jobs=1, seconds=0) == 0
    assert world.states() == ["running", "complete", "complete"]
    world.finish(0)
    assert program.wait(PATIENCE) == 0
    assert world.states() == ["complete"] * 3


def test_without_its_node_the_program_ends_and_its_trials_fail(world: World) -> None:
    program = world.start()
    world.running(2)
    node, *rest = family(program)
    node.kill()
    assert program.wait(PATIENCE) == 1
    assert "NodeDiedError" in world.output().read_text()
    until(lambda: not any(map(alive, rest)), "jobs outlive their node", seconds=60)
    assert world.states() == ["fail", "fail"]


@pytest.mark.parametrize("who", ["job", "supervisor", "server"])
def test_who_loses_a_process_loses_its_trial_alone(world: World, who: str) -> None:
    program = world.start(n_trials=3, catch="Exception")
    first, second = world.running(2)[:2]
    victim = {"job": first, "supervisor": first.parent(), "server": family(program)[1]}[who]
    assert victim is not None
    victim.kill()
    until(lambda: not alive(first), "the job lives on", seconds=60)
    for number in range(3):
        world.finish(number)
    assert program.wait(PATIENCE) == 0, world.output().read_text()
    told = [entry["told"] for entry in world.witness("told")]
    assert sorted(told) == [0, 1, 2]
    states = world.states()
    assert states[2] == "complete"
    assert states[:2].count("fail") == (2 if who == "server" and not world.witness("ended")[1:] else 1)
    assert not alive(second)


def test_an_uncaught_death_is_raised_when_the_others_have_ended(world: World) -> None:
    program = world.start()
    first, _ = world.running(2)[:2]
    first.kill()
    until(lambda: "fail" in world.states(), "it is not told")
    time.sleep(0.3)
    assert program.poll() is None
    for number in range(3):
        world.finish(number)
    assert program.wait(PATIENCE) == 1
    assert "JobError" in world.output().read_text()
    assert sorted(world.states()) == ["complete", "fail"]


def test_ctrl_c_interrupts_the_objectives_and_fails_their_trials(world: World) -> None:
    program = world.start()
    processes = world.running(2)
    program.send_signal(signal.SIGINT)
    assert program.wait(PATIENCE) == -signal.SIGINT
    assert "KeyboardInterrupt" in world.output().read_text()
    assert len(world.witness("cleaned")) == 2
    assert len(world.witness("returned")) == 1
    assert world.states() == ["fail", "fail"]
    assert {trial.user_attrs["gpu_launcher:failure"] for trial in world.study.trials} == {"was interrupted"}
    assert not any(map(alive, processes))
    assert world.witness("told") == []


def test_ctrl_c_queues_them_again_if_that_is_wanted(world: World) -> None:
    program = world.start(retry_stale=1)
    world.running(2)
    program.send_signal(signal.SIGINT)
    program.wait(PATIENCE)
    assert sorted(world.states()) == ["fail", "fail", "waiting", "waiting"]


def test_a_second_ctrl_c_waits_for_nobody(world: World) -> None:
    program = world.start(stubborn=True)
    processes = world.running(2)
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert program.poll() is None, "the first one waits for a while"
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == -signal.SIGINT
    until(lambda: not any(map(alive, processes)), "stubborn jobs live on", seconds=60)
    assert world.states() == ["fail", "fail"]


@pytest.mark.parametrize("stubborn", [True, False])
def test_however_often_ctrl_c_is_pressed_each_trial_is_told(world: World, stubborn: bool) -> None:
    """Also while that is going on, as it is for some time on a slow disk."""
    program = world.start(stubborn=stubborn, retry_stale=1, slow_disk=True)
    world.running(2)
    for _ in range(25):
        program.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert program.wait(PATIENCE) != 0
    assert sorted(world.states()) == ["fail", "fail", "waiting", "waiting"]
    assert "could not be marked as failed" not in world.output().read_text()


OURS = ("supervisor", "server", "guard", "node", "program")
"""What is above a job, in this order."""


def ours(who: str, job: psutil.Process) -> psutil.Process:
    return job.parents()[OURS.index(who)]


@pytest.mark.parametrize("who", OURS)
def test_what_is_lost_is_queued_again_as_often_as_that_is_wanted_and_no_more(world: World, who: str) -> None:
    """What it tries may be the reason, whichever process of ours it is that dies of it."""
    for run in range(3):
        program = world.start(n_trials=1, n_jobs=1, retry_stale=1)
        until(lambda run=run: len(world.witness("began")) > run, "no trial begins")  # type: ignore[misc]
        job = psutil.Process(world.witness("began")[run]["pid"])
        ours(who, job).kill()
        program.wait(PATIENCE)
        until(lambda job=job: not alive(job), "the job lives on", seconds=60)  # type: ignore[misc]
    first, second, third = (entry["x"] for entry in world.witness("began"))
    assert first == second
    assert third != first
    lost = [trial.user_attrs.get("gpu_launcher:lost", 0) for trial in world.study.trials[:3]]
    assert lost == [0, 1, 0]


@pytest.mark.parametrize("who", ["supervisor", "server", "guard"])
def test_what_is_queued_again_at_once_ends_no_search(world: World, who: str) -> None:
    program = world.start(n_trials=5, retry_stale=1)
    first, _ = world.running(2)[:2]
    ours(who, first).kill()
    until(lambda: not alive(first), "the job lives on", seconds=60)
    for number in range(5):
        world.finish(number)
    assert program.wait(PATIENCE) == 0, world.output().read_text()
    trials = world.study.trials
    repeated = {trial.user_attrs[RETRY_OF][-1]: trial for trial in trials if RETRY_OF in trial.user_attrs}
    failed = [trial for trial in trials if trial.state is TrialState.FAIL]
    assert {trial.number for trial in failed} == set(repeated) != set()
    for trial in failed:
        assert "killed" in trial.user_attrs["gpu_launcher:failure"]
        assert repeated[trial.number].params == trial.params
        assert repeated[trial.number].state is TrialState.COMPLETE
    told = Counter(entry["told"] for entry in world.witness("told"))
    assert told == Counter(range(5))


def test_two_programs_work_on_one_study(world: World) -> None:
    storage = gpu_launcher.storage(f"sqlite:///{world.directory}/study.db")
    study = optuna.create_study(study_name="shared", storage=storage)
    for number in range(16):
        study.enqueue_trial({"x": number / 100})
    both = [world.start(n_trials=10, seconds=0, devices="simulated:4") for _ in range(2)]
    assert [program.wait(PATIENCE) for program in both] == [0, 0], world.output().read_text()
    assert world.states() == ["complete"] * 20
    began = Counter(entry["began"] for entry in world.witness("began"))
    assert began == Counter(range(20))
    tried = {entry["ended"]: entry["x"] for entry in world.witness("ended")}
    assert [tried[number] for number in range(16)] == [number / 100 for number in range(16)]
    owners = Counter(trial.user_attrs["gpu_launcher:owner"]["pid"] for trial in study.trials)
    assert sorted(owners.values()) == [10, 10]


@pytest.mark.timeout(300)
def test_whoever_is_killed_no_trial_is_lost_or_told_twice(world: World) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    storage = gpu_launcher.storage(f"sqlite:///{world.directory}/study.db")
    study = optuna.create_study(study_name="shared", storage=storage)
    enqueued = [number / 1000 for number in range(1, 21)]
    for x in enqueued:
        study.enqueue_trial({"x": x})
    options = {"retry_stale": 1000, "catch": "Exception", "seconds": 0.05, "devices": "simulated:3"}
    living: list[Program] = []

    def gone_on(goal: int) -> bool:
        """Both may be about to end of the last two kills, and are replaced as soon as they have."""
        living[:] = [program for program in living if program.poll() is None]
        while len(living) < 2:
            living.append(world.start(**options))
        return len(world.witness("ended")) >= goal

    for _ in range(8):
        goal = len(world.witness("ended")) + chance.randrange(1, 6)
        until(partial(gone_on, goal), "nothing goes on")
        program = psutil.Process(chance.choice(living).pid)
        relatives = program.children(recursive=True) if chance.random() < 0.6 else []
        with suppress(psutil.NoSuchProcess):
            chance.choice(relatives or [program]).kill()
    for program in living:
        program.send_signal(signal.SIGINT)
    for program in living:
        program.wait(PATIENCE)
    waiting = sum(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in study.trials)
    assert world.run(n_trials=waiting + 1, **options) == 0, world.output(len(world.programs) - 1).read_text()
    with sqlite3.connect(world.directory / "study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    trials = study.trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    assert set(Counter(entry["began"] for entry in world.witness("began")).values()) == {1}, "no trial ran twice"
    assert set(Counter(entry["told"] for entry in world.witness("told")).values()) == {1}
    completed = Counter(trial.params["x"] for trial in trials if trial.state is TrialState.COMPLETE)
    assert max(completed.values()) == 1, "nothing that completed was tried again"
    # A process that died took its trial with it, maybe before that had suggested what was queued.
    why = {
        trial.system_attrs.get("fixed_params", {}).get("x"): str(trial.user_attrs.get("gpu_launcher:failure"))
        for trial in trials
        if trial.state is TrialState.FAIL
    }
    crashed = {x for x, failure in why.items() if "was killed" in failure or "was ended because" in failure}
    missing = set(enqueued) - set(completed) - crashed
    assert not missing, {x: why.get(x) for x in missing}
