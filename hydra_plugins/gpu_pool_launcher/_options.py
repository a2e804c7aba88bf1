"""Reads and checks `hydra.launcher`. Every mistake gets one message that names the option and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpu_launcher import requests, validation
from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Cause
from gpu_launcher.jobs.job_options import JobOptions
from gpu_launcher.jobs.manifest import DIRECTIONS
from gpu_launcher.jobs.notifications import ON_END, ON_JOB_FAILURE, Hooks, read_hook
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import BUSY_MEMORY, Request
from gpu_launcher.nodes.engines import NodeSpec, fetches, read_nodes
from gpu_launcher.sizes import read_memory
from gpu_launcher.text import one_line
from gpu_launcher.validation import StartMethod, one_of, read_integer

from ._interpolations import resolve

MAX_SHOWN = 60
"""Maximum number of characters of a value in a message."""


_REQUEST = ("gpus", "memory", "priority", "timeout", "stagger")
PER_JOB = (*_REQUEST, "retries", "retry_on", "enforce_memory", "visible", "cpu_affinity")
"""Options that each job's own config may set, also by interpolations."""
OF_SWEEP = (
    "devices",
    "nodes",
    "outputs",
    "on_failure",
    "max_failures",
    "resume",
    "dry_run",
    "detach",
    "direction",
    "on_end",
    "on_job_failure",
    "busy_memory",
    "max_parallel",
    "start_method",
    "grace",
    "pool_dir",
)
"""Options of the whole sweep. A job cannot set them."""


def spell(option: str) -> str:
    """An option's name as users write it."""
    return f"hydra.launcher.{option}"


@contextmanager
def _as_written() -> Iterator[None]:
    try:
        yield
    except OptionError as error:
        raise error.renamed(spell) from error


@_as_written()
def read_options(options: dict[str, Any], config: DictConfig) -> Options:
    """Check the launcher's options.

    `options` are the arguments with which Hydra instantiated the launcher; `config` is the sweep's own config.
    Raises OptionError.
    """
    for name in map(str, options.get("unresolved") or ()):
        resolve(config.hydra.launcher, name)
    per_job = any(OmegaConf.is_interpolation(config.hydra.launcher, name) for name in _REQUEST)
    if not per_job:
        options = {**options, "gpus": _count_of_gpus(_plain(options.get("gpus")), literal=True)}
    retries, retry_on = _retries(options)
    return Options(
        devices=_plain(options.get("devices", "auto")),
        request=None if per_job else requests.read_request(options, learns=True),
        max_parallel=_max_parallel(options.get("max_parallel")),
        cap=spell("max_parallel"),
        grace=_grace(options.get("grace", 10.0)),
        pool_dir=_pool_dir(options.get("pool_dir")),
        busy_memory=_busy_memory(options.get("busy_memory", BUSY_MEMORY)),
        device_environment=_device_environment(options),
        failures=FailurePolicy(retries, retry_on, _most_failures(options)),
        directions=_directions(options.get("direction")),
        resume=bool(options.get("resume", False)),
        spell=spell,
    )


def _count_of_gpus(value: object, *, literal: bool) -> object:
    """Convert a value of Lightning's `devices` to a number of GPUs: a list, or text such as `0,2`, by its length.

    A list in this option itself (`literal`) is refused, because it most probably names particular GPUs.
    """
    if isinstance(value, str) and "," in value:
        value = [entry.strip() for entry in value.split(",") if entry.strip()]
    if isinstance(value, list):
        if not value:
            raise OptionError("gpus", "the list is empty: give at least one device, or 0 for none")
        if literal:
            raise OptionError(
                "gpus",
                f"{_shown(value)} names GPUs, but this option is the number of GPUs per job: write "
                f"{spell('gpus')}={len(value)}; to choose GPUs, write {spell('devices')}={_shown(value)}",
            )
        return len(value)
    return value


@_as_written()
def read_job_options(sweep: DictConfig, job: DictConfig) -> tuple[Request, JobOptions]:
    """Read the request of one job, and its other options.

    `sweep` is the sweep's config, `job` the job's own. Raises OptionError.
    """
    launcher, ignored = job.hydra.launcher, []
    if launcher.get("_target_") != sweep.hydra.launcher.get("_target_"):
        ignored.append(f"hydra/launcher={job.hydra.runtime.choices.get('hydra/launcher')}")
        launcher = sweep.hydra.launcher
    else:
        ignored += _differing("hydra.launcher", sweep.hydra.launcher, launcher, OF_SWEEP)
    if job.hydra.sweeper.get("_target_") != sweep.hydra.sweeper.get("_target_"):
        ignored.append(f"hydra/sweeper={job.hydra.runtime.choices.get('hydra/sweeper')}")
    else:
        ignored += _differing("hydra.sweeper", sweep.hydra.sweeper, job.hydra.sweeper, map(str, job.hydra.sweeper))
    options = {name: resolve(launcher, name) for name in PER_JOB if name in launcher.keys()}  # noqa: SIM118  (also ???)
    literal = not OmegaConf.is_interpolation(launcher, "gpus")
    options["gpus"] = _count_of_gpus(options.get("gpus"), literal=literal)
    retries, retry_on = _retries(options)
    return requests.read_request(options, learns=True), JobOptions(
        _device_environment(options), FailurePolicy(retries, retry_on), tuple(ignored)
    )


def _differing(node: str, sweep: DictConfig, job: DictConfig, names: Iterable[str]) -> Iterator[str]:
    """The options in which a job differs from its sweep, as written on the command line."""
    for name in names:
        try:
            here, there = (_plain(config.get(name)) for config in (job, sweep))
        except OmegaConfBaseException:  # the job does not use an option that it cannot resolve
            continue
        if here != there:
            yield f"{node}.{name}={_shown(here)}"


def _shown(value: object) -> str:
    """Format a value about as users write it on the command line, on one short line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_shown(item)}" for key, item in value.items()) + "}"
    text = one_line(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _device_environment(options: Mapping[str, Any]) -> DeviceEnvironment:
    return DeviceEnvironment(
        by_uuid=one_of("visible", options.get("visible", "index"), ("index", "uuid")) == "uuid",
        enforce_memory=bool(options.get("enforce_memory", False)),
        pin_cpus=one_of("cpu_affinity", options.get("cpu_affinity"), (None, "auto")) == "auto",
    )


def _retries(options: Mapping[str, Any]) -> tuple[int, frozenset[Cause]]:
    default = FailurePolicy()
    known = tuple(cause.value for cause in Cause)
    named = _plain(options.get("retry_on", default.retry_on))
    named = [word.strip() for word in named.split(",")] if isinstance(named, str) else named
    if not isinstance(named, Iterable):
        raise OptionError("retry_on", f"{named!r} is not a list: give some of [{', '.join(known)}]")
    causes = frozenset(Cause(one_of("retry_on", cause, known)) for cause in named)
    return read_integer("retries", options.get("retries", 0), least=0), causes


def _most_failures(options: Mapping[str, Any]) -> int | None:
    most = options.get("max_failures")
    if most is not None:
        most = read_integer("max_failures", most, least=1, or_else="null for no limit")
    if one_of("on_failure", options.get("on_failure", "continue"), ("continue", "stop")) == "stop":
        if most is not None:
            raise OptionError("max_failures", "on_failure=stop is max_failures=1: leave one of them out")
        most = 1
    return most


def _directions(value: object) -> tuple[str, ...]:
    direction = one_of("direction", value, (None, *DIRECTIONS))
    return () if direction is None else (str(direction),)


@_as_written()
def read_start_method(value: object) -> StartMethod:
    """Read the option `start_method`. Raises OptionError."""
    return validation.read_start_method(value)


@_as_written()
def read_node_specs(options: dict[str, Any]) -> tuple[NodeSpec, ...]:
    """Read where jobs run. Empty for this machine. Raises OptionError."""
    return read_nodes(_plain(options.get("nodes")), _grace(options.get("grace", 10.0)))


@_as_written()
def read_fetches(options: dict[str, Any]) -> bool:
    """Read whether outputs are fetched from nodes that do not share the sweep's directory. Raises OptionError."""
    return fetches(options.get("outputs", "shared"))


@_as_written()
def read_hooks(options: dict[str, Any]) -> Hooks:
    """Read the commands to run when a job fails and when the sweep is over. Raises OptionError."""
    return Hooks(*(read_hook(name, _plain(options.get(name))) for name in (ON_END, ON_JOB_FAILURE)))


def _max_parallel(value: object) -> int | None:
    if value is None:
        return None
    return read_integer("max_parallel", value, least=1, or_else="null for as many jobs as the devices allow")


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


def _plain(value: object) -> object:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
