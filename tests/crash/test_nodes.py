"""Sweeps on several nodes, of which any may be lost. No two copies of a job run at the same time."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.crash.conftest import MARKER
from tests.waiting import alive, until

# The head and its agents lose patience with each other sooner than usual.
TRAIN = """
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(name="config", node={"lr": 0.1})


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    (Path(HydraConfig.get().runtime.output_dir) / "lr").write_text(str(cfg.lr))


if __name__ == "__main__":
    main()
"""
"""The program of the pages about nodes."""

QUICK = """
import functools
from gpu_launcher.nodes import node_group
from gpu_launcher.nodes.agent_messages import Timing
from watched import watch as watch_all


def watch():
    watch_all()
    timing = Timing(beat=0.2, quiet=1.0, silence=1.5, lost=5.0)
    node_group.NodeGroup = functools.partial(node_group.NodeGroup, timing=timing)
"""

# `relay.py COMMAND ...` connects to an agent by other pipes, as srun does. The agent's input outlives it.
RELAY = """
import os, subprocess, sys, threading
reads, writes = os.pipe()
holder = os.dup(writes)
os.set_inheritable(holder, True)
keeper = subprocess.Popen(["sleep", "600"], pass_fds=[holder], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
os.close(holder)
agent = subprocess.Popen(sys.argv[1:], stdin=reads, stdout=subprocess.PIPE)
os.close(reads)


def pump(source, sink):
    while data := os.read(source, 65536):
        os.write(sink, data)


threading.Thread(target=pump, args=(0, writes), daemon=True).start()
pump(agent.stdout.fileno(), 1)
"""


def on_nodes(world: Any, *more: str) -> str:
    """The option for two nodes with pools of their own, reached by `more` words before the agent's command."""
    (world.directory / "quick.py").write_text(QUICK)
    world.app.write_text(world.app.read_text().replace("from watched import", "from quick import"))
    words = [f"env GPU_LAUNCHER_POOL_DIR={world.directory}/pool-{name} {' '.join(more)}" for name in "ab"]
    return "hydra.launcher.nodes=[" + ",".join(f"'command:{one.strip()}'" for one in words) + "]"


def is_agent(process: psutil.Process | None) -> bool:
    words = process.cmdline() if process is not None else []
    return words[1:2] == ["-c"] and "nodes.agent" in "".join(words[2:3])


def agents(sweep: Any, *, everywhere: bool = False) -> list[psutil.Process]:
    """The agents of a sweep, even those that it did not start itself. What they fork has the same command line."""
    found = []
    for child in psutil.process_iter() if everywhere else psutil.Process(sweep.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            of_this_test = is_agent(child) and child.environ().get(MARKER) == str(sweep.output.parent)
            if of_this_test and not is_agent(child.parent()):
                found.append(child)
    return found


def agent_of(sweep: Any, number: int, *, everywhere: bool = False) -> psutil.Process:
    parents = psutil.Process(sweep.witness(number)["main"]).parents()
    return next(agent for agent in agents(sweep, everywhere=everywhere) if agent in parents)


def test_jobs_run_on_all_nodes_and_results_come_in_order(world: Any) -> None:
    sweep = world.start(f"n={','.join(map(str, range(8)))}", on_nodes(world))
    assert sweep.running(4)
    assert {agent_of(sweep, number).pid for number in sweep.running(4)} == {agent.pid for agent in agents(sweep)}
    sweep.finish(8)
    assert sweep.returns() == [("COMPLETED", number) for number in range(8)]
    until(lambda: world.marked() == [], "something is left")


def test_only_the_agent_has_the_connection_to_the_head(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    for agent in agents(sweep):
        connection = pipes(agent) & pipes(psutil.Process(sweep.process.pid))
        connection -= {str(Path(f"/proc/{agent.pid}/fd/2").readlink())}
        assert len(connection) == 2
        below = agent.children(recursive=True)
        assert len(below) > 4
        assert not [process for process in below if pipes(process) & connection]


def pipes(process: psutil.Process) -> set[str]:
    """The pipes that a process has open."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(str(descriptor.readlink()))
    return {name for name in found if name.startswith("pipe:")}


def test_jobs_of_a_killed_agent_run_elsewhere(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    lost = agent_of(sweep, 0)
    moved = [number for number in range(4) if agent_of(sweep, number) == lost]
    trees = sweep.processes(moved)
    for number in moved:
        (world.directory / f"witness-{number}").unlink()
    lost.kill()
    until(lambda: not any(alive(process) for process in trees), "jobs outlive their agent")
    sweep.finish(4)
    sweep.running(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert "its 2 jobs can run elsewhere" in sweep.output.read_text()
    until(lambda: world.marked() == [], "something is left")


def test_job_that_waits_on_a_busy_node_is_run_by_an_idle_one(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world), devices=1)
    sweep.running(2)
    busy, idle = agent_of(sweep, 0), agent_of(sweep, 1)
    assert busy != idle
    for number in (1, 2, 3):
        (world.directory / f"finish-{number}").touch()
    sweep.running(4)  # while job 0 keeps its node busy
    sweep.finish(1)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert "lost" not in sweep.output.read_text()


def test_job_that_had_finished_when_its_agent_was_killed_is_not_run_again(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    lost = agent_of(sweep, 0)
    lost.suspend()  # so that it does not pass on what its jobs return
    sweep.finish(4)
    reports = world.directory / "sweep" / ".gpu_launcher"
    until(lambda: list(reports.glob("0.*.report")), "the job leaves no report")
    (world.directory / "witness-0").unlink()
    lost.kill()
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert not (world.directory / "witness-0").exists()


def test_agent_ends_by_itself_when_it_hears_nothing(world: Any) -> None:
    (world.directory / "relay.py").write_text(RELAY)
    sweep = world.start("n=0,1,2,3", on_nodes(world, sys.executable, str(world.directory / "relay.py")))
    sweep.running(4)
    lost = agent_of(sweep, 0)
    trees = [psutil.Process(sweep.witness(number)["main"]) for number in range(4) if agent_of(sweep, number) == lost]
    numbers = [number for number in range(4) if agent_of(sweep, number) == lost]
    for number in numbers:
        (world.directory / f"witness-{number}").unlink()
    lost.parent().kill()
    until(lambda: not any(alive(process) for process in trees), "the agent has not ended its jobs")
    assert not any((world.directory / f"witness-{number}").exists() for number in numbers)
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


def test_suspended_head_loses_jobs_of_other_machines_and_runs_them_again(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    jobs = sweep.processes([0, 1, 2, 3])
    for number in range(4):
        (world.directory / f"witness-{number}").unlink()
    sweep.process.send_signal(signal.SIGSTOP)
    until(lambda: not any(alive(process) for process in jobs), "a suspended head keeps devices of other machines")
    sweep.finish(4)
    sweep.process.send_signal(signal.SIGCONT)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert "heard nothing from here for" in sweep.output.read_text()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_the_head_ends(world: Any, signum: int) -> None:
    sweep = world.start("n=0,1,2,3,4,5", on_nodes(world))
    sweep.running(4)
    sweep.process.send_signal(signum)
    sweep.process.wait(60)
    until(lambda: world.marked() == [], "something is left")


def test_jobs_of_an_agent_that_is_asked_to_end_run_elsewhere(world: Any) -> None:
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    leaving = agent_of(sweep, 0)
    for number in range(4):
        if agent_of(sweep, number) == leaving:
            (world.directory / f"witness-{number}").unlink()
    leaving.terminate()
    until(lambda: "got SIGTERM and ends" in sweep.output.read_text(), "the agent says nothing")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert "got SIGTERM and ends" in sweep.output.read_text()


def test_job_that_an_engine_interrupts_before_its_agent_runs_elsewhere(world: Any) -> None:
    patient = "from gpu_launcher.nodes import agent\n\nagent.HOLD_SECONDS = 1e6\n"
    world.app.write_text(patient + world.app.read_text())
    sweep = world.start("n=0,1,2,3", on_nodes(world))
    sweep.running(4)
    leaving = agent_of(sweep, 0)
    job = psutil.Process(sweep.witness(0)["main"])
    (world.directory / "witness-0").unlink()
    job.send_signal(signal.SIGINT)
    until(lambda: not alive(job), "the job is not interrupted")
    time.sleep(1)  # the node says that it has ended
    leaving.terminate()
    until(lambda: "got SIGTERM and ends" in sweep.output.read_text(), "the agent says nothing")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


def test_sweep_without_nodes_ends_and_says_why(world: Any) -> None:
    (world.directory / "once.sh").write_text('f=$GPU_LAUNCHER_POOL_DIR.used; [ -e $f ] && exit 3; : > $f; exec "$@"\n')
    sweep = world.start("n=0,1,2,3,4,5", on_nodes(world, "sh", str(world.directory / "once.sh")))
    sweep.running(4)
    for agent in agents(sweep):
        agent.kill()
    returns = sweep.returns()
    assert [status for status, _ in returns] == ["FAILED"] * 6
    assert "no node is left" in sweep.output.read_text()
    assert "exit status 3" in sweep.output.read_text()
    until(lambda: world.marked() == [], "something is left")
