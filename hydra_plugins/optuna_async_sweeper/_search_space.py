"""Reads a search space from overrides, and converts sampled values back to a job's overrides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gpu_launcher.errors import SearchSpaceError
from hydra_plugins.gpu_pool_launcher._exceptions import parser_message
from hydra_plugins.gpu_pool_launcher._override_text import holds_sweep, override_text, unquoted
from hydra_plugins.gpu_pool_launcher._zip import bare, check_zips, read_zip

from ._distributions import Searched, on_grid, searched, searched_rows
from ._mistakes import FORMS, instead_of_call, instead_of_words, is_call, nested_searches

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig


@dataclass(frozen=True)
class SearchSpace:
    """The searched parameters and the fixed overrides. Keys are as in overrides: `lr`, `+lr`, `db@source`."""

    entries: tuple[tuple[str, str | Searched], ...] = ()
    """Each key with its fixed override as written, or with its searched parameter, in the user's order."""
    distributions: dict[str, BaseDistribution] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        found = {key: entry.distribution for key, entry in self.entries if isinstance(entry, Searched)}
        object.__setattr__(self, "distributions", found)

    @property
    def fixed(self) -> tuple[str, ...]:
        """The overrides that every job gets, including deletions, as the user wrote them."""
        return tuple(entry for _, entry in self.entries if isinstance(entry, str))

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of the job that runs with these sampled values.

        A parameter that is not in the space comes from a custom search space function and is added at the end.
        The job gets values of the space's types, whatever their types in the storage are. The values of a float range
        with a step are exact: 0.3, where Optuna computes 0.1 + 2 * 0.1.
        Raises SearchSpaceError for a value that is not among the choices, and for a parameter that is also fixed.
        """
        made = []
        for key, entry in self.entries:
            if isinstance(entry, str):
                made.append(entry)
            elif key in params and entry.zipped is not None:
                made += entry.zipped.rows[_index(key, entry, params[key])]
            elif key in params:
                made.append(f"{key}={_text(key, entry, params[key])}")
        fixed = {bare(key): entry for key, entry in self.entries if isinstance(entry, str) and not _deletes(key)}
        for key, value in params.items():
            if key in self.distributions:
                continue
            if bare(key) in fixed:
                raise SearchSpaceError(
                    fixed[bare(key)],
                    "it is fixed here, and the custom search space suggests it, too: leave out one of them",
                )
            made.append(f"{key}={override_text(value)}")
        return made

    @property
    def job_keys(self) -> list[str]:
        """The keys, without prefix, of the overrides that every job gets."""
        keys: list[str] = []
        for key, entry in self.entries:
            zipped = entry.zipped if isinstance(entry, Searched) else None
            keys += map(bare, zipped.keys) if zipped else [] if _deletes(key) else [bare(key)]
        return keys

    def job_values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the overrides of the job with these sampled values, by their keys without prefix."""
        overrides = OverridesParser.create().parse_overrides(self.overrides(params))
        return {bare(one.get_key_element()): unquoted(one.value()) for one in overrides if not one.is_delete()}

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Convert sampled values to those that the job sees: lists and dictionaries instead of their text."""
        entries = dict(self.entries)
        return {key: _value(key, entries.get(key), value) for key, value in params.items()}

    def unzipped(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Like `values`, with the members of zips in place of the zips."""
        found: dict[str, Any] = {}
        for key, value in self.values(params).items():
            entry = dict(self.entries).get(key)
            found |= value if isinstance(entry, Searched) and entry.zipped is not None else {key: value}
        return found

    def encode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Encode values as users write them for Optuna (`study.enqueue_trial`).

        Keys may omit a `+` or `++`. Keys that are not in the space are kept unchanged, for a custom search space.
        Raises SearchSpaceError for a value that is not in the space.
        """
        keys = {bare(key): key for key in self.distributions} | {key: key for key in self.distributions}
        entries = dict(self.entries)
        return {keys.get(key, key): _encoded(key, entries.get(keys.get(key, key)), v) for key, v in params.items()}

    def words(self) -> list[str]:
        """The distributions in words, one line for each."""
        return [f"{key}: {_words(distribution)}" for key, distribution in self.distributions.items()]

    def describe(self) -> dict[str, Any]:
        """The distributions as JSON data, by key."""
        return {key: _describe(distribution) for key, distribution in self.distributions.items()}


def read_search_space(
    arguments: Sequence[str],
    config_loader: ConfigLoader | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    config: DictConfig | None = None,
) -> SearchSpace:
    """Read the search space from `params` (as in `hydra.sweeper.params`) and then the command line's overrides.

    If several overrides have the same key, the last one counts, in the position of the first, as in Hydra's basic
    sweeper. The command line takes precedence over `params`: a key that it fixes is not searched, and a key that it
    searches is not fixed. Globs need the config loader. `config` is the sweep's own, whose keys no
    zip may have as its name. `shuffle` has no effect, because the sampler chooses the order.
    Raises SearchSpaceError.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    entries: dict[str, str | Searched] = {}
    from_params = [_param(str(key), value) for key, value in (params or {}).items()]
    for source in (from_params, arguments):
        for key, entry in _read_source(source, parser).items():
            for other in [other for other, known in entries.items() if _collide(other, known, key, entry)]:
                if other != key:  # with another prefix; the same key keeps its position
                    del entries[other]
            entries[key] = entry
    zips = [entry.zipped for entry in entries.values() if isinstance(entry, Searched) and entry.zipped is not None]
    names = {zipped.name for zipped in zips}
    check_zips(zips, [key for key in entries if key not in names and not _deletes(key)], config)
    return SearchSpace(tuple(entries.items()))


def difference(space: SearchSpace, others: Mapping[str, BaseDistribution], *, custom: bool = False) -> str | None:
    """The differences between the space and that of a study's trials, in words; None if there are none.

    Different bounds are a difference. Optuna would accept trials with other bounds, but they would not be one search.
    With `custom`, parameters that only the study has come from a custom search space function.
    """
    found = []
    for key, distribution in space.distributions.items():
        if key not in others:
            found.append(f"the study does not search {key}")
        elif json.dumps(_describe(distribution)) != json.dumps(_describe(others[key])):  # NaN is equal, True is not 1
            found.append(f"{key} is {_words(distribution)}, in the study {_words(others[key])}")
    if not custom:
        missing = [key for key in others if key not in space.distributions]
        found += [f"the study searches {key} too, {_words(others[key])}" for key in missing]
    return "; ".join(found) or None


def _read_source(source: Sequence[str], parser: OverridesParser) -> dict[str, str | Searched]:
    entries: dict[str, str | Searched] = {}
    texts: dict[str, str] = {}
    for text in source:
        key, entry = _read(text, parser)
        for other, known in entries.items():
            if not _collide(other, known, key, entry):
                continue
            fixing, searching = (text, texts[other]) if isinstance(entry, str) else (texts[other], text)
            both = isinstance(entry, Searched) and isinstance(known, Searched)
            does = "searches" if both else "deletes" if _deletes(key) else "fixes"
            raise SearchSpaceError(searching, f"{fixing} {does} what this searches: leave out one of them")
        entries[key], texts[key] = entry, text
    return entries


def _read(text: str, parser: OverridesParser) -> tuple[str, str | Searched]:
    if (zipped := read_zip(text, parser)) is not None:
        return zipped.name, searched_rows(zipped)
    try:
        (override,) = parser.parse_overrides([text])
    except HydraException as error:
        raise SearchSpaceError(text, f"{parser_message(error)}{_remedy(text)}") from error
    key = override.get_key_element()
    if not bare(key):
        raise SearchSpaceError(text, "there is no key before the =: write key=value")
    if override.is_delete():
        return key, text
    if not override.is_sweep_override():
        if holds_sweep(override.value()):
            raise SearchSpaceError(
                text, "a list or a dictionary cannot contain a sweep: sweep over whole ones, as in choice([1],[2])"
            )
        _check_fixed(text, key, unquoted(override.value()))
        return key, text
    try:
        return key, searched(override, _options(override))
    except (ValueError, HydraException) as error:
        raise SearchSpaceError(text, str(error)) from error


def _check_fixed(text: str, key: str, value: Any) -> None:
    """Refuse a fixed value that looks like a search."""
    if isinstance(value, str) and (instead := instead_of_words(value)):
        raise SearchSpaceError(text, f"{value!r} is text, not a search: write {key}={instead}")
    if isinstance(value, str) and is_call(value):
        raise SearchSpaceError(text, f"{value!r} is quoted, so it is text: write {key}={value.strip()}")
    if found := list(nested_searches(value, key)):
        instead = " ".join(f"{name}={shown}" if " " not in shown else f"'{name}={shown}'" for name, shown in found)
        raise SearchSpaceError(text, f"a {_kind(value)} is a fixed value, not a search: write {instead}")


def _kind(value: Any) -> str:
    return "dictionary" if isinstance(value, Mapping) else "list"


def _remedy(text: str) -> str:
    """The end of a message about an override that Hydra cannot read, with the text to write instead."""
    key, _, value = text.partition("=")
    instead = instead_of_call(value)
    return f": write {key}={instead}" if instead else f". Write key=value; {FORMS}"


def _options(override: Override) -> list[str] | None:
    """The names that a glob matches; None if the override is not a glob or there is no config loader."""
    if not isinstance(override.value(), Glob) or override.config_loader is None:
        return None
    return [str(name) for name in override.sweep_iterator()]


def _param(key: str, value: Any) -> str:
    """Convert an entry of hydra.sweeper.params to an override."""
    name = f"hydra.sweeper.params.{key}"
    if key.lstrip("+~").startswith("hydra.sweeper."):
        option = key.lstrip("+~").removeprefix("hydra.sweeper.")
        raise SearchSpaceError(
            name, f"is an option of the sweeper, not a parameter: write {option}: next to params:, not in it"
        )
    if isinstance(value, str):
        return f"{key}={value.strip()}"
    if not isinstance(value, (Mapping, Sequence)):
        return f"{key}={_fixed_text(name, value)}"
    if found := list(nested_searches(value, key)):
        lines = "; ".join(f"{name}: {shown}" for name, shown in found)
        raise SearchSpaceError(name, f"a {_kind(value)} is a fixed value, not a search: write {lines}")
    return f"{key}={_fixed_text(name, value)}"


def _fixed_text(name: str, value: Any) -> str:
    try:
        return override_text(value)
    except TypeError as error:
        raise SearchSpaceError(name, str(error)) from None


def _deletes(key: str) -> bool:
    return key.startswith("~")


def _collide(before: str, known: str | Searched, key: str, entry: str | Searched) -> bool:
    """Whether a later override makes an earlier one ineffective, and one of them is searched.

    Two fixed overrides do not collide, because Hydra has an order for them. Nor does a deletion before an addition
    (`~db +db=a,b`). If a key is searched twice, the second search replaces the first, as in Hydra's own sweepers.
    """
    if bare(before) != bare(key) or _deletes(before):
        return False
    either = isinstance(known, Searched) or isinstance(entry, Searched)
    return either and not (before == key and isinstance(known, Searched) and isinstance(entry, Searched))


def _text(key: str, entry: Searched, value: Any) -> str:
    if entry.texts is not None:
        return entry.texts[_index(key, entry, value)]
    return override_text(_number(key, entry, value))


def _value(key: str, entry: str | Searched | None, value: Any) -> Any:
    if not isinstance(entry, Searched):
        return value
    return entry.values[_index(key, entry, value)] if entry.texts is not None else _number(key, entry, value)


def _index(key: str, entry: Searched, value: Any) -> int:
    try:
        return int(entry.distribution.to_internal_repr(value))
    except ValueError:
        raise SearchSpaceError(f"{key}={value!r}", f"is not among {_words(entry.distribution)}") from None


def _number(key: str, entry: Searched, value: Any) -> float:
    whole = isinstance(entry.distribution, IntDistribution)
    try:
        number = int(value) if whole else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (whole and number != value):
        raise SearchSpaceError(f"{key}={value!r}", f"is not a {'whole ' if whole else ''}number")
    return on_grid(entry.distribution, number) if isinstance(entry.distribution, FloatDistribution) else number


def _encoded(key: str, entry: str | Searched | None, value: Any) -> Any:
    if not isinstance(entry, Searched):
        return value
    outside = SearchSpaceError(f"{key}={value!r}", f"is not in {_words(entry.distribution)}")
    if entry.texts is None:
        number = _number(key, entry, value)
        if isinstance(value, (bool, str)) or not entry.distribution._contains(number):
            raise outside
        return number
    assert isinstance(entry.distribution, CategoricalDistribution)
    choices = entry.distribution.choices
    try:
        return choices[entry.texts.index(override_text(value))]
    except (ValueError, TypeError):
        pass  # a value whose text is not a choice may still equal one, as 1.0 equals 1
    for choice, known in zip(choices, entry.values, strict=True):
        if known == value or choice == value:
            return choice
    raise outside


def _describe(distribution: BaseDistribution) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"type": "choice", "choices": list(distribution.choices)}
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    bounds = {"low": distribution.low, "high": distribution.high, "log": distribution.log, "step": distribution.step}
    return {"type": "int" if isinstance(distribution, IntDistribution) else "float", **bounds}


def _words(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"choice({', '.join(map(str, distribution.choices))})"
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    kind = "int" if isinstance(distribution, IntDistribution) else "float"
    step = f", step {distribution.step}" if distribution.step not in (None, 1) else ""
    return f"{kind} from {distribution.low} to {distribution.high}{', log' if distribution.log else ''}{step}"
