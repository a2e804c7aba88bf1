"""The search space: what overrides become, and that every value reaches the job as it was."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from optuna import create_study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gpu_launcher.errors import SearchSpaceError
from hydra_plugins.gpu_pool_launcher._override_text import override_text
from hydra_plugins.optuna_async_sweeper._search_space import difference, read_search_space

PARSER = OverridesParser.create()
BASE: Any = {"version_base": None} if hydra.__version__.startswith("1.3") else {}
"""Without it Hydra 1.3 warns, and 1.4 with it."""


def parsed(override: str) -> Any:
    (found,) = PARSER.parse_overrides([override])
    assert not found.is_sweep_override()
    return found.value()


def same(one: Any, other: Any) -> bool:
    """Equal in value and type, at every depth; NaN is NaN, and -0.0 is not 0.0."""
    return repr(one) == repr(other)


def distribution(override: str) -> Any:
    (found,) = read_search_space([override]).distributions.values()
    return found


# Values and texts

text = st.text(st.characters(exclude_categories=["Cs"])) | st.text("\\'\"${}()[]:=, \t\nab.5")
plain = st.none() | st.booleans() | st.integers() | st.floats() | text
hard = [
    "",
    " ",
    "a,b",
    "'",
    '"',
    "'\"",
    "\\",
    "\\\\",
    "\\'",
    "a\\",
    "it's\\\\'",
    "{a:1}",
    "[1]",
    " a ",
    "a\nb",
    "\r\n\t",
]
hard += [
    "16",
    "true",
    "null",
    "1e-3",
    "nan",
    "-inf",
    "None",
    "${x}",
    "$",
    "${",
    "\\${x}",
    "~",
    "a=b",
    "ä€😀",
    "choice(1)",
]
hard += ["x:y", "a#b", "%", "1_000", "007", "+1", ".5", "null.x", "e5", "a/b.c-d", "-", "*", "?", "|", "@", "!", "\x00"]


@given(plain)
@example(1e-05)
@example(1e22)
@example(-0.0)
@settings(max_examples=500, deadline=None)
def test_every_value_comes_through_hydras_parser_unchanged(value: Any) -> None:
    assert same(parsed(f"x={override_text(value)}"), value)


@pytest.mark.parametrize("value", hard)
def test_every_string_comes_through_hydras_parser_unchanged(value: str) -> None:
    assert same(parsed(f"x={override_text(value)}"), value)


keys = st.from_regex(r"[A-Za-z_][A-Za-z_0-9 (,=:\\]{0,5}[A-Za-z]", fullmatch=True).filter(
    lambda key: key.lower() not in ("null", "true", "false", "inf", "nan")
)


@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=5))
@settings(max_examples=200, deadline=None)
def test_lists_and_dictionaries_come_through_hydras_parser_unchanged(value: Any) -> None:
    assert same(parsed(f"x={override_text(value)}"), value)


def test_words_are_written_as_a_user_writes_them() -> None:
    assert [override_text(word) for word in ("relu", "resnet/50.v2", "True", "1")] == [
        "relu",
        "resnet/50.v2",
        "'True'",
        "'1'",
    ]


def test_numpys_numbers_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    values = [numpy.float64(0.5), numpy.int64(3), numpy.bool_(True), numpy.float32(0.25)]
    assert [override_text(value) for value in values] == ["0.5", "3", "true", "0.25"]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Composes a config with overrides and says what `x` is."""
    (tmp_path / "config.yaml").write_text("x: null\ny: 7\n")
    GlobalHydra.instance().clear()

    def composed(*overrides: str) -> Any:
        with initialize_config_dir(str(tmp_path), **BASE):
            made = compose("config", overrides=list(overrides))
        return OmegaConf.to_container(made, resolve=True)["x"]  # type: ignore[call-overload, index]

    return composed


@pytest.mark.parametrize("value", [word for word in hard if "${" not in word] + [None, True, 1, 1.0, 1e-05, math.inf])
def test_a_value_that_is_suggested_reaches_the_jobs_config_unchanged(config: Any, value: Any) -> None:
    space = read_search_space([])
    assert same(config(*space.overrides({"x": value})), value)
    chosen = read_search_space([f"x={override_text(value)},other"])
    sampled = chosen.distributions["x"].to_external_repr(0)  # type: ignore[no-untyped-call]
    assert same(config(*chosen.overrides({"x": sampled})), value)


def test_an_interpolation_among_the_choices_stays_one(config: Any) -> None:
    space = read_search_space(["x=choice(${y},b)"])
    assert space.distributions["x"] == CategoricalDistribution(["${y}", "b"])
    assert config(*space.overrides({"x": "${y}"})) == 7
    assert config(*read_search_space([]).overrides({"x": "\\${y}"})) == "${y}"  # OmegaConf's escape


def through_optuna(override: str) -> list[Any]:
    """What the parser of each job makes of each choice, by way of a study."""
    space = read_search_space([override])
    ((key, found),) = space.distributions.items()
    assert isinstance(found, CategoricalDistribution)
    study = create_study()
    values = []
    for choice in found.choices:
        study.enqueue_trial({key: choice})
        trial = study.ask({key: found})
        (job,) = space.overrides(trial.params)
        values.append(parsed(job))
        assert same(list(space.values(trial.params).values()), values[-1:])
    return values


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("x=a,b", ["a", "b"]),
        ("x=choice(1,true,1.0)", [1, True, 1.0]),
        ("x=choice(1,true,'1','true',\"'1'\")", [1, True, "1", "true", "'1'"]),
        ("x=0,false,null,''", [0, False, None, ""]),
        ("x=choice([1,2],[3,4])", [[1, 2], [3, 4]]),
        ("x=choice([1,2],'[1,2]')", [[1, 2], "[1,2]"]),
        ("x=[a,'b c'],null", [["a", "b c"], None]),
        ("x=choice({a:1},{b:'c d',e:[null]})", [{"a": 1}, {"b": "c d", "e": [None]}]),
        ("x=16,'16'", [16, "16"]),
        ("x=choice(0.0,-0.0)", [0.0, -0.0]),
        ("x=nan,inf,-inf", [math.nan, math.inf, -math.inf]),
        ("x=sort(3,1,2)", [1, 2, 3]),
        ("x=str(1,2)", ["1", "2"]),
        ("x=a,b,a", ["a", "b"]),
        ("x='a,b',\"c'd\",'e\nf'", ["a,b", "c'd", "e\nf"]),
    ],
)
def test_each_choice_reaches_the_job_with_its_own_type(override: str, values: list[Any]) -> None:
    assert same(through_optuna(override), values)


@given(st.lists(plain | st.lists(plain, max_size=2), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_mix_of_choices_reaches_the_jobs_as_it_was(values: list[Any]) -> None:
    space = read_search_space([f"x={','.join(map(override_text, values))}"])
    found = space.distributions["x"]
    assert isinstance(found, CategoricalDistribution)
    jobs = [parsed(*space.overrides({"x": choice})) for choice in found.choices]
    assert {repr(job) for job in jobs} == {repr(value) for value in values}
    assert len({override_text(choice) for choice in found.choices}) == len(jobs)


# Distributions


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("x=range(1,4)", IntDistribution(1, 3)),
        ("x=range(4)", IntDistribution(0, 3)),
        ("x=range(0,10,3)", IntDistribution(0, 9, step=3)),
        ("x=range(5,1,-1)", IntDistribution(2, 5)),
        ("x=sort(range(5,1,-1))", IntDistribution(2, 5)),
        ("x=shuffle(range(3))", IntDistribution(0, 2)),
        ("x=range(1,2)", IntDistribution(1, 1)),
        ("x=range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("x=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
        ("x=range(0,1,0.3)", FloatDistribution(0, 0.9, step=0.3)),
        ("x=range(1,0,-0.5)", FloatDistribution(0.5, 1, step=0.5)),
        ("x=float(range(1,4))", FloatDistribution(1, 3, step=1)),
        ("x=range(1e16,1e16+3)", None),
        ("x=interval(1,4)", FloatDistribution(1, 4)),
        ("x=int(interval(1,4))", IntDistribution(1, 4)),
        ("x=tag(log,interval(1e-4,0.1))", FloatDistribution(1e-4, 0.1, log=True)),
        ("x=tag(log, int(interval(1, 64)))", IntDistribution(1, 64, log=True)),
        ("x=interval(-1,1)", FloatDistribution(-1, 1)),
        ("x=shuffle(a,b)", CategoricalDistribution(["a", "b"])),
        ("x=choice(a)", CategoricalDistribution(["a"])),
    ],
)
def test_the_grammar_means_what_it_means_to_hydra(override: str, expected: Any) -> None:
    if expected is None:
        with pytest.raises(SearchSpaceError):
            read_search_space([override])
    else:
        assert distribution(override) == expected


def test_steps_of_a_float_range_are_exact() -> None:
    space = read_search_space(["x=range(0.1,0.5,0.1)"])
    jobs = [space.overrides({"x": 0.1 + step * 0.1}) for step in range(4)]
    assert jobs == [["x=0.1"], ["x=0.2"], ["x=0.3"], ["x=0.4"]]


def test_a_range_too_fine_for_floats_is_a_choice() -> None:
    assert isinstance(distribution("x=range(1e16,10000000000000004.0,0.5)"), CategoricalDistribution)


@pytest.mark.parametrize(
    ("key", "override"),
    [("+x", "+x=1,2"), ("++x", "++x=1,2"), ("db@source", "db@source=a,b"), ("a.b.0", "a.b.0=1,2"), ("a/b", "a/b=1,2")],
)
def test_keys_are_those_of_the_overrides(key: str, override: str) -> None:
    space = read_search_space([override])
    assert list(space.distributions) == [key]
    found = space.distributions[key]
    assert isinstance(found, CategoricalDistribution)
    assert space.overrides({key: found.choices[1]}) == [f"{key}={found.choices[1]}"]


def test_values_get_the_type_of_their_distribution_whatever_a_storage_makes_of_them() -> None:
    space = read_search_space(["i=range(5)", "f=interval(0,5)", "c=1,2", "d=true,false"])
    jobs = space.overrides({"i": 3.0, "f": 3, "c": 1.0, "d": 1})
    assert jobs == ["i=3", "f=3.0", "c=1", "d=true"]


def test_fixed_overrides_and_deletions_stay_verbatim_and_in_their_place() -> None:
    arguments = ["a=0.10", "x=1,2", "~db", "+db=a,b", "s='a,b'", "e=", "l=[1, 2]"]
    space = read_search_space(arguments)
    assert space.fixed == ("a=0.10", "~db", "s='a,b'", "e=", "l=[1, 2]")
    assert list(space.distributions) == ["x", "+db"]
    jobs = space.overrides({"+db": "b", "x": 2, "new": "a b"})
    assert jobs == ["a=0.10", "x=2", "~db", "+db=b", "s='a,b'", "e=", "l=[1, 2]", "new='a b'"]


def test_a_glob_chooses_among_the_configs_of_its_group(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    for name in ("mysql", "postgres", "sqlite"):
        (tmp_path / "db" / f"{name}.yaml").write_text("x: 1\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), **BASE):
        loader = GlobalHydra.instance().config_loader()
        space = read_search_space(["+db=glob(*,exclude=my*)"], loader)
        assert space.distributions == {"+db": CategoricalDistribution(["postgres", "sqlite"])}
        with pytest.raises(SearchSpaceError, match="no config of the group matches"):
            read_search_space(["db=glob(zz*)"], loader)


def test_the_description_is_json() -> None:
    space = read_search_space(["lr=tag(log,interval(0.1,1))", "n=range(0,9,2)", "k=a,null,[1]"])
    assert json.loads(json.dumps(space.describe())) == {
        "lr": {"type": "float", "low": 0.1, "high": 1.0, "log": True, "step": None},
        "n": {"type": "int", "low": 0, "high": 8, "log": False, "step": 2},
        "k": {"type": "choice", "choices": ["a", None, "[1]"]},
    }


# Several sources


def fixed_and_searched(params: Mapping[str, Any], *arguments: str) -> tuple[tuple[str, ...], list[str]]:
    space = read_search_space(arguments, params=params)
    return space.fixed, list(space.distributions)


@pytest.mark.parametrize(
    ("params", "arguments", "fixed", "searched"),
    [
        ({"lr": "interval(0,1)"}, ["lr=0.1"], ("lr=0.1",), []),
        ({"lr": 0.1}, ["lr=interval(0,1)"], (), ["lr"]),
        ({"lr": "interval(0,1)", "n": "1,2"}, ["lr=range(3)"], (), ["lr", "n"]),
        ({"+lr": "interval(0,1)"}, ["++lr=0.1"], ("++lr=0.1",), []),
        ({"lr": "interval(0,1)"}, ["~lr"], ("~lr",), []),
        ({"x": "1,2"}, ["+x=3,4"], (), ["+x"]),
        ({"x": 1}, ["x=2"], ("x=2",), []),
        ({}, ["x=1,2", "x=3,4"], (), ["x"]),
        ({}, ["~db", "+db=a,b"], ("~db",), ["+db"]),
        ({"db@a": "1,2"}, ["db@b=3"], ("db@b=3",), ["db@a"]),
        ({"n": None, "l": [1, "a b"], "d": {"k": 1e-05}}, [], ("n=null", "l=[1,'a b']", "d={k:1e-05}"), []),
    ],
)
def test_the_command_line_goes_before_the_params(
    params: dict[str, Any], arguments: list[str], fixed: tuple[str, ...], searched: list[str]
) -> None:
    assert fixed_and_searched(params, *arguments) == (fixed, searched)


def test_params_can_be_hydras_config() -> None:
    params = OmegaConf.create({"x": "1,2", "l": [1, "${n}"], "n": 1e-05, "d": {"k": [True, None]}})
    space = read_search_space([], params=params)  # type: ignore[arg-type]
    assert space.fixed == ("l=[1,1e-05]", "n=1e-05", "d={k:[true,null]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=0.1", "lr=interval(0,1)"], "lr=interval(0,1): lr=0.1 fixes what this searches: leave out one of them"),
        (["lr=interval(0,1)", "+lr=0.1"], "lr=interval(0,1): +lr=0.1 fixes what this searches"),
        (["lr=1,2", "~lr"], "lr=1,2: ~lr deletes what this searches"),
        (["lr=1,2", "+lr=3,4"], "lr=1,2 searches what this searches"),
        (["x=choice()"], "x=choice(): ValueError while evaluating 'choice()': empty choice is not legal"),
        (["x=choice(null,1)"], "write x=null,a"),
        (["x=interval(1,1)"], "x=interval(1,1): the interval from 1.0 to 1.0 has no size: give two bounds"),
        (["x=interval(2,1)"], "reversed: write interval(1.0, 2.0)"),
        (["x=tag(log,interval(0,1))"], "a logarithmic interval cannot start at 0.0"),
        (["x=tag(log,interval(-1,1))"], "cannot start at -1.0"),
        (["x=tag(log,int(interval(0.5,9)))"], "cannot start at 0"),
        (["x=interval(0,inf)"], "is not an interval: give two finite numbers"),
        (["x=range(1,4,0)"], "step 0"),
        (["x=range(0.1,4,0.0)"], "step 0"),
        (["x=range(4,1)"], "is empty"),
        (["x=tag(lgo,interval(1,2))"], "the tag 'lgo' is unknown"),
        (["x=tag(log,range(1,4))"], "only an interval can be logarithmic"),
        (["x=tag(log,choice(1,2))"], "only an interval can be logarithmic"),
        (["x=glob(*)"], "name the choices"),
        (["x=[choice(1,2)]"], "a list or a dictionary cannot contain a sweep"),
        (["x=range(1,3),5"], "choices cannot contain a sweep"),
        (["x=choice(a"], "no viable alternative at input"),
        (["x='a"], "LexerNoViableAltException"),
        (["x"], "missing EQUAL"),
    ],
)
def test_what_cannot_be_searched_gets_one_line_that_names_it(arguments: list[str], message: str) -> None:
    with pytest.raises(SearchSpaceError) as error:
        read_search_space(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value).replace("\\n", "")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_custom_search_space_cannot_suggest_what_is_fixed() -> None:
    with pytest.raises(SearchSpaceError, match=r"lr=0\.1: it is fixed here"):
        read_search_space(["lr=0.1"]).overrides({"+lr": 3})


# Known good points, and other studies


def test_values_are_encoded_as_a_study_holds_them() -> None:
    space = read_search_space(["+i=range(5)", "f=interval(0,5)", "c=[1,2],[3,4]", "d=1,true,a"])
    assert space.encode({"i": 3, "f": 1, "c": [3, 4], "d": True, "else": "e"}) == {
        "+i": 3,
        "f": 1.0,
        "c": "[3,4]",
        "d": "true",
        "else": "e",
    }
    assert same(space.encode({"f": 1})["f"], 1.0)
    assert space.values({"c": "[3,4]", "d": "true", "else": 1}) == {"c": [3, 4], "d": True, "else": 1}


@pytest.mark.parametrize("params", [{"i": 9}, {"i": 1.5}, {"i": "a"}, {"i": True}, {"c": 3}, {"c": [1]}, {"i": None}])
def test_a_point_outside_of_the_space_is_an_error(params: dict[str, Any]) -> None:
    space = read_search_space(["i=range(5)", "c=1,2"])
    (name,) = params
    with pytest.raises(SearchSpaceError, match=f"^{name}="):
        space.encode(params)


def test_a_study_with_the_same_space_does_not_differ() -> None:
    arguments = ["a=interval(0,1)", "b=range(3)", "c=x,1,nan", "d=range(0,1,0.1)"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(read_search_space(arguments), read_search_space(arguments).distributions) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a=interval(0,2)", "b=1,2"], "a is float from 0.0 to 2.0, in the study float from 0.0 to 1.0"),
        (
            ["a=tag(log,interval(0.1,1))", "b=1,2"],
            "a is float from 0.1 to 1.0, log, in the study float from 0.0 to 1.0",
        ),
        (["a=interval(0,1)", "b=1,2.0"], "b is choice(1, 2.0), in the study choice(1, 2)"),
        (["a=interval(0,1)", "b=range(1,5)"], "b is int from 1 to 4, in the study choice(1, 2)"),
        (["a=interval(0,1)", "b=1,2", "c=1,2"], "the study does not search c"),
        (["a=interval(0,1)"], "the study searches b too, choice(1, 2)"),
    ],
)
def test_a_study_with_another_space_differs_in_words(arguments: list[str], message: str) -> None:
    study = read_search_space(["a=interval(0,1)", "b=1,2"]).distributions
    assert difference(read_search_space(arguments), study) == message


def test_what_a_custom_search_space_added_is_no_difference() -> None:
    study = read_search_space(["a=interval(0,1)", "b=1,2"]).distributions
    assert difference(read_search_space(["a=interval(0,1)"]), study, custom=True) is None


# Zips and filters

PAIR = '+pair="zip(kind=choice(a,b), opt.lr=[0.5,0.25])"'


def test_a_zip_is_one_categorical_parameter_whose_choice_sets_all_members() -> None:
    space = read_search_space([PAIR, "n=range(1,4)", "z=7"])
    assert space.distributions["pair"] == CategoricalDistribution(["kind=a opt.lr=0.5", "kind=b opt.lr=0.25"])
    params = {"pair": "kind=b opt.lr=0.25", "n": 2}
    assert space.overrides(params) == ["kind=b", "opt.lr=0.25", "n=2", "z=7"]
    assert space.values(params) == {"pair": {"kind": "b", "opt.lr": 0.25}, "n": 2}
    assert space.unzipped(params) == {"kind": "b", "opt.lr": 0.25, "n": 2}
    assert space.job_values(params) == {"kind": "b", "opt.lr": 0.25, "n": 2, "z": 7}
    assert space.job_keys == ["kind", "opt.lr", "n", "z"]
    assert space.encode({"pair": {"kind": "b", "opt.lr": 0.25}}) == {"pair": "kind=b opt.lr=0.25"}
    assert space.encode({"pair": "kind=a opt.lr=0.5"}) == {"pair": "kind=a opt.lr=0.5"}
    assert read_search_space(
        ["n=range(1,4)", "z=7"], params={"pair": PAIR.partition("=")[2].strip('"')}
    ).describe() == {name: space.describe()[name] for name in ("pair", "n")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PAIR, "kind=a,b"], "kind is also swept or fixed on its own"),
        ([PAIR, "opt.lr=0.5"], "opt.lr is also swept or fixed on its own"),
        ([PAIR, "q=zip(a=[1,2], kind=[x,y])"], "kind is also a member of the zip pair"),
        (["q=zip(a=[1,2], b=[x])"], "a has 2, b has 1"),
    ],
)
def test_a_zip_that_conflicts_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message):
        read_search_space(arguments)
