"""Nodes of a real Ray cluster: three on this machine, of which two have made-up GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

import gpu_launcher
from gpu_launcher.processes.linux import die_with_parent
from tests.cli.test_doctor_nodes import PATIENCE
from tests.crash.conftest import MARKER
from tests.crash.test_nodes import QUICK, TRAIN, agent_of, agents
from tests.crash.test_slurm_nodes import LOCK, forget, nothing_is_left
from tests.waiting import alive, until

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'gpu-launcher[ray]'", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).parents[2]
ON_NODES = REPOSITORY / "tests" / "hydra" / "programs" / "on_nodes.py"
LONG = 500.0
"""Maximum seconds for what Ray looks after only from time to time."""

# Starts a cluster, and answers questions about it. `gpus` are those that nothing has reserved.
CLUSTER = """
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

small = {"object_store_memory": 80 * 2**20}
head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, **small}
cluster = Cluster(initialize_head=True, head_node_args=head)


def add(name):
    nodes[name] = cluster.add_node(num_cpus=4, num_gpus=2, resources={name: 2}, **small)


def groups():
    return sum(group["state"] not in ("REMOVED", "INFEASIBLE") for group in placement_group_table().values())


nodes = {}
add("a")
add("b")
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
answers = {
    "gpus": lambda: int(ray.available_resources().get("GPU", 0)),
    "groups": groups,
    "kill": lambda name: cluster.remove_node(nodes.pop(name), allow_graceful=False),
    "add": add,
    "raylet": lambda name: nodes[name].all_processes["raylet"][0].process.pid,
}
print(cluster.address, flush=True)
for line in sys.stdin:
    question, *words = line.split()
    print(answers[question](*words), flush=True)
ray.shutdown()
cluster.shutdown()
"""


class RayCluster:
    """A running cluster. Its nodes `a` and `b` have two GPUs each, and two of a resource with their name."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.address = process.stdout.readline().strip()

    def ask(self, question: str, *words: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join((question, *words)) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def everything_is_free(self) -> None:
        """Wait until nothing is reserved."""
        until(lambda: self.ask("groups") == "0", "a placement group is left", LONG)
        until(lambda: self.ask("gpus") == "4", "GPUs are reserved", LONG)


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    # Ray's sockets lie there, and their paths must be short.
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    me = os.getpid()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, "RAY_TMPDIR": directory, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: die_with_parent(me),
    )
    try:
        cluster = RayCluster(process)
        if not cluster.address:
            pytest.skip("Ray does not start here")
        yield cluster
        process.communicate(timeout=200)
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster(world: Any, ray: RayCluster) -> Any:
    """A world whose sweeps can use the nodes of Ray. All nodes share this machine's pool."""
    (world.directory / "quick.py").write_text(QUICK)
    program = world.app.read_text().replace("from watched import", "from quick import")
    start = "def main(cfg):"
    world.app.write_text(program.replace(start, start + LOCK))
    world.environment["RAY_ADDRESS"] = ray.address
    yield world
    nothing_is_left(world)
    ray.everything_is_free()
    assert not list(world.directory.glob("overlap-*")), "two copies of a job ran at the same time"


def variables(world: Any, **more: str) -> str:
    """Words that set the environment of agents: it is otherwise that of Ray."""
    ours = {MARKER: str(world.directory), "GPU_LAUNCHER_POOL_DIR": str(world.pool), **more}
    return shlex.join(["env", *(f"{name}={value}" for name, value in ours.items())])


def nodes(world: Any, options: str, **more: str) -> str:
    return f"hydra.launcher.nodes='{options} {variables(world, **more)}'"


def two_machines(world: Any) -> str:
    """Two nodes, each with a pool of its own, so that neither has the devices of the other."""
    pools = [str(world.directory / name) for name in "ab"]
    entries = [f"'ray:1 --gpus=2 {variables(world, GPU_LAUNCHER_POOL_DIR=pool)}'" for pool in pools]
    return f"hydra.launcher.nodes=[{','.join(entries)}]"


def bridges(sweep: Any) -> list[psutil.Process]:
    children = psutil.Process(sweep.process.pid).children()
    return [child for child in children if "ray_bridge" in " ".join(child.cmdline())]


def jobs_at(sweep: Any, agent: psutil.Process, count: int) -> list[int]:
    return [number for number in range(count) if agent_of(sweep, number, everywhere=True) == agent]


def test_jobs_run_on_nodes_of_ray_and_everything_is_given_back(cluster: Any, ray: RayCluster) -> None:
    sweep = cluster.start("n=0,1,2,3,4", nodes(cluster, "ray:2 --gpus=2"), devices=4)
    sweep.running(4)
    until(lambda: len(agents(sweep, everywhere=True)) == 2, "not both nodes have an agent")
    until(lambda: (ray.ask("groups"), ray.ask("gpus")) == ("2", "0"), "not all GPUs are reserved", LONG)
    sweep.finish(5)
    assert sweep.returns() == [("COMPLETED", number) for number in range(5)]
    ray.everything_is_free()


def test_example_of_the_page_runs(cluster: Any) -> None:
    page = (REPOSITORY / "docs" / "ray.md").read_text()
    (line,) = re.findall(r"^python train\.py .*--gpus=2.*", page, flags=re.MULTILINE)
    (cluster.directory / "train.py").write_text(TRAIN)
    line = line.replace("--gpus=2", f"--gpus=2 {variables(cluster)}").replace("python", sys.executable, 1)
    command = ["bash", "-c", f"exec {line} hydra.launcher.devices=simulated:2 hydra.sweep.dir=sweep"]
    sweep = cluster.begin(command, cluster.surroundings(), cwd=cluster.directory)
    assert sweep.process.wait(LONG) == 0, sweep.output.read_text()
    assert [(cluster.directory / "sweep" / str(n) / "lr").read_text() for n in (0, 1)] == ["0.001", "0.0001"]


def test_agents_have_the_gpus_that_ray_reserved(cluster: Any, machine: Any) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b"))
    environment = {name: value for name, value in machine.environment().items() if os.environ.get(name) != value}
    cluster.environment |= environment
    option = nodes(cluster, "ray:2 --gpus=1 --resource=a=1", **environment)
    sweep = cluster.start("n=0,1", option, "hydra.launcher.devices=auto")
    assert sweep.running(2) == [0, 1]
    reserved = [agent_of(sweep, number, everywhere=True).environ() for number in (0, 1)]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in reserved) == ["0", "1"]
    assert [sweep.witness(n)["devices"] for n in (0, 1)] == [one["CUDA_VISIBLE_DEVICES"] for one in reserved]
    assert not any("OMP_NUM_THREADS" in one for one in reserved if "OMP_NUM_THREADS" not in os.environ)
    sweep.finish(2)
    assert sweep.returns() == [("COMPLETED", 0), ("COMPLETED", 1)]


def test_trials_are_pruned_on_nodes_of_ray_as_on_one_machine(cluster: Any) -> None:
    search = ("hydra/sweeper=optuna_async", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=3")
    pruner = ("meet=3", "reports=true", "hydra.sweeper.pruner={name: threshold, upper: 3.0}")
    launcher = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=sweep")
    command = [sys.executable, str(ON_NODES), "-m", *launcher, *search, *pruner, two_machines(cluster)]
    sweep = cluster.begin(command, cluster.surroundings(), cwd=cluster.directory)
    assert sweep.process.wait(LONG) == 0, sweep.output.read_text()
    assert "8 jobs: 3 completed, 5 pruned" in sweep.output.read_text()
    assert {path.read_text() for path in cluster.directory.glob("witness-*")} == {"a", "b"}
    url = f"sqlite:///{cluster.directory / 'sweep' / 'study.db'}"
    trials = optuna.load_study(study_name="on_nodes", storage=gpu_launcher.storage(url)).trials
    assert [trial.state.name for trial in trials].count("PRUNED") == 5


def test_jobs_of_a_killed_bridge_run_elsewhere(cluster: Any) -> None:
    sweep = cluster.start("n=0,1,2,3", two_machines(cluster), devices=2)
    sweep.running(4)
    trees = sweep.processes([0, 1, 2, 3])
    forget(cluster, [0, 1, 2, 3])
    bridges(sweep)[0].kill()
    until(lambda: sum(not alive(process) for process in trees) >= len(trees) // 2, "the jobs survive their bridge")
    sweep.finish(4)
    assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    assert "lost its connection" in sweep.output.read_text()


def test_jobs_of_a_lost_ray_node_run_elsewhere(cluster: Any, ray: RayCluster) -> None:
    sweep = cluster.start("n=0,1,2,3", two_machines(cluster), devices=2)
    sweep.running(4)
    raylet = int(ray.ask("raylet", "a"))
    (lost,) = [one for one in agents(sweep, everywhere=True) if raylet in [parent.pid for parent in one.parents()]]
    moved = jobs_at(sweep, lost, 4)
    assert len(moved) == 2
    trees = sweep.processes(moved)
    forget(cluster, moved)
    ray.ask("kill", "a")
    try:
        until(lambda: not any(alive(process) for process in trees), "they survive their node", LONG)
        stayed = [number for number in range(4) if number not in moved]
        for number in stayed:
            (cluster.directory / f"finish-{number}").touch()
        until(lambda: all((cluster.directory / f"witness-{n}").exists() for n in moved), "they do not move", LONG)
        sweep.finish(4)
        assert sweep.returns() == [("COMPLETED", number) for number in range(4)]
    finally:
        ray.ask("add", "a")


def test_nothing_is_left_of_a_killed_head(cluster: Any, ray: RayCluster) -> None:
    sweep = cluster.start("n=0,1,2,3,4,5", nodes(cluster, "ray:2 --gpus=2"), devices=4)
    sweep.running(4)
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait(60)
    nothing_is_left(cluster)
    ray.everything_is_free()


def test_request_that_waits_is_withdrawn_with_its_head(cluster: Any, ray: RayCluster) -> None:
    first = cluster.start("n=0,1,2,3", nodes(cluster, "ray:2 --gpus=2"), devices=4)
    first.running(4)
    second = cluster.start("n=4", nodes(cluster, "ray:1 --gpus=2"), devices=4, name="second")
    until(lambda: ray.ask("groups") == "3", "nothing waits")
    second.process.send_signal(signal.SIGKILL)
    second.process.wait(60)
    until(lambda: ray.ask("groups") == "2", "the request is not withdrawn", LONG)
    first.finish(4)
    assert first.returns() == [("COMPLETED", number) for number in range(4)]


def test_doctor_says_what_a_node_of_ray_has_or_lacks(cluster: Any) -> None:
    entries = [f"ray:1 --gpus=2 {variables(cluster)}", "ray:1 --gpus=3", "ray:1 --address=127.0.0.1:1"]
    named = [word for entry in entries for word in ("--nodes", entry)]
    done = subprocess.run(
        [sys.executable, "-c", PATIENCE, "doctor", "--json", *named],
        cwd=cluster.directory,
        env=cluster.surroundings(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "nodes"]
    texts = "\n".join(f"{one['text']} | {one.get('remedy')}" for one in found)
    assert re.search(r"ray: a message takes \d+\.\d ms there and back", texts), texts
    assert (
        "ray-2: did not start (exit status 1): the Ray cluster has no machine with 3 GPUs and 1 CPU: its machines have "
        "at most 2 GPUs and 4 CPUs | reserve less, or give --wait"
    ) in texts
    assert "ray-3: did not start (exit status 1): cannot connect to a Ray cluster at 127.0.0.1:1: " in texts
    assert "Connection refused | run this on a machine of the cluster" in texts


def test_new_cluster_ends_with_a_killed_head(world: Any) -> None:
    directory = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    world.environment["RAY_TMPDIR"] = directory
    try:
        sweep = world.start("n=0,1", nodes(world, "ray:1 --address=local"), devices=2)
        sweep.running(2)
        assert [process for process in world.marked() if process.name() == "raylet"]
        sweep.process.kill()
        until(lambda: world.marked() == [], "something is left", LONG)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
