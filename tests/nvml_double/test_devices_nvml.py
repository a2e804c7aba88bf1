"""The NVML probe as it ships, on the NVML double and, where there is one, on a real GPU."""

from __future__ import annotations

import ctypes
import json
import time
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from gpu_launcher.devices import LinkKind, NvmlProbe, environment, select_devices
from gpu_launcher.devices.monitor import ConditionMonitor

if TYPE_CHECKING:
    from conftest import Machine  # type: ignore[import-not-found]

    from gpu_launcher.model import Device

GIB = 2**30

SHOW = """
import json
from dataclasses import asdict
from gpu_launcher.devices import NvmlProbe
print(json.dumps(asdict(NvmlProbe().inventory())))
"""

SELECT = """
import json, os, sys
from gpu_launcher.devices import environment, select_devices
from gpu_launcher.errors import GpuLauncherError
try:
    selection = select_devices({spec!r}, os.environ, cpu_count=3)
except GpuLauncherError as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    mask = environment(selection.devices, by_uuid=selection.by_uuid)["CUDA_VISIBLE_DEVICES"]
    print(json.dumps([[device.uuid for device in selection.devices], mask, selection.notices]))
"""


def show(machine: Machine) -> Any:
    return json.loads(machine.run(SHOW))


def select(machine: Machine, spec: object = "auto", **environ: str) -> Any:
    return json.loads(machine.run(SELECT.format(spec=spec), **environ))


def test_several_gpus_are_listed_in_nvml_order(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-b", name="NVIDIA A"), *machine.gpu(1, "GPU-a", memory=8 * GIB))
    plain = {"exclusive": False, "parent": None, "instance": None, "numa_node": None, "cpus": [], "node": ""}
    assert show(machine) == {
        "devices": [
            {"uuid": "GPU-b", "index": 0, "name": "NVIDIA A", "kind": "gpu", "memory": 24 * GIB, **plain},
            {"uuid": "GPU-a", "index": 1, "name": "NVIDIA Double", "kind": "gpu", "memory": 8 * GIB, **plain},
        ],
        "unusable": [],
        "nothing_because": None,
    }
    assert select(machine) == [["GPU-b", "GPU-a"], "0,1", []]


def test_a_gpu_that_does_not_report_memory_is_listed_without(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", "memory.error 3"))
    assert show(machine)["devices"][0]["memory"] is None


@pytest.mark.parametrize("at", ["handle", "uuid", "name", "memory", "compute_mode", "mig"])
def test_a_lost_gpu_is_left_out_with_a_notice_and_the_others_go_on(machine: Machine, at: str) -> None:
    machine.has(
        "count 3", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b", f"{at}.error 15"), *machine.gpu(2, "GPU-c")
    )
    uuids, _, notices = select(machine)
    assert uuids == ["GPU-a", "GPU-c"]
    assert len(notices) == 1
    assert notices[0].startswith("GPU 1 is left out: it does not answer (NVML says 'GPU is lost')")


def test_jobs_get_uuids_where_a_lost_gpu_makes_counting_doubtful(machine: Machine) -> None:
    machine.has("count 3", *machine.gpu(0, "GPU-a"), "1.handle.error 15", *machine.gpu(2, "GPU-c"))
    assert select(machine)[1] == "GPU-a,GPU-c"
    assert select(machine, [2])[1] == "GPU-c"


def test_a_prohibited_gpu_is_left_out_with_the_command_that_allows_it(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a", "compute_mode 2"), *machine.gpu(1, "GPU-b", "compute_mode 3"))
    uuids, _, notices = select(machine)
    assert uuids == ["GPU-b"]
    assert "compute mode PROHIBITED: `nvidia-smi -i 0 -c DEFAULT`" in notices[0]


def test_a_gpu_in_exclusive_mode_is_a_device_that_says_so(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a", "compute_mode 3"), *machine.gpu(1, "GPU-b"))
    assert [device["exclusive"] for device in show(machine)["devices"]] == [True, False]


def test_mig_instances_are_devices_in_place_of_their_gpu_and_handed_over_by_uuid(machine: Machine) -> None:
    machine.has(
        "count 2",
        *machine.gpu(0, "GPU-a"),
        *machine.gpu(1, "GPU-b", "mig 1"),
        *machine.instance(1, 0, "MIG-aaaa"),
        *machine.instance(1, 2, "MIG-bbbb", memory=20 * GIB),
    )
    _, first, second = show(machine)["devices"]
    assert first["uuid"] == "MIG-aaaa"
    assert second == {
        "uuid": "MIG-bbbb",
        "index": 1,
        "name": "NVIDIA Double MIG 1g.10gb",
        "kind": "mig",
        "memory": 20 * GIB,
        "exclusive": False,
        "parent": "GPU-b",
        "instance": 2,
        "numa_node": None,
        "node": "",
        "cpus": [],
    }
    assert select(machine) == [["GPU-a", "MIG-aaaa", "MIG-bbbb"], "GPU-a,MIG-aaaa,MIG-bbbb", []]
    assert select(machine, "MIG-b") == [["MIG-bbbb"], "MIG-bbbb", []]
    assert select(machine, 1)[0] == ["MIG-aaaa", "MIG-bbbb"]
    assert select(machine, CUDA_VISIBLE_DEVICES="MIG-bbbb") == [["MIG-bbbb"], "MIG-bbbb", []]


def test_a_gpu_in_mig_mode_without_instances_is_left_out_with_the_commands_that_help(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b", "mig 1"))
    uuids, _, notices = select(machine)
    assert uuids == ["GPU-a"]
    assert "GPU 1 is left out: it is in MIG mode and has no MIG instances: `nvidia-smi mig -i 1 -cgi" in notices[0]


def test_a_lost_mig_instance_takes_its_gpu_with_it(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", "mig 1"), *machine.instance(0, 0, "MIG-a", "handle.error 15"))
    (unusable,) = show(machine)["unusable"]
    assert unusable["reason"].startswith("does not answer (NVML says 'GPU is lost')")


@pytest.mark.parametrize("code", [3, 13])
def test_a_gpu_without_mig_is_a_whole_gpu(machine: Machine, code: int) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", f"mig.error {code}"))
    assert select(machine) == [["GPU-a"], "0", []]


def test_a_driver_older_than_mig_lists_whole_gpus(old_machine: Machine) -> None:
    old_machine.has("count 1", *old_machine.gpu(0, "GPU-a", "mig 1"))
    assert select(old_machine) == [["GPU-a"], "0", []]


def test_a_gpu_named_that_cannot_be_used_is_an_error_that_says_why(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-aaaa"), *machine.gpu(1, "GPU-b", "mig 1"))
    for spec in (1, "GPU-b"):
        kind, message = select(machine, spec)
        assert kind == "OptionError"
        assert message.startswith("devices: GPU 1 cannot be used: it is in MIG mode")
        assert message.endswith("available: GPU 0 (NVIDIA Double, GPU-aaaa)")


def test_where_no_gpu_can_be_used_cpu_slots_are_and_the_notice_names_each_reason(machine: Machine) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a", "mig 1"), "1.handle.error 15")
    uuids, mask, notices = select(machine)
    assert uuids == ["CPU-0", "CPU-1", "CPU-2"]
    assert mask == ""
    assert len(notices) == 1
    assert "no GPU can be used: GPU 0 is in MIG mode" in notices[0]
    assert "GPU 1 does not answer" in notices[0]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (["init.error 9"], "no NVIDIA driver found (its library is here, but the kernel module is not loaded)"),
        (["init.error 28"], "the NVIDIA driver reports no GPU"),
        (["count 0"], "the NVIDIA driver reports no GPU"),
    ],
)
def test_a_machine_without_gpus_is_no_error(machine: Machine, state: list[str], reason: str) -> None:
    machine.has(*state)
    assert show(machine) == {"devices": [], "unusable": [], "nothing_because": reason}
    assert select(machine)[2] == [f"{reason}; using 3 CPU slots instead (devices=cpu:N for another number)"]


def test_without_the_library_there_is_no_driver(machine_without_driver: Machine) -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has the real libnvidia-ml.so.1, which cannot be hidden")
    assert (
        "no NVIDIA driver found (its library libnvidia-ml.so.1 is not"
        in show(machine_without_driver)["nothing_because"]
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (18, ["NVML/RM version mismatch", "the NVIDIA driver was updated", "reboot"]),
        (4, ["Insufficient Permissions", "/dev/nvidia*", "docker run --gpus all"]),
        (999, ["Unknown Error", "nvidia-smi"]),
        (77, ["nvidia-smi"]),
    ],
)
@pytest.mark.parametrize("at", ["init", "count"])
def test_a_driver_that_fails_as_a_whole_is_an_error_with_a_remedy(
    machine: Machine, at: str, code: int, words: list[str]
) -> None:
    machine.has(f"{at}.error {code}", "count 1")
    for spec in ("auto", [0]):
        kind, message = select(machine, spec)
        assert kind == "DeviceError"
        assert message.startswith("the machine's GPUs cannot be read: NVML says ")
        assert all(word in message for word in words), message


def test_neither_cpu_slots_nor_simulated_devices_ask_the_driver(machine: Machine) -> None:
    machine.has("init.error 999")
    assert select(machine, "cpu:2")[0] == ["CPU-0", "CPU-1"]
    assert select(machine, "simulated:2")[0] == ["SIMULATED-0", "SIMULATED-1"]


def test_a_failing_shutdown_does_not_hide_the_answer(machine: Machine) -> None:
    machine.has("count 1", "shutdown.error 999", *machine.gpu(0, "GPU-a"))
    assert select(machine)[0] == ["GPU-a"]


def test_an_inherited_mask_restricts_and_jobs_get_machine_indices(machine: Machine) -> None:
    machine.has("count 4", *(line for index in range(4) for line in machine.gpu(index, f"GPU-{index}{index}")))
    assert select(machine, CUDA_VISIBLE_DEVICES="3,1") == [["GPU-33", "GPU-11"], "3,1", []]
    assert select(machine, [1], CUDA_VISIBLE_DEVICES="3,1") == [["GPU-11"], "1", []]
    assert select(machine, CUDA_VISIBLE_DEVICES="GPU-2")[0] == ["GPU-22"]


def test_each_call_sees_the_machine_as_it_is_also_after_a_fork(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a"))
    code = """
import os, pathlib
from gpu_launcher.devices import NvmlProbe
state = pathlib.Path(os.environ["NVML_DOUBLE_STATE"])
def uuids():
    return [device.uuid for device in NvmlProbe().inventory().devices]
assert uuids() == ["GPU-a"]
state.write_text(state.read_text().replace("GPU-a", "GPU-b"))
assert uuids() == ["GPU-b"]
pid = os.fork()
if pid == 0:
    os._exit(0 if uuids() == ["GPU-b"] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
import pynvml
try:
    pynvml.nvmlDeviceGetCount()
except pynvml.NVMLError_Uninitialized:
    print("shut down")
"""
    assert machine.run(code) == "shut down"


def test_importing_the_package_neither_imports_pynvml_nor_calls_nvml(machine: Machine) -> None:
    machine.has("init.error 999")
    code = "import sys, gpu_launcher.devices; print(sorted({'pynvml', 'torch', 'ctypes'} & set(sys.modules)))"
    assert machine.run(code) == "[]"


@pytest.fixture
def real_gpus() -> tuple[Device, ...]:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pytest.skip("no NVIDIA driver here")
    inventory = NvmlProbe().inventory()
    if not inventory.devices:
        pytest.skip(f"no usable GPU here: {inventory}")
    return inventory.devices


@pytest.mark.gpu
def test_the_real_driver_lists_real_gpus(real_gpus: tuple[Device, ...]) -> None:
    for device in real_gpus:
        assert device.uuid.startswith(("GPU-", "MIG-"))
        assert device.memory is None or device.memory > GIB
    first = real_gpus[0]
    assert first in select_devices([first.index], {}).devices
    assert select_devices(first.uuid, {"CUDA_VISIBLE_DEVICES": first.uuid}).devices == (first,)
    assert environment([first])["CUDA_VISIBLE_DEVICES"] in (str(first.index), first.uuid)


@pytest.mark.gpu
def test_the_real_driver_tells_how_real_gpus_are_doing_and_how_they_are_wired(real_gpus: tuple[Device, ...]) -> None:
    for device, condition in zip(real_gpus, NvmlProbe().conditions(real_gpus), strict=True):
        assert condition.uuid == device.uuid
        assert condition.fault is None
        assert condition.utilisation is None or 0 <= condition.utilisation <= 1
        assert condition.memory_used is None or device.memory is None or condition.memory_used <= device.memory
        assert condition.processes is not None
    links = NvmlProbe().links(real_gpus)
    for one, other in combinations([gpu.uuid for gpu in real_gpus if gpu.parent is None], 2):
        assert links.between(one, other) is not LinkKind.UNKNOWN


@pytest.mark.gpu
def test_the_monitor_watches_real_gpus(real_gpus: tuple[Device, ...]) -> None:
    monitor = ConditionMonitor(real_gpus)
    try:
        for now in range(3):
            monitor.ask(now)
            deadline = time.monotonic() + 60
            while (reading := monitor.receive()) is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert (reading.asked, reading.problem) == (now, None)
    finally:
        monitor.close()


VERSIONS = """
from gpu_launcher.devices import NvmlProbe
print(NvmlProbe().versions())
"""


def test_the_versions_of_the_driver_are_told_as_far_as_it_tells_them(machine: Machine) -> None:
    machine.has("count 0", "driver 570.86.15", "nvml 12.570.86.15", "cuda 12080")
    assert machine.run(VERSIONS) == "Versions(driver='570.86.15', nvml='12.570.86.15', cuda='12.8')"
    machine.has("count 0", "driver 570.86.15", "nvml.error 999")
    assert machine.run(VERSIONS) == "Versions(driver='570.86.15', nvml=None, cuda=None)"


def test_without_a_driver_there_are_no_versions(machine_without_driver: Machine) -> None:
    assert machine_without_driver.run(VERSIONS) == "None"
