"""What cannot be meant as a search is refused before the first trial, with the line to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.types import RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import MISSING
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gpu_launcher.errors import CompositionError, SearchSpaceError
from hydra_plugins.optuna_async_sweeper._composition import check_composition
from hydra_plugins.optuna_async_sweeper._search_space import read_search_space

WRITE = [
    (
        {"optimizer.lr": {"type": "float", "low": 1e-4, "high": 0.1, "log": True}},
        "optimizer.lr: tag(log, interval(0.0001, 0.1))",
    ),
    ({"x": {"type": "int", "low": 1, "high": 9}}, "x: int(interval(1, 9))"),
    ({"x": {"type": "int", "low": 16, "high": 512, "log": True}}, "x: tag(log, int(interval(16, 512)))"),
    ({"x": {"type": "int", "low": 0, "high": 8, "step": 2}}, "x: range(0, 10, 2)"),
    ({"x": {"type": "float", "low": 0, "high": 1, "step": 0.1}}, "x: range(0, 1.1, 0.1)"),
    ({"x": {"type": "categorical", "choices": ["a", "b c", 3, None]}}, "x: choice(a, 'b c', 3, null)"),
    ({"x": {"type": "range", "bounds": [-5, 10.1]}}, "x: interval(-5.0, 10.1)"),
    ({"x": {"type": "range", "bounds": [1e-3, 0.1], "log_scale": True}}, "x: tag(log, interval(0.001, 0.1))"),
    ({"x": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0}}, "x: tag(log, interval(1e-05, 1.0))"),
    ({"x": {"distribution": "int_uniform", "min": 1, "max": 4}}, "x: int(interval(1, 4))"),
    ({"x": {"_target_": "optuna.distributions.FloatDistribution", "low": 0.1, "high": 1}}, "x: interval(0.1, 1.0)"),
    ({"x": {"_target_": "optuna.distributions.IntDistribution", "low": 1, "high": 9}}, "x: int(interval(1, 9))"),
    ({"x": {"_target_": "a.b.LogUniformDistribution", "low": 1, "high": 9}}, "x: tag(log, interval(1.0, 9.0))"),
    ({"x": {"_target_": "a.b.CategoricalDistribution", "choices": [1, 2]}}, "x: choice(1, 2)"),
    ({"x": {"values": [1, 2]}}, "x: choice(1, 2)"),
    (
        {"model": {"lr": "interval(0,1)", "n": {"min": 1, "max": 2.5}}},
        "model.lr: interval(0,1); model.n: interval(1.0, 2.5)",
    ),
    ({"x": ["interval(0,1)"]}, "x: interval(0,1)"),
    ({"x": '"interval(0,1)"'}, "write x=interval(0,1)"),
    ({"x": "intervall(0,1)"}, "write x=interval(0,1)"),
    ({"x": "Choice(a,b)"}, "write x=choice(a,b)"),
    ({"x": "uniform(0,1)"}, "write x=interval(0,1)"),
    ({"x": "loguniform(1e-4,1)"}, "write x=tag(log, interval(1e-4,1))"),
    ({"x": "log(interval(1,2))"}, "write x=tag(log, interval(1,2))"),
    ({"x": "randint(0,5)"}, "write x=range(0,5)"),
    ({"x": "categorical(a,b)"}, "write x=choice(a,b)"),
    ({"x": "interval[0,1]"}, "write x=interval(0,1)"),
    ({"x": "interval(0,1"}, "write x=interval(0,1)"),
    ({"x": "tag(log, interval(1,2)"}, "write x=tag(log, interval(1,2))"),
    ({"x": "interval(0,1,0.1)"}, "write x=range(0,1,0.1)"),
    ({"x": "interval(0,1) # of the optimizer"}, "write x=interval(0,1)"),
    ({"x": "interval 0 1"}, "write x=interval(0,1)"),
    ({"x": "range(0.0,1.0)"}, "write interval(0.0, 1.0)"),
    ({"x": "range(0,5,7)"}, "write interval(0.0, 5.0), give a smaller step"),
    ({"x": "f(0,1)"}, "a search is written as interval(0.0,1.0)"),
    ({"x": "(0,1)"}, "a search is written as interval(0.0,1.0)"),
    ({"": "1,2"}, "there is no key before the ="),
    ({"hydra.sweeper.n_trials": 5}, "write n_trials: next to params:"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), WRITE, ids=str)
def test_what_only_looks_like_a_search_gets_the_line_to_write(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchSpaceError) as error:
        read_search_space([], params=params)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "value", [[1, "a"], {"a": 1}, {"type": "adam", "lr": 0.1}, None, True, 0.5, "a b", "0..1", "${y}"]
)
def test_fixed_values_of_any_type_stay_legitimate(value: Any) -> None:
    assert len(read_search_space([], params={"x": value}).fixed) == 1


BOUNDS = st.tuples(st.integers(1, 1000), st.integers(1001, 5000))


@settings(max_examples=60, deadline=None)
@given(
    bounds=BOUNDS,
    words=st.sampled_from([("low", "high"), ("min", "max"), ("lower", "upper"), ("start", "end")]),
    whole=st.booleans(),
    log=st.booleans(),
    kind=st.sampled_from(["type", "distribution", "kind"]),
)
def test_the_line_means_what_the_dictionary_described(
    bounds: tuple[int, int], words: tuple[str, str], whole: bool, log: bool, kind: str
) -> None:
    described = {kind: "int" if whole else "float", **dict(zip(words, bounds, strict=True)), "log": log}
    with pytest.raises(SearchSpaceError) as error:
        read_search_space([], params={"x": described})
    line = str(error.value).partition("write x: ")[2]
    expected = IntDistribution(*bounds, log=log) if whole else FloatDistribution(*map(float, bounds), log=log)
    assert read_search_space([], params={"x": line}).distributions == {"x": expected}


@settings(max_examples=40, deadline=None)
@given(
    choices=st.lists(
        st.one_of(st.integers(), st.text(max_size=6), st.booleans()), min_size=2, max_size=5, unique_by=str
    )
)
def test_the_line_has_the_choices_of_the_dictionary(choices: list[Any]) -> None:
    with pytest.raises(SearchSpaceError) as error:
        read_search_space([], params={"x": {"type": "categorical", "choices": choices}})
    line = str(error.value).partition("write x: ")[2]
    found = read_search_space([], params={"x": line})
    assert isinstance(found.distributions["x"], CategoricalDistribution)
    (entry,) = (entry for _, entry in found.entries)
    assert list(entry.values) == choices  # type: ignore[union-attr]


# Composed


@dataclass
class Typed:
    n: int = 1
    word: str = "a"


@dataclass
class Config:
    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"model": "small"}])
    lr: Any = 0.1
    name: Any = "none"
    layers: Any = field(default_factory=lambda: [1, 2])
    optimizer: Any = field(default_factory=lambda: {"lr": 0.1})
    typed: Typed = field(default_factory=Typed)
    model: Any = MISSING


@pytest.fixture
def check() -> Iterator[Any]:
    state = Singleton.get_state()
    store = ConfigStore.instance()
    store.store(name="mistaken", node=Config)
    for number, name in enumerate(("small", "large", "huge")):
        store.store(group="model", name=name, node={"size": number, **({"depth": 1} if name == "huge" else {})})
    hydra.initialize(config_path=None, version_base="1.3")
    loader = GlobalHydra.instance().config_loader()
    config = loader.load_configuration("mistaken", [], RunMode.MULTIRUN)

    def check(*arguments: str) -> None:
        check_composition(loader, config, read_search_space(arguments, loader))

    yield check
    GlobalHydra.instance().clear()
    Singleton.set_state(state)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["lrr=interval(0.0,1.0)"],
            ["example with lrr=0.0", "Could not override 'lrr'.", "+lrr=0.0", "full_key: lrr"],
        ),
        (["optimizer.rate=1,2"], ["'optimizer.rate'", "full_key: optimizer.rate"]),
        (["lr=1,2", "lrr=3"], ["'lrr'"]),
        (["model=small,tiny"], ["model/tiny", "large"]),
        (["model=small,large,huge", "model.depth=1,2"], ["model.depth"]),
        (["typed.n=interval(0.0,9.0)"], ["could not be converted to Integer", "write int(interval(1, 9))"]),
        (["typed.n=1,2,3,many"], ["cannot compose typed.n=many", "'many'", "full_key: typed.n"]),
        (["lr=[0.1,0.2]", "name=a,b"], ["but the config has 0.1 there: write lr: choice(0.1, 0.2)"]),
        (["lr=choice([0.1,0.2])", "name=a,b"], ["but the config has 0.1 there: write lr: choice(0.1, 0.2)"]),
        (["name=[a,b]", "lr=1,2"], ["but the config has 'none' there: write name: choice(a, b)"]),
        (["lr={a:1}", "name=a,b"], ["a dictionary is a fixed value, but the config has 0.1"]),
        (["lr=1e-4..1e-1", "name=a,b"], ["write lr: interval(1e-4, 1e-1)"]),
        (["lr=1e-4:1e-1", "name=a,b"], ["write lr: interval(1e-4, 1e-1)"]),
        (["optimizer.lr=interval(0.0,1.0)", "optimizer={lr:3}"], ["optimizer.lr=0.0: it has no effect"]),
        (["optimizer.lr=1,2", "+optimizer={lr:3}"], ["optimizer.lr=1: it has no effect"]),
    ],
    ids=str,
)
def test_what_does_not_compose_is_found_with_hydras_whole_message(
    check: Any, arguments: list[str], says: list[str]
) -> None:
    with pytest.raises((CompositionError, SearchSpaceError)) as error:
        check(*arguments)
    assert all(part in str(error.value) for part in says), str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["lr=interval(0.0,1.0)", "layers=[3,4]", "name=text", "typed.word=0..1"],
        ["model=small,large,huge", "model.size=1,2", "+model.extra=interval(0,1)"],
        ["optimizer={lr:3}", "optimizer.lr=interval(0.0,1.0)"],
        ["layers=choice([1],[2,3])", "lr=${optimizer.lr},0.5", "typed.n=range(1,9)"],
        ["~optimizer", "+optimizer=choice({a:1},{b:2})", "++lr=1,2", "name=null,a"],
    ],
    ids=str,
)
def test_searches_that_compose_are_accepted(check: Any, arguments: list[str]) -> None:
    check(*arguments)
