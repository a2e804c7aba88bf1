"""A pool that becomes unusable, and a fork server that cannot be had, while a sweep runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

APP = """
import os, time
from pathlib import Path
import hydra
import gpu_launcher.allocation.request_queue
gpu_launcher.allocation.request_queue.UNUSABLE_SECONDS = 0.5

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    Path(cfg.marks, f"began-{cfg.n}").touch()
    while not Path(cfg.marks, f"end-{cfg.n}").exists():
        time.sleep(0.02)
    return cfg.n

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def sweep(tmp_path):
    """A sweep of three jobs on one device. Yields its process once the first job runs."""
    app = tmp_path / "app.py"
    app.write_text(textwrap.dedent(APP))
    command = [sys.executable, str(app), "-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:1"]
    command += [f"hydra.sweep.dir={tmp_path / 'sweep'}", f"+marks={tmp_path}", "+n=0,1,2"]
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    yield process
    process.kill()
    process.wait()
    process.stderr.close()


def until_announced(process: subprocess.Popen[str], what: str) -> str:
    """The first line on stderr that has `what` in it."""
    for line in process.stderr:
        if what in line:
            return line
    raise AssertionError(f"the sweep ended without saying: {what}")


def test_jobs_that_run_go_on_when_the_pool_directory_is_gone_and_the_others_fail_with_that_reason(sweep, tmp_path):
    started = re.search(
        r"job (\d) .* started on simulated GPU 0", until_announced(sweep, " started on simulated GPU 0")
    )
    assert started is not None
    running = started[1]
    (tmp_path / "pool" / "queue").rename(tmp_path / "elsewhere")  # at once: the sweep makes files in it at any time

    assert "were removed or moved away" in until_announced(sweep, "pool directory")
    assert "pool directory" in until_announced(sweep, "Running jobs continue")
    (tmp_path / f"end-{running}").touch()
    until_announced(sweep, f"job {running} (")
    _, rest = sweep.communicate(timeout=500)

    assert sweep.returncode == 1
    assert "1 completed, 2 failed" in rest
    assert "was not run: pool directory" in rest


def test_a_fork_server_that_ends_at_once_ends_the_sweep_with_its_reason(tmp_path):
    app = tmp_path / "app.py"
    app.write_text(
        textwrap.dedent("""
            import hydra
            import gpu_launcher.processes.fork_server_client as starter

            def refused(*arguments, captured):
                raise PermissionError("prctl is not allowed here")

            starter.serve = refused

            @hydra.main(version_base="1.3", config_path=None)
            def main(cfg):
                return 0

            main()
        """)
    )
    command = [sys.executable, str(app), "-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:1"]
    command += [f"hydra.sweep.dir={tmp_path / 'sweep'}", "+n=0,1"]
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)

    assert done.returncode == 1
    assert "prctl is not allowed here" in done.stderr
    assert "2 failed" in done.stderr
    assert "ends as soon as it is started" in done.stderr


def test_results_are_kept_when_fork_servers_are_killed_again_and_again(sweep, tmp_path):
    until_announced(sweep, "started on simulated GPU 0")
    for _ in range(5):
        guards = _children(sweep.pid)
        if not guards:
            break
        for guard in guards:
            os.kill(guard, signal.SIGKILL)
        while _children(sweep.pid) & guards:
            pass
    for number in range(3):
        (tmp_path / f"end-{number}").touch()
    _, rest = sweep.communicate(timeout=500)

    assert sweep.returncode == 1
    assert "3 jobs: " in rest, "whatever became of them, the sweep sums up"


def _children(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(child) for child in file.read().split()}
