"""What several unit tests need."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hydra.core.plugins import Plugins

from tests.played_node import Display

# Hydra's search for plugins executes modules again that are imported already. Later than this, it would replace the
# classes that tests have imported from them.
Plugins.instance()


class LateError(BaseException):
    """SIGALRM has come."""


@pytest.fixture
def alarm() -> Iterator[type[BaseException]]:
    """What SIGALRM raises, wherever the main thread is. Nothing is raised after the test."""

    def late(*_: object) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    yield LateError
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def display() -> Display:
    return Display()
