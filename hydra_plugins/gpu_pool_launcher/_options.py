"""From `hydra.launcher` to checked options. Every mistake gets one message that names the option and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from gpu_launcher import requests
from gpu_launcher.devices import BUSY_MEMORY
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.grants import Telling
from gpu_launcher.jobs.job import Cause
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import Request
from gpu_launcher.processes.starter import StartMethod
from gpu_launcher.requests import read_number
from gpu_launcher.sizes import read_memory

_START_METHODS = ("auto", "fork", "spawn")


PER_JOB = ("gpus", "memory", "priority", "timeout", "stagger")
"""Options that may be interpolations on each job's own config."""


def spell(option: str) -> str:
    """What users write for an option of the launcher."""
    return f"hydra.launcher.{option}"


@contextmanager
def _as_written() -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        raise error.written(spell) from error


@_as_written()
def read_options(options: dict[str, Any], config: DictConfig) -> Options:
    """Check the launcher's options.

    `options` is what Hydra instantiated the launcher with, `config` the sweep's own config. Raises OptionError.
    """
    per_job = any(OmegaConf.is_interpolation(config.hydra.launcher, name) for name in PER_JOB)
    return Options(
        devices=_plain(options.get("devices", "auto")),
        request=None if per_job else requests.read_request(options),
        max_parallel=_max_parallel(options.get("max_parallel")),
        grace=_grace(options.get("grace", 10.0)),
        pool_dir=_pool_dir(options.get("pool_dir")),
        busy_memory=_busy_memory(options.get("busy_memory", BUSY_MEMORY)),
        telling=Telling(
            by_uuid=_one_of("visible", options.get("visible", "index"), ("index", "uuid")) == "uuid",
            enforce_memory=bool(options.get("enforce_memory", False)),
            pin_cpus=_one_of("cpu_affinity", options.get("cpu_affinity"), (None, "auto")) == "auto",
        ),
        failures=_failures(options),
        resume=bool(options.get("resume", False)),
        spell=spell,
    )


@_as_written()
def read_request(options: Mapping[str, Any]) -> Request:
    """What one job needs, from the options of PER_JOB. Raises OptionError."""
    return requests.read_request(options)


def _failures(options: Mapping[str, Any]) -> FailurePolicy:
    default = FailurePolicy()
    known = tuple(cause.value for cause in Cause)
    named = _plain(options.get("retry_on", default.retry_on))
    named = [word.strip() for word in named.split(",")] if isinstance(named, str) else named
    if not isinstance(named, Iterable):
        raise OptionError("retry_on", f"{named!r} is no list: give some of [{', '.join(known)}]")
    causes = frozenset(Cause(_one_of("retry_on", cause, known)) for cause in named)
    most = options.get("max_failures")
    if most is not None and ((most := _whole_number(most)) is None or most < 1):
        raise OptionError(
            "max_failures",
            f"{options['max_failures']!r} is no number of failures: give a whole number from 1, or null for any number",
        )
    if _one_of("on_failure", options.get("on_failure", "continue"), ("continue", "stop")) == "stop":
        if most is not None:
            raise OptionError("max_failures", "on_failure=stop is max_failures=1: leave one of them out")
        most = 1
    retries = _whole_number(options.get("retries", 0))
    if retries is None or retries < 0:
        raise OptionError("retries", f"{options['retries']!r} is no number of times: give 0, 1, 2, ...")
    return FailurePolicy(retries, causes, most)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> object:
    if value not in allowed:
        listed = ", ".join("null" if choice is None else str(choice) for choice in allowed)
        raise OptionError(name, f"{value!r} is unknown: give one of {listed}")
    return value


@_as_written()
def read_start_method(value: object) -> StartMethod:
    """How to start jobs. Raises OptionError."""
    if value not in _START_METHODS:
        raise OptionError("start_method", f"{value!r} is unknown: give one of {', '.join(_START_METHODS)}")
    return cast("StartMethod", value)


def _max_parallel(value: object) -> int | None:
    if value is None:
        return None
    number = _whole_number(value)
    if number is None or number < 1:
        raise OptionError(
            "max_parallel",
            f"{value!r} would never run a job: give a whole number from 1, or null for as many as get devices",
        )
    return number


def _grace(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise OptionError("grace", f"{value!r} is not a number of seconds: give 0 or more")


def _busy_memory(value: object) -> int | None:
    return None if value is None else read_memory(value, "busy_memory")


def _pool_dir(value: object) -> str | None:
    if value == "":
        raise OptionError("pool_dir", "the name is empty: name a directory, or leave the option out")
    return None if value is None else str(value)


def _whole_number(value: object) -> int | None:
    number = read_number(value)
    return int(number) if number is not None and number.is_integer() else None


def _plain(value: object) -> object:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
