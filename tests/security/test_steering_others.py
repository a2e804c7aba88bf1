"""Users who try to steer a sweep that is not theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.control import Answer, Steering
from gpu_launcher.jobs.control_socket import ControlSocket
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.steering import Sweep
from tests.security.accounts import ADA, MALLORY, acting_as


@pytest.fixture
def sweep(parent: Path) -> Iterator[Path]:
    """A running sweep of root in a directory that others can read."""
    recorder = Recorder(parent / "sweep", [Job(0, "", [])], "train.py")
    control = ControlSocket(recorder.directory, recorder.socket)
    (parent / "sweep").chmod(0o755)
    yield parent / "sweep"
    control.serve(refuse_all, lambda: b"")
    control.close()
    recorder.close()


def refuse_all(request: Steering) -> Answer:
    raise AssertionError(f"{request} arrived")


@pytest.mark.parametrize("closed", [None, DIRECTORY, "."])
def test_sweep_of_another_user_is_refused(sweep: Path, closed: str | None) -> None:
    if closed is not None:
        (sweep / closed).chmod(0o700)
    with acting_as(MALLORY), pytest.raises(SteeringError) as caught:
        Sweep(sweep).stop()
    assert str(caught.value) == f"{sweep} belongs to root: only root can steer it"


def test_open_permissions_are_not_enough(sweep: Path) -> None:
    (path,) = (sweep / DIRECTORY).glob("*.sock")
    path.chmod(0o666)
    with acting_as(MALLORY), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b'{"version": 1, "do": "stop", "now": true}\n')


def test_root_may_steer(parent: Path) -> None:
    heard: list[Steering] = []

    def carry_out(request: Steering) -> Answer:
        heard.append(request)
        return {}

    home = parent / "ada"
    home.mkdir(mode=0o700)
    os.chown(home, ADA, ADA)
    with acting_as(ADA):
        control = ControlSocket(home, "launch-abc.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(home / "launch-abc.sock"))
        client.sendall(b'{"version": 1, "do": "status"}\n')
        with acting_as(ADA):
            control.serve(carry_out, lambda: b"")
            control.serve(carry_out, lambda: b"")
            control.close()
    assert len(heard) == 1
