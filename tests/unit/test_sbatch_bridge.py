"""The bridge to a node of `sbatch` with commands that stand in for Slurm's: no job may be left in the queue."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_launcher.nodes.authenticated_socket import AuthenticatedSocket, FrameKind, connect
from gpu_launcher.nodes.engines import module_command
from tests.waiting import until

SBATCH = """#!/bin/sh
touch called
while ! [ -e go ]; do sleep 0.02; done
echo 4711
"""
SCANCEL = """#!/bin/sh
echo "$@" >>cancelled
rm deadly 2>/dev/null && kill -TERM $$
exit 0
"""


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL), ("squeue", "#!/bin/sh\necho PENDING\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        module_command("sbatch_bridge"), stdin=pipe, stdout=pipe, stderr=pipe, cwd=tmp_path, env=environment
    ) as process:
        try:
            until((tmp_path / "called").exists, "sbatch is not run")
            yield process
        finally:
            (tmp_path / "go").touch()
            process.kill()


def die(bridge: subprocess.Popen[bytes]) -> None:
    """Do to the bridge what the death of its head does."""
    for end in (bridge.stdin, bridge.stdout, bridge.stderr):
        assert end is not None
        end.close()


def connected(directory: Path) -> AuthenticatedSocket:
    """Play the job on the node."""
    (directory / "go").touch()
    (file,) = directory.glob(".gpu-launcher-sbatch-*/key")
    found = json.loads(file.read_text())
    return connect(("127.0.0.1",), found["port"], bytes.fromhex(found["key"]))


def cancelled(directory: Path) -> str:
    assert list(directory.glob(".gpu-launcher-sbatch-*")) == []
    return (directory / "cancelled").read_text()


def test_job_is_cancelled_if_the_head_dies_while_it_is_submitted(bridge, tmp_path):
    die(bridge)
    (tmp_path / "go").touch()
    bridge.wait(60)
    assert cancelled(tmp_path) == "--quiet 4711\n"


def test_job_is_cancelled_if_its_connection_is_lost_after_the_death_of_the_head(bridge, tmp_path):
    with connected(tmp_path) as node:
        die(bridge)
        while FrameKind.END not in [frame.kind for frame in node.receive()]:
            pass
    bridge.wait(60)
    assert cancelled(tmp_path) == "--quiet 4711\n"


def test_job_is_cancelled_although_a_signal_to_the_bridge_hits_scancel(bridge, tmp_path):
    # A child that is not yet in a session of its own gets what the head sends to the bridge's process group.
    (tmp_path / "deadly").touch()
    die(bridge)
    (tmp_path / "go").touch()
    bridge.wait(60)
    assert cancelled(tmp_path) == "--quiet 4711\n" * 2
