"""The combinations of a grid: its dimensions, zipped or not, without those that `hydra.sweeper.filter` leaves out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException

from gpu_launcher.errors import OptionError
from hydra_plugins.gpu_pool_launcher._filter import OPTION, Filter
from hydra_plugins.gpu_pool_launcher._override_text import unquoted
from hydra_plugins.gpu_pool_launcher._zip import Zip, bare, check_zips, read_zip, texts_and_values

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Dimension:
    """One dimension of a grid. An override that is not a sweep is a dimension with one point."""

    keys: tuple[str, ...]
    """The keys that each point sets, without prefix: one, or the members of a zip."""
    texts: tuple[tuple[str, ...], ...]
    """The overrides of each point."""
    values: tuple[tuple[Any, ...], ...]
    """The values of each point, in the order of the keys."""


def read_dimensions(
    arguments: Sequence[str], parser: OverridesParser, config: DictConfig | None = None
) -> list[Dimension]:
    """Read the dimensions of a grid from overrides.

    If several overrides have the same key, the last one counts, in the position of the first, as in Hydra's basic
    sweeper. `config` is the sweep's own, whose keys no zip may have as its name. Raises SearchSpaceError, and
    HydraException for an override that is not valid or has infinitely many values.
    """
    found: dict[str, Zip | Override] = {}
    read = [(text, read_zip(text, parser)) for text in arguments]
    overrides = iter(parser.parse_overrides([text for text, zipped in read if zipped is None]))
    for _, zipped in read:
        if zipped is not None:
            found[f"zip {zipped.name}"] = zipped
        else:
            override = next(overrides)
            found[override.get_key_element()] = override
    zips = [one for one in found.values() if isinstance(one, Zip)]
    check_zips(zips, [key for key, one in found.items() if isinstance(one, Override)], config)
    return [_of_zip(one) if isinstance(one, Zip) else _of_override(one) for one in found.values()]


def combinations(dimensions: Sequence[Dimension], chosen: Filter | None) -> Iterator[list[str]]:
    """The overrides of each job, in the order of Hydra's basic sweeper: the last dimension varies fastest.

    Combinations that the filter leaves out are not among them. Raises OptionError if the filter does not fit.
    """
    if chosen is None:
        for point in itertools.product(*(dimension.texts for dimension in dimensions)):
            yield list(itertools.chain.from_iterable(point))
        return
    where = {key: (at, i) for at, dimension in enumerate(dimensions) for i, key in enumerate(dimension.keys)}
    chosen.check_names(list(where))
    used = {name: where[name] for name in chosen.names}
    for indices in itertools.product(*(range(len(dimension.texts)) for dimension in dimensions)):
        if chosen.keeps({name: dimensions[at].values[indices[at]][i] for name, (at, i) in used.items()}):
            texts = (dimension.texts[index] for dimension, index in zip(dimensions, indices, strict=True))
            yield list(itertools.chain.from_iterable(texts))


def size(dimensions: Sequence[Dimension]) -> int:
    """The number of combinations before any is left out."""
    return math.prod(len(dimension.texts) for dimension in dimensions)


def read_jobs(dimensions: Sequence[Dimension], chosen: Filter | None) -> list[list[str]]:
    """The overrides of all jobs. Raises OptionError if the filter leaves out every combination."""
    jobs = list(combinations(dimensions, chosen))
    if chosen is not None and not jobs:
        raise OptionError(OPTION, f"{chosen.text}: leaves out all {size(dimensions)} combinations: nothing would run")
    return jobs


def _of_zip(found: Zip) -> Dimension:
    return Dimension(tuple(map(bare, found.keys)), found.rows, found.values)


def _of_override(override: Override) -> Dimension:
    key = override.get_key_element()
    if override.is_interval_sweep():
        raise CompactHydraException(
            f"{override.input_line}: hydra/sweeper=grid_async runs every value, and an interval has "
            "infinitely many: use hydra/sweeper=optuna_async to search it, or give values, as in "
            f"{key}=0.1,0.2 or {key}=range(0.1,1.0,0.1)"
        )
    if override.is_sweep_override():
        points = texts_and_values(override)
    else:
        points = [(str(override.get_value_element_as_str()), unquoted(override.value()))]
    names = () if override.is_delete() else (bare(key),)
    values = tuple((value,) if names else () for _, value in points)
    return Dimension(names, tuple((f"{key}={text}",) for text, _ in points), values)
