"""PoolExecutor and parallel_map on nodes that are lost: nothing runs twice at the same time, nothing is forgotten."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import alive, until
from tests.warm import Program, Warm

PATIENCE = 200.0
"""Seconds until a test gives up on what should happen soon."""

# The program and its agents lose patience with each other sooner than usual. A call holds a lock while it runs, so two
# that run at the same time for the same number are noticed.
SCRIPT = """
import fcntl, json, os, sys, time
from pathlib import Path

import gpu_launcher
from gpu_launcher.jobs.where import Where

HERE = Path(__file__).parent
OPTIONS = json.loads(sys.argv[1])


def write(**entry):
    with open(HERE / "witness.jsonl", "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\\n")


def work(number):
    with open(HERE / f"lock-{number}", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            write(twice=number)
        write(began=number, pid=os.getpid())
        while number >= 0 and not (HERE / f"finish-{number}").exists() and not (HERE / "finish").exists():
            time.sleep(0.01)
    return number * 10


def outcome(future):
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    from gpu_launcher.nodes import node_group
    from gpu_launcher.nodes.agent_messages import Timing

    timing = Timing(beat=0.2, quiet=2.0, silence=3.0, lost=7.0)
    node_group.NodeGroup.__init__.__kwdefaults__["timing"] = timing
    where = {
        "pool": Where("simulated:2"),
        "nodes": [f"command:env GPU_LAUNCHER_POOL_DIR={HERE}/pool-{name} {OPTIONS.get('words', '')}" for name in "ab"],
    }
    if OPTIONS["what"] == "records":
        results = list(
            gpu_launcher.parallel_map(
                range(OPTIONS["count"]), function=work, progress=False, on_error="return", **where
            )
        )
        results = [result if isinstance(result, int) else str(result) for result in results]
    else:
        with gpu_launcher.PoolExecutor(**where) as executor:
            futures = [executor.submit(work, number) for number in range(OPTIONS["count"])]
            write(submitted=True)
            results = [outcome(future) for future in futures]
    (HERE / "results.json").write_text(json.dumps(results))
"""


class World:
    """A program that calls functions on two nodes with two devices each."""

    def __init__(self, directory: Path, warm: Warm) -> None:
        self.directory = directory
        self._warm = warm
        self.program: Program
        (directory / "script.py").write_text(SCRIPT)

    def start(self, what: str, count: int, **options: Any) -> None:
        command = ["script.py", json.dumps({"what": what, "count": count, **options})]
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
        """Wait until so many calls have begun. Returns the process of each."""
        until(lambda: len(self.witness("began")) >= count, f"not {count} begin: {self.output}", PATIENCE)
        return {entry["began"]: psutil.Process(entry["pid"]) for entry in self.witness("began")}

    def agent_of(self, job: psutil.Process) -> psutil.Process:
        """The agent above a job: the child of the program."""
        *_, agent = [parent for parent in job.parents() if self.program.pid in [p.pid for p in parent.parents()]]
        return agent

    def finish(self, *numbers: int) -> None:
        """Let these calls end, or all if there are none."""
        for name in [f"finish-{number}" for number in numbers] or ["finish"]:
            (self.directory / name).touch()

    @property
    def results(self) -> list[Any]:
        assert self.program.wait(PATIENCE) == 0, self.output
        assert self.witness("twice") == []
        results: list[Any] = json.loads((self.directory / "results.json").read_text())
        return results

    def began(self) -> Counter[int]:
        return Counter(entry["began"] for entry in self.witness("began"))


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
def test_calls_of_a_lost_node_fail_and_those_that_have_not_begun_move(world: World, signum: int) -> None:
    world.start("calls", 12)
    jobs = world.running(4)
    agent = world.agent_of(jobs[0])
    lost = [number for number, job in jobs.items() if agent in job.parents()]
    assert len(lost) == 2
    agent.send_signal(signum)
    until(lambda: not any(alive(jobs[number]) for number in lost), "calls outlive their agent", PATIENCE)
    world.finish()
    results = world.results
    for number, result in enumerate(results):
        if number in lost:
            assert result.startswith(f"JobError: job {number} (work) was "), result
            assert ("lost with node env" in result) if signum == signal.SIGKILL else ("which got SIGTERM" in result)
        else:
            assert result == number * 10
    assert world.began() == dict.fromkeys(range(12), 1)


def test_calls_of_a_silent_node_fail_only_when_they_have_ended(world: World) -> None:
    world.start("calls", 4)
    jobs = world.running(4)
    agent = world.agent_of(jobs[0])
    lost = [number for number, job in jobs.items() if agent in job.parents()]
    agent.suspend()
    world.finish(*(number for number in range(4) if number not in lost))
    results = world.results
    assert not any(alive(jobs[number]) for number in lost)
    assert [number for number, result in enumerate(results) if result != number * 10] == sorted(lost)
    assert world.began() == dict.fromkeys(range(4), 1)


def test_records_of_a_lost_node_are_dealt_again(world: World) -> None:
    world.start("records", 30)
    jobs = world.running(4)
    agent = world.agent_of(jobs[0])
    lost = [number for number, job in jobs.items() if agent in job.parents()]
    assert len(lost) == 2
    agent.kill()
    until(lambda: not any(alive(jobs[number]) for number in lost), "workers outlive their agent", PATIENCE)
    world.finish()
    assert world.results == [number * 10 for number in range(30)]
    assert world.began() == {number: 2 if number in lost else 1 for number in range(30)}


def test_records_of_a_node_that_is_asked_to_end_are_dealt_again(world: World) -> None:
    world.start("records", 30)
    jobs = world.running(4)
    agent = world.agent_of(jobs[0])
    lost = [number for number, job in jobs.items() if agent in job.parents()]
    agent.terminate()
    until(lambda: not any(alive(jobs[number]) for number in lost), "workers outlive their agent", PATIENCE)
    world.finish()
    assert world.results == [number * 10 for number in range(30)]
    assert world.began() == {number: 2 if number in lost else 1 for number in range(30)}


@pytest.mark.parametrize("what", ["calls", "records"])
def test_nothing_is_left_when_the_program_is_killed(world: World, what: str) -> None:
    world.start(what, 20)
    world.running(4)
    tree = psutil.Process(world.program.pid).children(recursive=True)
    world.program.kill()
    world.program.wait()
    until(lambda: not any(map(alive, tree)), "processes outlive their program", PATIENCE)
    assert world.began() == dict.fromkeys(world.began(), 1)


@pytest.mark.parametrize("what", ["calls", "records"])
def test_without_any_node_left_the_error_says_why(world: World, what: str) -> None:
    (world.directory / "once.sh").write_text('f=$GPU_LAUNCHER_POOL_DIR.used; [ -e $f ] && exit 3; : > $f; exec "$@"\n')
    world.start(what, 8, words=f"sh {world.directory}/once.sh")
    jobs = world.running(4)
    for agent in {world.agent_of(job) for job in jobs.values()}:
        agent.kill()
    if what == "records":
        assert world.program.wait(PATIENCE) == 1
        assert "NodeDiedError: no node is left (" in world.output
        assert "exit status 3" in world.output
    else:
        lost, others = [], []
        for number, result in enumerate(world.results):
            (lost if number in jobs else others).append(result)
        assert all("lost with node env" in result for result in lost), lost
        assert all("BrokenPoolExecutor" in result and "no node is left (" in result for result in others), others
    until(lambda: not any(map(alive, jobs.values())), "jobs outlive their agents", PATIENCE)
    assert world.began() == dict.fromkeys(jobs, 1)
