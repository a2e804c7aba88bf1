"""Signals that stop a sweep, sent to this very process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from gpu_launcher.processes.signals import SAME_SIGNAL_SECONDS, StopSignals

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signals(clock: Clock) -> Iterator[StopSignals]:
    with StopSignals(clock) as signals:
        yield signals


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_signals_that_come_together_count_once_and_the_first_of_them_gives_the_reason(signals, clock):
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert signals.take() == 1
    clock.now += SAME_SIGNAL_SECONDS / 2
    send(signal.SIGINT)
    assert signals.take() == 0
    assert signals.last is signal.SIGTERM


def test_a_signal_that_comes_later_counts_again(signals, clock):
    send(signal.SIGTERM)
    assert signals.take() == 1
    clock.now += SAME_SIGNAL_SECONDS
    send(signal.SIGINT)
    assert signals.take() == 1
    assert signals.last is signal.SIGINT


def test_a_terminal_that_is_gone_stops_it_and_does_not_insist(signals, clock):
    send(signal.SIGHUP)
    assert signals.take() == 1
    assert signals.last is signal.SIGHUP
    clock.now += SAME_SIGNAL_SECONDS
    send(signal.SIGHUP)
    assert signals.take() == 0
    send(signal.SIGHUP)
    send(signal.SIGTERM)
    assert signals.take() == 1
    assert signals.last is signal.SIGTERM


def test_other_signals_do_not_count(signals):
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: None)
    try:
        send(signal.SIGUSR1)
        assert signals.take() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "ignored", [[signal.SIGINT], [signal.SIGHUP], [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]], ids=str
)
def test_a_signal_that_the_program_ignores_stays_ignored(ignored):
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in ignored}
    try:
        with StopSignals() as signals:
            for signum in ignored:
                assert signal.getsignal(signum) is signal.SIG_IGN
                send(signum)
            assert not select.select([signals], [], [], 0)[0]
            assert signals.take() == 0
        for signum in ignored:
            assert signal.getsignal(signum) is signal.SIG_IGN
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_hangup_is_ignored_from_then_on_even_one_that_came_before():
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopSignals() as signals:
            send(signal.SIGHUP)
            signals.ignore_hangups()
            send(signal.SIGHUP)
            assert signals.take() == 0
            send(signal.SIGTERM)
            assert signals.take() == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_and_wakeup_descriptor_are_those_from_before_afterwards():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    before = [signal.getsignal(signum) for signum in STOPPING]
    try:
        with StopSignals():
            assert [signal.getsignal(signum) for signum in STOPPING] != before
        assert [signal.getsignal(signum) for signum in STOPPING] == before
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)
