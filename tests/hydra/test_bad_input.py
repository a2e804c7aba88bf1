"""Tests that each mistake gets one message with the option and the remedy, and that one job's mistake fails only it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_disk import mounted_tmpfs

Run = Callable[..., subprocess.CompletedProcess[str]]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")


# The sweep's own config has no `x`, but Hydra looks it up there before it creates the launcher.
NO_NUMBER = "is neither a number of devices nor a part of one: give 0, 1, 2, ... or a fraction such as 0.5"
OF_THE_JOB = "hydra.launcher.gpus=${oc.select:x,1}"


def complaint(run: Run, directory: Path, *arguments: str, **extra: Any) -> str:
    """The only line on stderr of a sweep that cannot run any job."""
    ran = run(directory, "plain.py", "-m", "+x=1,2", *arguments, **extra)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert not (directory / "a_job_ran").exists()
    said = [line for line in ran.stderr.splitlines() if line]
    assert len(said) == 1, ran.stderr
    return said[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["devices=simulatd:4"], "hydra.launcher.devices: 'simulatd:4' is neither a GPU's index nor its UUID"),
        (["devices=simulated:0"], "hydra.launcher.devices: 'simulated:0' needs a number from 1"),
        (["devices=[]"], "hydra.launcher.devices: the list is empty; use auto, "),
        (["devices=[0,-1]"], "hydra.launcher.devices: -1 is negative; GPUs are counted from 0"),
        (["devices=[0,0]"], "hydra.launcher.devices: "),
        (["devices=[0,63]"], "hydra.launcher.devices: "),
        (["devices=[0,GPU-nobodys]"], "hydra.launcher.devices: "),
        (["devices=1.5"], "hydra.launcher.devices: 1.5 is not a device; use auto, "),
        (["devices=null"], "hydra.launcher.devices: None is not a device; use auto, "),
        (
            ["gpus=5"],
            "hydra.launcher.gpus: the request is for 5 devices, but the pool has 4",
        ),
        (["gpus=5"], "ask for fewer or allow more devices"),
        (
            ["gpus=many"],
            "hydra.launcher.gpus: 'many' is neither a number of devices nor a part of one",
        ),
        (
            ["gpus=1.5"],
            "hydra.launcher.gpus: 1.5 is neither a number of devices nor a part of one",
        ),
        (
            ["gpus=-1"],
            "hydra.launcher.gpus: -1 does not say how many devices a job gets",
        ),
        (
            ["gpus=true"],
            "hydra.launcher.gpus: True is neither a number of devices nor a part of one",
        ),
        (
            ["gpus=[1]"],
            "hydra.launcher.gpus: [1] names GPUs, but this option is the number of GPUs per job: write "
            "hydra.launcher.gpus=1; to choose GPUs, write hydra.launcher.devices=[1]",
        ),
        (
            ["max_parallel=0"],
            "max_parallel: must be an integer >= 1, or null for as many jobs as the devices allow, got 0",
        ),
        (["start_method=forkserver"], "must be one of auto, fork, spawn, got 'forkserver'"),
        (["grace=-1"], "hydra.launcher.grace: -1.0 is not a number of seconds: give 0 or more"),
        (["grace=nan"], "hydra.launcher.grace: nan is not a number of seconds: give 0 or more"),
        (["pool_dir=''"], "hydra.launcher.pool_dir: the name is empty: name a directory, or leave the option out"),
        (["pool_dir=/proc/pool"], "pool directory /proc/pool: does not exist, and neither does its parent: make it"),
        (["pool_dir=/dev/null"], "pool directory /dev/null: is not a directory: remove what is there"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_option_that_makes_no_sense_gets_one_message(
    run: Run, tmp_path: Path, options: list[str], says: str
) -> None:
    assert says in complaint(run, tmp_path, *(f"hydra.launcher.{option}" for option in options))


@pytest.mark.parametrize("option", ["max_parallel=many", "grace=long"])
def test_hydra_itself_checks_the_types_of_options(run: Run, tmp_path: Path, option: str) -> None:
    ran = run(tmp_path, "plain.py", "-m", f"hydra.launcher.{option}")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert f"hydra.launcher.{option.partition('=')[0]}" in ran.stderr


def test_an_unknown_option_is_refused_by_hydra(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, "plain.py", "-m", "hydra.launcher.gpu=2")
    assert ran.returncode == 1
    assert "Could not override 'hydra.launcher.gpu'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.smoke
def test_a_job_that_asks_for_what_it_cannot_get_fails_alone(run: Run, tmp_path: Path) -> None:
    wishes = ["1", "5", "-2", "many", "1.5", "'${missing}'", "4", "0"]
    ran = run(tmp_path, "plain.py", "-m", OF_THE_JOB, f"+x={','.join(wishes)}")
    assert ran.returncode == 1
    returns = json.loads((tmp_path / "returns.json").read_text())
    assert [job["status"] for job in returns] == ["COMPLETED", *["FAILED"] * 5, "COMPLETED", "COMPLETED"]
    too_many = "job 1 (+x=5) cannot be run: its request is for 5 devices, but the pool has 4 that this program may use"
    assert too_many in returns[1]["text"]
    assert too_many in ran.stderr
    for number, wish in ((2, "-2"), (3, "'many'"), (4, "1.5")):
        message = f"hydra.launcher.gpus: {wish} {NO_NUMBER}"
        assert message in returns[number]["text"]
        assert f"job {number} (+x={wishes[number]}) FAILED: cannot be run: {message}" in ran.stderr
    assert "hydra.launcher.gpus: the config has no key missing, which ${oc.select:x,1} refers to" in returns[5]["text"]
    assert "Traceback" not in ran.stderr.replace("| Traceback", "")


def test_one_job_is_told_of_its_own_mistake_without_a_traceback(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, "plain.py", "-m", OF_THE_JOB, "+x=1,many")
    end = ran.stderr[ran.stderr.index("Error executing job with overrides: ['+x=many']") :]
    assert end.splitlines()[1] == (f"hydra.launcher.gpus: 'many' {NO_NUMBER}")
    assert "Traceback" not in end


def test_what_does_not_compose_is_told_by_hydras_own_sweeper_before_any_job_runs(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, "deaths.py", "-m", "size=small,large,no_such_size", VALIDATE="1")
    assert ran.returncode == 1
    assert "Could not find 'size/no_such_size'" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "returns.json").exists()


# The pool directory


@pytest.mark.root
@needs_root
def test_a_read_only_pool_directory_is_refused(run: Run, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    with mounted_tmpfs(pool, "size=64k,ro"):
        message = complaint(run, tmp_path)
    assert message == f"pool directory {pool}: is on a read-only file system: mount it so that programs can write to it"


@pytest.mark.root
@needs_root
def test_a_full_pool_directory_is_refused(run: Run, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    with mounted_tmpfs(pool, "size=64k"):
        (pool / "ballast").write_bytes(b"x" * 65536)
        message = complaint(run, tmp_path)
    assert message == f"pool directory {pool}: the disk is full (space or inodes): free some"


def test_a_pool_directory_of_somebody_else_is_refused(run: Run, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir(mode=0o555)
    within: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may write everywhere, unless it drops capabilities
        os.chown(pool, 65534, 65534)
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv (util-linux), or another user than root")
        within = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    message = complaint(run, tmp_path, within=within)
    assert message.startswith(
        f"pool directory {pool}: cannot be written by user {os.geteuid()}: ask its owner to `chmod 1777` it"
    )
