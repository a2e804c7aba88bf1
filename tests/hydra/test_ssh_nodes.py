"""Tests nodes that a real `sshd` on this machine reaches, under host names of which each has a pool of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.ssh_server import NEEDS_SSH, Ssh, ssh_server
from tests.waiting import until
from tests.warm import TextProgram

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

PROGRAM = "on_nodes.py"
GRID = ("-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=sweep")

pytestmark = NEEDS_SSH


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """An sshd that lets this user in."""
    with ssh_server(tmp_path_factory) as ssh:
        yield ssh


def pools(directory: Path) -> set[str]:
    """The pools in which jobs ran."""
    return {path.read_text().split()[0] for path in directory.glob("witness-*")}


def test_example_of_the_page_runs(run: Run, server: Ssh, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "ssh.md").read_text()
    (words,) = map(shlex.split, re.findall(r"^python train\.py (.*ssh:gpu2\].*)", page, flags=re.MULTILINE))
    words = [word.replace("gpu2", "node1").replace("lr=1e-3,1e-4", "n=1,2") for word in words]
    done = run(tmp_path, PROGRAM, *words, "hydra.launcher.devices=simulated:2", **server.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 jobs: 2 completed", done.stderr), done.stderr


def test_grid_runs_on_two_hosts(run: Run, server: Ssh, tmp_path: Path) -> None:
    nodes = "hydra.launcher.nodes=[ssh:node1,ssh:node2]"
    done = run(tmp_path, PROGRAM, *GRID, "n=range(6)", "meet=4", nodes, **server.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert pools(tmp_path) == {"pool-node1", "pool-node2"}
    values = [job["value"] for job in json.loads((tmp_path / "returns.json").read_text())]
    assert values == [f"[{n}, {{'ten times': {10 * n}}}]" for n in range(6)]
    assert re.search(r"job 0 \(n=0\) started on node\d simulated GPU \d", done.stderr)


def test_unknown_host_is_named_once_while_the_other_runs_jobs(run: Run, server: Ssh, tmp_path: Path) -> None:
    nodes = "hydra.launcher.nodes=[ssh:nowhere.invalid,ssh:node1]"
    done = run(tmp_path, PROGRAM, *GRID, "n=range(3)", nodes, **server.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert pools(tmp_path) == {"pool-node1"}
    lines = [line for line in done.stderr.splitlines() if "nowhere.invalid" in line]
    (line,) = lines
    assert "node nowhere.invalid did not start (exit status 255): ssh: Could not resolve hostname" in line


def test_jobs_of_a_killed_ssh_run_again(start: Start, server: Ssh, tmp_path: Path) -> None:
    nodes = "hydra.launcher.nodes=[ssh:node1,ssh:node2]"
    options = ("n=range(4)", "meet=4", "holds=true", nodes)
    with start(tmp_path, PROGRAM, *GRID, *options, IMPATIENT="yes", **server.environment(tmp_path)) as sweep:
        try:
            until(lambda: len(list(tmp_path.glob("witness-*"))) == 4 or sweep.poll() is not None)
            lost = {
                number for number in range(4) if (tmp_path / f"witness-{number}").read_text().startswith("pool-node1")
            }
            clients = [
                child
                for child in psutil.Process(sweep.pid).children(recursive=True)
                if child.name() == "ssh" and "node1" in child.cmdline()
            ]
            (client,) = clients
            client.kill()
            until(lambda: any(len((tmp_path / f"runs-{number}").read_text()) >= 2 for number in lost), seconds=200)
            (tmp_path / "release").touch()
            _, said = sweep.communicate(timeout=100)
        except BaseException:
            sweep.kill()
            raise
    assert sweep.returncode == 0, said
    assert len(lost) == 2
    assert "node node1 lost its connection" in said
    assert "its 2 jobs can run elsewhere" in said, said
    assert not (tmp_path / "twice").exists(), "two copies of a job ran at the same time"
    assert "4 jobs: 4 completed" in said


def test_functions_run_on_the_hosts(tmp_path: Path, server: Ssh) -> None:
    program = """
import os, time
from pathlib import Path
from gpu_launcher import PoolExecutor, parallel_map
from gpu_launcher.jobs.where import Where

def work(number):
    Path(f"began-{number}").touch()
    while number < 4 and len(list(Path().glob("began-*"))) < 4:  # so that both hosts run some
        time.sleep(0.01)
    return number + 1, os.environ["GPU_LAUNCHER_POOL_DIR"].rpartition("-")[2]

if __name__ == "__main__":
    options = {"pool": Where("simulated:2"), "nodes": ["ssh:node1", "ssh:node2"]}
    with PoolExecutor(**options) as executor:
        large = executor.submit(len, bytes(20_000_000))
        results = list(executor.map(work, range(40)))
        assert large.result() == 20_000_000
    assert [number for number, _ in results] == list(range(1, 41))
    records = list(parallel_map(range(2000), function=work, progress=False, **options))
    assert [number for number, _ in records] == list(range(1, 2001))
    print(*sorted({node for _, node in results + records}))
"""
    (tmp_path / "program.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, **server.environment(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "node1 node2\n"), ran.stderr
