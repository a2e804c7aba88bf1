"""Amounts of memory: what users write, and what messages show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.errors import OptionError
from gpu_launcher.sizes import GIB, MIB, read_memory, show_memory


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("20GiB", 20 * GIB),
        ("20 gib", 20 * GIB),
        (" 1.5GiB ", 3 * GIB // 2),
        ("10G", 10 * GIB),
        ("512m", 512 * MIB),
        ("2048K", 2 * MIB),
        ("2048KiB", 2 * MIB),
        ("1T", 1024 * GIB),
        ("500MB", 500_000_000),
        ("0.5GB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("3000kB", 3_000_000),
        ("21474836480", 20 * GIB),
        ("21474836480B", 20 * GIB),
        (20 * GIB, 20 * GIB),
        (2e9, 2 * 10**9),
        (0, 0),
        ("0", 0),
        ("0GiB", 0),
    ],
)
def test_memory_is_read_as_people_write_it(value: object, size: int) -> None:
    assert read_memory(value, "memory") == size


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "'' is not an amount of memory: write one like 20GiB"),
        ("much", "'much' is not an amount"),
        ("20 apples", "'20 apples' is not an amount"),
        ("-1GiB", "'-1GiB' is not an amount"),
        (-5, "-5 is not an amount"),
        ("1e3GiB", "'1e3GiB' is not an amount"),
        ("٣GiB", "is not an amount"),
        (float("nan"), "nan is not an amount"),
        (float("inf"), "inf is not an amount"),
        (True, "True is not an amount"),
        (None, "None is not an amount"),
        ([1], "[1] is not an amount"),
        ("9" * 500, "is not an amount"),
        (20, "20 is less than 1 MiB; write 20GiB if gibibytes are meant"),
        ("20", "'20' is less than 1 MiB; write 20GiB if gibibytes are meant"),
        ("20KB", "'20KB' is less than 1 MiB"),
        ("0.0001K", "'0.0001K' is less than 1 MiB"),
    ],
)
def test_what_is_no_amount_is_refused_with_the_option_and_the_remedy(value: object, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_memory(value, "hydra.launcher.memory")
    assert words in str(caught.value)
    assert str(caught.value).startswith("hydra.launcher.memory: ")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 MiB"), (300 * MIB, "300 MiB"), (GIB, "1 GiB"), (3 * GIB // 2, "1.5 GiB"), (140 * GIB + 5, "140 GiB")],
)
def test_memory_is_shown_short(size: int, text: str) -> None:
    assert show_memory(size) == text


@given(st.integers(16 * MIB, 2**45))
def test_what_is_shown_reads_back_as_about_the_same(size: int) -> None:
    assert read_memory(show_memory(size), "memory") == pytest.approx(size, rel=0.06)


@given(st.text(max_size=12) | st.integers() | st.floats() | st.none() | st.binary(max_size=3))
def test_any_value_is_an_amount_or_an_option_error(value: object) -> None:
    try:
        size = read_memory(value, "memory")
    except OptionError as error:
        message = str(error)
    else:
        assert size >= 0
        return
    assert message.startswith("memory: ")
    assert "\n" not in message
