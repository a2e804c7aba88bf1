"""A sweep whose launching program is killed, at every named point of a job's life, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gpu_launcher.jobs.manifest import State, read
from gpu_launcher.jobs.reports import read_report
from tests.waiting import until
from tests.warm import Warm

Sweep = Callable[..., "subprocess.CompletedProcess[str]"]

POINTS = ("started", "prepared", "queued", "claimed", "granted", "exited", "released", "concluded")
JOBS = 4

APP = """
import functools, itertools, json, os, signal, time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from gpu_launcher.jobs import node
from hydra_plugins.gpu_pool_launcher import _launch

HERE = Path(__file__).parent
passed = itertools.count(1)
head = os.getpid()


def checkpoint(name):
    point, _, times = os.environ.get("DIE_AT", "").partition(":")
    if name == point and next(passed) == int(times):
        os.kill(head, signal.SIGKILL)
        while os.getppid() == head:
            time.sleep(0.001)


def launch(*arguments):
    returns = original(*arguments)
    (HERE / "returns").write_text(json.dumps([[one.status.name, str(one._return_value)] for one in returns]))
    return returns


original = _launch.launch
_launch.launch = launch
node.JobLoop = functools.partial(node.JobLoop, checkpoint=checkpoint)


@dataclass
class Config:
    n: int = 0


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    if cfg.n == 1 and os.environ["GPU_LAUNCHER_ATTEMPT"] == "1":
        os._exit(3)
    with (HERE / "ran").open("a") as file:
        file.write(f"{cfg.n}\\n")
    return cfg.n


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def sweep(app: Path, warm: Warm) -> Sweep:
    def sweep(*options: str, grid: str = "n=range(4)", die_at: str = "") -> subprocess.CompletedProcess[str]:
        command = ["app.py", "-m", grid, "hydra.sweep.dir=sweep", "hydra/launcher=gpu_pool"]
        command += ["hydra.launcher.devices=simulated:2", "hydra.launcher.retries=1", *options]
        pool = {"GPU_LAUNCHER_POOL_DIR": str(app / "pool"), "DIE_AT": die_at}
        return warm.run(command, {**os.environ, **pool}, timeout=500, cwd=app)

    return sweep


def processes(app: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(app) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def returns(app: Path) -> list[list[str]]:
    found: list[list[str]] = json.loads((app / "returns").read_text())
    return found


def ran(app: Path) -> Counter[int]:
    file = app / "ran"
    return Counter(map(int, file.read_text().split())) if file.exists() else Counter()


@pytest.mark.parametrize(
    ("point", "times"), [*((point, 3) for point in POINTS), ("started", 1), ("granted", 1), ("retried", 1)]
)
def test_killed_at_any_point_a_sweep_is_resumed_and_no_finished_job_runs_again(app, sweep, point, times):
    killed = sweep(die_at=f"{point}:{times}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    until(lambda: not processes(app))
    left = read(app / "sweep")
    assert sorted(left) == list(range(JOBS))
    assert {entry.state for entry in left.values()} <= {State.COMPLETED, State.LOST, State.FAILED}
    reported = {number for number, entry in left.items() if entry.report and read_report(entry.report).ok}
    assert reported == {number for number, entry in left.items() if entry.state is State.COMPLETED}
    before = ran(app)

    resumed = sweep("hydra.launcher.resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert returns(app) == [["COMPLETED", f"{number}"] for number in range(JOBS)]
    assert f"resumed: {len(reported)} of 4 jobs completed before" in resumed.stderr
    again = ran(app) - before
    assert set(again) == set(range(JOBS)) - reported
    assert max(again.values(), default=1) == 1
    assert {entry.state for entry in read(app / "sweep").values()} == {State.COMPLETED}
    assert list((app / "sweep" / ".gpu_launcher").glob("launch-*")) == []


@pytest.mark.smoke
def test_what_completed_is_run_again_only_if_its_overrides_changed_or_nobody_asked_to_resume(app, sweep):
    assert sweep().returncode == 0
    assert ran(app) == dict.fromkeys(range(4), 1)
    nothing = sweep("hydra.launcher.resume=true")
    assert nothing.returncode == 0
    assert "resumed: 4 of 4 jobs completed before" in nothing.stderr
    assert ran(app) == dict.fromkeys(range(4), 1)
    assert returns(app) == [["COMPLETED", f"{number}"] for number in range(4)]

    changed = sweep("hydra.launcher.resume=true", grid="n=0,7,2,3,4")
    assert changed.returncode == 0, changed.stderr
    assert "resumed: 3 of 5 jobs completed before" in changed.stderr
    assert ran(app) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 7: 1}
    assert returns(app) == [["COMPLETED", number] for number in "07234"]
    assert (app / "sweep" / "1" / "job.attempt-2.log").exists(), "what the earlier job 1 had logged is kept"

    assert sweep().returncode == 0
    assert ran(app)[0] == 2
    assert len(list((app / "sweep" / ".gpu_launcher").glob("0.*.report"))) == 1, "superseded reports are removed"


def test_what_a_live_program_runs_is_not_run_twice(app, sweep):
    (app / "app.py").write_text(
        APP.replace("if cfg.n == 1", "while not (HERE / 'go').exists(): pass\n    if cfg.n == 1")
    )
    command = [sys.executable, "app.py", "-m", "n=0", "hydra.sweep.dir=sweep", "hydra/launcher=gpu_pool"]
    pool = {"GPU_LAUNCHER_POOL_DIR": str(app / "pool")}
    with subprocess.Popen(
        [*command, "hydra.launcher.devices=simulated:2"], cwd=app, env={**os.environ, **pool}, stderr=subprocess.DEVNULL
    ) as first:
        until(lambda: any(entry.state is State.RUNNING for entry in read(app / "sweep").values()))
        refused = sweep("hydra.launcher.resume=true", grid="n=0")
        assert refused.returncode == 1
        assert f"is being run by process {first.pid} (app.py): wait for it, or stop it" in refused.stderr
        (app / "go").touch()
        assert first.wait(100) == 0
    assert sweep("hydra.launcher.resume=true", grid="n=0").returncode == 0
    assert ran(app) == {0: 1}


def test_of_a_launch_on_another_machine_nobody_can_say_whether_it_lives(app, sweep):
    assert sweep().returncode == 0
    launch = app / "sweep" / ".gpu_launcher" / "launch-0123456789ab.json"
    identity = {"pid": 1, "start": 1, "namespace": "", "boot": "another", "host": "elsewhere", "command": "train.py"}
    launch.write_text(json.dumps(identity))
    refused = sweep("hydra.launcher.resume=true")
    assert refused.returncode == 1
    assert "may still be run by process 1 (train.py) of elsewhere" in refused.stderr
    assert f"remove {launch}" in refused.stderr
    launch.write_text(json.dumps({**identity, "host": os.uname().nodename}))
    assert sweep("hydra.launcher.resume=true").returncode == 0, "it was before the last restart"


def test_a_manifest_that_was_cut_off_or_is_of_a_newer_version(app, sweep):
    assert sweep().returncode == 0
    manifest = app / "sweep" / ".gpu_launcher" / "manifest.jsonl"
    whole = manifest.read_text()
    manifest.write_text(whole.rstrip()[:-20])
    assert Counter(entry.state for entry in read(app / "sweep").values()) == {State.COMPLETED: 4}, "its report is there"
    assert "resumed: 4 of 4" in sweep("hydra.launcher.resume=true").stderr
    manifest.write_text(whole.replace('"format": 1', '"format": 2'))
    refused = sweep("hydra.launcher.resume=true")
    assert refused.returncode == 1
    assert "written by a newer version of gpu-launcher: use that" in refused.stderr
