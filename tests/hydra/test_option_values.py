"""Tests options that are interpolations, and numbers of GPUs in the notation of other programs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import Request
from hydra_plugins.gpu_pool_launcher._options import OF_SWEEP, PER_JOB, read_job_options, read_options
from hydra_plugins.gpu_pool_launcher.config import GpuPoolLauncherConf

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = {
    "trainer": {"devices": [0, 2], "gpu": 2, "must": "???", "nothing": None, "ref": "${machine.count}", "text": "0,2"},
    "model": {"optimizer": {"lr": 0.1}},
}


def config_of(**options: Any) -> DictConfig:
    """A program's config, as Hydra composes it, with these launcher options."""
    launcher = OmegaConf.structured(GpuPoolLauncherConf)
    runtime = {"choices": {"hydra/launcher": "gpu_pool"}}
    hydra = {"launcher": launcher, "sweeper": {}, "runtime": runtime}
    config = OmegaConf.create({**PROGRAM, "hydra": hydra})
    OmegaConf.set_struct(config, True)
    for name, value in options.items():
        config.hydra.launcher[name] = value
    OmegaConf.set_readonly(config.hydra, True)
    return config


def options_of(config: DictConfig) -> Options:
    """The options that the launcher reads from a config."""
    launcher: Any = Plugins.instance()._instantiate(config.hydra.launcher)  # does not create the sweep's directory
    return read_options(launcher.options, config)


def problem(read: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text
    return text


UNRESOLVABLE = [
    ("${trainer.gpus}", "the config has no key trainer.gpus (trainer has devices, gpu, must, nothing, ref, text). "),
    ("${trainer.gpus}", "Did you mean ${trainer.devices}? "),
    ("${trainer.gpus}", "write ${oc.select:trainer.gpus,1}"),
    ("${trainer.gpuss}", "Did you mean ${trainer.gpu}? "),
    ("${Trainer.Devices}", "the config has no key Trainer.Devices (its top level has trainer, model). For "),
    ("${Trainer.devices}", "Did you mean ${trainer.devices}? "),
    ("${trainr.devices}", "the config has no key trainr.devices (its top level has trainer, model). Did you mean "),
    ("${trainer.Devices}", "Did you mean ${trainer.devices}? "),
    ("${model.optimizer.gpus}", "the config has no key model.optimizer.gpus (model.optimizer has lr). For "),
    (
        "${model.opt.lr}",
        "the config has no key model.opt.lr (model has optimizer). Did you mean ${model.optimizer.lr}? ",
    ),
    ("${trainer[gpus]}", "the config has no key trainer.gpus (trainer has "),
    ("${...trainer.gpuss}", "the config has no key trainer.gpuss (trainer has "),
    (
        "${trainer.ref}",
        "the config has no key machine.count, which ${trainer.ref} refers to (its top level has trainer",
    ),
    ("${trainer.must}", "${trainer.must} has no value, because trainer.must is not set (???): set it, as in"),
    ("???", "it has no value (???): set it, or leave it out"),
    ("${oc.env:NO_SUCH_VARIABLE}", "${oc.env:NO_SUCH_VARIABLE} cannot be resolved: KeyError raised"),
    ("${hydra.launcher.gpus}", "cannot be resolved: Recursive interpolation detected"),
    ("${trainer.devices.7}", "the config has no key trainer.devices.7"),
    ("${no.such:1}", "cannot be resolved: Unsupported interpolation type no.such"),
    ("${raises:}", "cannot be resolved: ZeroDivisionError raised while resolving interpolation: "),
    ("${oc.decode:'${trainer.gpus}'}", "the config has no key trainer.gpus (trainer has devices,"),
    ("${model.optimizer.lr.x}", "cannot be resolved: ConfigTypeError raised"),
]


@pytest.fixture(autouse=True)
def _resolvers() -> None:
    OmegaConf.register_new_resolver("raises", lambda: 1 // 0, replace=True)


@pytest.mark.parametrize(("value", "says"), UNRESOLVABLE)
def test_option_that_cannot_be_resolved_is_explained(value: str, says: str) -> None:
    config = config_of(gpus=value)
    text = problem(lambda: options_of(config))
    assert text.startswith("hydra.launcher.gpus: ")
    assert says in text
    assert problem(lambda: read_job_options(config_of(), config)) == text


@pytest.mark.parametrize("option", [*PER_JOB, *OF_SWEEP])
def test_every_option_names_the_key_that_is_missing(option: str) -> None:
    value: Any = ["${trainer.no}"] if option == "retry_on" else "${trainer.no}"
    text = problem(lambda: options_of(config_of(**{option: value})))
    assert text.startswith(f"hydra.launcher.{option}: the config has no key trainer.no (trainer has devices, ")


def test_long_list_of_neighbours_is_cut() -> None:
    config = config_of(gpus="${many.no}")
    with open_dict(config):
        config["many"] = {f"key{number}": number for number in range(40)}
    assert "(many has key0, key1," in problem(lambda: options_of(config))
    assert "key11, ...)" in problem(lambda: options_of(config))


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (1, 1),
        ("2", 2),
        (2.0, 2),
        (0.5, 0.5),
        (None, 1),
        ("${oc.decode:'[3]'}", 1),
        ("${oc.decode:'[GPU-1,GPU-2,GPU-3]'}", 3),
        ("${oc.select:trainer.gpus,'1,'}", 1),
        ("${trainer.devices}", 2),
        ("${trainer.gpu}", 2),
        ("${trainer.nothing}", 1),
        ("${trainer.text}", 2),
        ("${oc.select:trainer.gpus,3}", 3),
    ],
)
def test_number_of_gpus_is_read_as_lightning_reads_devices(value: Any, count: float) -> None:
    request, _ = read_job_options(config_of(), config_of(gpus=value))
    assert request == Request.of(count)
    assert options_of(config_of(gpus=value)).request in (None, Request.of(count))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("auto", "'auto' does not say how many devices a job gets: give 0, 1, 2, ... or"),
        (" AUTO ", "does not say how many devices a job gets"),
        (-1, "-1 does not say how many devices a job gets"),
        ("-1", "'-1' does not say how many devices a job gets"),
        ([], "the list is empty"),
        ("${oc.decode:'[]'}", "the list is empty"),
        (
            [1],
            "[1] names GPUs, but this option is the number of GPUs per job: write hydra.launcher.gpus=1; to choose",
        ),
        ([0, "GPU-1"], "write hydra.launcher.gpus=2; to choose GPUs, write hydra.launcher.devices=[0,GPU-1]"),
        ("0,2", "[0,2] names GPUs, but this option is the number"),
        ("${trainer}", "it is a mapping (devices, gpu, must, nothing, ref, text), not a value"),
        (",", "the list is empty"),
        ({"a": 1, "b": 2}, "it is a mapping (a, b), not a value: name one of its keys"),
        (-2, "-2 is neither a number of devices nor a part of one"),
        (True, "True is neither a number of devices nor a part of one"),
        ("two", "'two' is neither a number of devices nor a part of one"),
    ],
)
def test_what_is_no_number_of_gpus_is_refused(value: Any, says: str) -> None:
    config = config_of(gpus=value)
    if not OmegaConf.is_interpolation(config.hydra.launcher, "gpus"):
        assert says in problem(lambda: options_of(config))
    assert says in problem(lambda: read_job_options(config_of(), config))


def test_missing_key_is_explained_in_one_line(run: Run, tmp_path: Path) -> None:
    option = "hydra.launcher.gpus=${trainer.gpus}"
    ran = run(tmp_path, "plain.py", "-m", "+trainer.devices=1,2", "+trainer.gpuz=1", option)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[0].startswith(
        "hydra.launcher.gpus: the config has no key trainer.gpus (trainer has gpuz). Did you mean ${trainer.gpuz}?"
    )
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "a_job_ran").exists()
