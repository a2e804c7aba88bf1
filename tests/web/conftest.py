"""Fixtures that serve pages on sweeps that the tests write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.web.serving import SCRIPT, WebServer, WrittenSweep, write_sweep


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sweeps, below which the module's server looks."""
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def server(sweeps: Path, sweep: WrittenSweep, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server on `sweeps`, with one in it, because it looks for new ones every few seconds only."""
    server = WebServer(sweeps, log=tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.end() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    """Starts servers with options, and ends them."""
    started: list[WebServer] = []

    def start(*arguments: str, directory: Path = tmp_path) -> WebServer:
        started.append(WebServer(directory, *arguments, log=tmp_path / f"log{len(started)}"))
        return started[-1]

    yield start
    for server in started:
        server.end()


@pytest.fixture(scope="module")
def sweep(sweeps: Path) -> WrittenSweep:
    return write_sweep(sweeps / f"runs {SCRIPT.replace('/', '')}")
