"""Sweeps whose nodes a real Slurm provides: three nodes with made-up GPUs, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.test_nodes import QUICK, agent_of, agents
from tests.waiting import until

SLURM_HERE = Path(__file__).with_name("slurm_here.sh")
NODES = "hydra.launcher.nodes='slurm:2 --gpus=2'"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of the configuration of a running Slurm."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs Slurm: {', '.join(missing)} not found")
    if os.geteuid() != 0:
        pytest.skip("only root can start Slurm's daemons")
    directory = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_HERE": str(directory), "NODES": "3", "GPUS": "2"}

    def run(what: str) -> str:
        command = ["bash", str(SLURM_HERE), what]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250).stdout

    if run("start").count("idle") < 3:
        run("stop")
        pytest.skip("Slurm does not start here")
    yield str(directory / "slurm.conf")
    run("stop")


@pytest.fixture
def cluster(world: Any, slurm: str) -> Any:
    """A world whose sweeps can use the nodes of Slurm. All nodes share this machine's pool."""
    (world.directory / "quick.py").write_text(QUICK)
    world.app.write_text(world.app.read_text().replace("from watched import", "from quick import"))
    world.environment["SLURM_CONF"] = slurm
    yield world
    until(lambda: not queue(slurm), "Slurm still has jobs of the sweep")


def queue(slurm: str) -> list[str]:
    command = ["squeue", "--noheader", "--format=%i %T"]
    shown = subprocess.run(command, env={**os.environ, "SLURM_CONF": slurm}, capture_output=True, text=True, check=True)
    return shown.stdout.split("\n")[:-1]


def test_jobs_run_on_nodes_of_slurm_and_allocations_are_given_back(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3,4", NODES, devices=4)
    sweep.running(4)
    until(lambda: len(agents(sweep, everywhere=True)) == 2, "not both nodes have an agent")
    sweep.finish(5)
    assert sweep.returns() == [("COMPLETED", number) for number in range(5)]
    assert queue(slurm) == []


def test_jobs_of_a_cancelled_allocation_run_elsewhere(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES, devices=2)
    sweep.running(2)
    first = agent_of(sweep, 0, everywhere=True)
    allocation = first.environ()["SLURM_JOB_ID"]
    for number in sweep.running(2):
        (cluster.directory / f"witness-{number}").unlink()
    subprocess.run(["scancel", allocation], env=cluster.environment, check=True)
    until(lambda: "got SIGTERM and ends" in sweep.output.read_text(), "the agent says nothing")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


def test_allocations_end_with_a_killed_head(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES, devices=4)
    sweep.running(4)
    assert len(queue(slurm)) == 2
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait(60)
    until(lambda: cluster.marked() == [], "something is left")
    until(lambda: queue(slurm) == [], "Slurm still has allocations")
