"""`gpu-launcher map` stopped by signals, killed at every named point of a run's life, and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import until

POINTS = ("started", "prepared", "queued", "claimed", "granted", "exited", "released", "concluded", "retried")
RUNS = 5

APP = """
import functools, itertools, os, signal, sys, time

from gpu_launcher.cli.main import main
from gpu_launcher.cli.mapping import results_file
from gpu_launcher.jobs import node

passed = itertools.count(1)
point, _, times = os.environ.get("DIE_AT", "").partition(":")


program = os.getpid()


def checkpoint(name):
    if name == point and next(passed) == int(times):
        os.kill(program, signal.SIGKILL)
        while os.getppid() == program:  # this is the node
            time.sleep(0.001)


class ResultsFile(results_file.ResultsFile):
    def add(self, line):
        checkpoint("outcome left")
        if point == "line half written" and next(passed) == int(times):
            os.write(self._descriptor, b'{"index": 3, "par')
            os.kill(os.getpid(), signal.SIGKILL)
        super().add(line)
        checkpoint("line written")


node.JobLoop = functools.partial(node.JobLoop, checkpoint=checkpoint)
from gpu_launcher.cli.mapping import launch
launch.ResultsFile = ResultsFile
main()
"""

# Says that it ran, and fails at its first attempt if it is number 1.
RUN = """
import os, sys, time
n = sys.argv[1]
if n == "1" and os.environ["GPU_LAUNCHER_ATTEMPT"] == "1":
    sys.exit(3)
time.sleep(0.05)
with open("ran", "a") as file:
    file.write(f"{n}\\n")
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path


def environment(app: Path, die_at: str = "") -> dict[str, str]:
    tree = str(Path(__file__).parents[2])
    return {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(app / "pool"), "DIE_AT": die_at, "PYTHONPATH": tree}


def run_map(app: Path, *words: str, die_at: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "app.py", "map", *words],
        cwd=app,
        env=environment(app, die_at),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=500,
        check=False,
    )


def start_map(app: Path, *words: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "app.py", "map", *words],
        cwd=app,
        env=environment(app),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        text=True,
    )


def grid(*command: str) -> tuple[str, ...]:
    options = ("--devices", "simulated:2", "--retries", "1", "--dir", "out")
    return ("--param", f"n=range({RUNS})", *options, "--", *(command or (sys.executable, "run.py", "{n}")))


def ran(app: Path) -> Counter[int]:
    file = app / "ran"
    return Counter(map(int, file.read_text().split())) if file.exists() else Counter()


def lines(app: Path) -> list[dict[str, Any]]:
    file = app / "out" / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def whole_lines(app: Path) -> list[dict[str, Any]]:
    """Of a program that may have been killed while it wrote one."""
    found = []
    for line in (app / "out" / "results.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def completed(app: Path) -> set[int]:
    """The runs that left an outcome which says so."""
    found = {path: json.loads(path.read_text()) for path in (app / "out").glob("*/outcome.json")}
    return {int(path.parent.name) for path, outcome in found.items() if outcome["outcome"] == "completed"}


def processes(app: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cwd() == str(app) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sleepers(app: Path) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):  # another process has just ended
        return sum("sleep" in process.name() for process in processes(app))
    return 0


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("point", [*POINTS, "outcome left", "line half written", "line written"])
def test_killed_at_any_point_a_map_is_resumed_at_once_and_nothing_completed_runs_again(app, point, times):
    times = 1 if point == "retried" else times
    killed = run_map(app, *grid(), die_at=f"{point}:{times}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    known = completed(app) | {line["index"] for line in whole_lines(app) if line["outcome"] == "completed"}

    # At once: it waits for what is left of the first launch, in which runs may yet complete.
    resumed = run_map(app, "--resume", "out")
    assert resumed.returncode == 0, resumed.stderr
    results = lines(app)
    assert sorted(line["index"] for line in results) == list(range(RUNS)), "each exactly once"
    assert {line["outcome"] for line in results} == {"completed"}
    # A run that got its devices as the node was killed may complete before it ends. Its devices were never recorded.
    assert sum(not line["devices"] for line in results) <= (point == "granted")
    (before,) = [int(line.split()[1]) for line in resumed.stderr.splitlines() if "completed before" in line]
    again = {number for number, times in ran(app).items() if times > 1}
    assert not again & known, "what had completed before"
    assert before >= len(known)
    # A run that was killed after it had said so, and before it could leave its outcome, is not known to have completed.
    assert len(again) <= 2
    assert f"{RUNS - before} job" in resumed.stderr
    assert not processes(app)


def test_what_completed_before_the_kill_is_not_run_again_whoever_has_taken_note(app):
    """Killed between the outcome that a run left and the line about it."""
    killed = run_map(app, *grid(), die_at="outcome left:3")
    assert killed.returncode == -signal.SIGKILL
    until(lambda: not processes(app))
    left = completed(app)
    assert len(left) > len(lines(app)) == 2
    before = ran(app)
    assert run_map(app, "--resume", "out").returncode == 0
    assert sorted(line["index"] for line in lines(app)) == list(range(RUNS))
    assert all(ran(app)[number] == before[number] for number in left)
    assert all(line["devices"] and line["params"] == {"n": line["index"]} for line in lines(app))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_by_a_signal_it_ends_its_runs_says_how_to_go_on_and_goes_on(app, signum):
    (app / "wait.sh").write_text("sleep 600 & echo $1 >> began; test -e go || sleep 600; kill %1; echo $1 >> ran")
    words = grid("bash", "wait.sh", "{n}")
    process = start_map(app, *words)
    until(lambda: (app / "began").exists() and len((app / "began").read_text().split()) == 2)
    process.send_signal(signum)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 128 + signum
    assert "Traceback" not in said
    assert "gpu-launcher map --resume out" in said
    assert not processes(app)
    assert [line["outcome"] for line in lines(app)] == ["cancelled"] * 2
    (app / "go").touch()
    resumed = run_map(app, "--resume", "out")
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(line["index"] for line in lines(app)) == list(range(RUNS))
    assert ran(app) == dict.fromkeys(range(RUNS), 1)


@pytest.mark.smoke
def test_killed_it_takes_everything_with_it(app):
    words = grid("bash", "-c", "setsid sleep 601 & sleep 602; echo {n}")
    process = start_map(app, *words, output=subprocess.DEVNULL)
    until(lambda: sleepers(app) == 4)
    process.kill()
    process.wait()
    until(lambda: not processes(app))


@pytest.mark.parametrize("who", ["fork server", "supervisor", "run", "command"])
def test_whoever_else_is_killed_fails_alone_and_the_map_goes_on(app, who):
    """Two runs wait to be killed with it; the others run after them, and a resumption runs the two again."""
    (app / "wait.sh").write_text(
        "if test $1 -lt 2 -a ! -e go; then echo $$ >> began; setsid sleep 601 & sleep 602; fi; echo $1 >> ran"
    )
    words = list(grid("bash", "wait.sh", "{n}"))
    words[words.index("--retries") + 1] = "0"
    process = start_map(app, *words)
    until(lambda: (app / "began").exists() and len((app / "began").read_text().split()) == 2)
    until(lambda: sleepers(app) == 4)
    (app / "go").touch()
    above = ("command", "run", "supervisor", "fork server")
    for pid in (app / "began").read_text().split():
        command = psutil.Process(int(pid))
        family = dict(zip(above, (command, *command.parents()), strict=False))
        with contextlib.suppress(psutil.NoSuchProcess):  # one fork server has both
            family[who].kill()
        if who == "fork server":
            break
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert not processes(app), "and nothing is left of what it had started"
    found = {line["index"]: line for line in lines(app)}
    assert {index: line["outcome"] for index, line in found.items()} == {
        index: "failed" if index < 2 else "completed" for index in range(RUNS)
    }
    assert all("killed" in found[index]["message"] for index in range(2)), found
    assert completed(app) == {2, 3, 4}
    resumed = run_map(app, "--resume", "out")
    assert resumed.returncode == 0, resumed.stderr
    assert {line["index"]: line["outcome"] for line in lines(app)} == dict.fromkeys(range(RUNS), "completed")
    assert ran(app) == dict.fromkeys(range(RUNS), 1)


def test_a_resumption_that_is_killed_at_once_loses_no_result(app):
    """Between the removal of what failed before and the first new result."""
    words = ("--param", "n=range(4)", "--devices", "simulated:1", "--dir", "out", "--")
    assert run_map(app, *words, "bash", "-c", "test {n} = 0").returncode == 1
    before = {line["index"]: line for line in lines(app)}
    assert len(before) == 4
    killed = run_map(app, "--resume", "out", die_at="prepared:1")
    assert killed.returncode == -signal.SIGKILL
    stopped = run_map(app, "--resume", "out", "--stop-on-failure")
    assert stopped.returncode == 1
    after = {line["index"]: line for line in lines(app)}
    assert sorted(after) == [0, 1, 2, 3]
    assert after[0] == before[0]
    assert after[1]["attempts"] == 2
    assert after[3] == before[3], "it did not run again; the one before it may have begun to"


def test_what_a_live_program_runs_is_not_resumed(app):
    process = subprocess.Popen(
        [sys.executable, "app.py", "map", *grid("bash", "-c", "touch began; sleep 600; echo {n}")],
        cwd=app,
        env=environment(app),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: (app / "began").exists())
    refused = run_map(app, "--resume", "out")
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    assert refused.returncode == 2
    assert f"is being run by process {process.pid} (gpu-launcher map): wait for it, or stop it" in refused.stderr
