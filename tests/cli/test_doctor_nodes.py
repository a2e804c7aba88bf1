"""Tests `gpu-launcher doctor --nodes`: what it finds out about nodes, and what it says if they cannot be used."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from gpu_launcher.cli.checks import nodes_check
from gpu_launcher.cli.checks.finding import Level
from gpu_launcher.nodes.engines import read_nodes
from tests.waiting import alive, until
from tests.wrong_nodes import WRONG, write_ssh

if TYPE_CHECKING:
    from conftest import Cli, Lab  # type: ignore[import-not-found]

PATIENCE = "import sys; from gpu_launcher.cli.checks import nodes_check; nodes_check.AGENT_SECONDS = 250.0; " + (
    "nodes_check.STEP_SECONDS = 250.0; from gpu_launcher.cli.main import main; main()"
)
"""Agents start late on a busy machine."""

Findings = list[tuple[str, str, str]]


@pytest.fixture
def doctor(cli: Cli, tmp_path: Path) -> Callable[..., Findings]:
    """Try nodes from a directory of its own. Returns the level, text and remedy of each finding about nodes."""
    return lambda *nodes: _doctor(cli, tmp_path, *nodes)


def _command(*nodes: str) -> list[str]:
    named = [word for node in nodes for word in ("--nodes", node)]
    return [sys.executable, "-c", PATIENCE, "doctor", "--json", *named]


def _environment(cli: Cli, tmp_path: Path) -> dict[str, str]:
    write_ssh(tmp_path / "bin")
    return {**cli.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def _doctor(cli: Cli, tmp_path: Path, *nodes: str) -> Findings:
    directory = tmp_path / "project"
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        _command(*nodes),
        cwd=directory,
        env=_environment(cli, tmp_path),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0)
    assert list(directory.iterdir()) == [], "it leaves files behind"
    return [(one["level"], one["text"], one["remedy"] or "") for one in report["findings"] if one["check"] == "nodes"]


@pytest.mark.smoke
def test_a_node_that_can_be_used_is_described(lab: Lab, tmp_path: Path) -> None:
    found = _doctor(lab.cli, tmp_path, "ssh:motd", "local")
    assert [level for level, _, _ in found] == ["ok"] * 6
    agent, versions, directory, round_trip, devices, here = [text for _, text, _ in found]
    assert re.fullmatch(rf"motd: its agent answered after .+ s, on {re.escape(os.uname().nodename)}", agent)
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    assert versions.startswith(f"motd: the same versions as here: {python}, gpu-launcher ")
    assert directory == f"motd: sees the files in this directory, {tmp_path / 'project'}"
    assert re.fullmatch(r"motd: a message takes \d+\.\d ms there and back", round_trip)
    assert devices == "motd: GPU 0-3: NVIDIA H100 80GB HBM3, 80 GiB"
    assert here == "local: is this machine: see the other findings"


def test_each_wrong_node_has_one_problem_with_its_remedy(doctor: Callable[..., Findings]) -> None:
    found = [(text, remedy) for level, text, remedy in doctor(*WRONG) if level == "problem"]
    for (text, remedy), (node, (said, advice)) in zip(found, WRONG.items(), strict=True):
        assert said in text, node
        assert remedy.startswith(advice), node


def test_a_command_that_does_not_exist_is_a_problem_and_the_others_are_tried(doctor: Callable[..., Findings]) -> None:
    found = doctor("command:no-such-command x", "command:env")
    assert found[0] == (
        "problem",
        "no-such-command: cannot run its command: No such file or directory: 'no-such-command'",
        "install no-such-command on this machine, or give its full path",
    )
    assert [level for level, _, _ in found[1:5]] == ["ok"] * 4


def test_a_node_without_gpus_is_warned_of_with_the_reason(doctor: Callable[..., Findings]) -> None:
    found = [(text, remedy) for level, text, remedy in doctor("ssh:gpu2") if level == "warning"]
    (first, remedy), (reason, _) = found
    assert re.fullmatch(r"gpu2: no GPU is found there: jobs run on \d+ CPU slots?", first)
    assert remedy.startswith("none if that is wanted; else leave this node out")
    assert reason.startswith("gpu2: no NVIDIA driver found (")


def test_a_pool_that_cannot_be_opened_is_a_problem(doctor: Callable[..., Findings], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    *_, (level, text, _) = doctor(f"command:env GPU_LAUNCHER_POOL_DIR={tmp_path}/file/pool")
    assert level == "problem"
    assert text.startswith("env: cannot run jobs: ")
    assert f"{tmp_path}/file/pool" in text


def test_a_directory_that_is_not_shared_is_a_problem(doctor: Callable[..., Findings], tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount file systems")
    project = tmp_path / "project"
    elsewhere = f"'mount -t tmpfs none {project} && exec \"$@\"'"
    (_, *found) = doctor(f"command:unshare -m sh -c {elsewhere} sh")
    remedy = "use a directory on a file system that all nodes share, or outputs=fetch"
    assert found == [("problem", f"unshare: does not see the files in {project}", remedy)]


@pytest.mark.parametrize(
    ("nodes", "remedy"),
    [
        ("ssh:silent", "`ssh silent true` must succeed without a question"),
        ("slurm:1 --partition=x", "`squeue --me` says why it waits; a sweep starts without it. Else try `srun "),
    ],
)
def test_a_node_that_gives_no_sign_is_given_up_with_what_to_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: str, remedy: str
) -> None:
    write_ssh(tmp_path / "bin")
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes_check, "AGENT_SECONDS", 0.5)
    (finding,) = nodes_check.examine_nodes(read_nodes([nodes]))
    assert finding.level is Level.PROBLEM
    assert "has no agent after 0.5 s" in finding.text
    assert finding.remedy is not None
    assert finding.remedy.startswith(remedy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("host", ["silent", "gpu2"])
def test_a_signal_ends_the_trial_and_what_it_started(
    cli: Cli, tmp_path: Path, signum: signal.Signals, code: int, host: str
) -> None:
    write_ssh(tmp_path / "bin")
    (tmp_path / "project").mkdir()
    process = subprocess.Popen(
        _command(f"ssh:{host}", "ssh:silent"),
        cwd=tmp_path / "project",
        env=_environment(cli, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started: list[Any] = []

    def started_both() -> bool:
        started[:] = psutil.Process(process.pid).children(recursive=True)
        return len(started) >= 2

    until(started_both)
    process.send_signal(signum)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert (out, err.strip()) == ("", "")  # click ends the line of a ^C
    until(lambda: not any(alive(one) for one in started), "something is left")
    assert list((tmp_path / "project").iterdir()) == []


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("gpu2", "--nodes: 'gpu2' names no node: give local, ssh:HOST, slurm:COUNT"),
        ("ssh:-oProxyCommand=x", "--nodes: '-oProxyCommand=x' is not the name of a host"),
    ],
)
def test_an_invalid_node_is_refused_before_anything_is_examined(cli: Cli, node: str, said: str) -> None:
    done = cli("doctor", "--nodes", node)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
