"""When Ctrl-C raises while a study is optimized."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gpu_launcher.studies import deferred_sigint
from gpu_launcher.studies.deferred_sigint import DeferredSigint


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_held_until_it_is_heeded_and_each_raises_once() -> None:
    with DeferredSigint() as held:
        press()
        press()
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt), held.allowed():
                raise AssertionError("not reached")
        with held.allowed():
            pass
        with pytest.raises(KeyboardInterrupt), held.allowed():
            press()
        press()  # held again
        with pytest.raises(KeyboardInterrupt), held.allowed():
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_never_heeded_raises_in_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), DeferredSigint():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nobody_is_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_sigint, "MAX_DEFERRED_SECONDS", 0.0)
    with DeferredSigint(), pytest.raises(KeyboardInterrupt):
        press()


def test_a_handler_that_does_not_raise_is_called_each_time() -> None:
    called: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: called.append(arguments))
    with DeferredSigint() as held:
        with held.allowed():
            press()
            press()
        press()
        assert len(called) == 2
        with held.allowed():
            assert len(called) == 3


def test_a_handler_that_somebody_sets_meanwhile_stays() -> None:
    with DeferredSigint():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_other_threads_nothing_happens() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with DeferredSigint() as held, held.allowed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
