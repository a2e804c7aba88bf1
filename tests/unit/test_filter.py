"""The expressions of `hydra.sweeper.filter`: they mean what they mean in Python, and cannot do anything else."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpu_launcher.errors import OptionError
from hydra_plugins.gpu_pool_launcher._filter import MAX_DEPTH, MAX_LENGTH, read_filter

VALUES: dict[str, Any] = {"batch": 32, "lr": 0.1, "kind": "adam", "deep": True, "off": None, "betas": [0.9, 0.99]}


def keeps(text: str, **values: Any) -> bool:
    return read_filter(text).keeps({**VALUES, **values})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("batch * 16 <= 512", True),
        ("batch * 17 <= 512", False),
        ("0.01 < lr <= 0.1", True),
        ("kind == 'adam' and not (batch > 64 or lr > 1)", True),
        ('kind in ["sgd", "adamw"]', False),
        ("kind not in ('sgd', 'adamw')", True),
        ("'ada' in kind", True),
        ("batch in betas", False),
        ("deep", True),
        ("deep == true and off == null and deep != false", True),
        ("deep is_", None),
        ("-batch // 5 == -7 and batch % 5 == 2 and 2 ** -1 == +0.5 and batch / 64 == 0.5", True),
        ("betas == [0.9, 0.99]", True),
        ("kind < 'b'", True),
        ("optimizer.lr < 1", True),
        ("  batch\n  >\n  1 ", True),
    ],
)
def test_an_expression_means_what_it_says(text: str, kept: bool | None) -> None:
    if kept is None:
        with pytest.raises(OptionError, match="invalid syntax at character 6"):
            read_filter(text)
    else:
        assert keeps(text, **{"optimizer.lr": 0.5}) is kept


def test_the_names_of_an_expression_are_its_keys_in_order() -> None:
    assert read_filter("b.c > a and b.c < 3 and true").names == ("b.c", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("batch <=", "invalid syntax at the end"),
        ("batch = 5", "at character"),
        ("(batch > 5", "was never closed at character 1"),
        ("batch > 5 )", "unmatched '\\)' at character 11"),
        ("ä > 5 and open('x')", r"\"open\('x'\)\" at character 11 is not supported: functions cannot be called"),
        ("betas[0] > 1", "values cannot be indexed"),
        ("1 if deep else 2", "there is no if"),
        ("batch is null", "write == instead of is"),
        ("deep & deep", "write and instead of &"),
        ("~batch", "write not instead of ~"),
        ("batch.__class__()", "functions cannot be called"),
        ("'a'.upper", "is not supported"),
        ("[x for x in betas]", "is not supported"),
        ("lambda: 1", "is not supported"),
        ("(x := 5) > 1", "is not supported"),
        ("f'{batch}' == '32'", "is not supported"),
        ("b'a' == kind", "is not supported"),
        ("1j == batch", "is not supported"),
        ("... == batch", "is not supported"),
        ("{1: 2} == batch", "is not supported"),
        ("1 << 100 > batch", "is not supported"),
        ("[*betas, 1] == betas", "is not supported"),
        ("batch\0 > 1", "null bytes"),
        ("1 + " * MAX_DEPTH + "1 > 0", f"nested too deeply: {MAX_DEPTH} levels at most"),
        ("not " * 400 + "deep", "nested too deeply"),
        ("(" * 900 + "deep" + ")" * 900, "too many nested parentheses"),
        ("a" * (MAX_LENGTH + 1), f"{MAX_LENGTH} at most"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        read_filter(text)
    assert str(raised.value).startswith("hydra.sweeper.filter: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch * 16", r"gives 512, which is neither true nor false: compare it, .* \(for batch=32\)"),
        ("batch > kind", r"'batch > kind' cannot compare 32 with the text 'adam' \(for batch=32 kind='adam'\)"),
        ("deep > 0", "cannot compare true with 0"),
        ("kind * 3 == 'a'", "'kind \\* 3' needs numbers, got the text 'adam'"),
        ("deep + 1 == 2", "needs numbers, got true"),
        ("-kind == 1", "needs a number"),
        ("batch and deep", "'batch' must be true or false here, got 32"),
        ("not off", "must be true or false here, got null"),
        ("1 in batch", "cannot look for 1 in 32"),
        ("batch / 0 > 1", "'batch / 0' divides by zero"),
        ("0 ** -1 > 1", "divides by zero"),
        ("2 ** 100000 > 1", "is too large"),
        ("2.0 ** 100000 > 1", "is too large"),
        ("9 ** 999 * 9 ** 999 > 1", "is too large"),
        ("2 ** 4000 / 3 > 1", "is too large"),
        ("(-8) ** 0.5 > 1", "root of a negative number"),
        ("lost > 1", "the job has no lost"),
        ("same > 1", "the value of same is an interpolation"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_the_values(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        keeps(text, same="${batch}")


def test_an_unknown_key_is_refused_with_the_keys_there_are() -> None:
    with pytest.raises(OptionError, match=r"sizes is not the key of an override \(there are: batch, lr\)"):
        read_filter("batch * sizes > 1").check_names(["lr", "batch"])


numbers = st.integers(-20, 20) | st.sampled_from([0.5, -1.25, 3.0, 1e-3])
number_texts = st.recursive(
    numbers.map(lambda number: f"({number})") | st.sampled_from(["batch", "lr"]),
    lambda inner: (
        st.builds(
            lambda one, op, other: f"({one} {op} {other})",
            inner,
            st.sampled_from(["+", "-", "*", "/", "//", "%"]),
            inner,
        )
        | inner.map(lambda one: f"(-{one})")
    ),
    max_leaves=6,
)
comparisons = (
    st.builds(
        lambda one, first, other, second, third: f"{one} {first} {other} {second} {third}",
        number_texts,
        st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
        number_texts,
        st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
        number_texts,
    )
    | st.builds(lambda one, items: f"{one} in [{', '.join(items)}]", number_texts, st.lists(number_texts, max_size=3))
    | st.builds(lambda one: f"kind not in {one!r}", st.lists(st.sampled_from(["adam", "sgd", "it's"])))
    | st.sampled_from(["deep", "True", "kind >= 'adam'", "off == None", "betas == [0.9, 0.99]"])
)
expressions = st.recursive(
    comparisons,
    lambda inner: (
        st.builds(lambda one, op, other: f"({one}) {op} ({other})", inner, st.sampled_from(["and", "or"]), inner)
        | inner.map(lambda one: f"not ({one})")
    ),
    max_leaves=5,
)


@given(expressions)
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_python(text: str) -> None:
    try:
        expected: Any = eval(text, {"__builtins__": {}}, VALUES)
    except ZeroDivisionError:
        expected = "divides by zero"
    try:
        found: Any = keeps(text)
    except OptionError as error:
        found = str(error)
        if len(text) > MAX_LENGTH:
            return
    if isinstance(expected, str):
        assert expected in str(found)
    else:
        assert found is expected


TOKENS = """batch lr kind deep ( ) [ ] , . + - * / // % ** < <= == != in not and or is if else lambda : for x 9 9.5e300
'a' __class__ open( __import__('os') print( exit( {} := await yield * = ~ & | ^ << @ # \\ ' " 0x1F 1_0 1j"""
tokens = st.sampled_from(TOKENS.split())


@given(st.lists(tokens, max_size=25).map(" ".join) | st.text(max_size=60))
@example("9 ** 9 ** 9 ** 9 > 1")
@example("9.5e300 * 9.5e300 > 1")
@settings(max_examples=150, deadline=None)
def test_any_text_is_answered_or_refused_and_nothing_is_called(text: str) -> None:
    calls = []

    class Trap:
        """A value that notes whatever is done to it, other than being looked at."""

        def __call__(self, *_: Any, **__: Any) -> None:
            calls.append("call")

        def __getitem__(self, _: Any) -> None:
            calls.append("getitem")

    with suppress(OptionError):
        read_filter(text).keeps({**VALUES, "x": Trap(), "open": Trap(), "print": Trap(), "exit": Trap()})
    assert not calls
