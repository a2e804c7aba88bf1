"""Zipped dimensions: what `name=zip(...)` means, what is refused, and the combinations of a grid that has some."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gpu_launcher.errors import OptionError, SearchSpaceError
from hydra_plugins.gpu_pool_launcher._filter import read_filter
from hydra_plugins.gpu_pool_launcher._override_text import override_text
from hydra_plugins.gpu_pool_launcher._zip import read_zip
from hydra_plugins.grid_async_sweeper._grid import read_dimensions, read_jobs, size

PARSER = OverridesParser.create()


def rows(text: str) -> tuple[tuple[str, ...], ...]:
    found = read_zip(text, PARSER)
    assert found is not None
    return found.rows


def jobs(*arguments: str, chosen: str | None = None, config: Any = None) -> list[list[str]]:
    dimensions = read_dimensions(arguments, PARSER, config)
    return read_jobs(dimensions, None if chosen is None else read_filter(chosen))


@pytest.mark.parametrize(
    "text",
    [
        "mo=zip(model=choice(a,b),lr=choice(1,2))",
        "+mo=zip( model = choice( a , b ) , lr = [1, 2] )",
        '+mo="zip(model=[a,b], lr=range(1,3))"',
        "mo='zip(model=[a,b],\n lr=choice(1,2)\n)'",
        "mo=  zip (model=[a,b], lr=sort(2,1))",
    ],
)
def test_all_ways_to_write_a_zip_give_the_same_rows(text: str) -> None:
    assert rows(text) == (("model=a", "lr=1"), ("model=b", "lr=2"))


def test_members_can_be_any_key_and_value_of_an_override() -> None:
    text = '+x="zip(+a.b=choice(\'p, (q\',\\"it\'s\\"), db@src=[s,t], n=choice([1,2],{k:3}))"'
    found = read_zip(text, PARSER)
    assert found is not None
    assert found.name == "x"
    assert found.keys == ("+a.b", "db@src", "n")
    assert found.rows == (("+a.b=p\\,\\ \\(q", "db@src=s", "n=[1,2]"), ("+a.b=it's", "db@src=t", "n={k:3}"))
    assert found.values == (("p, (q", "s", [1, 2]), ("it's", "t", {"k": 3}))


@pytest.mark.parametrize("text", ["zip=1", "x=a", "x=zipped(1)", "x='a zip(b)'", "x", "~x", "x=", "x='zip'"])
def test_other_overrides_are_no_zips(text: str) -> None:
    assert read_zip(text, PARSER) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m=zip(a=[1,2], b=[1])", "must have the same number of values, but a has 2, b has 1"),
        ("m=zip(a=[1,2])", "at least two members"),
        ("m=zip()", "at least two members"),
        ("m=zip(a=[1], +a=[2])", "a is a member twice"),
        ("m=zip([1,2],[3,4])", "'\\[1,2\\]' is not a member: write key=choice"),
        ("m=zip(a=1,2, b=3,4)", "a=1 has no list of values: write a=choice"),
        ("m=zip(a=1, b=2)", "a=1 has no list of values: write a=choice"),
        ("m=zip(a=1, 2, b=[1])", "a=1 has no list of values"),
        ("m=zip(a=[1], 2, b=[1])", "'2' is not a member"),
        ("m=zip(a=[choice(1,2)], b=[1])", "a=\\[choice\\(1,2\\)\\] contains another sweep"),
        ("m=zip(a=glob(*), b=[1])", "cannot be enumerated"),
        ("m=zip(a=[], b=[])", "a has no values"),
        ("m=zip(a=interval(0,1), b=[1,2])", "has no list of values"),
        ("m=zip(a=shuffle(1,2), b=[1,2])", "a is shuffled"),
        ("m=zip(a=zip(b=[1],c=[2]), d=[1])", "cannot be read"),
        ("m=zip(a=[1,2], b=[1,2]", "does not end with its closing parenthesis"),
        ("m=zip(a=[1,2, b=[1,2])", "parenthesis is not closed"),
        ("m=zip(a=['1,2], b=[1,2])", "quote is not closed"),
        ("m=zip(a=[1,2]], b=[1,2])", "without its opening"),
        ("m=shuffle(zip(a=[1,2], b=[1,2]))", "cannot be within another function"),
        ("=zip(a=[1,2], b=[1,2])", "'' is not a name for a zip: write \\+name="),
        ("++m=zip(a=[1,2], b=[1,2])", "'\\+\\+m' is not a name for a zip"),
        ("~m=zip(a=[1,2], b=[1,2])", "is not a name for a zip"),
        ("m=zip(~a=[1,2], b=[1,2])", "~a cannot be a member"),
        ("m=zip(hydra.job.name=[1,2], b=[1,2])", "hydra.job.name cannot be a member"),
        ("m=zip(hydra/launcher=[a,b], b=[1,2])", "cannot be a member"),
        ("m=zip(a=uniform(1,2), b=[1,2])", "a=uniform.*cannot be read: .*Unknown function 'uniform'"),
    ],
)
def test_what_is_no_zip_is_refused_with_the_fix(text: str, message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message) as raised:
        read_zip(text, PARSER)
    assert str(raised.value).startswith(f"{text}: ")


def test_a_zip_is_one_dimension_of_the_grid_in_its_place() -> None:
    assert jobs("s=1,2", '+m="zip(a=[x,y], b=[5,6])"', "k=0") == [
        ["s=1", "a=x", "b=5", "k=0"],
        ["s=1", "a=y", "b=6", "k=0"],
        ["s=2", "a=x", "b=5", "k=0"],
        ["s=2", "a=y", "b=6", "k=0"],
    ]
    assert len(jobs("m=zip(a=[x,y], b=[5,6])", "n=zip(c=range(3), d=[1,2,3])")) == 6


def test_the_command_lines_zip_replaces_that_of_params() -> None:
    assert jobs("m=zip(a=[x,y], b=[5,6])", '+m="zip(a=[z], b=[7])"') == [["a=z", "b=7"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=1,2", "m=zip(a=[x,y], b=[5,6])"], "a is also swept or fixed on its own: leave out one of them"),
        (["m=zip(+a=[x,y], b=[5,6])", "a=3"], "a is also swept or fixed on its own"),
        (["m=zip(a=[x,y], b=[5,6])", "n=zip(a=[x,y], c=[5,6])"], "a is also a member of the zip m"),
        (["m=zip(a=[x,y], b=[5,6])", "m=3"], "m is also the key of another override"),
        (["lr=zip(a=[x,y], b=[5,6])"], "the program's config has lr: use another name"),
        (["model=zip(a=[x,y], b=[5,6])"], "the program's config has model"),
    ],
)
def test_a_key_that_is_set_twice_is_refused(arguments: list[str], message: str) -> None:
    config = OmegaConf.create({"lr": 1, "hydra": {"runtime": {"choices": {"model": "resnet"}}}})
    with pytest.raises(SearchSpaceError, match=message):
        jobs(*arguments, config=config)


def test_the_name_that_hydra_added_to_the_config_is_not_taken() -> None:
    text = "zip(a=[x,y], b=[5,6])"
    config = OmegaConf.create({"m": text, "hydra": {"runtime": {"choices": {}}}})
    assert len(jobs(f'+m="{text}"', config=config)) == 2


def test_an_interval_is_refused() -> None:
    with pytest.raises(HydraException, match="optuna_async to search it"):
        jobs("x=interval(0,1)")


# The combinations of a grid

texts = st.text("ab ,'\"\\()[]{}=:$%", min_size=1, max_size=4).filter(lambda text: "${" not in text)
values = st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False) | texts | st.lists(st.integers())
choices = st.lists(values.filter(lambda value: value is not None), min_size=1, max_size=3).map(
    lambda items: f"choice({','.join(map(override_text, items))})"
)
sweeps = choices | st.sampled_from(
    ["1", "a", "range(3)", "range(0,1,0.25)", "1,2", "sort(3,1)", "int(1.5)", "float(range(2))"]
)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "+c", "d.e", "f@g"]), sweeps), max_size=4))
@settings(max_examples=60, deadline=None)
def test_without_zip_and_filter_the_jobs_are_those_of_the_basic_sweeper(grid: list[tuple[str, str]]) -> None:
    arguments = [f"{key}={sweep}" for key, sweep in grid]
    (expected,) = BasicSweeper.split_arguments(PARSER.parse_overrides(arguments), None)
    assert jobs(*arguments) == expected


@given(st.lists(values, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_quoting_a_zip_keeps_every_value(items: list[Any]) -> None:
    members = ",".join(map(override_text, items))
    plain = f"zip(a=[{members}],b=[{members}])"
    (parsed,) = PARSER.parse_overrides([f"+m={override_text(plain)}"])
    assert parsed.value() == plain
    assert rows(f"+m={override_text(plain)}") == rows(f"m={plain}")
    found = read_zip(f"m={plain}", PARSER)
    assert found is not None
    assert repr([a for a, _ in found.values]) == repr(items)


def test_a_filter_leaves_out_combinations_and_keeps_the_order() -> None:
    grid = ["batch=range(1,200)", '+m="zip(kind=[a,b], accumulate=[1,4])"', "seed=range(100)"]
    kept = jobs(*grid, chosen="batch * accumulate <= 64 and not (kind == 'b' and seed > 1)")
    everything = jobs(*grid)
    assert len(everything) == size(read_dimensions(grid, PARSER)) == 199 * 2 * 100
    expected = [
        job
        for job, (batch, (kind, accumulate), seed) in zip(
            everything, itertools.product(range(1, 200), [("a", 1), ("b", 4)], range(100)), strict=True
        )
        if batch * accumulate <= 64 and not (kind == "b" and seed > 1)
    ]
    assert kept == expected


def test_a_filter_that_leaves_nothing_or_names_an_unknown_key_is_refused() -> None:
    with pytest.raises(OptionError, match="a > 5: leaves out all 6 combinations: nothing would run"):
        jobs("a=1,2,3", "b=1,2", chosen="a > 5")
    with pytest.raises(OptionError, match=r"c is not the key of an override \(there are: a, b\)"):
        jobs("a=1,2,3", "b=1,2", chosen="c > 5")
    with pytest.raises(OptionError, match=r"cannot compare 2 with the text 'x' \(for a=2 b='x'\)"):
        jobs("a=2", "b=x", chosen="a > b")


def test_a_filter_sees_values_without_prefix_and_after_casts() -> None:
    assert jobs("+a=float(1,3)", "~b", "g@h=x,y", chosen="a < 2.5") == [
        ["+a=1.0", "~b=null", "g@h=x"],
        ["+a=1.0", "~b=null", "g@h=y"],
    ]
