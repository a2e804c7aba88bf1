"""Values of options that several entry points check alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpu_launcher.errors import OptionError
from gpu_launcher.validation import integer, one_of, read_integer, read_start_method, true_or_false


def test_accepted_values_are_returned() -> None:
    assert integer("n", 3, least=1) == 3
    assert [read_integer("n", value, least=1) for value in (3, 3.0, "3", " 3 ")] == [3, 3, 3, 3]
    assert one_of("pin", None, (None, "auto")) is None
    assert true_or_false("ordered", False) is False
    assert read_start_method("fork") == "fork"


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: integer("n", "3", least=1), "n: must be an integer >= 1, got '3'"),
        (lambda: integer("n", True, least=0), "n: must be an integer >= 0, got True"),
        (lambda: integer("n", 0, least=1, most=9), "n: must be an integer from 1 to 9, got 0"),
        (lambda: read_integer("n", "x", least=1, or_else="null"), "n: must be an integer >= 1, or null, got 'x'"),
        (lambda: read_integer("n", 1.5, least=1), "n: must be an integer >= 1, got 1.5"),
        (lambda: read_integer("n", float("inf"), least=1), "n: must be an integer >= 1, got inf"),
        (lambda: one_of("pin", "x", (None, "auto")), "pin: must be one of null, auto, got 'x'"),
        (lambda: true_or_false("ordered", 1), "ordered: must be True or False, got 1"),
        (lambda: read_start_method("x"), "start_method: must be one of auto, fork, spawn, got 'x'"),
    ],
)
def test_refused_values_are_named_with_what_is_allowed(check: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        check()
    assert str(refused.value) == message
