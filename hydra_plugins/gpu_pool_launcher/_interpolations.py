"""Resolves options that are interpolations, and explains those that cannot be resolved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.errors import OptionError

MAX_NEIGHBOURS = 12
"""Maximum number of keys that a message lists."""
_MISSING_KEY = re.compile(r"Interpolation key '(.*)' not found", re.DOTALL)
_MISSING_VALUE = re.compile(r"Missing mandatory value: (\S+)")
_SYNONYMS = ("devices", "gpus", "num_gpus", "n_gpus", "num_devices")
"""Common names for the number of GPUs. Lightning's was `gpus` and is now `devices`."""


def resolve(launcher: DictConfig, option: str) -> Any:
    """Return an option's value with interpolations resolved. Raises OptionError if they cannot be resolved."""
    try:
        value = launcher[option]
        if OmegaConf.is_dict(value):
            keys = ", ".join(map(str, value)) or "no keys"
            raise OptionError(option, f"it is a mapping ({keys}), not a value: name one of its keys")
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise OptionError(option, _explain(launcher, option, str(error))) from None


def unresolvable(launcher: DictConfig, besides: Sequence[str] = ()) -> list[str]:
    """The options, except `besides`, that cannot be resolved."""
    return [name for name in map(str, launcher) if name not in besides and not _is_resolvable(launcher, name)]


def _is_resolvable(launcher: DictConfig, option: str) -> bool:
    try:
        resolve(launcher, option)
    except OptionError:
        return False
    return True


def _explain(launcher: DictConfig, option: str, error: str) -> str:
    written = _written(launcher, option)
    if found := _MISSING_KEY.search(error):
        return _explain_missing_key(launcher, option, written, found[1])
    if written == "???":
        return "it has no value (???): set it, or leave it out"
    if found := _MISSING_VALUE.search(error):
        return f"{written} has no value, because {found[1]} is not set (???): set it, as in {found[1]}=1"
    return f"{written} cannot be resolved: {error.splitlines()[0]}"


def _written(launcher: DictConfig, option: str) -> str:
    node = OmegaConf.to_container(launcher, resolve=False)
    assert isinstance(node, dict)
    return str(node[option])


def _explain_missing_key(launcher: DictConfig, option: str, written: str, key: str) -> str:
    names = _absolute(launcher, written, key)
    full = ".".join(names)
    parent, known = launcher._get_root(), 0
    while known < len(names) - 1 and isinstance(inner := _child(parent, names[known]), DictConfig):
        parent, known = inner, known + 1
    neighbours = [str(name) for name in parent if known or name != "hydra"]
    place = ".".join(names[:known]) or "its top level"
    problem = f"the config has no key {full}"
    if key not in written:
        problem += f", which {written} refers to"
    listed = ", ".join(neighbours[:MAX_NEIGHBOURS]) + (", ..." if len(neighbours) > MAX_NEIGHBOURS else "")
    problem += f" ({place} has {listed or 'no keys'})"
    guess = [*names[:known], _similar(names[known], neighbours), *names[known + 1 :]]
    if _exists(launcher._get_root(), guess):
        problem += f". Did you mean ${{{'.'.join(map(str, guess))}}}?"
    else:
        problem += "."
    default = 1 if option == "gpus" else "null"
    return f"{problem} For a key that only some jobs have, write ${{oc.select:{full},{default}}}"


def _absolute(launcher: DictConfig, written: str, key: str) -> list[str]:
    """The parts of the absolute key. OmegaConf's messages omit the leading dots of a relative key."""
    names = _parts(key)
    if relative := re.search(rf"\$\{{(\.+){re.escape(key)}\}}", written):
        base: Any = launcher
        for _ in relative[1][1:]:
            base = base._get_parent() or base
        names = [*_parts(base._get_full_key(names[0])), *names[1:]]
    return names


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", key) if part]


def _child(parent: Any, name: str) -> Any:
    try:
        return parent.get(name)
    except OmegaConfBaseException:
        return None


def _similar(name: str, neighbours: Sequence[str]) -> str | None:
    if name in _SYNONYMS:
        for synonym in _SYNONYMS:
            if synonym in neighbours:
                return synonym
    lowered = {neighbour.lower(): neighbour for neighbour in reversed(neighbours)}
    close = difflib.get_close_matches(name.lower(), lowered, 1, cutoff=0.5)
    return lowered[close[0]] if close else None


def _exists(root: Any, names: Sequence[str | None]) -> bool:
    node = root
    for name in names:
        if name is None or not isinstance(node, DictConfig) or name not in node:
            return False
        node = _child(node, name)
    return True
