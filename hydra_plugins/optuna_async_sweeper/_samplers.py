"""Creates one of Optuna's samplers from `hydra.sweeper.sampler`, and explains the choice."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import optuna
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, BruteForceSampler

from gpu_launcher.errors import OptionError

from ._classes import Family, own_options, plain
from ._joining import derived_seed

if TYPE_CHECKING:
    from ._search_space import SearchSpace

OPTION = "hydra.sweeper.sampler"
_NAMES = {
    "auto": "auto",
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "random": "RandomSampler",
    "cmaes": "CmaEsSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "qmc": "QMCSampler",
    # Optuna's GridSampler does not see that queued points were tried, and never retries interrupted ones.
    "grid": "BruteForceSampler",
    "bruteforce": "BruteForceSampler",
    "partial_fixed": "PartialFixedSampler",
}
_SAMPLERS: Family[BaseSampler] = Family(
    OPTION, BaseSampler, optuna.samplers, _NAMES, ("independent_sampler", "base_sampler")
)
_PACKAGES = {"CmaEsSampler": ("cmaes",), "GPSampler": ("torch", "scipy"), "QMCSampler": ("scipy",)}
_TPE = {"multivariate": True, "constant_liar": True}
_OFFICIAL = "optuna_sweeper"
"""The provider name under which hydra-optuna-sweeper stores its configs."""

GP_TRIALS = 300
"""Maximum number of trials for which `auto` chooses the GP sampler.

At each ask, that sampler fits to all finished trials. On one core, this takes 2 s with 300 trials and 3 s with 500
(measured with Optuna 5.0 and 7 parameters). That is more than a short job takes, and by then TPE has caught up."""
GP_PARAMETERS = 20
"""Maximum number of parameters for which `auto` chooses the GP sampler.

With more, distances between points say little, and Gaussian processes are known not to beat TPE."""
MAX_GRID_POINTS = 1_000_000

_OF_THE_STUDY = (optuna.samplers.QMCSampler, optuna.samplers.GridSampler)
"""Samplers whose sequence or grid belongs to the study, and is shuffled by the seed.

The study knows which points are taken. A different seed would give another sequence, which may contain the same points.
"""


@dataclass(frozen=True)
class _Seeds:
    given: int | None
    """`hydra.sweeper.seed`."""
    sweeps_before: int
    """Number of earlier sweeps of the study."""

    def derived(self, seed: Any) -> Any:
        """The seed for this sweep; see `derived_seed`. The sampler itself refuses a seed that is not an integer."""
        return derived_seed(seed, self.sweeps_before) if isinstance(seed, int) else seed


def takes_turns(sampler: BaseSampler) -> bool:
    """Whether sweeps on one study must sample one at a time, because they could otherwise take the same point."""
    return isinstance(sampler, (*_OF_THE_STUDY, BruteForceSampler))


def make_sampler(
    node: object,
    *,
    choice: str | None,
    space: SearchSpace,
    directions: Sequence[str],
    n_trials: int | None,
    seed: int | None = None,
    sweeps_before: int = 0,
    overrides: Sequence[str] = (),
) -> tuple[BaseSampler, str]:
    """Create the sampler; return it with one sentence for the log that names it and explains the choice.

    `node` is a name (`tpe`, `TPESampler`), None for `auto`, a mapping with `name` or `_target_` and options, or a
    sampler. `choice` is the name chosen in the config group hydra/sweeper/sampler. A node of the official plugin is
    read as that name, with the options that differ from the official defaults or are given on the command line
    (`overrides`, from hydra.overrides.hydra). `n_trials` is None if the number of trials is open.

    `seed` goes to samplers that accept one, unless the node has its own. A later sweep of a study (`sweeps_before`)
    gets another seed derived from it; otherwise it would repeat the points of the first sweep. Raises OptionError.
    """
    seeds = _Seeds(seed, sweeps_before)
    node = plain(node)
    if isinstance(node, functools.partial):  # Hydra 1.3 creates one for `_partial_: true`
        node = {"_target_": f"{node.func.__module__}.{getattr(node.func, '__name__', '')}", **node.keywords}
    if isinstance(node, BaseSampler):
        if sweeps_before:
            node.reseed_rng()  # a new seed, because its own cannot be read
        return node, f"Sampler: {type(node).__name__}, as given"
    name, options = _read(node, choice, overrides)
    if name is None:
        assert isinstance(node, Mapping)
        cls = _SAMPLERS.class_of(str(node["_target_"]))
        sampler = _made(cls, options, space, seeds) if cls and "_args_" not in node else _from_target(node, seeds)
        return sampler, f"Sampler: {type(sampler).__name__}, by its _target_"
    if name == "auto":
        return _auto(options, space, directions, n_trials, seeds)
    cls = _SAMPLERS.find(name)
    if cls is optuna.samplers.TPESampler:
        options = {**_TPE, **{option: value for option, value in options.items() if value is not None}}
    sampler = _made(cls, options, space, seeds)
    return sampler, f"Sampler: {cls.__name__}{_kind(cls, options)}, as {OPTION} says"


def grid_size(space: SearchSpace) -> int:
    """The number of combinations in a search space. Raises OptionError if it is infinite."""
    return math.prod(_size(key, distribution) for key, distribution in space.distributions.items())


def _read(node: object, choice: str | None, overrides: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Read the name and the options from a node. The name is None for a `_target_`."""
    if node is None:
        return "auto", {}
    if isinstance(node, str):
        return node, {}
    if not isinstance(node, Mapping):
        raise OptionError(
            OPTION, f"{node!r} is not a sampler: give a name such as tpe, or a mapping with name or _target_"
        )
    official = _official(choice)
    target = node.get("_target_")
    if official is not None and target == official["_target_"]:
        assert choice is not None
        given = {override.lstrip("+").partition("=")[0] for override in overrides}
        return choice, {
            key: value
            for key, value in own_options(node).items()
            if key not in official or value != official[key] or f"{OPTION}.{key}" in given
        }
    if target is not None:
        return None, own_options(node)
    if not isinstance(node.get("name"), str):
        raise OptionError(OPTION, "the name is missing: give one, such as {name: tpe, n_startup_trials: 5}")
    return node["name"], own_options(node)


def _official(choice: str | None) -> dict[str, Any] | None:
    """The official plugin's config with this name, if there is one."""
    if choice is None:
        return None
    store = ConfigStore.instance()
    try:
        if f"{choice}.yaml" not in store.list("hydra/sweeper/sampler"):
            return None
    except OSError:  # the group does not exist
        return None
    stored = store.load(f"hydra/sweeper/sampler/{choice}.yaml")
    return OmegaConf.to_container(stored.node) if stored.provider == _OFFICIAL else None  # type: ignore[return-value]


def _auto(
    options: Mapping[str, Any], space: SearchSpace, directions: Sequence[str], n_trials: int | None, seeds: _Seeds
) -> tuple[BaseSampler, str]:
    for option, value in options.items():
        if option != "seed" and value is not None:
            raise OptionError(f"{OPTION}.{option}", "auto has no options but seed: name a sampler, such as name=tpe")
    own = {"seed": options.get("seed")}
    numeric = sum(not isinstance(found, CategoricalDistribution) for found in space.distributions.values())
    missing = [package for package in _PACKAGES["GPSampler"] if find_spec(package) is None]
    against = (
        f"there are {len(directions)} objectives"
        if len(directions) > 1
        else "the number of trials is open"
        if n_trials is None
        else f"there are more than {GP_TRIALS} trials"
        if n_trials > GP_TRIALS
        else "no parameter is a number"
        if numeric == 0
        else f"there are more than {GP_PARAMETERS} parameters"
        if len(space.distributions) > GP_PARAMETERS
        else f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, which the GP sampler needs"
        if missing
        else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the user did not choose an experimental feature
        if against is None:
            why = f"one objective, {n_trials} trials and {len(space.distributions)} parameters suit it"
            return _made(optuna.samplers.GPSampler, own, space, seeds), f"Sampler: GPSampler, chosen by auto: {why}"
        tpe = optuna.samplers.TPESampler
        return _made(
            tpe, {**_TPE, **own}, space, seeds
        ), f"Sampler: TPESampler{_kind(tpe, _TPE)}, chosen by auto: {against}"


def _made(cls: type[BaseSampler], options: Mapping[str, Any], space: SearchSpace, seeds: _Seeds) -> BaseSampler:
    missing = [package for package in _PACKAGES.get(cls.__name__, ()) if find_spec(package) is None]
    if missing:
        raise OptionError(OPTION, f"{cls.__name__} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    options = _seeded(cls, options, seeds)
    if cls is optuna.samplers.GridSampler and options.get("search_space") is None:
        options["search_space"] = _grid(space)
    if cls is optuna.samplers.BruteForceSampler and (size := grid_size(space)) > MAX_GRID_POINTS:
        raise OptionError(OPTION, f"a grid of {size} points is too large: make ranges coarser, or use random")
    if options.get("reference_points") is not None:
        import numpy

        options["reference_points"] = numpy.asarray(options["reference_points"], dtype=float)

    def nested(node: object) -> BaseSampler:
        return make_sampler(
            node,
            choice=None,
            space=space,
            directions=("minimize",),
            n_trials=None,
            seed=seeds.given,
            sweeps_before=seeds.sweeps_before,
        )[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument ``(multivariate|constant_liar)``", ExperimentalWarning)
        warnings.filterwarnings("ignore", "BruteForceSampler", ExperimentalWarning)  # it implements `grid`
        return _SAMPLERS.build(cls, options, nested)


def _seeded(cls: type[BaseSampler], options: Mapping[str, Any], seeds: _Seeds) -> dict[str, Any]:
    given = {option: value for option, value in options.items() if value is not None}
    if "seed" not in inspect.signature(cls).parameters:
        return given
    seed = given.get("seed", seeds.given)
    if cls in _OF_THE_STUDY:
        if cls is optuna.samplers.QMCSampler and seeds.sweeps_before:
            given.setdefault("independent_sampler", {"name": "random", "seed": seed})
        return {**given, "seed": seed}
    return {**given, "seed": seeds.derived(seed)}


def _from_target(node: Mapping[str, Any], seeds: _Seeds) -> BaseSampler:
    if "seed" in node:
        node = {**node, "seed": seeds.derived(node["seed"])}

    def nested(node: object) -> BaseSampler:
        raise AssertionError("only Optuna's own classes have options that are read as samplers")

    return _SAMPLERS.from_target(node, nested)


def _kind(cls: type[BaseSampler], options: Mapping[str, Any]) -> str:
    if cls is not optuna.samplers.TPESampler:
        return ""
    named = {"multivariate": "multivariate", "constant_liar": "with constant liar"}
    said = [word for option, word in named.items() if options.get(option)]
    return ", " + " ".join(said) if said else ""


def _grid(space: SearchSpace) -> dict[str, list[Any]]:
    if (size := grid_size(space)) > MAX_GRID_POINTS:
        raise OptionError(OPTION, f"a grid of {size} points is too large: make ranges coarser, or use random")
    return {key: _points(distribution) for key, distribution in space.distributions.items()}


def _size(key: str, distribution: BaseDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if distribution.step is None:
        raise OptionError(
            OPTION,
            f"{key} is continuous, and this sampler needs an end: give it steps, as in {key}=range({distribution.low},"
            f"{distribution.high},{(distribution.high - distribution.low) / 10:.3g}), or values: {key}=choice(...)",
        )
    low, high, step = (Decimal(str(bound)) for bound in (distribution.low, distribution.high, distribution.step))
    return int((high - low) / step) + 1


def _points(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    assert isinstance(distribution, FloatDistribution)
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    return [float(low + i * step) for i in range(_size("", distribution))]
