"""The main process of a job of `sbatch`: how long it waits for a bridge that takes nothing of what the agent says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_launcher.nodes.authenticated_socket import AuthenticatedSocket, FrameKind, Listener
from gpu_launcher.nodes.authentication import new_key
from gpu_launcher.nodes.rendezvous import Contact, RendezvousDirectory
from tests.waiting import until

MAIN = """
import os, signal
from gpu_launcher.nodes import sbatch_node
connect = sbatch_node.connect
def signalled(*contact):
    os.kill(os.getpid(), signal.SIGTERM)
    return connect(*contact)
if {early}:
    sbatch_node.connect = signalled
sbatch_node.LAST_WORDS_SECONDS = {last_words}
sbatch_node.main()
"""
SIZE = 64 * 2**20
"""More than a connection takes that nobody reads."""
SPEAKS = f"import os; os.set_blocking(1, True); [os.write(1, bytes(2**16)) for _ in range({SIZE // 2**16})]"
ENDS = f"import threading, time, os; threading.Thread(target=lambda: (time.sleep(1), os._exit(3))).start(); {SPEAKS}"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    key = new_key()
    with Listener(key) as made:
        RendezvousDirectory.create(tmp_path, Contact(("127.0.0.1",), made.port, key))
        yield made


@contextlib.contextmanager
def node(
    listener: Listener, directory: Path, agent: str, last_words: float = 60.0, *, early: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], AuthenticatedSocket]]:
    (key_file,) = directory.glob("*/key")
    main = MAIN.format(last_words=last_words, early=early)
    words = [sys.executable, "-c", main, str(key_file), sys.executable, "-c", agent]
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            with until(listener.accept, "it does not connect") as connection:
                yield process, connection
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the agent, too


def test_agent_waits_for_a_head_that_is_busy(listener, tmp_path):
    with node(listener, tmp_path, SPEAKS) as (process, connection):
        time.sleep(1)
        arrived, status = 0, b""
        while not status:
            for frame in connection.receive():
                arrived += len(frame.data) if frame.kind is FrameKind.DATA else 0
                status = frame.data if frame.kind is FrameKind.END else b""
        assert (arrived, status) == (SIZE, b"0")
        assert process.wait(60) == 0


def test_job_ends_soon_after_its_agent_if_nothing_takes_its_last_words(listener, tmp_path):
    with node(listener, tmp_path, ENDS, 0.5) as (process, _):
        assert process.wait(60) == 1


def test_agent_gets_a_signal_that_arrived_before_it_was_there(listener, tmp_path):
    with node(listener, tmp_path, "import time; time.sleep(600)", early=True) as (process, connection):
        (end,) = until(connection.receive, "it does not say how its agent ended")
        assert (end.kind, end.data) == (FrameKind.END, b"143")
        assert process.wait(60) == 0
