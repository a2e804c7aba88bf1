"""Sweeps whose nodes a real Slurm provides: three nodes with made-up GPUs, on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.crash.test_nodes import QUICK, agent_of, agents
from tests.waiting import alive, until

SLURM_HERE = Path(__file__).with_name("slurm_here.sh")
NODES = "hydra.launcher.nodes='slurm:2 --gpus=2'"
LONG = 240.0
"""Maximum seconds for what Slurm looks after only from time to time."""

# Each job locks a file of its own as long as any process of it lives, so that a second copy at the same time is seen.
LOCK = """
    import fcntl
    lock = os.open(HERE / f"lock-{cfg.n}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (HERE / f"overlap-{cfg.n}").touch()
"""


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
    environment |= {"PORT": str(20000 + os.getpid() % 3000 * 4), "SLURM_CONF": str(directory / "slurm.conf")}

    def run(*command: str) -> str:
        try:
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout
        except subprocess.TimeoutExpired:
            return ""

    here = ("bash", str(SLURM_HERE))
    if run(*here, "start").count("idle") < 3 or run("srun", "--nodes=3", "echo", "hello").count("hello") < 3:
        run(*here, "stop")
        pytest.skip("Slurm does not start here")
    yield environment["SLURM_CONF"]
    run(*here, "stop")


@pytest.fixture
def cluster(world: Any, slurm: str) -> Any:
    """A world whose sweeps can use the nodes of Slurm. All nodes share this machine's pool."""
    (world.directory / "quick.py").write_text(QUICK)
    program = world.app.read_text().replace("from watched import", "from quick import")
    start = "def main(cfg):"
    world.app.write_text(program.replace(start, start + LOCK))
    world.environment.update(SLURM_CONF=slurm, SLURM_HERE=str(Path(slurm).parent))
    yield world
    try:
        until(lambda: not queue(slurm), "Slurm still has jobs of the sweep", LONG)
        assert not list(world.directory.glob("overlap-*")), "two copies of a job ran at the same time"
    finally:
        command(world, "scancel", "--user=root")


def command(cluster: Any, *words: str) -> None:
    subprocess.run(words, env=cluster.environment, check=True, capture_output=True, timeout=120)


def forget(cluster: Any, numbers: list[int]) -> None:
    """Remove the witnesses of jobs, so that those of the next copies can be waited for."""
    for number in numbers:
        (cluster.directory / f"witness-{number}").unlink()


def nothing_is_left(cluster: Any) -> None:
    try:
        until(lambda: cluster.marked() == [])
    except AssertionError:
        raise AssertionError([(one.pid, one.ppid(), one.cmdline()) for one in cluster.marked()]) from None


@contextlib.contextmanager
def blocker(cluster: Any, *options: str) -> Iterator[None]:
    """Occupy whole nodes with a job of somebody else."""
    words = ["srun", "--quiet", "--exclusive", "--job-name=blocker", *options, "sleep", "600"]
    other = subprocess.Popen(words, env=cluster.environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        other.terminate()
        other.wait(60)


def running_again(cluster: Any, count: int) -> None:
    """Wait until there are so many witnesses. Slurm may need long to provide another node."""
    until(lambda: len(list(cluster.directory.glob("witness-*"))) >= count, "they do not run again", LONG)


def queue(slurm: str) -> list[str]:
    words = ["squeue", "--noheader", "--format=%i %T"]
    shown = subprocess.run(words, env={**os.environ, "SLURM_CONF": slurm}, capture_output=True, text=True, check=True)
    return shown.stdout.split("\n")[:-1]


def test_jobs_run_on_nodes_of_slurm_and_allocations_are_given_back(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3,4", NODES, devices=4)
    sweep.running(4)
    until(lambda: len(agents(sweep, everywhere=True)) == 2, "not both nodes have an agent")
    sweep.finish(5)
    assert sweep.returns() == [("COMPLETED", number) for number in range(5)]
    assert queue(slurm) == []


@pytest.mark.thorough
def test_script_behind_the_options_runs_first_on_the_node(cluster: Any) -> None:
    script = cluster.directory / "on_node.sh"
    script.write_text('export LOADED=yes\nexec "$@"\n')
    sweep = cluster.start("n=0,1", f"hydra.launcher.nodes='slurm:1 --gpus=2 sh {script}'", devices=2)
    sweep.running(2)
    assert psutil.Process(sweep.witness(0)["main"]).environ()["LOADED"] == "yes"
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
def test_each_node_uses_the_gpus_that_slurm_assigned_to_it(cluster: Any, machine: Any) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b"))
    cluster.environment |= machine.environment(**cluster.environment)
    nodes = "hydra.launcher.nodes='slurm:2 --gpus=1 --nodelist=n1'"
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.devices=auto")
    assert sweep.running(2) == [0, 1]
    assigned = [agent_of(sweep, number, everywhere=True).environ()["CUDA_VISIBLE_DEVICES"] for number in (0, 1)]
    assert sorted(assigned) == ["0", "1"]
    assert [sweep.witness(number)["devices"] for number in (0, 1)] == assigned
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


def test_jobs_of_a_cancelled_allocation_run_elsewhere(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES, devices=2)
    sweep.running(2)
    first = agent_of(sweep, 0, everywhere=True)
    allocation = first.environ()["SLURM_JOB_ID"]
    forget(cluster, sweep.running(2))
    command(cluster, "scancel", allocation)
    until(lambda: "got SIGTERM and ends" in sweep.output.read_text(), "the agent says nothing")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


def test_allocations_end_with_a_killed_head(cluster: Any, slurm: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES, devices=4)
    sweep.running(4)
    assert len(queue(slurm)) == 2
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait(60)
    nothing_is_left(cluster)
    until(lambda: queue(slurm) == [], "Slurm still has allocations")


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_jobs_are_interrupted_before_their_allocation_ends_and_run_again(cluster: Any) -> None:
    nodes = "hydra.launcher.nodes='slurm:1 --gpus=2 --time=1'"
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.grace=2", devices=2)
    sweep.running(2)
    forget(cluster, [0, 1])
    until(lambda: "node slurm got SIGTERM and ends" in sweep.output.read_text(), "the agent is not told", LONG)
    running_again(cluster, 2)
    assert "slurm joined" in sweep.output.read_text()
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_jobs_of_a_preempted_allocation_run_again(cluster: Any) -> None:
    nodes = "hydra.launcher.nodes='slurm:1 --gpus=2 --partition=low --nodelist=n1'"
    sweep = cluster.start("n=0,1", nodes, devices=2)
    sweep.running(2)
    forget(cluster, [0, 1])
    with blocker(cluster, "--nodelist=n1"):
        until(lambda: "node slurm got SIGTERM and ends" in sweep.output.read_text(), "it is not preempted", LONG)
    running_again(cluster, 2)
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["set down", "power off"])
def test_jobs_of_a_lost_node_run_elsewhere(cluster: Any, how: str) -> None:
    sweep = cluster.start("n=0,1,2,3", "hydra.launcher.nodes='slurm:2 --gpus=2 --exclusive'", devices=4)
    sweep.running(4)
    lost = agent_of(sweep, 0, everywhere=True)
    node = lost.environ()["SLURMD_NODENAME"]
    moved = [number for number in range(4) if agent_of(sweep, number, everywhere=True) == lost]
    trees = sweep.processes(moved)
    forget(cluster, moved)
    try:
        if how == "set down":
            command(cluster, "scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        else:
            command(cluster, "bash", str(SLURM_HERE), "kill-node", node.removeprefix("n"))
        until(lambda: not any(alive(process) for process in trees), "they survive their node", LONG)
        running_again(cluster, 4)
        sweep.finish(4)
        assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    finally:
        if how == "set down":
            with contextlib.suppress(subprocess.CalledProcessError):  # it is back already
                command(cluster, "scontrol", "update", f"nodename={node}", "state=resume")
        else:
            command(cluster, "bash", str(SLURM_HERE), "revive-node", node.removeprefix("n"))


@pytest.mark.thorough
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nodes_that_wait_in_the_queue_are_withdrawn_with_the_sweep(cluster: Any, slurm: str, signum: int) -> None:
    with blocker(cluster, "--nodes=3"):
        until(lambda: len(queue(slurm)) == 1, "the blocker does not start")
        sweep = cluster.start("n=0,1", NODES, devices=2)
        until(lambda: sum("PENDING" in line for line in queue(slurm)) == 2, "the nodes do not wait in the queue")
        until(lambda: "none of slurm, slurm-2 is ready yet" in sweep.output.read_text(), "it does not say so")
        sweep.process.send_signal(signum)
        sweep.process.wait(60)
        until(lambda: len(queue(slurm)) == 1, "requests are left in the queue")
    nothing_is_left(cluster)
