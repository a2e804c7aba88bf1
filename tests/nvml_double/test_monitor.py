"""The process that watches devices: asked without waiting, and gone with the launch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpu_launcher.devices import cpu_slots
from gpu_launcher.devices.monitor import ConditionMonitor
from gpu_launcher.model import Device, DeviceKind
from tests.waiting import alive, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Machine  # type: ignore[import-not-found]

A, B = (Device(f"GPU-{name}", index, "NVIDIA Double", DeviceKind.GPU) for index, name in enumerate("ab"))


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The machine, for processes that this one starts."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(machine.libraries))
    monkeypatch.setenv("NVML_DOUBLE_STATE", str(machine.state))
    machine.has("count 2", *machine.gpu(0, "GPU-a", "utilisation 10"), *machine.gpu(1, "GPU-b", "utilisation 20"))
    return machine


@pytest.fixture
def monitor(here: Machine) -> Iterator[ConditionMonitor]:
    monitor = ConditionMonitor((B, A))
    yield monitor
    monitor.close()


def wait(monitor: ConditionMonitor) -> None:
    """Until the answer is there."""
    until(lambda: monitor.receive() is not None, "there is no answer")


def watcher(monitor: ConditionMonitor) -> subprocess.Popen[bytes]:
    process = monitor._process
    assert process is not None
    return process


def test_it_answers_each_question_with_how_the_devices_are_then(here: Machine, monitor: ConditionMonitor) -> None:
    assert monitor.latest is None
    monitor.ask(3.0)
    assert monitor.asking == 3.0
    wait(monitor)
    assert monitor.latest is not None
    assert (monitor.latest.asked, monitor.latest.problem, monitor.asking) == (3.0, None, None)
    assert [(c.uuid, c.utilisation) for c in monitor.latest.conditions] == [("GPU-b", 0.2), ("GPU-a", 0.1)]
    here.now("0.utilisation 90")
    monitor.ask(4.0)
    wait(monitor)
    assert monitor.latest.conditions[1].utilisation == 0.9


def test_it_initialises_nvml_once_and_again_when_a_device_fails(
    here: Machine, monitor: ConditionMonitor, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    here.now(f"calls {calls}")
    for now in range(3):
        monitor.ask(now)
        wait(monitor)
    assert calls.read_text().split() == ["init"]
    here.now("1.*.error 15")
    for now in range(2):
        monitor.ask(now)
        wait(monitor)
    assert monitor.latest is not None
    assert (monitor.latest.conditions[0].fault or "").startswith("does not answer (NVML says 'GPU is lost')")
    assert monitor.latest.conditions[1].fault is None
    assert calls.read_text().split()[:4] == ["init", "shutdown", "init", "shutdown"]
    here.now("1.*.error 0")
    monitor.ask(9)
    wait(monitor)
    assert [condition.fault for condition in monitor.latest.conditions] == [None, None]


def test_a_driver_that_fails_as_a_whole_is_a_problem_and_no_end(here: Machine, monitor: ConditionMonitor) -> None:
    before = list(here.lines)
    here.has("init.error 18")
    monitor.ask(1)
    wait(monitor)
    assert monitor.latest is not None
    assert "the NVIDIA driver was updated while the old one is still loaded: reboot" in (monitor.latest.problem or "")
    assert monitor.latest.conditions == ()
    here.has(*before)
    monitor.ask(2)
    wait(monitor)
    assert monitor.latest.problem is None


def test_asking_again_before_the_answer_changes_nothing(monitor: ConditionMonitor) -> None:
    monitor.ask(1)
    monitor.ask(2)
    wait(monitor)
    assert monitor.latest is not None
    assert monitor.latest.asked == 1
    time.sleep(0.05)
    assert monitor.receive() is None


def test_one_that_is_killed_is_started_again_with_the_same_descriptor(monitor: ConditionMonitor) -> None:
    descriptor = monitor.fileno()
    monitor.ask(1)
    wait(monitor)
    for now in (2, 3):
        os.kill(watcher(monitor).pid, signal.SIGKILL)
        watcher(monitor).wait()
        monitor.ask(now)
        wait(monitor)
        assert monitor.latest is not None
        assert monitor.latest.asked == now
        assert monitor.latest.conditions
    assert monitor.fileno() == descriptor
    os.kill(watcher(monitor).pid, signal.SIGKILL)
    watcher(monitor).wait()
    monitor.ask(4)
    assert monitor.latest is not None
    assert monitor.latest.problem == "the process that watches the GPUs ended again and again"


def test_one_that_hangs_hangs_nobody(monitor: ConditionMonitor) -> None:
    monitor.ask(1)
    wait(monitor)
    os.kill(watcher(monitor).pid, signal.SIGSTOP)
    monitor.ask(2)
    assert monitor.receive() is None
    assert monitor.asking == 2
    monitor.close()
    assert watcher(monitor).returncode is not None


def test_where_there_is_no_gpu_nothing_is_started() -> None:
    monitor = ConditionMonitor(cpu_slots(2))
    monitor.ask(1)
    assert monitor.latest is not None
    assert [condition.uuid for condition in monitor.latest.conditions] == ["CPU-0", "CPU-1"]
    assert monitor._process is None
    assert monitor.receive() is None
    monitor.close()


def test_it_ends_when_the_launching_program_is_killed(here: Machine) -> None:
    code = """
import sys, time
from gpu_launcher.devices.monitor import ConditionMonitor
from gpu_launcher.model import Device, DeviceKind
monitor = ConditionMonitor([Device("GPU-a", 0, "NVIDIA Double", DeviceKind.GPU)])
monitor.ask(1)
while monitor.receive() is None:
    time.sleep(0.005)
print(monitor._process.pid, flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=here.environment(), stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        program.kill()
    until(lambda: not alive(pid), "it outlives the program")


def test_a_module_in_the_current_directory_does_not_take_the_place_of_pythons(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monitor = ConditionMonitor([A])
    monitor.ask(1)
    wait(monitor)
    monitor.close()
    assert monitor.latest is not None
    assert monitor.latest.conditions
