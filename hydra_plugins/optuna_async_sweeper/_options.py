"""Reads and checks `hydra.sweeper`. Every mistake gets one message that names the option and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from gpu_launcher.durations import read_duration
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.manifest import DIRECTIONS
from gpu_launcher.studies.stopping import Bounds
from gpu_launcher.validation import integer
from hydra_plugins.gpu_pool_launcher._filter import Filter, read_filter

from ._classes import plain


@dataclass(frozen=True)
class SweeperOptions:
    """The sweeper's options, except those that become Optuna objects."""

    directions: tuple[str, ...]
    bounds: Bounds
    n_jobs: int | None
    params: Mapping[str, Any]
    enqueue: Sequence[Mapping[str, Any]]
    retry_stale: int
    kill_pruned: bool
    plots: bool
    seed: int | None
    filter: Filter | None


def read_options(options: Mapping[str, Any]) -> SweeperOptions:
    """Check `hydra.sweeper`. Raises OptionError."""
    directions = _directions(options.get("direction", "minimize"))
    patience = _count("patience", options.get("patience"), least=1)
    if patience is not None and len(directions) > 1:
        raise OptionError("hydra.sweeper.patience", "needs a single objective: there is no one best value")
    if len(directions) > 1 and plain(options.get("pruner")) not in (None, "none", "nop"):
        raise OptionError("hydra.sweeper.pruner", "needs a single objective: Optuna prunes by one value")
    total = _count("total_trials", options.get("total_trials"), least=1)
    # A given total_trials takes precedence over the default of n_trials.
    n_trials = None if total is not None else _count("n_trials", options.get("n_trials"), least=1)
    timeout = options.get("timeout")
    return SweeperOptions(
        directions=directions,
        bounds=Bounds(
            n_trials=n_trials,
            total_trials=total,
            timeout=None if timeout is None else read_duration(timeout, "hydra.sweeper.timeout"),
            patience=patience,
            max_failure_rate=_rate(options.get("max_failure_rate")),
        ),
        n_jobs=_count("n_jobs", options.get("n_jobs"), least=1),
        params=_params(options.get("params")),
        enqueue=_enqueue(options.get("enqueue")),
        retry_stale=_count("retry_stale", options.get("retry_stale", 1), least=0) or 0,
        kill_pruned=bool(options.get("kill_pruned", False)),
        plots=bool(options.get("plots", False)),
        seed=_count("seed", options.get("seed"), least=0),
        filter=None if options.get("filter") is None else read_filter(str(options["filter"])),
    )


def _directions(value: object) -> tuple[str, ...]:
    value = plain(value)
    named: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    words = [str(one.name if isinstance(one, Enum) else one) for one in named]
    wrong = [word for word in words if word not in DIRECTIONS]
    if wrong or not words:
        shown = repr(wrong[0]) if wrong else "[]"
        raise OptionError("hydra.sweeper.direction", f"must be minimize, maximize, or a list of these, got {shown}")
    return tuple(words)


def _count(name: str, value: object, *, least: int) -> int | None:
    if value is None:
        return None
    return integer(f"hydra.sweeper.{name}", value, least=least, or_else="null")


def _rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise OptionError("hydra.sweeper.max_failure_rate", f"must be a number from 0 to 1, or null, got {value!r}")
    return float(value)


def _params(value: object) -> Mapping[str, Any]:
    params = plain(value)
    if params is None:
        return {}
    if not isinstance(params, dict):
        raise OptionError("hydra.sweeper.params", f"{params!r} is not a mapping: write lr: interval(0, 1)")
    return {str(key): one for key, one in params.items()}


def _enqueue(value: object) -> Sequence[Mapping[str, Any]]:
    name = "hydra.sweeper.enqueue"
    points = plain(value)
    if isinstance(points, str):
        file = Path(points)
        try:
            points = OmegaConf.to_container(OmegaConf.load(file))
        except OSError as error:
            raise OptionError(name, f"{file.absolute()} cannot be read: {error.strerror or error}") from error
        except (YAMLError, UnicodeDecodeError) as error:
            raise OptionError(name, f"{file.absolute()} is not YAML: {error}") from error
    if points is None:
        return []
    points = [points] if isinstance(points, dict) else points
    if not isinstance(points, list) or not all(isinstance(point, dict) and point for point in points):
        raise OptionError(name, "give a list of mappings such as [{lr: 0.1}], or a YAML file with one")
    return [{str(key): one for key, one in point.items()} for point in points]
