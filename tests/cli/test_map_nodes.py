"""Tests `gpu-launcher map` on several nodes, each with a pool of its own: it must do what it does on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher import Sweep
from tests.emulated_terminal import EmulatedTerminal
from tests.waiting import alive, until

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 250.0

# On a busy machine, nodes start so late that maps would begin without them.
APP = """
import functools, os
from gpu_launcher.cli.main import main
from gpu_launcher.jobs import directory
from gpu_launcher.nodes import node_group
from gpu_launcher.nodes.agent_messages import Timing

node_group.FIRST_NODE_SECONDS = node_group.LATECOMER_SECONDS = 300.0
if "IMPATIENT" in os.environ:
    directory.NODES_END_SECONDS = 5.0
    timing = Timing(beat=0.5, quiet=3.0, silence=5.0, lost=12.0)
    node_group.NodeGroup = functools.partial(node_group.NodeGroup, timing=timing)
main()
"""

# A run says where it runs. It notices if another copy of it runs, and waits, fails or is repeated as the test wants.
RUN = """
import fcntl, json, os, sys, time
from pathlib import Path

n, attempt = int(sys.argv[1]), os.environ["GPU_LAUNCHER_ATTEMPT"]
lock = os.open(f"lock-{n}", os.O_CREAT | os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    Path("twice").touch()
pool = Path(os.environ["GPU_LAUNCHER_POOL_DIR"]).name
with open("ran", "a") as file:
    file.write(f"{n} {pool}\\n")
Path(f"temporary-{n}").write_text(str(os.getpid()))
Path(f"temporary-{n}").rename(f"witness-{n}")
print(json.dumps({"n": n, "cwd": os.getcwd()}), flush=True)
while len(list(Path.cwd().glob("witness-*"))) < int(os.environ.get("MEET", "0")):
    time.sleep(0.01)
while "HOLDS" in os.environ and not Path("release").exists():
    time.sleep(0.01)
if n in json.loads(os.environ.get("FAILS", "[]")) and not Path("healed").exists():
    sys.exit(3)
if n in json.loads(os.environ.get("REPEATS", "[]")) and attempt == "1":
    sys.exit(4)
"""


class Maps:
    """Runs maps in a directory."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        (path / "app.py").write_text(APP)
        (path / "run.py").write_text(RUN)

    def environ(self, extra: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "GPU_LAUNCHER_"))}
        ours = {"PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(self.path / "pool")}
        return {**kept, **ours, **extra}

    def start(self, *words: str, **extra: str) -> subprocess.Popen[str]:
        (self.path / "said").unlink(missing_ok=True)
        with open(self.path / "said", "w") as said:
            return subprocess.Popen(
                [sys.executable, "app.py", "map", *words],
                cwd=self.path,
                env=self.environ(extra),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def __call__(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **extra)
        stdout, _ = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(words, process.returncode, stdout, self.said)

    @property
    def said(self) -> str:
        return (self.path / "said").read_text()

    def node(self, name: str, *words: str) -> tuple[str, str]:
        """The option for a node with the pool `pool-<name>`, reached by further words."""
        return "--nodes", " ".join([f"command:env GPU_LAUNCHER_POOL_DIR={self.path}/pool-{name}", *words])

    def results(self) -> list[dict[str, Any]]:
        """The result lines, in the order of the runs. Each run must have at most one."""
        lines = [json.loads(line) for line in (self.path / "out" / "results.jsonl").read_text().splitlines()]
        assert len({line["index"] for line in lines}) == len(lines)
        assert not (self.path / "twice").exists(), "two copies of a run at the same time"
        return sorted(lines, key=lambda line: line["index"])

    def outcomes(self) -> list[tuple[str, int]]:
        """The outcome of each run, and how many times it was started."""
        return [(line["outcome"], line["attempts"]) for line in self.results()]

    def ran(self) -> list[tuple[int, str]]:
        """The runs that were started, each with its pool."""
        return [(int(line.split()[0]), line.split()[1]) for line in (self.path / "ran").read_text().splitlines()]

    def pools(self) -> set[str]:
        return {pool for _, pool in self.ran()}

    def running(self, *numbers: int) -> list[psutil.Process]:
        """Wait until these runs run, and return their processes."""
        files = [self.path / f"witness-{number}" for number in numbers]
        until(lambda: all(file.exists() for file in files), f"not all of {numbers} run", PATIENCE)
        return [psutil.Process(int(file.read_text())) for file in files]

    def processes(self) -> list[psutil.Process]:
        """All processes that work in the directory."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.path) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture
def maps(tmp_path: Path) -> Maps:
    return Maps(tmp_path)


def grid(runs: int, *options: str) -> tuple[str, ...]:
    words = ("--devices", "simulated:2", "--dir", "out", "--param", f"n=range({runs})")
    return (*words, *options, "--", sys.executable, "run.py", "{n}")


def on_two(maps: Maps) -> tuple[str, ...]:
    return (*maps.node("a"), *maps.node("b"))


def agent_of(process: psutil.Process) -> psutil.Process:
    """The agent above a run. What it forks has the same command line."""
    return [one for one in process.parents() if "nodes.agent" in one.cmdline()[-1]][-1]


def witnesses(maps: Maps) -> list[int]:
    """The runs that have begun, by number."""
    return sorted(int(file.name.partition("-")[2]) for file in maps.path.glob("witness-*"))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """What a map says that cannot run. It leaves nothing behind."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.smoke
def test_results_are_those_of_one_machine(tmp_path: Path) -> None:
    one, two = Maps(tmp_path / "one"), Maps(tmp_path / "two")
    behaviour = {"MEET": "4", "FAILS": "[1, 4]", "REPEATS": "[2]"}
    expected = one(*grid(8, "--retries", "1", "--devices", "simulated:4"), **behaviour)
    done = two(*grid(8, "--retries", "1", *on_two(two)), **behaviour)
    assert done.returncode == expected.returncode == 1, done.stderr
    assert two.pools() == {"pool-a", "pool-b"}
    assert "8 jobs: 6 completed, 2 failed" in done.stderr
    assert "to run the rest: gpu-launcher map --resume out" in done.stderr
    assert done.stdout == expected.stdout == "out/results.jsonl\n"
    assert [line["outcome"] for line in two.results()] == [
        "failed" if number in (1, 4) else "completed" for number in range(8)
    ]
    for maps in (one, two):
        assert [line["output"] for line in maps.results()] == [{"n": n, "cwd": str(maps.path)} for n in range(8)]
    same = ("index", "params", "outcome", "exit_code", "attempts", "message")
    assert [{name: line[name] for name in same} for line in two.results()] == [
        {name: line[name] for name in same} for line in one.results()
    ]
    for number in range(8):
        files = [sorted(file.name for file in (maps.path / "out" / str(number)).iterdir()) for maps in (one, two)]
        assert files[0] == files[1]


def test_failed_runs_are_resumed_on_the_same_nodes_or_on_others(maps: Maps) -> None:
    first = maps(*grid(6, *on_two(maps)), FAILS="[1, 4]", MEET="4")
    assert first.returncode == 1
    assert maps.pools() == {"pool-a", "pool-b"}
    (maps.path / "ran").unlink()
    (maps.path / "healed").write_text("1")
    again = maps("--resume", "out", FAILS="[1, 4]")
    assert again.returncode == 0, again.stderr
    assert "4 of 6 runs completed before" in again.stderr
    assert sorted(number for number, _ in maps.ran()) == [1, 4]
    assert maps.pools() <= {"pool-a", "pool-b"}
    assert maps.outcomes() == [("completed", 2 if number in (1, 4) else 1) for number in range(6)]


def test_files_of_runs_are_fetched_from_nodes_that_do_not_share_the_directory(maps: Maps) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    hidden = f"'mount -t tmpfs none {maps.path}/out && exec \"$@\"'"
    nodes = [word for name in "ab" for word in maps.node(name, "unshare", "-m", "sh", "-c", hidden, "sh")]
    first = maps(*grid(6, *nodes, "--outputs", "fetch"), FAILS="[1, 4]", MEET="4")
    assert first.returncode == 1, first.stderr
    assert "6 jobs: 4 completed, 2 failed" in first.stderr
    assert maps.pools() == {"pool-a", "pool-b"}
    (maps.path / "healed").write_text("1")
    again = maps("--resume", "out", FAILS="[1, 4]")
    assert again.returncode == 0, again.stderr
    assert "4 of 6 runs completed before" in again.stderr
    assert maps.outcomes() == [("completed", 2 if number in (1, 4) else 1) for number in range(6)]
    for number in range(6):
        names = {file.name for file in (maps.path / "out" / str(number)).iterdir()}
        earlier = {"stdout.attempt-1.txt", "stderr.attempt-1.txt"} if number in (1, 4) else set()
        assert names == {"params.json", "outcome.json", "stdout.txt", "stderr.txt", *earlier}
        assert json.loads((maps.path / "out" / str(number) / "stdout.txt").read_text())["n"] == number


def test_nodes_of_a_map_can_be_replaced_when_it_is_resumed(maps: Maps) -> None:
    assert maps(*grid(3, *maps.node("a")), FAILS="[1]").returncode == 1
    assert maps.pools() == {"pool-a"}
    (maps.path / "ran").unlink()
    done = maps("--resume", "out", "--nodes", "local")
    assert done.returncode == 0, done.stderr
    assert maps.ran() == [(1, "pool")]


def test_no_node_is_started_if_all_runs_completed(maps: Maps) -> None:
    assert maps(*grid(2)).returncode == 0
    done = maps("--resume", "out", "--nodes", "command:touch started")
    assert done.returncode == 0, done.stderr
    assert not (maps.path / "started").exists()


def test_one_run_at_a_time_runs_on_all_nodes_together(maps: Maps) -> None:
    alone = "test ! -e busy && touch busy || touch overlap; sleep 0.2; rm -f busy; echo {n}"
    words = ("--devices", "simulated:2", "--dir", "out", "--param", "n=range(6)", "--max-parallel", "1", *on_two(maps))
    done = maps(*words, "--", "sh", "-c", alone)
    assert done.returncode == 0, done.stderr
    assert maps.outcomes() == [("completed", 1)] * 6
    assert not (maps.path / "overlap").exists()


def test_first_failure_on_any_node_stops_a_map_that_wants_that(maps: Maps) -> None:
    done = maps(*grid(30, "--stop-on-failure", *on_two(maps)), FAILS="[1]", MEET="4")
    assert done.returncode == 1
    assert "stopped by 1 failure" in done.stderr
    assert len(maps.ran()) < 30


def test_parameters_of_a_pipe_run_on_nodes(maps: Maps) -> None:
    os.mkfifo(maps.path / "p")
    words = ("--devices", "simulated:1", "--dir", "out", "--from", "p", *on_two(maps))
    process = maps.start(*words, "--", sys.executable, "run.py", "{n}", MEET="2")
    (maps.path / "p").write_text('{"n": 0}\n{"n": 1}\n{"n": 2}\n')
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said
    assert maps.outcomes() == [("completed", 1)] * 3
    assert maps.pools() == {"pool-a", "pool-b"}


@pytest.mark.thorough
def test_limit_counts_the_devices_in_use_on_all_nodes(maps: Maps) -> None:
    waits = "echo {n} $(basename $GPU_LAUNCHER_POOL_DIR) >> ran; until test -e go-{n}; do sleep 0.05; done; echo {n}"
    words = ("--devices", "simulated:2", "--dir", "out", "--param", "n=range(6)", *on_two(maps))
    log = maps.path / "log"
    process = maps.start(*words, "--", "sh", "-c", waits, GPU_LAUNCHER_LOG=f"debug:{log}")
    until(lambda: (maps.path / "ran").exists() and len(maps.ran()) == 4, "not all devices are used", PATIENCE)
    on = {pool: [number for number, where in maps.ran() if where == pool] for pool in maps.pools()}
    assert {pool: len(numbers) for pool, numbers in on.items()} == {"pool-a": 2, "pool-b": 2}
    sweep = Sweep(maps.path / "out")
    sweep.limit(2)
    until(lambda: len(re.findall(r"Throttle\(.*devices=\d", log.read_text())) >= 2, "the nodes are not told", PATIENCE)
    for ended, number in enumerate([on["pool-a"][0], on["pool-b"][0]], start=1):
        (maps.path / f"go-{number}").touch()
        until(lambda: sweep.status()["ended"] == {"completed": ended}, "the run does not end", PATIENCE)  # noqa: B023
    assert len(maps.ran()) == 4
    assert sweep.status()["running"] == 2
    (maps.path / f"go-{on['pool-b'][1]}").touch()
    until(lambda: len(maps.ran()) == 5, "the limit is not used", PATIENCE)
    until(lambda: sweep.status()["ended"] == {"completed": 3}, "the run does not end", PATIENCE)
    until(lambda: sweep.status()["running"] == 2, "the head does not know the run that was started", PATIENCE)
    assert maps.ran()[4][1] == "pool-a"
    for number in range(6):
        (maps.path / f"go-{number}").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said


@pytest.mark.thorough
def test_run_is_repeated_on_a_node_to_which_the_others_leave_no_part_of_the_limit(maps: Maps) -> None:
    waits = (
        "echo {n} $(basename $GPU_LAUNCHER_POOL_DIR) >> ran; until test -e go-{n}; do sleep 0.05; done; "
        "test $GPU_LAUNCHER_ATTEMPT = 2 || test ! -e fails-{n}"
    )
    words = ("--devices", "simulated:2", "--dir", "out", "--param", "n=range(4)", "--retries", "1", *on_two(maps))
    process = maps.start(*words, "--", "sh", "-c", waits)
    until(lambda: (maps.path / "ran").exists() and len(maps.ran()) == 4, "not all devices are used", PATIENCE)
    Sweep(maps.path / "out").limit(2)
    repeated = next(number for number, pool in maps.ran() if pool == "pool-b")
    (maps.path / f"fails-{repeated}").touch()
    for number in range(4):
        (maps.path / f"go-{number}").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said
    assert maps.ran()[4:] == [(repeated, "pool-b")]


# Nodes that cannot be used


def test_nodes_that_cannot_be_reached_are_named_in_one_line_and_leave_nothing(maps: Maps) -> None:
    line = refusal(maps(*grid(2, "--nodes", "command:false", "--nodes", "command:sh -c 'echo no pod >&2; exit 7'")))
    assert "no node can run jobs: false did not start (exit status 1)" in line
    assert "sh did not start (exit status 7): no pod" in line
    line = refusal(maps(*grid(2, "--nodes", "command:no-such-command")))
    assert "node no-such-command: cannot run its command: " in line
    assert not (maps.path / "out").exists()


def test_program_in_the_heads_path_is_the_one_that_runs_on_a_node(maps: Maps) -> None:
    for directory, says in (("bin", "head"), ("other", "node")):
        (maps.path / directory).mkdir()
        (maps.path / directory / "tool").write_text(f'#!/bin/sh\necho \'{{"says": "{says}"}}\'\n')
        (maps.path / directory / "tool").chmod(0o755)
    words = ("--devices", "simulated:1", "--dir", "out", "--param", "n=1,2")
    elsewhere = maps.node("a", f"PATH={maps.path}/other:/usr/bin:/bin")
    done = maps(*words, *elsewhere, "--", "tool", "{n}", PATH=f"{maps.path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert [line["output"] for line in maps.results()] == [{"says": "head"}] * 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("./hidden/tool", "says './hidden/tool' cannot be run: there is no such program"),
        ("tool", "says 'tool' cannot be run: there is no such program"),
        ("sh hidden/tool", "says 'hidden/tool', which sh is to run, does not exist in "),
    ],
)
def test_node_without_the_program_is_not_used(maps: Maps, command: str, said: str) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    (maps.path / "hidden").mkdir()
    (maps.path / "hidden" / "tool").write_text("#!/bin/sh\necho {}\n")
    (maps.path / "hidden" / "tool").chmod(0o755)
    hide = f"'mount -t tmpfs none {maps.path}/hidden && exec \"$@\"'"
    blind = maps.node("a", "unshare", "-m", "sh", "-c", hide, "sh")
    words = ("--devices", "simulated:1", "--dir", "out", "--param", "n=range(4)")
    path = {"PATH": f"{maps.path}/hidden:{os.environ['PATH']}"}
    line = refusal(maps(*words, *blind, "--", *command.split(), "{n}", **path))
    assert f"no node can run jobs: env {said}" in line
    done = maps(*words, *blind, *maps.node("b"), "--", *command.split(), "{n}", **path)
    assert done.returncode == 0, done.stderr
    assert f"env {said}" in done.stderr
    assert {device for line in maps.results() for device in line["devices"]} == {"env-2 simulated GPU 0"}


# What others see


def test_status_and_top_show_the_devices_of_nodes(maps: Maps) -> None:
    process = maps.start(*grid(4, *on_two(maps)), HOLDS="", MEET="4")
    maps.running(0, 1, 2, 3)

    def status(*words: str, directory: Path = maps.path) -> str:
        command = [sys.executable, "-m", "gpu_launcher.cli", "status", "--devices", "cpu:1", *words]
        done = subprocess.run(command, cwd=directory, env=maps.environ({}), capture_output=True, text=True, check=True)
        return done.stdout

    def devices_with_jobs() -> list[dict[str, Any]]:
        """The devices once all jobs are shown on them. A head that does not answer at once is left out."""
        devices: list[dict[str, Any]] = json.loads(status("--json"))["nodes"]
        return devices if sum(len(device["jobs"]) for device in devices) == 4 else []

    seen = until(devices_with_jobs, "the jobs are not shown")
    assert len({(device["node"], device["uuid"]) for device in seen}) == len(seen) == 4
    assert len({device["node"] for device in seen}) == 2
    assert {device["sweep"] for device in seen} == {str(maps.path / "out")}
    assert sorted(job["number"] for device in seen for job in device["jobs"]) == [0, 1, 2, 3]
    assert all(device["in_contact"] for device in seen)
    rows = until(lambda: status().partition("NODES")[2], "no nodes are shown")
    for device in seen:
        (job,) = device["jobs"]
        assert re.search(rf"{device['label']} .* out +#{job['number']} n={job['number']}$", rows, re.MULTILINE)
    top = EmulatedTerminal(
        [sys.executable, "-m", "gpu_launcher.cli", "top", "--devices", "cpu:1"], maps.environ({}), maps.path, (100, 30)
    )
    try:
        for device in seen:
            top.until(device["label"])
    finally:
        top.close()
    elsewhere = maps.path / "elsewhere"
    elsewhere.mkdir()
    assert "NODES" not in status(directory=elsewhere)
    (maps.path / "release").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said
    assert "NODES" not in status()


# Nodes that are lost


def test_runs_of_a_killed_node_run_elsewhere_and_each_has_one_result(maps: Maps) -> None:
    process = maps.start(*grid(6, *on_two(maps)), HOLDS="", MEET="4", IMPATIENT="")
    until(lambda: len(witnesses(maps)) == 4, "not all devices are used", PATIENCE)
    running = {number: maps.running(number)[0] for number in witnesses(maps)}
    lost = agent_of(next(iter(running.values())))
    moved = [number for number, run in running.items() if agent_of(run) == lost]
    assert len(moved) == 2
    lost.kill()
    until(lambda: not any(alive(running[number]) for number in moved), "runs outlive their agent", PATIENCE)
    (maps.path / "release").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said
    assert "jobs can run elsewhere" in maps.said
    assert [line["outcome"] for line in maps.results()] == ["completed"] * 6
    starts = Counter(number for number, _ in maps.ran())
    for number in range(6):
        if number in moved:
            assert (maps.path / "out" / str(number) / "stdout.attempt-1.txt").exists()
            assert starts[number] >= 2
    until(lambda: not maps.processes(), "something is left")


def test_runs_of_a_node_whose_engine_ends_everything_on_it_run_elsewhere(maps: Maps) -> None:
    process = maps.start(*grid(4, *on_two(maps)), HOLDS="", MEET="4")
    running = maps.running(0, 1, 2, 3)
    leaving = agent_of(running[0])
    moved = [number for number, run in enumerate(running) if agent_of(run) == leaving]
    leaving.suspend()  # so that the ends of the runs arrive together with its own SIGTERM, as from Slurm
    for one in leaving.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended with another one
            one.terminate()
    until(lambda: not any(alive(running[number]) for number in moved), "the runs survive", PATIENCE)
    leaving.terminate()
    leaving.resume()
    (maps.path / "release").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, maps.said
    assert maps.outcomes() == [("completed", 2 if number in moved else 1) for number in range(4)]
    starts = Counter(number for number, _ in maps.ran())
    assert all(starts[number] == 2 for number in moved), starts


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_map_leaves_nothing_on_its_nodes_and_is_resumed(maps: Maps, signum: signal.Signals) -> None:
    process = maps.start(*grid(6, *on_two(maps)), HOLDS="", MEET="4", IMPATIENT="")
    until(lambda: len(witnesses(maps)) == 4, "not all devices are used", PATIENCE)
    process.send_signal(signum)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    until(lambda: not maps.processes(), "something is left", PATIENCE)
    if signum != signal.SIGKILL:
        assert [line["outcome"] for line in maps.results()] == ["cancelled"] * 4
        assert "to run the rest: gpu-launcher map --resume out" in maps.said
    resumed = maps("--resume", "out", IMPATIENT="")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["outcome"] for line in maps.results()] == ["completed"] * 6
    assert Counter(number for number, _ in maps.ran()).most_common()[0][1] == 2
