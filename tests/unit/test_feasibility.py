"""A request that can never be granted: which option is to blame."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.allocation.feasibility import refusal, refuse
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.errors import OptionError
from gpu_launcher.model import MILLIONTHS, Device, Request, Share

GIB = 2**30


def blamed(request: Request, devices: tuple[Device, ...]) -> str | None:
    try:
        refuse(request, devices, lambda option: f"--{option}")
    except OptionError as error:
        return error.option
    return None


def machine(*memories: int | None, exclusive: int = 0) -> tuple[Device, ...]:
    devices = simulated_devices(len(memories))
    return tuple(
        replace(device, memory=memory and memory * GIB, exclusive=number < exclusive)
        for number, (device, memory) in enumerate(zip(devices, memories, strict=True))
    )


@pytest.mark.parametrize(
    ("gpus", "memory", "devices", "option", "says"),
    [
        (1, 200, machine(80, 80), "--memory", "the largest device has 80 GiB: ask for less"),
        (None, 200, machine(80, 40), "--memory", "the largest device has 80 GiB: ask for less"),
        (0.5, 200, machine(80), "--memory", "the largest device has 80 GiB: ask for less"),
        (2, 200, machine(80, 80), "--memory", "the largest device has 80 GiB: ask for less"),
        (2, 60, machine(80, 40, 40), "--memory", "simulated GPU 1, simulated GPU 2 with less than 60 GiB of memory"),
        (3, 20, machine(80, 80), "--gpus", "3 devices, but the pool has 2"),
        (3, 200, machine(80, 80), "--gpus", "3 devices, but the pool has 2"),
        (0.5, None, machine(80, exclusive=1), "--gpus", "EXCLUSIVE_PROCESS, which only one process may use): ask for"),
        (None, 20, machine(80, exclusive=1), "--memory", "ask for whole devices, or allow more devices"),
        (0.5, 20, machine(80, exclusive=1), "--gpus", "ask for whole devices, or allow more devices"),
    ],
)
def test_option_that_asks_for_too_much_is_named(
    gpus: float | None, memory: int | None, devices: tuple[Device, ...], option: str, says: str
) -> None:
    request = Request.of(gpus, memory and memory * GIB)
    assert blamed(request, devices) == option
    assert says in (refusal(request, devices) or "")


@given(
    gpus=st.sampled_from([None, 0.25, 0.5, 1, 2, 3, 4]),
    memory=st.sampled_from([None, 10, 50, 100]),
    memories=st.lists(st.sampled_from([None, 8, 40, 80]), min_size=1, max_size=3),
    exclusive=st.integers(0, 3),
)
def test_memory_is_blamed_exactly_if_less_of_it_would_help(
    gpus: float | None, memory: int | None, memories: list[int | None], exclusive: int
) -> None:
    if gpus is None and memory is None:
        gpus = 1
    request, devices = Request.of(gpus, memory and memory * GIB), machine(*memories, exclusive=exclusive)
    without = replace(request, share=Share(request.share.millionths or MILLIONTHS))
    option = blamed(request, devices)
    if option is None:
        assert refusal(request, devices) is None
    elif memory is None or request.gpus > len(devices):
        assert option == "--gpus"
    elif refusal(without, devices) is None or all(known is not None and known < memory for known in memories):
        assert option == "--memory"
        assert "memory" in (refusal(request, devices) or "") or exclusive
    else:
        assert option == "--gpus"
