"""From what users write to requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_launcher.errors import OptionError
from gpu_launcher.model import Request
from gpu_launcher.requests import read_request
from gpu_launcher.sizes import GIB


@pytest.mark.parametrize(
    ("written", "request_"),
    [
        ({}, Request.of(1)),
        ({"gpus": "2"}, Request.of(2)),
        ({"gpus": "0.001"}, Request.of(0.001)),
        ({"gpus": "0.5", "memory": "20GiB"}, Request.of(0.5, 20 * GIB)),
        ({"gpus": None, "memory": "20GiB"}, Request.of(None, 20 * GIB)),
        ({"gpus": 0, "priority": "-2", "timeout": "1h30m"}, Request.of(0, priority=-2, timeout=5400)),
    ],
)
def test_text_means_what_numbers_mean(written: dict[str, object], request_: Request) -> None:
    assert read_request(written) == request_


def test_auto_memory_begins_with_a_whole_device() -> None:
    request = read_request({"memory": "auto", "timeout": 60}, learns=True)
    assert request == replace(Request.of(1, timeout=60), auto_memory=True)


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 2])
def test_auto_memory_decides_the_share_alone(gpus: float) -> None:
    with pytest.raises(OptionError, match=r"memory: with auto, the memory decides .* leave out gpus"):
        read_request({"memory": "auto", "gpus": gpus}, learns=True)


@pytest.mark.parametrize(
    ("option", "written"),
    [
        ("gpus", {"gpus": "1.5"}),
        ("gpus", {"gpus": "0.0000001"}),
        ("gpus", {"gpus": 0.0009}),
        ("memory", {"memory": "0GiB"}),
        ("memory", {"memory": "auto"}),
        ("memory", {"gpus": "0", "memory": "1GiB"}),
        ("priority", {"priority": "high"}),
        ("timeout", {"timeout": "0"}),
        ("stagger", {"stagger": "soon"}),
    ],
)
def test_errors_name_the_option_and_can_be_spelled_as_users_do(option: str, written: dict[str, object]) -> None:
    with pytest.raises(OptionError) as raised:
        read_request(written)
    assert raised.value.option == option
    assert str(raised.value.renamed("hydra.launcher.{}".format)).startswith(f"hydra.launcher.{option}: ")
