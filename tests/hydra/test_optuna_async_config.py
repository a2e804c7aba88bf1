"""Tests `hydra/sweeper=optuna_async` and its samplers in Hydra's config, alone and beside the official plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = "plain.py"
HYDRA = hydra.__version__[:3]
SWEEPER = "hydra/sweeper=optuna_async"
WARNS: dict[str, Any] = {"PYTHONWARNINGS": "default", "HYDRA_FULL_ERROR": "1"}
SAMPLERS = ("auto", "tpe", "gp", "random", "cmaes", "nsgaii", "nsgaiii", "qmc", "grid", "bruteforce")

# The configs that hydra-optuna-sweeper stores, under the same module names, so that Hydra sees no difference.
STUB_CONFIG = """
from dataclasses import dataclass, field
from typing import Any
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

@dataclass
class SamplerConfig:
    _target_: str = MISSING

@dataclass
class TPESamplerConfig(SamplerConfig):
    _target_: str = "optuna.samplers.TPESampler"
    seed: int | None = None
    consider_prior: bool = True
    n_startup_trials: int = 10
    multivariate: bool = False

@dataclass
class GridSamplerConfig(SamplerConfig):
    _target_: str = "optuna.samplers.GridSampler"
    _partial_: bool = True

@dataclass
class NSGAIISamplerConfig(SamplerConfig):
    _target_: str = "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaii_sampler"
    seed: int | None = None
    population_size: int = 50

@dataclass
class OptunaSweeperConf:
    _target_: str = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}])
    sampler: SamplerConfig = MISSING

store = ConfigStore.instance()
store.store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="optuna_sweeper")
for name, node in (("tpe", TPESamplerConfig), ("grid", GridSamplerConfig), ("nsgaii", NSGAIISamplerConfig)):
    store.store(group="hydra/sweeper/sampler", name=name, node=node, provider="optuna_sweeper")
"""
STUB_SWEEPER = """
from hydra.plugins.sweeper import Sweeper
from . import config

class OptunaSweeper(Sweeper):
    def setup(self, *, hydra_context, task_function, config): ...
    def sweep(self, arguments): ...
"""


@pytest.fixture(params=["alone", "beside a stub before it", "beside a stub after it", "beside the official plugin"])
def beside(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of a program with or without hydra-optuna-sweeper, which Hydra finds before or after ours."""
    installed = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is not None
    if request.param == "beside the official plugin":
        if not installed:
            pytest.skip("hydra-optuna-sweeper is not installed")
        return WARNS
    if installed:
        pytest.skip("hydra-optuna-sweeper is installed, and is tested itself")
    if request.param == "alone":
        return WARNS
    plugin = tmp_path / "site" / "hydra_plugins" / "hydra_optuna_sweeper"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    (plugin / "config.py").write_text(STUB_CONFIG)
    (plugin / "optuna_sweeper.py").write_text(STUB_SWEEPER)
    import hydra_plugins.optuna_async_sweeper as ours

    assert ours.__file__ is not None
    path = [str(Path(ours.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    path.insert(0 if "before" in request.param else 1, str(tmp_path / "site"))
    return {**WARNS, "PYTHONPATH": os.pathsep.join(path)}


def shown(run: Run, directory: Path, beside: dict[str, str], *overrides: str) -> Any:
    done = run(directory, PROGRAM, "--cfg=hydra", "-p=hydra.sweeper", *overrides, **beside)
    assert done.returncode == 0, done.stderr
    assert clean(done.stderr) == ""
    return yaml.safe_load(done.stdout)


def clean(stderr: str) -> str:
    """Remove Hydra 1.4's warning about the programs' version_base, which Hydra 1.3 needs."""
    lines = iter(stderr.splitlines())
    for line in lines:
        if "The version_base parameter is deprecated" not in line:
            return "\n".join([line, *lines])
        next(lines, None), next(lines, None)
    return ""


def made(run: Run, directory: Path, beside: dict[str, str], *overrides: str) -> Any:
    done = run(directory, "sampler.py", HYDRA, *overrides, **beside)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_hydra_finds_it_and_shows_its_options(run: Run, tmp_path: Path, beside: dict[str, str]) -> None:
    found = run(tmp_path, PROGRAM, "--info", "plugins", **beside)
    assert found.stdout.count("OptunaAsyncSweeper") == 1
    assert clean(found.stderr) == ""
    options = shown(run, tmp_path, beside, SWEEPER)
    assert set(options["help"]) == options.keys() - {"_target_", "_recursive_", "help"}
    assert options["sampler"] == {"name": "auto", "seed": None}
    assert (options["n_trials"], options["direction"], options["pruner"]) == (20, "minimize", None)


def test_every_sampler_of_the_group_is_there_whoever_stored_it(
    run: Run, tmp_path: Path, beside: dict[str, str]
) -> None:
    done = run(tmp_path, PROGRAM, SWEEPER, "hydra/sweeper/sampler=?", "--cfg=job", **beside)
    listed = {line.strip() for line in done.stderr.splitlines()}
    assert set(SAMPLERS) <= listed, done.stderr


@pytest.mark.parametrize("name", ["tpe", "random", "nsgaii", "grid"])
def test_a_sampler_means_the_same_with_and_without_the_official_plugin(
    run: Run, tmp_path: Path, beside: dict[str, str], name: str
) -> None:
    found = made(run, tmp_path, beside, f"hydra/sweeper/sampler={name}")
    assert found["node"] == "DictConfig"
    assert found["sampler"].lower() == {"grid": "bruteforcesampler"}.get(name, f"{name}sampler")
    assert found["why"].startswith("Sampler: ")
    if name == "tpe":
        assert found["multivariate"] is True


def test_what_the_user_changes_in_a_samplers_config_holds(run: Run, tmp_path: Path, beside: dict[str, str]) -> None:
    found = made(run, tmp_path, beside, "hydra/sweeper/sampler=tpe", "hydra.sweeper.sampler.n_startup_trials=3")
    assert (found["sampler"], found["startup"], found["multivariate"]) == ("TPESampler", 3, True)


@pytest.mark.parametrize(
    ("value", "sampler"),
    [
        ("random", "RandomSampler"),
        ("{name:tpe,n_startup_trials:3}", "TPESampler"),
        ("{_target_:optuna.samplers.NSGAIISampler,population_size:7}", "NSGAIISampler"),
    ],
)
def test_a_sampler_can_be_given_as_a_value(
    run: Run, tmp_path: Path, beside: dict[str, str], value: str, sampler: str
) -> None:
    assert made(run, tmp_path, beside, f"hydra.sweeper.sampler={value}")["sampler"] == sampler


def test_nested_targets_arrive_as_they_are_written(run: Run, tmp_path: Path) -> None:
    patient = (
        "hydra.sweeper.pruner={_target_:optuna.pruners.PatientPruner,patience:2,"
        "wrapped_pruner:{_target_:optuna.pruners.MedianPruner}}"
    )
    found = made(run, tmp_path, {}, "hydra.sweeper.sampler={_target_:optuna.samplers.RandomSampler,seed:1}", patient)
    assert (found["node"], found["sampler"], found["pruner"]) == ("DictConfig", "RandomSampler", "PatientPruner")


def test_the_official_sweeper_is_left_as_it_is(run: Run, tmp_path: Path, beside: dict[str, str]) -> None:
    listed = run(tmp_path, PROGRAM, "hydra/sweeper=?", "--cfg=job", **beside).stderr
    if "\toptuna\n" not in listed:
        pytest.skip("there is no official plugin here")
    options = shown(run, tmp_path, beside, "hydra/sweeper=optuna")
    assert options["sampler"]["_target_"] == "optuna.samplers.TPESampler"
    assert options["sampler"]["multivariate"] is False


TEMPLATE = ("template/train.py", "-m", "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4", SWEEPER)


def test_a_config_with_the_official_target_runs_as_it_is(run: Run, tmp_path: Path, beside: dict[str, str]) -> None:
    done = run(tmp_path, *TEMPLATE, "hparams_search=optuna", "hydra.sweep.dir=sweep", **beside)
    assert done.returncode == 0, done.stderr
    assert "6 jobs: 6 completed" in done.stderr
    assert "belongs to the sweep" not in done.stderr, "of a job, whose config states the official target again"
    results = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert set(results["best_params"]) == {"model.optimizer.lr", "data.batch_size"}


def test_another_sweepers_target_is_left_as_the_config_says(run: Run, tmp_path: Path) -> None:
    basic = "hydra.sweeper._target_=hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    done = run(tmp_path, *TEMPLATE, basic, "data.batch_size=1")
    assert done.returncode != 0, "its options are others"


def test_a_dictionary_in_the_config_is_refused_with_the_line_to_write(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, *TEMPLATE, "hparams_search=dictionary", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "write model.optimizer.lr: tag(log, interval(0.0001, 0.1))" in done.stderr
    assert not (tmp_path / "sweep" / "0").exists()
