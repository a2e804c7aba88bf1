"""Samplers and pruners: by name, by class, by `_target_`; which one auto takes; and what a mistake is answered."""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

from gpu_launcher.errors import OptionError
from hydra_plugins.optuna_async_sweeper import _samplers
from hydra_plugins.optuna_async_sweeper._pruners import make_pruner
from hydra_plugins.optuna_async_sweeper._samplers import grid_size, make_sampler
from hydra_plugins.optuna_async_sweeper._search_space import SearchSpace, read_search_space
from hydra_plugins.optuna_async_sweeper.config import SAMPLERS

MIXED = read_search_space(["x=interval(0,1)", "k=a,b,[1]", "n=range(1,4)"])
DISCRETE = read_search_space(["k=a,b,[1]", "n=range(1,7,2)", "r=range(0.1,0.4,0.1)"])

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def made(
    node: Any,
    *,
    choice: str | None = None,
    space: SearchSpace = MIXED,
    directions: tuple[str, ...] = ("minimize",),
    n_trials: int | None = 50,
    seed: int | None = None,
) -> tuple[BaseSampler, str]:
    return make_sampler(node, choice=choice, space=space, directions=directions, n_trials=n_trials, seed=seed)


def sampler(node: Any, **more: Any) -> Any:
    return made(node, **more)[0]


def installed(*packages: str) -> Any:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes packages look as if they were not installed."""

    def hide(*names: str) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(_samplers, "find_spec", lambda name: None if name in names else real(name))

    return hide


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_samplers, "find_spec", lambda name: object())


# auto


@installed("torch", "scipy")
@pytest.mark.parametrize("node", [None, "auto", {"name": "auto", "seed": None}])
def test_auto_takes_the_gp_sampler_where_it_suits(node: Any) -> None:
    found, why = made(node)
    assert type(found) is GPSampler
    assert why == "Sampler: GPSampler, chosen by auto: one objective, 50 trials and 3 parameters suit it"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"directions": ("minimize", "maximize")}, "there are 2 objectives"),
        ({"n_trials": 301}, "there are more than 300 trials"),
        ({"n_trials": None}, "the number of trials is open"),
        ({"space": read_search_space(["k=a,b"])}, "no parameter is a number"),
        ({"space": read_search_space([f"x{n}=interval(0,1)" for n in range(21)])}, "there are more than 20 parameters"),
    ],
)
def test_auto_takes_tpe_elsewhere_and_says_why(everything: None, case: dict[str, Any], reason: str) -> None:
    found, why = made("auto", **case)
    assert type(found) is TPESampler
    assert (found._multivariate, found._constant_liar) == (True, True)
    assert why == f"Sampler: TPESampler, multivariate with constant liar, chosen by auto: {reason}"


def test_auto_takes_tpe_where_torch_is_missing(without: Any) -> None:
    without("torch", "scipy")
    found, why = made("auto")
    assert type(found) is TPESampler
    assert why.endswith("torch and scipy are not installed, which the GP sampler needs")


def test_auto_has_no_options_but_seed() -> None:
    with pytest.raises(OptionError, match=r"hydra\.sweeper\.sampler\.n_ei_candidates: auto has no options but seed"):
        made({"name": "auto", "n_ei_candidates": 3})


# By name


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "auto"])
def test_every_config_of_the_group_makes_a_sampler(name: str, everything: None) -> None:
    node = {"name": name, **dict.fromkeys(SAMPLERS[name].split())}
    if name == "qmc" and importlib.util.find_spec("scipy") is None:
        pytest.skip("needs scipy")
    if name == "gp" and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    found, why = made(OmegaConf.create(node), space=DISCRETE, seed=3)
    expected = {"grid": "bruteforce"}.get(name, name)
    assert type(found).__name__.lower() == f"{expected}sampler"
    assert why.startswith(f"Sampler: {type(found).__name__}")


@pytest.mark.parametrize("name", [name for name in optuna.samplers.__all__ if name.endswith("Sampler")])
def test_every_sampler_of_optuna_can_be_named_by_its_class(name: str) -> None:
    needed = {"CmaEsSampler": (), "QMCSampler": ("scipy",), "GPSampler": ("torch", "scipy")}.get(name, ())
    if any(importlib.util.find_spec(package) is None for package in needed):
        pytest.skip(f"needs {needed}")
    if name.startswith("Base"):
        with pytest.raises(OptionError, match="unknown"):
            made(name)
        return
    if name == "CmaEsSampler" and importlib.util.find_spec("cmaes") is None:
        return
    options = {"base_sampler": "random", "fixed_params": {"n": 1}} if name == "PartialFixedSampler" else {}
    assert type(sampler({"name": name, **options}, space=DISCRETE)).__name__ == name


def test_tpe_is_multivariate_with_constant_liar_unless_the_user_says_otherwise() -> None:
    found = sampler("tpe")
    assert (found._multivariate, found._constant_liar) == (True, True)
    found, why = made({"name": "tpe", "multivariate": False, "constant_liar": False, "n_startup_trials": 3})
    assert (found._multivariate, found._constant_liar, found._n_startup_trials) == (False, False, 3)
    assert why == "Sampler: TPESampler, as hydra.sweeper.sampler says"


def test_tpes_own_experimental_options_do_not_warn_and_others_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("tpe")
        made("auto", n_trials=None)
        with pytest.raises(optuna.exceptions.ExperimentalWarning, match="group"):
            made({"name": "tpe", "group": True})


def test_no_option_that_is_deprecated_is_passed_by_itself() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name in ("tpe", "random", "nsgaii"):
            made({"name": name, **dict.fromkeys(SAMPLERS[name].split())})


def test_a_seed_makes_two_samplers_alike_and_the_nodes_own_goes_first() -> None:
    def first(node: Any, seed: int | None) -> float:
        study = optuna.create_study(sampler=sampler(node, seed=seed))
        return float(study.ask(MIXED.distributions).params["x"])

    assert first("random", 1) == first("random", 1) == first({"name": "random", "seed": 1}, 2) != first("random", 2)


def test_nested_samplers_can_be_named() -> None:
    found = sampler({"name": "partial_fixed", "fixed_params": {"n": 2}, "base_sampler": {"name": "tpe", "seed": 1}})
    assert type(found._base_sampler) is TPESampler
    assert found._base_sampler._multivariate


def test_a_sampler_that_is_there_already_is_taken() -> None:
    given = RandomSampler()
    assert made(given) == (given, "Sampler: RandomSampler, as given")


# Grids


def test_a_grid_has_every_point_of_the_space() -> None:
    study = optuna.create_study(sampler=sampler("grid", space=DISCRETE, seed=1))
    points = set()
    for _ in range(grid_size(DISCRETE)):
        trial = study.ask(DISCRETE.distributions)
        points.add(tuple(DISCRETE.overrides(trial.params)))
    assert len(points) == grid_size(DISCRETE) == 3 * 3 * 3
    assert ("k=[1]", "n=5", "r=0.3") in points


@pytest.mark.parametrize("name", ["grid", "bruteforce"])
def test_a_grid_of_something_continuous_names_it_and_the_remedy(name: str) -> None:
    with pytest.raises(OptionError, match=r"x is continuous.*x=range\(0\.0,1\.0,0\.1\).*x=choice"):
        made(name)


def test_a_grid_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(OptionError, match="a grid of 1000000000 points is too large"):
        made("grid", space=read_search_space(["n=range(0,1000000000)"]))


# By _target_


class Mine(RandomSampler):
    def __init__(self, points: list[int], seed: int | None = None) -> None:
        super().__init__(seed)
        self.points = points


@pytest.mark.parametrize("partial", [{}, {"_partial_": True}, {"_partial_": False, "_convert_": "all"}])
def test_a_target_makes_what_it_says_and_no_more(partial: dict[str, bool]) -> None:
    node = {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4, "multivariate": False, **partial}
    found, why = made(OmegaConf.create(node))
    assert type(found) is TPESampler
    assert (found._n_startup_trials, found._multivariate) == (4, False)
    assert why == "Sampler: TPESampler, by its _target_"


def test_a_target_of_the_users_own_gets_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.samplers._random, "Mine", Mine, raising=False)
    Mine.__module__ = "optuna.samplers._random"
    # over a node of ours, which has its options as null
    node = OmegaConf.create({"name": "tpe", "group": None, "_target_": "optuna.samplers._random.Mine", "points": [1]})
    found = sampler(node)
    assert found.points == [1]
    assert type(found.points) is list
    assert sampler({"_target_": "optuna.samplers._random.Mine", "_args_": [[2]]}).points == [2]


def test_a_target_can_hold_others() -> None:
    node = {
        "_target_": "optuna.samplers.NSGAIISampler",
        "crossover": {"_target_": "optuna.samplers.nsgaii.UniformCrossover", "swapping_prob": 0.25},
        "population_size": 6,
    }
    found = sampler(node)
    assert found._population_size == 6
    partial_fixed = {"_target_": "optuna.samplers.PartialFixedSampler", "fixed_params": {"n": 1}}
    base = {"base_sampler": {"_target_": "optuna.samplers.RandomSampler", "seed": 1}}
    assert type(sampler({**partial_fixed, **base})._base_sampler) is RandomSampler


def test_a_grid_by_target_gets_its_points_from_the_space() -> None:
    for node in ({"_target_": "optuna.samplers.GridSampler", "_partial_": True}, functools.partial(GridSampler)):
        assert type(sampler(node, space=DISCRETE)) is GridSampler
    own = {"_target_": "optuna.samplers.GridSampler", "search_space": {"n": [1, 3]}}
    assert sampler(own)._search_space == {"n": [1, 3]}


# The official plugin's configs


@pytest.fixture
def official() -> Iterator[None]:
    """Configs as hydra-optuna-sweeper stores them, of 1.3 (tpe) and 1.4."""
    state = Singleton.get_state()
    ConfigStore.instance().repo = {}
    nodes = {
        "tpe": {**TPE, "consider_prior": True, "prior_weight": 1.0},
        "grid": {"_target_": "optuna.samplers.GridSampler", "_partial_": True, "seed": None},
        "nsgaii": NSGAII,
        "motpe": {"_target_": "hydra_plugins.hydra_optuna_sweeper.config.raise_motpe_removed"},
    }
    for name, node in nodes.items():
        ConfigStore.instance().store(group="hydra/sweeper/sampler", name=name, node=node, provider="optuna_sweeper")
    yield
    Singleton.set_state(state)


TPE = {"_target_": "optuna.samplers.TPESampler", "seed": None, "n_startup_trials": 10, "multivariate": False}
OLD = {"consider_prior": True, "prior_weight": 1.0}
CREATE = "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaii_sampler"
NSGAII = {"_target_": CREATE, "seed": None, "population_size": 50, "crossover": None, "crossover_prob": 0.9}


def test_an_official_config_is_its_name_with_what_the_user_changed(official: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sampler(OmegaConf.create({**TPE, **OLD, "n_startup_trials": 4}), choice="tpe")
    assert type(found) is TPESampler
    assert (found._n_startup_trials, found._multivariate, found._constant_liar) == (4, True, True)
    found = sampler({**NSGAII, "population_size": 7}, choice="nsgaii")
    assert type(found) is NSGAIISampler
    assert found._population_size == 7
    grid = {"_target_": "optuna.samplers.GridSampler", "_partial_": True, "seed": None}
    assert type(sampler(grid, choice="grid", space=DISCRETE)) is BruteForceSampler


def test_an_official_default_that_the_command_line_gives_is_the_users(official: None) -> None:
    node = {**TPE, **OLD}
    more: dict[str, Any] = {"space": MIXED, "directions": ["minimize"], "n_trials": 9}
    found: Any
    found, _ = make_sampler(node, choice="tpe", overrides=["hydra.sweeper.sampler.multivariate=false"], **more)
    assert (found._multivariate, found._constant_liar) == (False, True)


def test_the_official_motpe_is_answered_with_what_took_its_place(official: None) -> None:
    with pytest.raises(OptionError, match="'motpe' is unknown: did you mean tpe"):
        made({"_target_": "hydra_plugins.hydra_optuna_sweeper.config.raise_motpe_removed"}, choice="motpe")


def test_another_target_over_an_official_config_is_that_target(official: None) -> None:
    assert type(sampler({"_target_": "optuna.samplers.RandomSampler", "seed": 1}, choice="tpe")) is RandomSampler


# Mistakes


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("tpee", "hydra.sweeper.sampler: 'tpee' is unknown: did you mean tpe? Known are auto, tpe, gp, random"),
        ("Nope", "hydra.sweeper.sampler: 'Nope' is unknown"),
        (
            {"name": "tpe", "n_startup": 3},
            "hydra.sweeper.sampler.n_startup: TPESampler has no such option: did you mean",
        ),
        ({"name": "random", "x": 3}, "hydra.sweeper.sampler.x: RandomSampler has no such option: it has seed"),
        ({"name": "tpe", "group": True, "multivariate": False}, "TPESampler does not take its options"),
        ({"name": "partial_fixed"}, "hydra.sweeper.sampler.fixed_params: PartialFixedSampler needs it"),
        ({"n_startup_trials": 3}, "the name is missing"),
        (7, "7 is not a sampler"),
        ({"_target_": "optuna.samplers.Nope"}, "optuna.samplers.Nope cannot be made"),
        ({"_target_": "optuna.samplers.TPESampler", "nope": 1}, "hydra.sweeper.sampler.nope: TPESampler has no such"),
        ({"_target_": "optuna.pruners.MedianPruner"}, "a MedianPruner is not a BaseSampler"),
        ({"_target_": "fractions.Fraction", "_args_": ["a"]}, "fractions.Fraction cannot be made"),
    ],
)
def test_a_mistake_gets_one_line_that_names_the_option(node: Any, message: str) -> None:
    with pytest.raises(OptionError) as error:
        made(node)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("cmaes", "cmaes"), ("gp", "torch"), ("qmc", "scipy")])
def test_a_missing_package_is_named_with_how_to_get_it(without: Any, name: str, package: str) -> None:
    without("torch", "scipy", "cmaes")
    with pytest.raises(OptionError, match=f"needs {package}.*: pip install {package}"):
        made(name)


# Pruners


@pytest.mark.parametrize(
    ("node", "cls"),
    [
        (None, "NopPruner"),
        ("none", "NopPruner"),
        ("median", "MedianPruner"),
        ("hyperband", "HyperbandPruner"),
        ("asha", "SuccessiveHalvingPruner"),
        ("successive_halving", "SuccessiveHalvingPruner"),
        ({"name": "percentile", "percentile": 25.0}, "PercentilePruner"),
        ({"name": "threshold", "upper": 3.0}, "ThresholdPruner"),
        ("MedianPruner", "MedianPruner"),
        ({"_target_": "optuna.pruners.HyperbandPruner", "min_resource": 2}, "HyperbandPruner"),
        (optuna.pruners.MedianPruner(), "MedianPruner"),
    ],
)
def test_pruners_can_be_named(node: Any, cls: str) -> None:
    assert type(make_pruner(OmegaConf.create(node) if isinstance(node, dict) else node)).__name__ == cls


@installed("scipy")
def test_the_wilcoxon_pruner_can_be_named() -> None:
    assert type(make_pruner("wilcoxon")).__name__ == "WilcoxonPruner"


@pytest.mark.parametrize(
    ("node", "wrapped"),
    [
        ({"name": "patient", "patience": 3}, "NoneType"),
        ({"name": "patient", "patience": 3, "wrapped": None}, "NoneType"),
        ({"name": "patient", "patience": 3, "wrapped": "median"}, "MedianPruner"),
        ({"name": "patient", "patience": 3, "wrapped": {"name": "asha", "min_resource": 2}}, "SuccessiveHalvingPruner"),
        (
            {
                "_target_": "optuna.pruners.PatientPruner",
                "patience": 3,
                "wrapped_pruner": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 1},
            },
            "MedianPruner",
        ),
    ],
)
def test_patience_wraps_another_pruner(node: dict[str, Any], wrapped: str) -> None:
    found: Any = make_pruner(OmegaConf.create(node))
    assert type(found._wrapped_pruner).__name__ == wrapped
    assert found._patience == 3


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("medain", "hydra.sweeper.pruner: 'medain' is unknown: did you mean median? Known are none"),
        ("patient", "hydra.sweeper.pruner.patience: PatientPruner needs it"),
        ({"name": "median", "n": 1}, "hydra.sweeper.pruner.n: MedianPruner has no such option: it has"),
        ("threshold", "ThresholdPruner does not take its options"),
        ({"name": "asha", "min_resource": 0}, "SuccessiveHalvingPruner does not take its options"),
        ({"patience": 1}, "the name is missing"),
        (True, "a bool is not a BasePruner"),
    ],
)
def test_a_pruner_that_cannot_be_made_gets_one_line(node: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        make_pruner(node)
