"""A pool of two simulated devices for each test, and a node that pauses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpu_launcher.jobs.node import _Link
from gpu_launcher.jobs.node_messages import Ended, Message
from gpu_launcher.jobs.where import Where


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where("simulated:2", tmp_path / "pool")


@pytest.fixture
def pause_after_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make nodes pause after sending the end of a job, so that the program reads it before anything else is sent."""
    send = _Link.send

    def slow_send(link: _Link, message: Message) -> None:
        send(link, message)
        if isinstance(message, Ended):
            time.sleep(0.3)

    monkeypatch.setattr(_Link, "send", slow_send)  # the node is forked from this process
