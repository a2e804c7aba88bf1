"""How devices are doing and how they are wired, as the shipped code reads it from the NVML double."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Machine  # type: ignore[import-not-found]

GIB = 2**30

CONDITIONS = """
import json, os
from dataclasses import asdict
from pathlib import Path
from gpu_launcher.devices import NvmlProbe
probe = NvmlProbe(Path(os.environ.get("ROOT", "/")))
print(json.dumps([asdict(condition) for condition in probe.conditions(probe.inventory().devices)]))
"""

LINKS = """
import json
from itertools import combinations
from gpu_launcher.devices import NvmlProbe
devices = NvmlProbe().inventory().devices
links = NvmlProbe().links(devices)
print(json.dumps([links.between(a.uuid, b.uuid).name for a, b in combinations(devices, 2)]))
"""

AFTER = """
from gpu_launcher.devices import NvmlProbe
from gpu_launcher.errors import DeviceError
import os, pathlib
devices = NvmlProbe().inventory().devices
with open(os.environ["NVML_DOUBLE_STATE"], "w") as state:
    state.write({state!r})
try:
    for condition in NvmlProbe().conditions(devices):
        print(condition.fault)
except DeviceError as error:
    print("DeviceError:", error)
"""


def conditions(machine: Machine, **environ: str) -> Any:
    return json.loads(machine.run(CONDITIONS, **environ))


def test_utilisation_and_memory_are_read_without_what_the_driver_keeps(machine: Machine) -> None:
    lines = ("utilisation 37", f"memory_used {3 * GIB}", f"memory_reserved {GIB}")
    machine.has("count 1", *machine.gpu(0, "GPU-a", *lines))
    assert conditions(machine) == [
        {"uuid": "GPU-a", "utilisation": 0.37, "memory_used": 3 * GIB, "processes": [], "fault": None}
    ]


def test_an_older_driver_counts_its_own_memory_and_has_older_process_lists(older_machine: Machine) -> None:
    lines = (f"memory_used {3 * GIB}", f"memory_reserved {GIB}", "compute 1:5")
    older_machine.has("count 1", *older_machine.gpu(0, "GPU-a", *lines))
    (condition,) = conditions(older_machine)
    assert condition["memory_used"] == 4 * GIB
    assert [process["pid"] for process in condition["processes"]] == [1]


def test_a_driver_without_process_lists_leaves_memory_to_judge_by(old_machine: Machine) -> None:
    old_machine.has("count 1", *old_machine.gpu(0, "GPU-a", "memory_used 7", "compute 1:5", "ecc 1"))
    (condition,) = conditions(old_machine)
    assert condition["processes"] is None
    assert condition["memory_used"] == 7
    assert condition["fault"].startswith("has had an uncorrectable memory error: `nvidia-smi --gpu-reset -i 0`")


def test_what_a_gpu_does_not_report_is_not_known_and_no_fault(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", "memory.error 3", "compute.error 3", "utilisation.error 999"))
    nothing = {"utilisation": None, "memory_used": None, "processes": None, "fault": None}
    assert conditions(machine) == [{"uuid": "GPU-a", **nothing}]


def test_a_process_here_is_named_with_all_its_ancestors(machine: Machine, first_namespace: Path) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", f"compute {os.getpid()}:{GIB}"))
    ((process,),) = [condition["processes"] for condition in conditions(machine, ROOT=str(first_namespace))]
    assert process["memory"] == GIB
    assert process["user"]
    assert "py" in process["command"]
    assert process["ancestors"][0] == os.getppid()
    assert process["draws"] is False


def test_processes_of_which_nothing_is_known_have_no_ancestors(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", "compute 4194305:-"))
    ((process,),) = [condition["processes"] for condition in conditions(machine)]
    assert process == {
        "pid": 4194305,
        "memory": None,
        "user": None,
        "command": None,
        "ancestors": None,
        "draws": False,
    }


def test_a_process_that_is_listed_twice_is_one_and_programs_that_only_draw_are_none(machine: Machine) -> None:
    machine.has("count 1", *machine.gpu(0, "GPU-a", "compute 70001:3 70002:5 70001:4", "graphics 70002:5 70003:9"))
    ((first, second),) = [condition["processes"] for condition in conditions(machine)]
    assert (first["pid"], first["memory"], first["draws"]) == (70001, 7, False)
    assert (second["pid"], second["memory"], second["draws"]) == (70002, 5, True)


def test_a_mig_instance_has_memory_and_processes_of_its_own(machine: Machine) -> None:
    machine.has(
        "count 1",
        *machine.gpu(0, "GPU-a", "mig 1", "utilisation 50"),
        *machine.instance(0, 0, "MIG-a", f"memory_used {GIB}", "compute 70001:9"),
        *machine.instance(0, 1, "MIG-b"),
    )
    busy, idle = conditions(machine)
    assert (busy["uuid"], busy["memory_used"], busy["utilisation"]) == ("MIG-a", GIB, None)
    assert len(busy["processes"]) == 1
    assert (idle["uuid"], idle["memory_used"], idle["processes"]) == ("MIG-b", 0, [])


@pytest.mark.parametrize(
    ("state", "faults"),
    [
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.*.error 15\n", ["None", "does not answer (NVML says 'GPU is lost')"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.memory.error 16\n", ["None", "does not answer"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.utilisation.error 15\n", ["None", "does not answer"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.handle.error 4\n", ["None", "does not answer"]),
        ("count 1\n0.uuid GPU-a\n", ["None", "is gone: `dmesg | grep Xid`"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.ecc 3\n", ["None", "has had 3 uncorrectable memory errors"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.remapped 0 9 1 1\n", ["None", "has memory that fails and cannot"]),
        ("count 2\n0.uuid GPU-a\n1.uuid GPU-b\n1.remapped 0 1 1 0\n", ["None", "None"]),
        ("init.error 18\n", ["DeviceError: the machine's GPUs cannot be read: NVML says 'RM has detected"]),
        ("init.error 9\n", ["DeviceError: the machine's GPUs cannot be read any more: no NVIDIA driver found"]),
        ("count.error 1\n", ["DeviceError: the machine's GPUs cannot be read: NVML says 'Uninitialized'"]),
    ],
)
def test_a_gpu_that_fails_between_two_calls_has_a_fault_and_the_others_none(
    machine: Machine, state: str, faults: list[str]
) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a"), *machine.gpu(1, "GPU-b"))
    lines = machine.run(AFTER.format(state=state)).splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(fault)


def test_links_are_nvlink_before_pcie_and_unknown_where_the_driver_does_not_say(machine: Machine) -> None:
    gpus = [line for index in range(4) for line in machine.gpu(index, f"GPU-{index}")]
    machine.has(
        "count 4", *gpus, "nvlink.0.1 0", "topology.0.1 50", "nvlink.0.2 5", "topology.0.2 10", "topology.1.2 40"
    )
    #                                    0-1       0-2       0-3        1-2      1-3        2-3
    assert json.loads(machine.run(LINKS)) == ["NVLINK", "SWITCH", "UNKNOWN", "NODE", "UNKNOWN", "UNKNOWN"]


def test_numa_nodes_tell_where_the_driver_does_not(machine: Machine, tmp_path: Path) -> None:
    buses = ("00000000:3B:00.0", "00000000:AF:00.0", "00000000:B0:00.0")
    for bus, node, cpus in zip(buses, (0, 1, 1), ("0-3,8", "4-7", "4-7"), strict=True):
        device = tmp_path / "sys/bus/pci/devices" / bus.lower().removeprefix("0000")
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        (device / "local_cpulist").write_text(f"{cpus}\n")
    gpus = [line for index in range(3) for line in machine.gpu(index, f"GPU-{index}", f"pci {buses[index]}")]
    machine.has("count 3", *gpus)
    root = f"NvmlProbe(__import__('pathlib').Path({str(tmp_path)!r}))"
    assert json.loads(machine.run(LINKS.replace("NvmlProbe()", root))) == ["SYSTEM", "SYSTEM", "NODE"]
    show = f"from gpu_launcher.devices import NvmlProbe\nprint([d.cpus for d in {root}.inventory().devices])"
    assert machine.run(show) == "[(0, 1, 2, 3, 8), (4, 5, 6, 7), (4, 5, 6, 7)]"
