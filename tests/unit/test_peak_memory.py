"""What `memory=auto` gives to later jobs, from the peaks of earlier ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.devices import Condition
from gpu_launcher.devices.condition import GpuProcess
from gpu_launcher.devices.cpu import cpu_slots
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.job_record import JobRun
from gpu_launcher.jobs.peak_memory import MIN_JOBS, MIN_MEASUREMENTS, STEP, PeakMemory
from gpu_launcher.model import Device, Share

GIB = 2**30
DEVICES = tuple(replace(device, memory=80 * GIB) for device in simulated_devices(2))


def learned(*peaks: int | None, devices: tuple[Device, ...] = DEVICES) -> PeakMemory:
    made = PeakMemory(devices)
    for peak in peaks:
        made.note(peak, MIN_MEASUREMENTS, completed=True)
    return made


def test_first_jobs_get_whole_devices() -> None:
    assert learned().share is None
    assert learned(*[GIB] * (MIN_JOBS - 1)).share is None
    assert learned(*[GIB] * MIN_JOBS).share is not None


def test_highest_peak_counts_with_head_room() -> None:
    assert learned(10 * GIB, 20 * GIB, 5 * GIB).share == Share(0, 24 * GIB)
    assert learned(GIB, GIB, GIB).share == Share(0, 2 * GIB), "at least 1 GiB of head-room"
    grown = learned(10 * GIB, 10 * GIB, 10 * GIB)
    grown.note(30 * GIB, MIN_MEASUREMENTS, completed=False)
    assert grown.share == Share(0, 36 * GIB), "a job that failed needed that memory, too"


def test_jobs_that_failed_or_were_hardly_measured_are_not_enough() -> None:
    made = learned(*[GIB] * (MIN_JOBS - 1))
    made.note(GIB, MIN_MEASUREMENTS, completed=False)
    made.note(GIB, MIN_MEASUREMENTS - 1, completed=True)
    made.note(None, 0, completed=True)
    assert made.share is None


def test_job_that_was_hardly_measured_does_not_raise_the_share() -> None:
    made = learned(*[GIB] * MIN_JOBS)
    made.note(60 * GIB, MIN_MEASUREMENTS - 1, completed=True)
    assert made.share == Share(0, 2 * GIB)


def test_share_that_was_too_small_is_raised_once_for_all_jobs_that_had_it() -> None:
    made = learned(*[GIB] * MIN_JOBS)
    for _ in range(3):
        made.note_too_small(Share(0, 2 * GIB))
    assert made.share == Share(0, 3 * GIB)
    while (share := made.share) is not None:
        made.note_too_small(share)  # until nothing is packed any more


@pytest.mark.parametrize(
    "devices",
    [
        (DEVICES[0], replace(DEVICES[1], memory=10 * GIB)),
        (DEVICES[0], replace(DEVICES[1], exclusive=True)),
        (DEVICES[0], replace(DEVICES[1], memory=None)),
        cpu_slots(2),
    ],
)
def test_whole_devices_are_kept_where_a_share_might_never_be_granted(devices: tuple[Device, ...]) -> None:
    assert learned(*[10 * GIB] * 5, devices=devices).share is None


def test_jobs_that_nearly_fill_a_device_stay_alone() -> None:
    assert learned(*[70 * GIB] * 5).share is None


def test_sweep_without_measurements_is_noticed_once() -> None:
    made = PeakMemory(DEVICES)
    found = []
    for _ in range(2 * MIN_JOBS):
        made.note(None, 0, completed=True)
        found.append(made.blind)
    assert found == [number == MIN_JOBS - 1 for number in range(2 * MIN_JOBS)]
    assert not learned(*[GIB] * MIN_JOBS).blind


@given(st.lists(st.integers(1, 100 * GIB), min_size=1, max_size=8))
def test_share_always_covers_the_highest_peak_and_fits_each_device(peaks: list[int]) -> None:
    share = learned(*peaks).share
    if share is not None:
        assert max(peaks) + GIB <= share.memory <= 80 * GIB
        assert share.memory % STEP == 0
        assert not share.whole


def test_processes_of_a_job_are_added_up_and_its_fullest_device_counts() -> None:
    run = JobRun(None, 0, pid=7, devices=DEVICES)  # type: ignore[arg-type]
    first = GpuProcess(8, GIB, ancestors=(7, 1)), GpuProcess(9, 2 * GIB, ancestors=(8, 7, 1))
    other = (GpuProcess(50, 40 * GIB, ancestors=(1,)), GpuProcess(8, 4 * GIB, ancestors=(7, 1)))
    run.note_conditions([Condition(DEVICES[0].uuid, processes=first)])
    assert (run.peak_device_memory, run.measurements) == (3 * GIB, 1)
    run.note_conditions([Condition(DEVICES[0].uuid, processes=first), Condition(DEVICES[1].uuid, processes=other)])
    assert (run.peak_device_memory, run.measurements) == (4 * GIB, 2)
    run.note_conditions([Condition(DEVICES[0].uuid, processes=()), Condition("elsewhere", processes=first)])
    assert (run.peak_device_memory, run.measurements) == (4 * GIB, 2)
