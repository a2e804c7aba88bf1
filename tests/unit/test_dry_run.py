"""What a dry run says about the requests of a sweep, for given devices and a given pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.outlook import Outlook, device_share, foresee
from gpu_launcher.allocation.survey import Found, PoolSeen, PoolSurvey, take_survey
from gpu_launcher.devices import Condition
from gpu_launcher.devices.cpu import cpu_slots
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.dry_run import describe_needs
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.leases import LeaseView, PoolView, TicketView
from gpu_launcher.leases.grant_policy import Candidate, Demand
from gpu_launcher.model import WHOLE, Device, Owner, Request
from hydra_plugins.gpu_pool_launcher._dry_run import sample

DEVICES = simulated_devices(4)
EMPTY = PoolView((), (), 0)
OURS = Owner(1, "anna", "train.py #3 lr=0.1")


def lease(*devices: Device, left: float | None = None) -> LeaseView:
    return LeaseView(f"lease-{devices[0].index}", {device.uuid: WHOLE for device in devices}, OURS, None, left)


def ticket(request: Request, priority: int = 0) -> TicketView:
    demand = Demand(request, tuple(Candidate(device.uuid) for device in DEVICES))
    return TicketView("ticket", 7, priority, demand, Owner(2, "ben", "eval.py"), None)


def test_all_devices_of_an_empty_pool_can_be_had_at_once() -> None:
    assert foresee(Request.of(1), 3, DEVICES, EMPTY, {}) == Outlook(3)
    assert foresee(Request.of(0.5), 20, DEVICES, EMPTY, {}).now == 8
    assert foresee(Request.of(2), 20, DEVICES, EMPTY, {}).now == 2
    assert foresee(Request.of(0), 20, (), EMPTY, {}) == Outlook(20)


def test_impossible_request_is_told_from_one_that_waits() -> None:
    never = foresee(Request.of(5), 1, DEVICES, EMPTY, {})
    assert (never.now, never.reason) == (0, "")
    assert never.never is not None
    assert never.never.startswith("for 5 devices, but the pool has 4")
    waits = foresee(Request.of(1), 1, DEVICES, PoolView((), (lease(*DEVICES),), 0), {})
    assert (waits.now, waits.never) == (0, None)
    assert waits.reason == "simulated GPU 0-3 held by anna (train.py #3 lr=0.1)"


def test_device_in_use_outside_the_pool_is_not_granted() -> None:
    outlook = foresee(Request.of(4), 1, DEVICES, EMPTY, {DEVICES[1].uuid: "is used by process 9"})
    assert outlook == Outlook(0, None, "simulated GPU 1 is used by process 9")


def test_tickets_of_no_lower_priority_go_first() -> None:
    pool = PoolView((ticket(Request.of(4)),), (lease(DEVICES[0]),), 0)
    behind = foresee(Request.of(1), 1, DEVICES, pool, {})
    assert behind.now == 0
    assert behind.reason.endswith("ben (eval.py) is ahead in the queue")
    assert foresee(Request.of(1, priority=1), 3, DEVICES, pool, {}) == Outlook(3)


def test_job_with_a_time_limit_passes_one_that_must_wait_longer() -> None:
    pool = PoolView((ticket(Request.of(4)),), (lease(DEVICES[0], left=100.0),), 0)
    assert foresee(Request.of(1, timeout=60.0), 1, DEVICES, pool, {}).now == 1
    assert foresee(Request.of(1, timeout=600.0), 1, DEVICES, pool, {}).now == 0


def test_memory_counts_as_the_part_of_the_device_that_has_it() -> None:
    device = simulated_devices(1)[0]
    assert device.memory is not None
    assert device_share(Request.of(None, device.memory // 4), (device,)) == 0.25
    assert device_share(Request.of(2), (device,)) == 2
    assert device_share(Request.of(0.5), ()) == 0.5


def options(max_parallel: int | None = None) -> Options:
    return Options("auto", None, max_parallel, 10.0, None, None, DeviceEnvironment(), spell=lambda one: f"--{one}")


def survey(devices: tuple[Device, ...], pool: PoolView = EMPTY, *conditions: Condition) -> PoolSurvey:
    known = {device.uuid: device for device in devices}
    return take_survey(
        Found(devices, known=known, only=True),
        conditions,
        PoolSeen(Path("pool"), pool),
        time=0.0,
        machine="here",
        exists=lambda pid: True,
        busy_memory=None,
    )


@pytest.mark.parametrize(
    ("requests", "total", "max_parallel", "lines"),
    [
        ({Request.of(1): 1}, 1, None, ("1 job needs 1 GPU: it can start now",)),
        ({Request.of(2): 2}, 2, None, ("2 jobs need 2 GPUs each: all can start now",)),
        ({Request.of(1): 9}, 9, None, ("9 jobs need 1 GPU each: 4 can start now, the others when those end",)),
        ({Request.of(1): 9}, 9, 2, ("9 jobs need 1 GPU each: 2 can start now, the others when those end",)),
        ({Request.of(0): 9}, 9, 3, ("9 jobs need no device: 3 can start now, the others when those end",)),
        ({Request.of(1): 9}, 800, None, ("800 jobs need 1 GPU each: 4 can start now, the others when those end",)),
        ({Request.of(1): 9}, None, None, ("each job needs 1 GPU: 4 can start now, the others when those end",)),
        (
            {Request.of(1): 9, Request.of(2): 1},
            800,
            None,
            (
                "9 of 10 examined jobs need 1 GPU: 4 can start now, the others when those end",
                "1 of 10 examined jobs need 2 GPUs: it can start now",
            ),
        ),
        ({}, 800, None, ()),
    ],
)
def test_jobs_of_equal_needs_get_one_line(
    requests: Mapping[Request, int], total: int | None, max_parallel: int | None, lines: tuple[str, ...]
) -> None:
    needs = describe_needs(requests, total, options(max_parallel), "job", survey(DEVICES))
    assert tuple(line for line in needs.lines if "hours:" not in line) == lines
    assert needs.possible


def test_each_device_in_the_way_is_named_once() -> None:
    condition = Condition(DEVICES[0].uuid, fault="has fallen off the bus")
    found = survey(DEVICES, PoolView((), (lease(*DEVICES[1:]),), 0), condition)
    needs = describe_needs({Request.of(1): 2}, 2, options(), "job", found)
    assert needs.lines[0] == (
        "2 jobs need 1 GPU each: they wait now: simulated GPU 1-3 held by anna (train.py #3 lr=0.1); "
        "simulated GPU 0 has fallen off the bus"
    )
    assert needs.possible


def test_one_impossible_request_makes_the_sweep_impossible() -> None:
    needs = describe_needs({Request.of(1): 2, Request.of(9): 1}, 3, options(), "job", survey(DEVICES))
    assert not needs.possible
    assert "1 job needs 9 GPUs, which is never granted: the request is for 9 devices, but the pool has 4" in " ".join(
        needs.lines
    )


def test_what_other_machines_have_is_not_guessed() -> None:
    needs = describe_needs({Request.of(900): 2}, 2, options(), "job", None)
    assert needs.possible
    assert needs.lines[0] == "2 jobs need 900 GPUs each; the nodes say whether they can grant that once they run"


@pytest.mark.parametrize(
    ("requests", "total", "devices", "line"),
    [
        (
            {Request.of(1, timeout=1800.0): 6},
            6,
            DEVICES,
            "GPU hours: at most 3, if each job takes as long",
        ),
        ({Request.of(1): 6}, 6, DEVICES, "GPU hours: 6 for each hour that a job takes"),
        ({Request.of(1): 3, Request.of(2): 3}, 12, DEVICES, "GPU hours: about 18 for each hour"),
        ({Request.of(0.5, timeout=60.0): 6}, 6, DEVICES, "GPU hours: at most 0.05,"),
        ({Request.of(1): 2}, 2, cpu_slots(2), "CPU slot hours: 2 for each hour"),
    ],
)
def test_device_time_follows_from_the_time_limits(
    requests: Mapping[Request, int], total: int, devices: tuple[Device, ...], line: str
) -> None:
    assert describe_needs(requests, total, options(), "job", survey(devices)).lines[-1].startswith(line)


def test_jobs_without_devices_take_no_device_time() -> None:
    (line,) = describe_needs({Request.of(0): 2}, 2, options(1), "job", survey(DEVICES)).lines
    assert "hours" not in line


def test_sample_has_each_value_if_there_is_room() -> None:
    jobs = [Job(number, "", [f"a={number // 50}", f"b={number % 50}"]) for number in range(1000)]
    chosen = sample(jobs, 100)
    assert len(chosen) == 100
    assert [job.number for job in chosen] == sorted({job.number for job in chosen})
    assert {text for job in chosen for text in job.spec} == {text for job in jobs for text in job.spec}
    assert sample(jobs, 1000) == jobs
    assert sample(jobs, 100) == chosen, "each dry run examines the same jobs"
