"""Which devices are liked better: load in steps that do not flicker, connections, and CPUs near them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.devices import (
    Condition,
    LinkKind,
    Links,
    by_load,
    combinable,
    cpus_near,
    load_levels,
    simulated_devices,
)
from gpu_launcher.devices.affinity import neighbourhood
from gpu_launcher.errors import RequestError
from gpu_launcher.model import Device, DeviceKind

DEVICES = simulated_devices(4)


def loads(*utilisations: float | None, before: dict[str, int] | None = None) -> dict[str, int]:
    conditions = [Condition(device.uuid, load) for device, load in zip(DEVICES, utilisations, strict=False)]
    return load_levels(conditions, before)


def test_the_least_loaded_come_first_and_equals_in_the_order_given() -> None:
    assert by_load(DEVICES, loads(0.9, 0.0, 0.5, 0.02)) == tuple(DEVICES[i] for i in (1, 3, 2, 0))
    assert by_load(DEVICES[::-1], loads(0.0, 0.0, 0.0, 0.0)) == DEVICES[::-1]
    assert by_load(DEVICES, {}) == DEVICES


def test_a_load_that_is_not_known_counts_as_none() -> None:
    assert by_load(DEVICES, loads(0.9, None))[0] == DEVICES[1]


def test_a_load_that_wavers_between_two_levels_does_not_change_the_order() -> None:
    levels = loads(0.36, 0.40)
    order = by_load(DEVICES[:2], levels)
    for load in (0.39, 0.36, 0.41, 0.37, 0.43, 0.32):
        levels = loads(load, 0.75 - load, before=levels)
        assert by_load(DEVICES[:2], levels) == order
    assert by_load(DEVICES[:2], loads(0.9, 0.0, before=levels)) == DEVICES[1::-1]


@given(
    st.lists(st.floats(0, 1), max_size=4),
    st.dictionaries(st.sampled_from([d.uuid for d in DEVICES]), st.integers(0, 4)),
)
def test_levels_stay_in_range_and_settle_at_once(loads_now: list[float], before: dict[str, int]) -> None:
    levels = loads(*loads_now, before=before)
    assert all(0 <= level <= 4 for level in levels.values())
    assert loads(*loads_now, before=levels) == levels


def test_connections_are_the_same_in_both_directions_and_unknown_by_default() -> None:
    links = Links({frozenset(("a", "b")): LinkKind.NVLINK})
    assert links.between("a", "b") is links.between("b", "a") is LinkKind.NVLINK
    assert links.between("a", "c") is LinkKind.UNKNOWN
    assert LinkKind.NVLINK > LinkKind.SWITCH > LinkKind.HOST_BRIDGE > LinkKind.NODE > LinkKind.SYSTEM > 0


def test_several_devices_are_never_mig_instances() -> None:
    split = [replace(device, kind=DeviceKind.MIG, parent="GPU-a", instance=0) for device in DEVICES[2:]]
    mixed = [*DEVICES[:2], *split]
    assert combinable(mixed, 1) == tuple(mixed)
    assert combinable(mixed, 2) == DEVICES[:2]
    assert combinable(DEVICES, 4) == DEVICES
    assert combinable(mixed, 9) == DEVICES[:2], "too many for this machine: not because of MIG"
    with pytest.raises(RequestError, match="3 devices, and here that takes MIG instances, of which CUDA lets a job"):
        combinable(mixed, 3)


def near(device: Device, *cpus: int) -> Device:
    return replace(device, cpus=cpus)


def test_a_job_is_pinned_to_the_allowed_cpus_near_its_devices() -> None:
    one, other, unknown = near(DEVICES[0], 0, 1, 2, 3), near(DEVICES[1], 4, 5), DEVICES[2]
    assert cpus_near([one], range(8)) == {0, 1, 2, 3}
    assert cpus_near([one, other], range(8)) == {0, 1, 2, 3, 4, 5}
    assert cpus_near([one], {2, 3, 7}) == {2, 3}
    assert cpus_near([], range(8)) is None
    assert cpus_near([one, unknown], range(8)) is None
    assert cpus_near([one], {6, 7}) is None, "what is allowed is the administrator's to say"
    assert cpus_near([one], {2, 3}) is None, "there is nothing to pin"


@pytest.mark.parametrize(
    ("node", "cpus", "expected"),
    [
        ("1", "0-1,8", (1, (0, 1, 8))),
        ("-1", "0-3", (None, (0, 1, 2, 3))),
        ("0", "", (0, ())),
        ("0", "zero", (None, ())),
        ("", "0", (None, ())),
    ],
)
def test_the_neighbourhood_of_a_device_is_what_the_kernel_says(
    tmp_path: Path, node: str, cpus: str, expected: tuple[int | None, tuple[int, ...]]
) -> None:
    device = tmp_path / "sys/bus/pci/devices/0001:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (device / "local_cpulist").write_text(f"{cpus}\n")
    assert neighbourhood("00000001:3B:00.0", tmp_path) == expected
    assert neighbourhood("00000001:3C:00.0", tmp_path) == (None, ())
    assert neighbourhood("../../0", tmp_path) == (None, ())
