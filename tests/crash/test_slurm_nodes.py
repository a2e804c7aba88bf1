"""Sweeps whose nodes a real Slurm provides: three nodes with made-up GPUs, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.test_doctor_nodes import PATIENCE
from tests.crash.test_nodes import QUICK, TRAIN, agent_of, agents
from tests.waiting import alive, until

SLURM_HERE = Path(__file__).with_name("slurm_here.sh")
NODES = "hydra.launcher.nodes='slurm:2 --gpus=2'"
WAYS = pytest.mark.parametrize("way", ["slurm", pytest.param("sbatch", marks=pytest.mark.thorough)])
"""The same must be true of both ways to a node of Slurm."""
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
# The first agent is signalled while it imports the program.
PREEMPTED = """
import os, pathlib, subprocess, time
preempted = pathlib.Path(__file__).with_name("preempted")
if __name__ == "__mp_main__" and not preempted.exists():
    preempted.touch()
    batch = ["--batch"] if "SLURM_STEP_ID" not in os.environ else []
    subprocess.run(["scancel", "--signal=TERM", *batch, os.environ["SLURM_JOB_ID"]], check=True)
    time.sleep(600)
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


def printed(slurm: str, *words: str) -> str:
    """What a command of Slurm prints."""
    environment = {**os.environ, "SLURM_CONF": slurm}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def queue(slurm: str) -> list[str]:
    return printed(slurm, "squeue", "--noheader", "--format=%i %T").split("\n")[:-1]


@WAYS
def test_jobs_run_on_nodes_of_slurm_and_allocations_are_given_back(cluster: Any, slurm: str, way: str) -> None:
    sweep = cluster.start("n=0,1,2,3,4", NODES.replace("slurm", way), devices=4)
    sweep.running(4)
    until(lambda: len(agents(sweep, everywhere=True)) == 2, "not both nodes have an agent")
    sweep.finish(5)
    assert sweep.returns() == [("COMPLETED", number) for number in range(5)]
    until(lambda: queue(slurm) == [], "Slurm still has allocations")


@pytest.mark.thorough
def test_example_of_the_page_runs(cluster: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    (line,) = re.findall(r"^python (train\.py .*'slurm:2 --gpus=2'.*)", page, flags=re.MULTILINE)
    (cluster.directory / "train.py").write_text(TRAIN)
    line = f"exec {sys.executable} {line} hydra.launcher.devices=simulated:2 hydra.sweep.dir=sweep"
    sweep = cluster.begin(["bash", "-c", line], cluster.surroundings(), cwd=cluster.directory)
    assert sweep.process.wait(LONG) == 0, sweep.output.read_text()
    assert [(cluster.directory / "sweep" / str(n) / "lr").read_text() for n in (0, 1)] == ["0.001", "0.0001"]


@pytest.mark.thorough
def test_script_behind_the_options_runs_first_on_the_node(cluster: Any) -> None:
    script = cluster.directory / "on_node.sh"
    script.write_text('export LOADED=yes\nexec "$@"\n')
    sweep = cluster.start("n=0,1", f"hydra.launcher.nodes='slurm:1 --gpus=2 sh {script}'", devices=2)
    sweep.running(2)
    assert psutil.Process(sweep.witness(0)["main"]).environ()["LOADED"] == "yes"
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@WAYS
@pytest.mark.thorough
def test_each_node_uses_the_gpus_that_slurm_assigned_to_it(cluster: Any, machine: Any, way: str) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b"))
    cluster.environment |= machine.environment(**cluster.environment)
    nodes = f"hydra.launcher.nodes='{way}:2 --gpus=1 --nodelist=n1'"
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.devices=auto")
    assert sweep.running(2) == [0, 1]
    assigned = [agent_of(sweep, number, everywhere=True).environ()["CUDA_VISIBLE_DEVICES"] for number in (0, 1)]
    assert sorted(assigned) == ["0", "1"]
    assert [sweep.witness(number)["devices"] for number in (0, 1)] == assigned
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@WAYS
def test_jobs_of_a_cancelled_allocation_run_elsewhere(cluster: Any, way: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES.replace("slurm", way), devices=2)
    first = agent_of(sweep, sweep.running(2)[0], everywhere=True)
    allocation = first.environ()["SLURM_JOB_ID"]
    forget(cluster, sweep.running(2))
    command(cluster, "scancel", allocation)
    until(lambda: "got SIGTERM and ends" in sweep.output.read_text(), "the agent says nothing")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


@WAYS
def test_allocations_end_with_a_killed_head(cluster: Any, slurm: str, way: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES.replace("slurm", way), devices=4)
    sweep.running(4)
    assert len(queue(slurm)) == 2
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait(60)
    nothing_is_left(cluster)
    until(lambda: queue(slurm) == [], "Slurm still has allocations")


@WAYS
@pytest.mark.thorough
def test_allocations_end_if_the_machine_of_the_head_fails(
    cluster: Any, slurm: str, way: str, kill_together: Callable[[list[psutil.Process]], None]
) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES.replace("slurm", way), devices=4)
    sweep.running(4)
    assert len(queue(slurm)) == 2
    head = psutil.Process(sweep.process.pid)
    kill_together([head, *head.children(recursive=True)])
    sweep.process.wait(60)
    nothing_is_left(cluster)
    until(lambda: queue(slurm) == [], "Slurm still has allocations")


@WAYS
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_jobs_are_interrupted_before_their_allocation_ends_and_run_again(cluster: Any, way: str) -> None:
    nodes = f"hydra.launcher.nodes='{way}:1 --gpus=2 --time=1'"
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.grace=2", devices=2)
    sweep.running(2)
    forget(cluster, [0, 1])
    until(lambda: f"node {way} got SIGTERM and ends" in sweep.output.read_text(), "the agent is not told", LONG)
    running_again(cluster, 2)
    assert f"{way} joined" in sweep.output.read_text()
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@WAYS
@pytest.mark.thorough
def test_node_that_is_preempted_while_it_imports_the_program_is_asked_for_again(cluster: Any, way: str) -> None:
    cluster.app.write_text(PREEMPTED + cluster.app.read_text())
    sweep = cluster.start("n=0,1", f"hydra.launcher.nodes='{way}:1 --gpus=2'", "hydra.launcher.grace=2", devices=2)
    sweep.running(2)
    assert f"node {way} got SIGTERM before it could run jobs" in sweep.output.read_text()
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_jobs_that_would_outlast_their_allocation_run_in_the_next(cluster: Any) -> None:
    asked = cluster.directory / "asked"
    squeue = cluster.directory / "bin" / "squeue"
    squeue.parent.mkdir()
    # The first allocation believes that it has little time left.
    first = f'echo "$*" >{asked}/about; echo 1:40 10:00'
    squeue.write_text(f'#!/bin/sh\nif mkdir {asked}; then {first}; else exec {shutil.which("squeue")} "$@"; fi\n')
    squeue.chmod(0o755)
    cluster.environment["PATH"] = f"{squeue.parent}:{os.environ['PATH']}"
    nodes = "hydra.launcher.nodes='slurm:1 --gpus=2 --time=10'"
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.grace=2", "hydra.launcher.timeout=60")
    assert sweep.running(2) == [0, 1]
    assert "node slurm is replaced, because it ends too soon for jobs that wait" in sweep.output.read_text()
    allocation = agent_of(sweep, 0, everywhere=True).environ()["SLURM_JOB_ID"]
    assert not (asked / "about").read_text().strip().endswith(f"--jobs={allocation}")
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
@pytest.mark.parametrize("known", ["here", "there"])
def test_timeout_that_no_allocation_can_hold_is_an_error(cluster: Any, known: str) -> None:
    if known == "there":
        cluster.environment["SLURM_TIMELIMIT"] = "2"
    nodes = "hydra.launcher.nodes='slurm:2 --gpus=2" + (" --time=2'" if known == "here" else "'")
    sweep = cluster.start("n=0,1", nodes, "hydra.launcher.grace=2", "hydra.launcher.timeout=60")
    assert sweep.process.wait(100) == 1
    said = "hydra.launcher.timeout: 1m 00s is longer than jobs can run on this node before its allocation ends, 28.0 s"
    assert said in sweep.output.read_text()
    assert not list(cluster.directory.glob("witness-*"))


@pytest.fixture
def scaled(cluster: Any) -> Any:
    """A cluster whose sweeps give back at once what they do not need."""
    soon = "    from gpu_launcher.nodes import scaling\n    scaling.IDLE_SECONDS = 2.0\n"
    (cluster.directory / "quick.py").write_text(QUICK + soon)
    return cluster


@pytest.mark.thorough
def test_idle_allocation_is_given_back_before_the_sweep_ends(scaled: Any, slurm: str) -> None:
    sweep = scaled.start("n=0,1", NODES, devices=2)
    sweep.running(2)
    (scaled.directory / "finish-1").touch()
    until(lambda: len(queue(slurm)) == 1, "no allocation is given back")
    until(lambda: "is given back, because no job needs it now" in sweep.output.read_text(), "it does not say so")
    sweep.finish(1)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
def test_request_in_the_queue_is_withdrawn_when_no_job_needs_it(scaled: Any, slurm: str) -> None:
    with blocker(scaled, "--nodes=2"):
        until(lambda: [line for line in queue(slurm) if "RUNNING" in line], "the blocker does not start")
        sweep = scaled.start("n=0,1", "hydra.launcher.nodes='slurm:2 --gpus=2 --exclusive'", devices=2)
        sweep.running(2)
        until(lambda: len(queue(slurm)) == 2, "the second request is still in the queue")
        assert sweep.process.poll() is None
        until(lambda: "is given back, because no job needs it now" in sweep.output.read_text(), "it does not say so")
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@WAYS
@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_jobs_of_a_preempted_allocation_run_again(cluster: Any, way: str) -> None:
    nodes = f"hydra.launcher.nodes='{way}:1 --gpus=2 --partition=low --nodelist=n1'"
    sweep = cluster.start("n=0,1", nodes, devices=2)
    sweep.running(2)
    forget(cluster, [0, 1])
    with blocker(cluster, "--nodelist=n1"):
        until(lambda: f"node {way} got SIGTERM and ends" in sweep.output.read_text(), "it is not preempted", LONG)
    running_again(cluster, 2)
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["agent", "node process", "fork server", "supervisor"])
def test_every_job_has_one_result_if_a_process_of_a_node_is_killed(cluster: Any, what: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES, devices=4)
    sweep.running(4)
    lost = agent_of(sweep, 0, everywhere=True)
    moved = [number for number in range(4) if agent_of(sweep, number, everywhere=True) == lost]
    supervisor, server, _, node = psutil.Process(sweep.witness(0)["main"]).parents()[:4]
    assert node.parent() == lost
    failed = {"supervisor": [0], "fork server": moved}.get(what, [])
    trees = sweep.processes(failed or moved)
    if not failed:
        forget(cluster, moved)
    {"agent": lost, "node process": node, "fork server": server, "supervisor": supervisor}[what].kill()
    until(lambda: not any(alive(process) for process in trees), "jobs survive", LONG)
    running_again(cluster, 4)
    sweep.finish(4)
    returns = sweep.returns()
    assert [status for status, _ in returns] == ["FAILED" if number in failed else "COMPLETED" for number in range(4)]
    nothing_is_left(cluster)


@pytest.mark.thorough
def test_sweep_in_an_allocation_never_gives_that_back(cluster: Any, slurm: str) -> None:
    salloc = ("salloc", "--quiet", "--nodes=2", "--gpus-per-node=2")
    sweep = cluster.start("n=0,1,2,3", NODES, devices=4, before=salloc)
    sweep.running(4)
    (allocation,) = queue(slurm)
    (head,) = psutil.Process(sweep.process.pid).children()
    assert {agent.environ()["SLURMD_NODENAME"] for agent in agents(sweep, everywhere=True)} == {"n1", "n2"}
    trees = sweep.processes([0, 1, 2, 3])
    forget(cluster, [0, 1, 2, 3])
    head.suspend()  # so that the agents lose it
    until(lambda: not any(alive(process) for process in trees), "jobs survive")
    head.resume()
    running_again(cluster, 4)
    assert queue(slurm) == [allocation]
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("how", "way"), [("set down", "slurm"), ("power off", "slurm"), ("power off", "sbatch"), ("no answer", "slurm")]
)
def test_jobs_of_a_lost_node_run_elsewhere(cluster: Any, slurm: str, how: str, way: str) -> None:
    sweep = cluster.start("n=0,1,2,3", f"hydra.launcher.nodes='{way}:2 --gpus=2 --exclusive'", devices=4)
    sweep.running(4)
    lost = agent_of(sweep, 0, everywhere=True)
    node, allocation = (lost.environ()[name] for name in ("SLURMD_NODENAME", "SLURM_JOB_ID"))
    moved = [number for number in range(4) if agent_of(sweep, number, everywhere=True) == lost]
    trees = sweep.processes(moved)
    forget(cluster, moved)
    with lost_node(cluster, node, lost, how):
        until(lambda: not any(alive(process) for process in trees), "they survive their node", LONG)
        running_again(cluster, 4)
        sweep.finish(4)
        assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
        # Slurm calls an allocation COMPLETING until its node answers.
        until(lambda: f"{allocation} RUNNING" not in queue(slurm), "the allocation is not given back")
        assert how == "set down" or "down" not in printed(
            slurm, "sinfo", "--noheader", f"--nodes={node}", "--format=%T"
        )


@contextlib.contextmanager
def lost_node(cluster: Any, node: str, agent: psutil.Process, how: str) -> Iterator[None]:
    """Let a node be lost in one of several ways."""
    here = ("bash", str(SLURM_HERE))
    if how == "set down":
        command(cluster, "scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        try:
            yield
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # it is back already
                command(cluster, "scontrol", "update", f"nodename={node}", "state=resume")
    elif how == "power off":
        command(cluster, *here, "kill-node", node.removeprefix("n"))
        try:
            yield
        finally:
            command(cluster, *here, "revive-node", node.removeprefix("n"))
    else:  # its connections stay open
        slurmd = psutil.Process(
            int((Path(cluster.environment["SLURM_HERE"]) / "run" / f"slurmd-{node}.pid").read_text())
        )
        slurmstepd = agent.parent()
        assert slurmstepd is not None
        silent = [slurmd, slurmstepd]
        for process in silent:
            process.suspend()
        try:
            for process in slurmstepd.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just died with the one before
                    process.kill()
            yield
        finally:
            for process in silent:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()


@WAYS
@pytest.mark.thorough
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nodes_that_wait_in_the_queue_are_withdrawn_with_the_sweep(
    cluster: Any, slurm: str, signum: int, way: str
) -> None:
    with blocker(cluster, "--nodes=3"):
        until(lambda: len(queue(slurm)) == 1, "the blocker does not start")
        sweep = cluster.start("n=0,1", NODES.replace("slurm", way), devices=2)
        until(lambda: sum("PENDING" in line for line in queue(slurm)) == 2, "the nodes do not wait in the queue")
        until(lambda: f"none of {way}, {way}-2 is ready yet" in sweep.output.read_text(), "it does not say so")
        sweep.process.send_signal(signum)
        sweep.process.wait(60)
        until(lambda: len(queue(slurm)) == 1, "requests are left in the queue")
    nothing_is_left(cluster)


# Through sbatch


def bridges(sweep: Any) -> list[psutil.Process]:
    """The processes on the machine of the sweep through which its nodes are reached."""
    children = psutil.Process(sweep.process.pid).children()
    return [child for child in children if "sbatch_bridge" in " ".join(child.cmdline())]


def left_in(cluster: Any) -> list[Path]:
    """The directories with keys."""
    return list(cluster.directory.glob(".gpu-launcher-sbatch-*"))


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["bridge", "agent", "main process of the job"])
def test_jobs_run_elsewhere_if_a_process_of_the_connection_is_killed(cluster: Any, what: str) -> None:
    sweep = cluster.start("n=0,1,2,3", NODES.replace("slurm", "sbatch"), devices=4, cwd=cluster.directory)
    sweep.running(4)
    lost = agent_of(sweep, 0, everywhere=True)
    moved = [number for number in range(4) if agent_of(sweep, number, everywhere=True) == lost]
    trees = sweep.processes(moved)
    forget(cluster, moved)
    main = lost.parent()
    assert main is not None
    assert "sbatch_node" in " ".join(main.cmdline())
    (connected,) = {one.laddr.port for one in main.net_connections("tcp")}
    ours = [one for one in bridges(sweep) if connected in {c.raddr.port for c in one.net_connections("tcp")}]
    {"bridge": ours[0], "agent": lost, "main process of the job": main}[what].kill()
    until(lambda: not any(alive(process) for process in trees), "jobs survive", LONG)
    running_again(cluster, 4)
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert left_in(cluster) == []


@pytest.mark.thorough
def test_job_that_starts_after_everything_was_killed_ends_at_once(cluster: Any, slurm: str) -> None:
    with blocker(cluster, "--nodes=3"):
        until(lambda: len(queue(slurm)) == 1, "the blocker does not start")
        sweep = cluster.start("n=0", "hydra.launcher.nodes='sbatch:1 --gpus=2'", cwd=cluster.directory)
        until(lambda: len(queue(slurm)) == 2, "no job is in the queue")
        (bridge,) = bridges(sweep)
        (directory,) = left_in(cluster)
        bridge.suspend()  # it must not notice the end of the head
        sweep.process.kill()
        bridge.kill()
        sweep.process.wait(60)
        assert [line for line in queue(slurm) if "PENDING" in line]
    until(lambda: queue(slurm) == [], "the job does not end", LONG)
    assert not directory.exists()
    nothing_is_left(cluster)


@pytest.mark.thorough
def test_key_is_in_a_file_of_this_user_and_nowhere_else(cluster: Any, slurm: str) -> None:
    with blocker(cluster, "--nodes=3"):
        until(lambda: len(queue(slurm)) == 1, "the blocker does not start")
        sweep = cluster.start("n=0", "hydra.launcher.nodes='sbatch:1 --gpus=2'", cwd=cluster.directory)
        until(lambda: len(queue(slurm)) == 2, "no job is in the queue")
        (directory,) = left_in(cluster)
        assert (directory.stat().st_mode & 0o777, (directory / "key").stat().st_mode & 0o777) == (0o700, 0o600)
        key = json.loads((directory / "key").read_text())["key"]
        (pending,) = [line.split()[0] for line in queue(slurm) if "PENDING" in line]
        told = printed(slurm, "scontrol", "show", "job", pending)
        told += printed(slurm, "scontrol", "write", "batch_script", pending, "-")
    sweep.running(1)
    assert left_in(cluster) == []
    processes = cluster.marked()
    assert len(processes) > 5
    told += "".join(str(process.cmdline()) + str(process.environ()) for process in processes)
    told += printed(slurm, "scontrol", "show", "job", pending) + sweep.output.read_text()
    sweep.finish(1)
    assert len(key) == 64
    assert key not in told
    assert bytes.fromhex(key).hex(" ")[:20] not in told
    assert not [file for file in cluster.directory.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


@pytest.mark.thorough
def test_script_of_the_user_runs_first_in_the_job(cluster: Any) -> None:
    script = cluster.directory / "on_node.sh"
    script.write_text('#!/bin/sh\nexport LOADED=yes\nexec "$@"\n')
    sweep = cluster.start("n=0", f"hydra.launcher.nodes='sbatch:1 --gpus=2 {script}'", devices=2)
    sweep.running(1)
    assert psutil.Process(sweep.witness(0)["main"]).environ()["LOADED"] == "yes"
    sweep.finish(1)
    assert sweep.returns() == [("COMPLETED", 0)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("node", "said", "remedy"),
    [
        ("sbatch:1 --partition=nowhere", "invalid partition specified", "`sbatch --wrap=true --partition=nowhere`"),
        ("sbatch:1 sh x", "does not look like a batch script", "name a script behind the options that begins with #!"),
        ("sbatch:1 nowhere.sh", "Unable to open file", "name a script behind the options that begins with #!"),
        ("sbatch:1 ./fails.sh", "the job ended before its agent was there (FAILED): no module", "see `scontrol show"),
        ("sbatch:1 ./moves.sh", "the node could not connect to this machine, at port", "let the nodes connect to"),
        ("sbatch:1 --hold", "has no agent after", "`squeue --me` says why it waits"),
    ],
)
def test_doctor_says_what_is_wrong_with_a_job(cluster: Any, slurm: str, node: str, said: str, remedy: str) -> None:
    (cluster.directory / "fails.sh").write_text("#!/bin/sh\necho no module >&2\nexit 1\n")
    # Another port: that of a listener without the key is refused in the same way.
    change = "import json, sys; path = sys.argv[1]; found = json.load(open(path)); found['port'] = 1; "
    change += "json.dump(found, open(path, 'w'))"
    moves = f'#!/bin/sh\nfor word; do case $word in */key) {sys.executable} -c "{change}" "$word";; esac; done\n'
    (cluster.directory / "moves.sh").write_text(moves + 'exec "$@"\n')
    doctor = PATIENCE.replace("AGENT_SECONDS = 250.0", "AGENT_SECONDS = " + ("5.0" if "hold" in node else "250.0"))
    done = subprocess.run(
        [sys.executable, "-c", doctor, "doctor", "--json", "--nodes", node],
        cwd=cluster.directory,
        env=cluster.surroundings(),
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    (found,) = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "nodes"]
    assert found["level"] == "problem"
    assert said in found["text"]
    assert found["remedy"].startswith(remedy)
    assert left_in(cluster) == []


@pytest.mark.thorough
def test_doctor_describes_a_node(cluster: Any, slurm: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PATIENCE, "doctor", "--json", "--nodes", "sbatch:1 --gpus=1"],
        cwd=cluster.directory,
        env=cluster.surroundings(),
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    found = [one["text"] for one in json.loads(done.stdout)["findings"] if one["check"] == "nodes"]
    assert [text for text in found if re.fullmatch(r"sbatch: a message takes \d+\.\d ms there and back", text)]
    assert left_in(cluster) == []
