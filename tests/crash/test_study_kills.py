"""Sweeps, samplers and jobs on one study are killed at random, and others go on: no trial is lost, or run twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState

import gpu_launcher

optuna = pytest.importorskip("optuna")

KILLS = 25
ENQUEUED = [number / 1000 for number in range(1, 61)]
SWEEPS = 3
"""At a time."""

APP = """
import json, os, time, random
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

import gpu_launcher

HERE = Path(__file__).parent


@dataclass
class Config:
    x: float = 0.0


ConfigStore.instance().store(name="config", node=Config)


def write(**entry):
    with open(HERE / "witness.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\\n")


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    trial = gpu_launcher.current_trial()
    write(began=trial.number, x=cfg.x)
    for step in range(5):
        trial.report(cfg.x, step)
        time.sleep(random.random() * 0.05)
    value = random.random()
    write(ended=trial.number, x=cfg.x, value=value)
    return value


if __name__ == "__main__":
    main()
"""


class World:
    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.chance = chance
        self.url = f"sqlite:///{directory / 'study.db'}"
        self.started = 0
        self.sweeps: list[subprocess.Popen[bytes]] = []
        (directory / "app.py").write_text(APP)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        self.started += 1
        command = [
            *(sys.executable, "app.py", "-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4"),
            *("hydra/sweeper=optuna_async", "hydra/sweeper/sampler=random", "x=interval(0.0,1.0)"),
            *(f"hydra.sweeper.storage={self.url}", "hydra.sweeper.study_name=shared"),
            f"hydra.sweep.dir=sweep-{self.started}",
            *("hydra.sweeper.n_jobs=3", "hydra.sweeper.retry_stale=1000", *options),
        ]
        environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(self.directory / "pool")}
        with (self.directory / f"output-{self.started}.txt").open("wb") as output:
            return subprocess.Popen(command, cwd=self.directory, env=environment, stdout=output, stderr=output)

    def witness(self) -> list[dict[str, Any]]:
        file = self.directory / "witness.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def keep_sweeping(self) -> None:
        self.sweeps = [sweep for sweep in self.sweeps if sweep.poll() is None]
        while len(self.sweeps) < SWEEPS:
            self.sweeps.append(self.start("hydra.sweeper.n_trials=1000"))

    def kill_somebody(self) -> str:
        """A launching program in one of three cases, else anything of its: guard, server, sampler, supervisor, job."""
        sweep = psutil.Process(self.chance.choice(self.sweeps).pid)
        family = [] if self.chance.random() < 1 / 3 else sweep.children(recursive=True)
        victim = self.chance.choice(family) if family else sweep
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        return "program" if victim == sweep else "another"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_trial_is_lost_or_run_twice_whoever_is_killed(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    world = World(tmp_path, random.Random(seed))
    study = optuna.create_study(study_name="shared", storage=gpu_launcher.storage(world.url))
    for x in ENQUEUED:
        study.enqueue_trial({"x": x})
    killed: Counter[str] = Counter()
    try:
        while killed.total() < KILLS:
            world.keep_sweeping()
            ended = len(world.witness())
            goal = ended + world.chance.randrange(1, 12)
            deadline = time.monotonic() + 120
            while len(world.witness()) < goal and time.monotonic() < deadline:
                time.sleep(0.02)
            if len(world.witness()) == ended:
                pytest.fail((tmp_path / f"output-{world.started}.txt").read_text())
            world.keep_sweeping()
            killed[world.kill_somebody()] += 1
        for sweep in world.sweeps:
            sweep.send_signal(signal.SIGINT)
        for sweep in world.sweeps:
            sweep.wait(60)
        waiting = [trial for trial in study.trials if trial.state in (TrialState.WAITING, TrialState.RUNNING)]
        last = world.start(f"hydra.sweeper.n_trials={len(waiting) + 1}")
        assert last.wait(120) == 0, (tmp_path / f"output-{world.started}.txt").read_text()
    finally:
        for sweep in world.sweeps:
            sweep.kill()
            sweep.wait()
    print(f"killed: {dict(killed)}; {world.started} sweeps; {len(study.trials)} trials")
    assert killed["program"]
    assert killed["another"]
    with sqlite3.connect(tmp_path / "study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    trials = study.trials
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    began = Counter(entry["began"] for entry in world.witness() if "began" in entry)
    assert set(began.values()) == {1}, "no trial ran twice"
    values = {entry["ended"]: entry["value"] for entry in world.witness() if "ended" in entry}
    for trial in trials:
        if trial.state is TrialState.COMPLETE:
            assert trial.values == [values[trial.number]]
    completed = Counter(trial.params["x"] for trial in trials if trial.state is TrialState.COMPLETE)
    assert max(completed.values()) == 1, "nothing that completed was tried again"
    why = {trial.params.get("x"): str(trial.user_attrs.get("gpu_launcher:failure")) for trial in trials}
    crashed = {x for x, failure in why.items() if "was killed" in failure or "was ended because" in failure}
    assert set(ENQUEUED) <= set(completed) | crashed, "each queued point was tried"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_sweeps_run_each_of_sixty_queued_trials_once(tmp_path: Path) -> None:
    world = World(tmp_path, random.Random(0))
    points = ",".join(f"{{x: {x}}}" for x in ENQUEUED)
    total, sweeps = len(ENQUEUED), 8
    each = f"hydra.sweeper.n_trials={total // sweeps + 1}"
    try:
        world.sweeps = [world.start(each, f"hydra.sweeper.enqueue=[{points}]") for _ in range(sweeps)]
        for number, sweep in enumerate(world.sweeps, start=1):
            assert sweep.wait(500) == 0, (tmp_path / f"output-{number}.txt").read_text()
    finally:
        for sweep in world.sweeps:
            sweep.kill()
            sweep.wait()
    study = optuna.load_study(study_name="shared", storage=gpu_launcher.storage(world.url))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * (total // sweeps + 1) * sweeps
    ran = Counter(entry["x"] for entry in world.witness() if "began" in entry)
    assert {x: ran[x] for x in ENQUEUED} == dict.fromkeys(ENQUEUED, 1)
    values = {entry["ended"]: entry["value"] for entry in world.witness() if "ended" in entry}
    assert {trial.number: trial.values[0] for trial in study.trials} == values
    owners = {trial.user_attrs["gpu_launcher:owner"]["pid"] for trial in study.trials}
    assert owners == {sweep.pid for sweep in world.sweeps}, "all of them had a part in it"
    with sqlite3.connect(tmp_path / "study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
