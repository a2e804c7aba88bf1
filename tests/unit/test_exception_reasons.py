"""What is said in one line of an exception that ended a job."""

from __future__ import annotations

import bdb
import getpass
import io
import itertools
import sys
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from gpu_launcher.processes.exceptions import NO_TERMINAL, RemoteTraceback, describe, reason
from hydra_plugins.gpu_pool_launcher._results import outcome


def raised(message: str, cause: BaseException | None = None, *, explicit: bool = True) -> BaseException:
    try:
        try:
            if cause is not None:
                raise cause
            raise RuntimeError(message)
        except BaseException as error:
            if error is not cause:
                raise
            if explicit:
                raise RuntimeError(message) from error
            raise RuntimeError(message)  # noqa: B904  (the point)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    "message",
    ["", ":", "could not build it:", "\n\ncould not build it: \n\n", "first:\n\nsecond:\n", "\n====\nx:\n====\n"],
)
def test_a_message_that_does_not_tell_the_cause_is_followed_by_it(message: str, explicit: bool) -> None:
    said = describe(raised(message, ValueError("boom"), explicit=explicit))
    assert said.startswith("RuntimeError")
    assert "ValueError: boom" in said
    assert "\n" not in said


@pytest.mark.parametrize(("begin", "blank", "end"), list(itertools.product(["", "\n"], ["", "\n \n"], ["", "\nmore"])))
def test_a_message_that_ends_in_a_colon_goes_on_with_its_next_line(begin: str, blank: str, end: str) -> None:
    assert describe(RuntimeError(f"{begin}sizes differ:\n{blank}\tweight: 3 and 4{end}")) == (
        "RuntimeError: sizes differ: weight: 3 and 4"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError(), "ValueError"),
        (ValueError("\n\n  nan\nmore"), "ValueError: nan"),
        (RuntimeError("nothing follows:"), "RuntimeError: nothing follows:"),
        (raised("step 3", ValueError("boom")), "RuntimeError: step 3 (caused by ValueError: boom)"),
        (raised("step 3", ValueError("boom"), explicit=False), "RuntimeError: step 3"),
        (raised("failed: boom", ValueError("boom")), "RuntimeError: failed: boom"),
        (raised("step 3", RemoteTraceback("Traceback ...")), "RuntimeError: step 3"),
        (raised("a:", raised("b:", ValueError("boom"))), "RuntimeError: a: RuntimeError: b: ValueError: boom"),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                '  File "x.py", line 3, in f\n    g()\nValueError: boom\n'
            ),
            "ValueError: Caught ValueError in DataLoader worker process 0. (ValueError: boom)",
        ),
        (
            RuntimeError("died:\nTraceback (most recent call last):\n  f()\nOSError: no"),
            "RuntimeError: died: OSError: no",
        ),
    ],
)
def test_an_exception_is_described_in_one_line_that_tells_its_cause(error: BaseException, said: str) -> None:
    assert describe(error) == said


# Hydra 1.4 warns of an `instantiate` that is not told what it may execute, which Hydra 1.3 cannot be told.
@pytest.mark.filterwarnings(r"ignore:hydra\.utils\.instantiate\(\) resolved:UserWarning")
def test_an_instantiation_error_of_hydra_names_its_cause_and_its_key() -> None:
    with pytest.raises((InstantiationException, ValueError)) as caught:
        instantiate({"model": {"_target_": "builtins.int", "_args_": ["x"]}})
    cause = "ValueError: invalid literal for int() with base 10: 'x'"
    if isinstance(caught.value, InstantiationException):
        in_words = f"InstantiationException: Error in call to target 'builtins.int': {cause} (full_key: model)"
    else:  # Hydra 1.4 raises the cause itself, and adds the key as a note, which the traceback shows
        in_words = cause
    assert outcome(caught.value) == f"raised {in_words}"


class Group(Exception):
    """As ExceptionGroup, which Python 3.10 lacks."""

    exceptions: Any = ()


@pytest.mark.parametrize(
    ("number", "end"), [(1, ": ValueError: 0"), (2, ": ValueError: 0; ValueError: 1"), (5, "ValueError: 2; and 2 more")]
)
def test_a_group_names_the_first_of_its_exceptions(number: int, end: str) -> None:
    group = Group("some failed")
    group.exceptions = tuple(ValueError(i) for i in range(number))
    assert describe(group).endswith(end)


def test_an_endless_chain_of_causes_is_cut_off() -> None:
    one, other = ValueError("a:"), ValueError("b:")
    one.__cause__, other.__cause__ = other, one
    assert describe(one).count("ValueError") <= 5


def ask_for_a_password() -> None:
    getpass.getpass(stream=io.StringIO())


@pytest.mark.filterwarnings("ignore::getpass.GetPassWarning")
@pytest.mark.parametrize("ask", [input, ask_for_a_password])
def test_a_failed_question_says_that_jobs_have_no_terminal(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(getpass, "getpass", getpass.fallback_getpass)
    with pytest.raises(EOFError) as caught:
        ask()
    assert reason(caught.value).endswith(NO_TERMINAL)
    assert reason(raised("aborted", caught.value)).endswith(NO_TERMINAL)


def test_a_debugger_that_ends_says_that_jobs_have_no_terminal() -> None:
    assert reason(bdb.BdbQuit()) == f"raised BdbQuit; {NO_TERMINAL}"
    assert reason(EOFError("Ran out of input")) == "raised EOFError: Ran out of input"
