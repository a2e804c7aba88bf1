"""Tests of readings that pages share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from gpu_launcher.jobs.node_devices import NodeDevice
from gpu_launcher.web import catalogue
from gpu_launcher.web.catalogue import Catalogue
from gpu_launcher.web.fresh import FRESH_SECONDS, Fresh


def test_a_reading_is_used_until_it_is_old() -> None:
    now, calls = 0.0, 0

    def read() -> int:
        nonlocal now, calls
        now += 100.0  # it takes long
        calls += 1
        return calls

    shared = Fresh(read, lambda: now)
    assert [shared(), shared()] == [1, 1]
    now += FRESH_SECONDS + 0.1
    assert [shared(), shared()] == [2, 2]


def test_an_error_is_not_kept() -> None:
    answers = iter([OSError("once"), None])

    def read() -> str:
        if (error := next(answers)) is not None:
            raise error
        return "read"

    shared = Fresh(read, lambda: 0.0)
    with pytest.raises(OSError, match="once"):
        shared()
    assert shared() == "read"


def test_heads_are_asked_once_for_all_tabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(directories: list[Path]) -> list[NodeDevice]:
        asked.append(directories)
        return []

    monkeypatch.setattr(catalogue, "nodes_of_running", ask)
    sweeps, together = Catalogue([tmp_path], lambda: 0.0), Barrier(8)

    def tab() -> list[NodeDevice]:
        together.wait(200)
        return sweeps.nodes()

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(tab) for _ in range(8)]
    assert [one.result() for one in found] == [[]] * 8
    assert asked == [[]]
