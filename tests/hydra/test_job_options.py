"""Tests launcher options in a swept config group: each applies to the job, or is reported as one of the sweep."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict, read_write

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Cause
from gpu_launcher.jobs.job_options import JobOptions
from gpu_launcher.model import Request
from hydra_plugins.gpu_pool_launcher._options import OF_SWEEP, PER_JOB, read_job_options
from hydra_plugins.gpu_pool_launcher.config import GpuPoolLauncherConf

Run = Callable[..., subprocess.CompletedProcess[str]]

OTHER_VALUES: dict[str, Any] = {
    "gpus": 2,
    "memory": "4GiB",
    "priority": -3,
    "timeout": "2h",
    "stagger": 5,
    "retries": 2,
    "retry_on": ["exception"],
    "enforce_memory": True,
    "visible": "uuid",
    "cpu_affinity": "auto",
    "devices": [0, 2],
    "nodes": ["local", "ssh:gpu2"],
    "outputs": "fetch",
    "on_failure": "stop",
    "max_failures": 3,
    "resume": True,
    "dry_run": True,
    "detach": True,
    "busy_memory": None,
    "max_parallel": 1,
    "start_method": "spawn",
    "grace": 1.5,
    "direction": "minimize",
    "on_end": "true",
    "on_job_failure": ["true"],
    "pool_dir": "/elsewhere",
}
"""A value other than the default for each option."""


@pytest.fixture
def sweep() -> Iterator[DictConfig]:
    GlobalHydra.instance().clear()
    with initialize(version_base="1.3", config_path=None):
        config = compose(overrides=["hydra/launcher=gpu_pool", "+n=1"], return_hydra_config=True)
    yield config
    GlobalHydra.instance().clear()


def job_of(sweep: DictConfig, **options: Any) -> DictConfig:
    job = sweep.copy()
    with read_write(job), open_dict(job):
        for name, value in options.items():
            job.hydra.launcher[name] = value
    return job


def test_every_option_is_the_jobs_or_the_sweeps() -> None:
    options = {field.name for field in fields(GpuPoolLauncherConf)} - {"_target_", "unresolved", "help"}
    assert options == set(PER_JOB) | set(OF_SWEEP) == set(OTHER_VALUES)
    assert not set(PER_JOB) & set(OF_SWEEP)


@pytest.mark.parametrize("option", PER_JOB)
def test_option_of_a_job_is_honoured(sweep: DictConfig, option: str) -> None:
    changed = read_job_options(sweep, job_of(sweep, **{option: OTHER_VALUES[option]}))
    assert changed != read_job_options(sweep, sweep)
    assert changed[1].ignored == ()


@pytest.mark.parametrize("option", OF_SWEEP)
def test_option_of_the_sweep_is_reported_when_a_job_differs(sweep: DictConfig, option: str) -> None:
    request, options = read_job_options(sweep, job_of(sweep, **{option: OTHER_VALUES[option]}))
    assert (request, options.device_environment) == (Request(1), DeviceEnvironment())
    (said,) = options.ignored
    assert said.startswith(f"hydra.launcher.{option}=")


def test_job_options_are_read_together(sweep: DictConfig) -> None:
    options = {name: OTHER_VALUES[name] for name in PER_JOB}
    request, own = read_job_options(sweep, job_of(sweep, **options))
    assert request == Request.of(2, 4 * 2**30, priority=-3, timeout=7200.0, stagger=5.0)
    retries = FailurePolicy(2, frozenset({Cause.EXCEPTION}))
    assert own == JobOptions(DeviceEnvironment(by_uuid=True, enforce_memory=True, pin_cpus=True), retries)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("devices", [0, "GPU-1"], "[0,GPU-1]"),
        ("resume", True, "true"),
        ("busy_memory", None, "null"),
        ("pool_dir", "/a\nb" + "c" * 100, "/a b"),
        ("max_parallel", "${n}", "1"),
    ],
)
def test_ignored_option_is_shown_as_it_is_written(sweep: DictConfig, option: str, value: Any, shown: str) -> None:
    _, options = read_job_options(sweep, job_of(sweep, **{option: value}))
    assert options.ignored[0].startswith(f"hydra.launcher.{option}={shown}")
    assert len(options.ignored[0]) < 120


def test_interpolation_that_differs_in_the_job_counts_as_different(sweep: DictConfig) -> None:
    whole = job_of(sweep, max_parallel="${n}", retries="${n}")
    one = whole.copy()
    one.n = 2
    _, options = read_job_options(whole, one)
    assert options.ignored == ("hydra.launcher.max_parallel=2",)
    assert options.failures.retries == 2


def test_option_of_the_sweep_that_a_job_cannot_resolve_is_not_reported(sweep: DictConfig) -> None:
    whole = job_of(sweep, max_parallel="${n}")
    one = whole.copy()
    with open_dict(one):
        del one["n"]
    assert read_job_options(whole, one)[1].ignored == ()


def test_other_launcher_or_sweeper_of_a_job_is_reported(sweep: DictConfig) -> None:
    with initialize(version_base="1.3", config_path=None):
        other = compose(overrides=["hydra/sweeper=grid_async", "+n=1"], return_hydra_config=True)
    request, options = read_job_options(job_of(sweep, gpus=2), other)
    assert options.ignored == ("hydra/launcher=basic", "hydra/sweeper=grid_async")
    assert request == Request(2), "of the sweep"


def test_sweeper_option_of_a_job_is_reported(sweep: DictConfig) -> None:
    job = sweep.copy()
    with read_write(job), open_dict(job):
        job.hydra.sweeper.max_batch_size = 3
    assert read_job_options(sweep, job)[1].ignored == ("hydra.sweeper.max_batch_size=3",)


@pytest.mark.parametrize(("option", "value"), [("retries", -1), ("retry_on", "rain"), ("visible", "no")])
def test_wrong_option_of_a_job_is_named(sweep: DictConfig, option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^hydra.launcher.{option}: "):
        read_job_options(sweep, job_of(sweep, **{option: value}))


EXPERIMENTS = {
    "again": {"retries": 2, "retry_on": "[exception]"},
    "tight": {"gpus": 0.5, "enforce_memory": "true"},
    "lost": {"gpus": "${trainer.gpus}"},
    "sweepwide": {"busy_memory": "1GiB", "max_parallel": 1},
    "sweepwide_too": {"busy_memory": "2GiB", "grace": 1},
}


@pytest.fixture(scope="module")
def swept(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    if not hydra.__version__.startswith("1.3"):
        pytest.skip("Hydra 1.4 refuses a swept group that changes hydra.launcher")
    directory = tmp_path_factory.mktemp("experiments")
    group = directory / "conf" / "experiment"
    group.mkdir(parents=True)
    for name, options in EXPERIMENTS.items():
        lines = [f"    {option}: {value}" for option, value in options.items()]
        text = "\n".join(["# @package _global_", "hydra:", "  launcher:", *lines])
        (group / f"{name}.yaml").write_text(f"{text}\ngood: {2 if name == 'again' else 1}\n")
    experiment = f"+experiment={','.join(EXPERIMENTS)}"
    done = run(directory, "options.py", "-m", "--config-dir", "conf", "hydra.sweep.dir=sweep", experiment)
    return done, [directory / "sweep" / str(number) for number in range(len(EXPERIMENTS))]


def test_options_of_a_swept_group_work_per_job(
    swept: tuple[subprocess.CompletedProcess[str], list[Path]],
) -> None:
    done, directories = swept
    again, tight, *others = (
        json.loads(seen.read_text()) for one in directories if (seen := one / "seen.json").exists()
    )
    assert len(others) == 2, done.stderr
    assert again["attempt"] == 2
    assert "attempt 2 of 3 follows" in done.stderr
    assert tight["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    for other in (again, *others):
        assert other["environment"]["CUDA_VISIBLE_DEVICES"].isdecimal()
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in other["environment"]


def test_option_that_one_job_cannot_resolve_fails_that_job(
    swept: tuple[subprocess.CompletedProcess[str], list[Path]],
) -> None:
    done, _ = swept
    assert done.returncode == 1
    assert "4 completed, 1 failed" in done.stderr
    (line, _) = [line for line in done.stderr.splitlines() if "FAILED" in line]
    assert "hydra.launcher.gpus: the config has no key trainer.gpus (its top level has good)." in line


def test_ignored_option_of_a_group_is_reported_once(
    swept: tuple[subprocess.CompletedProcess[str], list[Path]],
) -> None:
    done, _ = swept
    said = [line for line in done.stderr.splitlines() if "ignored" in line]
    assert all("Set " in line for line in said)
    options = [word for line in said for word in line.split() if word.startswith("hydra.launcher.")]
    assert sorted(option.partition("=")[0] for option in options) == [
        "hydra.launcher.busy_memory",
        "hydra.launcher.grace",
        "hydra.launcher.max_parallel",
    ]
