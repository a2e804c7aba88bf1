"""Composes some trial configs before the first trial, to find overrides that do not fit or have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gpu_launcher.errors import CompositionError, SearchSpaceError
from hydra_plugins.gpu_pool_launcher._exceptions import whole_message
from hydra_plugins.gpu_pool_launcher._zip import bare

from ._mistakes import instead_of_list, instead_of_text
from ._search_space import SearchSpace

MAX_COMPOSED = 24
"""Maximum number of composed configs, which take 50 to 100 ms each. Further options of a group are not tried."""
MAX_ASSIGNED = 200
"""Maximum number of values of one parameter that are tried in a composed config."""

_UNKNOWN = object()


def check_composition(loader: ConfigLoader, config: DictConfig, space: SearchSpace) -> list[dict[str, Any]]:
    """Compose trial configs in advance: each option of a searched group once, and both ends of each numeric range.

    Returns the points that were composed. Raises CompositionError and SearchSpaceError. `config` is the sweep's own.
    """
    entries = {key: entry for key, entry in space.entries if not isinstance(entry, str)}
    points = [{key: _value(entry.distribution, turn) for key, entry in entries.items()} for turn in (0, 1)]
    composed = [_compose(loader, config, space, point) for point in points]
    groups = _groups(composed[0])
    options = [_choices(entry.distribution) for key, entry in entries.items() if entry.zipped or bare(key) in groups]
    for turn in range(2, min(max(options, default=0), MAX_COMPOSED)):
        points.append({key: _value(entry.distribution, turn) for key, entry in entries.items()})
        composed.append(_compose(loader, config, space, points[-1]))
    values = [key for key in entries if bare(key) not in groups]
    for key in values:
        first, second = (space.overrides({key: point[key]}) for point in points[:2])
        before = _node(composed[0], key)
        if first != second and before is not _UNKNOWN and before == _node(composed[1], key):
            raise SearchSpaceError(
                _override(space, key, points[0]),
                "it has no effect, because another override sets the same key: remove one of them",
            )
        if entries[key].zipped is None:
            _assign_all(composed[0], key, entries[key].values)
            continue
        for member in map(bare, entries[key].values[0]):
            if member not in groups:
                _assign_all(composed[0], member, tuple(row[member] for row in entries[key].values))
    _check_fixed(loader, config, space, composed[0], points[0])
    return points


def _compose(loader: ConfigLoader, config: DictConfig, space: SearchSpace, point: Mapping[str, Any]) -> DictConfig:
    overrides = space.overrides(point)
    try:
        return loader.load_sweep_config(config, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        said = whole_message(error)
        whole = any(isinstance(found, FloatDistribution) for found in space.distributions.values())
        hint = "\nFor integers, write int(interval(1, 9)) or range(1, 9)" if whole and "to Integer" in said else ""
        raise CompositionError(
            f"cannot compose the trials' configs, for example with {' '.join(overrides)}:\n{said}{hint}"
        ) from error


def _assign_all(composed: DictConfig, key: str, values: tuple[Any, ...]) -> None:
    """Assign each choice in the composed config, which checks types that the config declares."""
    with open_dict(composed):
        for value in values[:MAX_ASSIGNED]:
            try:
                OmegaConf.update(composed, bare(key), value, force_add=True)
            except OmegaConfBaseException as error:
                raise CompositionError(f"cannot compose {key}={value}:\n{whole_message(error)}") from error


def _check_fixed(
    loader: ConfigLoader, config: DictConfig, space: SearchSpace, composed: DictConfig, point: Mapping[str, Any]
) -> None:
    """Refuse a fixed list, dictionary or text that replaces a single value: the user probably meant a search."""
    suspect = dict(_suspects(space, composed))
    if not suspect:
        return
    entries = tuple((key, entry) for key, entry in space.entries if key not in suspect)
    try:
        without = _compose(
            loader, config, SearchSpace(entries), {key: point[key] for key in point if key not in suspect}
        )
    except CompositionError:
        return  # the config does not compose without them
    for key, text in suspect.items():
        before, now = _node(without, key), _node(composed, key)
        if isinstance(now, list) and isinstance(before, (str, int, float)):
            raise SearchSpaceError(
                text,
                f"a list is a fixed value, but the config has {before!r} there: write {key}: {instead_of_list(now)}",
            )
        if isinstance(now, dict) and isinstance(before, (str, int, float)):
            raise SearchSpaceError(
                text, f"a dictionary is a fixed value, but the config has {before!r} there: write {key}: choice(...)"
            )
        if isinstance(now, str) and isinstance(before, (int, float)) and (instead := instead_of_text(now)):
            raise SearchSpaceError(
                text, f"text is a fixed value, but the config has {before!r} there: write {key}: {instead}"
            )


def _suspects(space: SearchSpace, composed: DictConfig) -> Iterator[tuple[str, str]]:
    groups = _groups(composed)
    for key, entry in space.entries:
        if key.startswith(("+", "~")) or key in groups:
            continue
        if isinstance(entry, str):
            now = _node(composed, key)
            if isinstance(now, (list, dict)) or (isinstance(now, str) and instead_of_text(now)):
                yield key, entry
        elif len(entry.values) == 1 and isinstance(entry.values[0], list) and entry.texts:
            yield key, f"{key}=choice({entry.texts[0]})"


def _groups(composed: DictConfig) -> set[str]:
    return {str(group) for group in composed.hydra.runtime.choices}


def _node(composed: DictConfig, key: str) -> Any:
    """The value of a key, with interpolations as written; _UNKNOWN if it cannot be found."""
    parent, _, name = bare(key).rpartition(".")
    try:
        node = OmegaConf.select(composed, parent) if parent else composed
        found = node._get_node(name) if isinstance(node, DictConfig) else None
    except OmegaConfBaseException:
        return _UNKNOWN  # a part of the path is an interpolation, or missing
    if isinstance(found, (DictConfig, ListConfig)):
        return OmegaConf.to_container(found, resolve=False)
    return found._value() if isinstance(found, Node) else _UNKNOWN


def _override(space: SearchSpace, key: str, point: Mapping[str, Any]) -> str:
    (text,) = (text for text in space.overrides(point) if text.startswith(f"{key}="))
    return text


def _value(distribution: BaseDistribution, turn: int) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[turn % len(distribution.choices)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return distribution.high if turn % 2 else distribution.low


def _choices(distribution: BaseDistribution) -> int:
    return len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 0
