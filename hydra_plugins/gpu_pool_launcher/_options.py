"""From `hydra.launcher` to checked options. Every mistake gets one message that names the option and the remedy."""

from __future__ import annotations

import math
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.processes.starter import StartMethod

_START_METHODS = ("auto", "fork", "spawn")


def read_options(options: dict[str, Any], config: DictConfig) -> Options:
    """Check the launcher's options.

    `options` is what Hydra instantiated the launcher with, `config` the sweep's own config. Raises OptionError.
    """
    per_job = OmegaConf.is_interpolation(config.hydra.launcher, "gpus")
    return Options(
        devices=_plain(options.get("devices", "auto")),
        gpus=None if per_job else read_gpus(options.get("gpus", 1)),
        max_parallel=_max_parallel(options.get("max_parallel")),
        grace=_grace(options.get("grace", 10.0)),
        pool_dir=_pool_dir(options.get("pool_dir")),
    )


def read_gpus(value: object) -> int:
    """The number of devices that one job needs. Raises OptionError."""
    number = _whole_number(value)
    if number is None or number < 0:
        raise OptionError("hydra.launcher.gpus", f"{value!r} is not a whole number of devices: give 0, 1, 2, ...")
    return number


def read_start_method(value: object) -> StartMethod:
    """How to start jobs. Raises OptionError."""
    if value not in _START_METHODS:
        raise OptionError(
            "hydra.launcher.start_method", f"{value!r} is unknown: give one of {', '.join(_START_METHODS)}"
        )
    return cast("StartMethod", value)


def _max_parallel(value: object) -> int | None:
    if value is None:
        return None
    number = _whole_number(value)
    if number is None or number < 1:
        raise OptionError(
            "hydra.launcher.max_parallel",
            f"{value!r} would never run a job: give a whole number from 1, or null for as many as get devices",
        )
    return number


def _grace(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise OptionError("hydra.launcher.grace", f"{value!r} is not a number of seconds: give 0 or more")


def _pool_dir(value: object) -> str | None:
    if value == "":
        raise OptionError("hydra.launcher.pool_dir", "the name is empty: name a directory, or leave the option out")
    return None if value is None else str(value)


def _whole_number(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
        return int(value)
    return None


def _plain(value: object) -> object:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
