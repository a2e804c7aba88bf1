"""Whether somebody outside the pool uses a device: cases from servers, desktops and containers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.devices import Condition, GpuProcess, foreign_processes, why_busy
from gpu_launcher.model import BUSY_MEMORY
from gpu_launcher.sizes import GIB, MIB

LAUNCHER = 100
STRANGER = GpuProcess(4711, 3 * GIB, "anna", "train.py --lr 1", ancestors=(500, 1))
JOB = GpuProcess(120, 10 * GIB, "bert", "python train.py", ancestors=(110, 105, LAUNCHER, 50, 1))
LAUNCHER_ITSELF = GpuProcess(LAUNCHER, GIB, "bert", "python train.py -m", ancestors=(50, 1))
HIDDEN = GpuProcess(99, 3 * GIB)
DESKTOP = GpuProcess(800, 200 * MIB, "anna", "gnome-shell", ancestors=(1,), draws=True)
RENDERER = GpuProcess(801, 6 * GIB, "anna", "blender", ancestors=(1,), draws=True)
MPS = GpuProcess(802, 30 * MIB, "root", "nvidia-cuda-mps-server -d", ancestors=(1,))


def condition(used: int | None, *processes: GpuProcess) -> Condition:
    return Condition("GPU-a", 0.5, used, processes)


def test_a_device_that_nobody_uses_is_not_busy() -> None:
    assert why_busy(condition(300 * MIB), owners={LAUNCHER}) is None
    assert why_busy(condition(0), owners=()) is None


def test_a_foreign_process_is_named_however_little_memory_it_has() -> None:
    assert why_busy(condition(0, STRANGER), owners={LAUNCHER}) == ("is used by train.py --lr 1 (pid 4711, anna, 3 GiB)")
    assert why_busy(condition(None, STRANGER), owners=()) is not None
    assert (why_busy(condition(0, STRANGER, STRANGER), owners=()) or "").count(" and ") == 1


def test_what_a_launching_program_started_is_the_pools() -> None:
    assert foreign_processes(condition(0, JOB, STRANGER), {LAUNCHER}) == (STRANGER,)
    assert foreign_processes(condition(0, JOB, STRANGER), {LAUNCHER, 500}) == ()
    assert why_busy(condition(10 * GIB, JOB), owners={LAUNCHER}, leased=12 * GIB, leases=1) is None


def test_a_program_that_used_cuda_before_it_launched_does_not_wait_for_itself() -> None:
    assert why_busy(condition(GIB, LAUNCHER_ITSELF), owners={LAUNCHER}) is None
    assert why_busy(condition(GIB, LAUNCHER_ITSELF), owners={300}) is not None


@pytest.mark.parametrize("process", [DESKTOP, MPS])
def test_display_servers_and_servers_of_others_do_not_count(process: GpuProcess) -> None:
    assert why_busy(condition(400 * MIB, process), owners=()) is None


def test_a_program_that_also_draws_is_judged_by_memory() -> None:
    assert why_busy(condition(6 * GIB, RENDERER), owners=()) is not None


def test_a_process_that_cannot_be_attributed_is_judged_by_memory() -> None:
    assert foreign_processes(condition(3 * GIB, HIDDEN), {LAUNCHER}) == ()
    assert why_busy(condition(3 * GIB, HIDDEN), owners={LAUNCHER}) == (
        "has 3 GiB in use by processes that cannot be told from here"
    )
    assert why_busy(condition(3 * GIB, HIDDEN), owners={LAUNCHER}, leased=3 * GIB, leases=1) is None


def test_a_lease_from_another_container_leaves_memory_to_judge_by() -> None:
    assert why_busy(condition(3 * GIB, STRANGER), owners=None, leased=3 * GIB, leases=1) is None
    assert why_busy(condition(9 * GIB, STRANGER), owners=None, leased=3 * GIB, leases=1) == (
        "has 9 GiB in use where 3 GiB are leased"
    )


def test_each_lease_may_have_a_context_beyond_what_it_declared() -> None:
    for leases in range(1, 5):
        most = leases * 5 * GIB + (leases + 1) * BUSY_MEMORY
        assert why_busy(condition(most), owners=(), leased=leases * 5 * GIB, leases=leases) is None
        assert why_busy(condition(most + 1), owners=(), leased=leases * 5 * GIB, leases=leases) is not None


def test_a_device_that_does_not_report_memory_is_judged_by_processes_alone() -> None:
    assert why_busy(condition(None, HIDDEN), owners=()) is None
    assert why_busy(Condition("GPU-a"), owners=()) is None


def test_busy_memory_is_the_users_to_say_and_none_means_not_to_look() -> None:
    assert why_busy(condition(3 * GIB), owners=(), busy_memory=4 * GIB) is None
    assert why_busy(condition(MIB), owners=(), busy_memory=0) is not None
    assert why_busy(condition(9 * GIB, STRANGER), owners=(), busy_memory=None) is None


PIDS = st.integers(1, 6)
PROCESSES = st.builds(
    GpuProcess,
    pid=PIDS,
    memory=st.none() | st.integers(0, 4 * GIB),
    command=st.sampled_from([None, "train.py", "/usr/bin/nvidia-cuda-mps-server"]),
    ancestors=st.none() | st.lists(PIDS, max_size=3).map(tuple),
    draws=st.booleans(),
)
CONDITIONS = st.builds(
    Condition,
    uuid=st.just("GPU-a"),
    memory_used=st.none() | st.integers(0, 8 * GIB),
    processes=st.none() | st.lists(PROCESSES, max_size=3).map(tuple),
)


@given(CONDITIONS, st.none() | st.frozensets(PIDS), st.integers(0, 4 * GIB), st.integers(0, 3), st.integers(0, GIB))
def test_more_leased_more_owners_and_more_tolerance_never_make_a_device_busy(
    condition: Condition, owners: frozenset[int] | None, leased: int, leases: int, busy_memory: int
) -> None:
    if why_busy(condition, owners=owners, leased=leased, leases=leases, busy_memory=busy_memory) is None:
        for more in (owners, None if owners is None else owners | {1, 2}):
            reason = why_busy(
                condition, owners=more, leased=leased + MIB, leases=leases + 1, busy_memory=busy_memory + MIB
            )
            assert reason is None


@given(CONDITIONS, st.frozensets(PIDS))
def test_a_foreign_process_always_means_busy(condition: Condition, owners: frozenset[int]) -> None:
    if foreign_processes(condition, owners):
        assert why_busy(condition, owners=owners, leased=2**50, leases=9) is not None
