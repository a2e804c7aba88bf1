"""Tests shared devices, programs outside the pool, priorities and time limits, in real sweeps."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.leases import FileLedger, PoolView
from tests.waiting import until

GIB = 2**30

APP = """
import json, os, time
from pathlib import Path
import hydra

NAMES = ("CUDA_VISIBLE_DEVICES", "GPU_LAUNCHER_MEMORY_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION",
         "XLA_CLIENT_MEM_FRACTION", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    marks = Path(cfg.marks)
    told = {name: os.environ.get(name) for name in NAMES}
    also = {"began": time.monotonic(), "cpus": sorted(os.sched_getaffinity(0))}
    new = marks / f"new-{cfg.name}"
    new.write_text(json.dumps({**told, **also}))
    new.rename(marks / f"told-{cfg.name}")
    while cfg.get("hold") and not (marks / f"end-{cfg.name}").exists():
        time.sleep(0.01)
    if cfg.get("fails"):
        raise RuntimeError("CUDA error")

if __name__ == "__main__":
    main()
"""

# Goes before APP. The NVML double has no /sys, so the program is told where the machine's /sys is.
SYS_OF_ITS_OWN = """
from functools import partial
from pathlib import Path
from gpu_launcher.devices import NvmlProbe, selection

selection.NvmlProbe = partial(NvmlProbe, Path({root!r}))
"""


class Sweeps:
    """Sweeps that share a pool in a directory."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = {**environment, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool")}
        self.app = directory / "app.py"
        self.app.write_text(APP)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, devices: str = "simulated:1") -> subprocess.Popen[str]:
        place = f"hydra.sweep.dir={self.directory / f'sweep-{len(self.processes)}'}"
        command = [sys.executable, str(self.app), "-m", "hydra/launcher=gpu_pool", place, f"+marks={self.directory}"]
        process = subprocess.Popen(
            [*command, f"hydra.launcher.devices={devices}", *arguments],
            env=self.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, devices: str = "simulated:1") -> str:
        """Run a sweep to its end; return its stderr."""
        return self.start(*arguments, devices=devices).communicate(timeout=500)[1]

    def told(self, name: str) -> dict[str, Any]:
        return json.loads((self.directory / f"told-{name}").read_text())

    def has_begun(self, name: object) -> bool:
        return (self.directory / f"told-{name}").exists()

    def end(self, *names: object) -> None:
        for name in names:
            (self.directory / f"end-{name}").touch()

    def pool(self) -> PoolView:
        """The pool's leases and tickets."""
        ledger = FileLedger(self.directory / "pool")
        try:
            return ledger.snapshot()
        finally:
            ledger.close()


@pytest.fixture
def sweeps(tmp_path):
    found = Sweeps(tmp_path, dict(os.environ))
    yield found
    stop(found)


@pytest.fixture
def gpus(machine, tmp_path):
    """Sweeps on a machine with two GPUs."""
    machine.has("count 2", *machine.gpu(0, "GPU-aaaa"), *machine.gpu(1, "GPU-bbbb"))
    found = Sweeps(tmp_path, machine.environment())
    yield found
    stop(found)


def stop(sweeps: Sweeps) -> None:
    for process in sweeps.processes:
        process.kill()
        process.wait()
        process.stderr.close()


def said(process: subprocess.Popen[str], what: str) -> str:
    """Wait for a line on stderr that contains `what`, and return it."""
    for line in process.stderr:
        if what in line:
            return line
    raise AssertionError(f"it ended without saying: {what}")


@pytest.mark.smoke
def test_two_jobs_share_a_device_by_halves_and_are_told_so_and_a_third_waits(sweeps):
    sweep = sweeps.start("hydra.launcher.gpus=0.5", "hydra.launcher.enforce_memory=true", "+hold=1", "+name=0,1,2")
    began = [said(sweep, "started on").split("job ")[1][0] for _ in range(2)]
    (third,) = {"0", "1", "2"} - set(began)
    assert not sweeps.has_begun(third)
    sweeps.end(began[0])
    assert f"job {third} " in said(sweep, "started on")
    sweeps.end(0, 1, 2)
    assert "3 completed" in sweep.communicate(timeout=500)[1]
    for name in "012":
        assert sweeps.told(name)["CUDA_VISIBLE_DEVICES"] == "0"
        assert sweeps.told(name)["GPU_LAUNCHER_MEMORY_FRACTION"] == "0.5"
        assert sweeps.told(name)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
        assert sweeps.told(name)["PYTORCH_CUDA_ALLOC_CONF"] == "per_process_memory_fraction:0.5"


def test_enforcing_memory_keeps_what_else_the_user_told_the_allocator(tmp_path):
    own = "expandable_segments:True,per_process_memory_fraction:0.9,roundup_power2_divisions:[256:1,>:4]"
    sweeps = Sweeps(tmp_path, {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": own})
    try:
        # A simulated device has 80 GiB.
        sweeps.run("hydra.launcher.memory=20GiB", "hydra.launcher.enforce_memory=true", "+name=part")
        sweeps.run("hydra.launcher.enforce_memory=true", "+name=whole")
    finally:
        stop(sweeps)
    part, whole = sweeps.told("part"), sweeps.told("whole")
    assert part["GPU_LAUNCHER_MEMORY_FRACTION"] == part["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.25"
    kept = "expandable_segments:True,roundup_power2_divisions:[256:1,>:4]"
    assert part["PYTORCH_CUDA_ALLOC_CONF"] == f"{kept},per_process_memory_fraction:0.25"
    assert whole["GPU_LAUNCHER_MEMORY_FRACTION"] == "1"
    assert (whole["PYTORCH_CUDA_ALLOC_CONF"], whole["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == (own, None)


def test_enforcing_memory_follows_the_user_to_the_newer_names_of_the_variables(tmp_path):
    newer = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "XLA_CLIENT_MEM_FRACTION": "0.9"}
    sweeps = Sweeps(tmp_path, {**os.environ, **newer})
    try:
        sweeps.run("hydra.launcher.gpus=0.5", "hydra.launcher.enforce_memory=true", "+name=0")
    finally:
        stop(sweeps)
    told = sweeps.told("0")
    both = "expandable_segments:True,per_process_memory_fraction:0.5"
    assert told["PYTORCH_ALLOC_CONF"] == told["PYTORCH_CUDA_ALLOC_CONF"] == both, "either may be what torch reads"
    assert told["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    assert told["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None, "JAX refuses to have both"


def test_with_memory_alone_jobs_pack_by_memory(sweeps):
    # A simulated device has 80 GiB, so two jobs with 30 GiB fit and a third does not.
    sweep = sweeps.start("hydra.launcher.memory=30GiB", "+hold=1", "+name=0,1,2", devices="simulated:2")
    where = [said(sweep, "started on").split("simulated GPU ")[1][0] for _ in range(3)]
    sweeps.end(0, 1, 2)
    assert sorted(where) == ["0", "0", "1"]
    assert "3 completed" in sweep.communicate(timeout=500)[1]
    assert sweeps.told("0")["GPU_LAUNCHER_MEMORY_FRACTION"] == "0.375"
    assert sweeps.told("0")["PYTORCH_CUDA_ALLOC_CONF"] is None, "nothing is enforced that nobody asked for"


def test_a_device_that_a_stranger_computes_on_is_not_granted_until_it_is_free(gpus, machine, stranger):
    machine.now(f"0.compute {stranger}:1048576", f"1.compute {stranger}:1048576")
    sweep = gpus.start("+name=0", devices="auto")
    line = said(sweep, "waits")
    assert "GPU 0 is used by" in line
    assert f"pid {stranger}" in line
    assert not gpus.has_begun(0)
    machine.has(*[line for line in machine.lines if not line.startswith("1.compute")])
    assert "GPU 1" in said(sweep, "started on")
    assert "1 completed" in sweep.communicate(timeout=500)[1]


def test_memory_in_use_that_nobody_leased_keeps_a_device_from_being_granted_unless_one_does_not_look(gpus, machine):
    machine.now(f"0.memory_used {2 * GIB}", f"1.memory_used {2 * GIB}")
    sweep = gpus.start("+name=0", devices="auto")
    assert "has 2 GiB in use by processes that cannot be told from here" in said(sweep, "waits")
    careless = gpus.start("+name=1", "hydra.launcher.busy_memory=null", "hydra.launcher.priority=1", devices="auto")
    assert "1 completed" in careless.communicate(timeout=500)[1]
    machine.now("0.memory_used 0")
    assert "1 completed" in sweep.communicate(timeout=500)[1]


def test_a_device_that_falls_off_the_bus_is_set_aside_and_the_sweep_goes_on_with_the_rest(gpus, machine):
    sweep = gpus.start("+hold=1", "+fails=1", "+name=0,1,2", devices="auto")
    first, second = (said(sweep, "started on") for _ in range(2))
    (on_zero,) = [line.split("job ")[1][0] for line in (first, second) if "on GPU 0" in line]
    (on_one,) = {"0", "1", "2"} & {line.split("job ")[1][0] for line in (first, second)} - {on_zero}
    machine.now("0.*.error 15")
    assert "GPU 0 " in said(sweep, "it is set aside")
    gpus.end(on_zero)
    assert "GPU 0" in said(sweep, f"job {on_zero} (")
    gpus.end(on_one)
    assert "on GPU 1" in said(sweep, "started on"), "never again on GPU 0"
    gpus.end(0, 1, 2)
    rest = sweep.communicate(timeout=500)[1]
    assert "3 failed" in rest


def test_a_higher_priority_goes_first_among_those_that_wait(sweeps):
    first = sweeps.start("+hold=1", "+name=first")
    said(first, "started on")
    low = sweeps.start("+name=low", "hydra.launcher.priority=-1")
    said(low, "waits")
    high = sweeps.start("+name=high", "hydra.launcher.priority=5")
    said(high, "waits")
    sweeps.end("first")
    for process in (first, low, high):
        assert "1 completed" in process.communicate(timeout=500)[1]
    assert sweeps.told("high")["began"] < sweeps.told("low")["began"]


def test_a_short_sweep_does_not_wait_for_the_end_of_a_long_one(sweeps):
    many = sweeps.start("+hold=1", "+name=range(30)")
    first = said(many, "started on").split("job ")[1].split(" ")[0]
    few = sweeps.start("+name=few")
    said(few, "waits")
    sweeps.end(first)
    said(many, "started on")
    sweeps.end(*range(30))
    assert "1 completed" in few.communicate(timeout=500)[1]
    assert many.poll() is None or sum(sweeps.has_begun(n) for n in range(30)) > 2
    many.communicate(timeout=500)


def test_a_large_request_is_passed_only_by_jobs_that_end_before_it_could_start(sweeps):
    def waiting(name: str, *options: str) -> subprocess.Popen[str]:
        sweep = sweeps.start("+hold=1", f"+name={name}", *options, devices="simulated:2")
        said(sweep, "waits")
        return sweep

    held = sweeps.start("+hold=1", "+name=held", "hydra.launcher.timeout=1h", devices="simulated:2")
    said(held, "started on")
    both = waiting("both", "hydra.launcher.gpus=2")
    without = waiting("without")
    longer = waiting("longer", "hydra.launcher.timeout=2h")
    short = sweeps.start("+name=short", "hydra.launcher.timeout=5m", devices="simulated:2")
    assert "1 completed" in short.communicate(timeout=500)[1], "on the free device, past the three that wait"
    assert not any(map(sweeps.has_begun, ("both", "without", "longer")))
    sweeps.end("held")
    assert "on simulated GPU 0, simulated GPU 1" in said(both, "started")
    assert not any(map(sweeps.has_begun, ("without", "longer")))
    sweeps.end("both", "without", "longer")
    for process in (held, both, without, longer):
        assert "1 completed" in process.communicate(timeout=500)[1]
    began = {name: sweeps.told(name)["began"] for name in ("both", "without", "longer")}
    assert min(began, key=began.__getitem__) == "both"


def test_nobody_passes_a_large_request_that_could_start_at_any_moment(sweeps):
    held = sweeps.start("+hold=1", "+name=held", devices="simulated:2")
    said(held, "started on")
    both = sweeps.start("+name=both", "hydra.launcher.gpus=2", devices="simulated:2")
    said(both, "waits")
    short = sweeps.start("+name=short", "hydra.launcher.timeout=1", devices="simulated:2")
    said(short, "waits")
    sweeps.end("held")
    for process in (held, both, short):
        assert "1 completed" in process.communicate(timeout=500)[1]
    assert sweeps.told("both")["began"] < sweeps.told("short")["began"]


def test_jobs_that_stagger_start_at_once_on_different_devices_and_wait_on_one(sweeps):
    options = ("hydra.launcher.gpus=0.25", "hydra.launcher.stagger=1h")
    sweep = sweeps.start(*options, "+hold=1", "+name=0,1,2", devices="simulated:2")
    began = [said(sweep, "started on") for _ in range(2)]
    first, second = (line.split("job ")[1][0] for line in began)
    assert sorted(line.split("simulated GPU ")[1][0] for line in began) == ["0", "1"]
    (third,) = {"0", "1", "2"} - {first, second}
    (ticket,) = until(lambda: sweeps.pool().tickets)
    assert sorted(ticket.wait.staggered) == sorted(ticket.candidates), "and nothing else keeps it"
    assert not ticket.wait.behind
    hasty = ("hydra.launcher.gpus=0.25", "hydra.launcher.priority=1", "+name=hasty")
    assert "1 completed" in sweeps.run(*hasty, devices="simulated:2"), "there is room on both devices"
    assert not sweeps.has_begun(third)
    sweeps.end(first)
    assert f"job {third} " in said(sweep, "started on"), "beside no job that has only just started"
    sweeps.end(second, third)
    assert "3 completed" in sweep.communicate(timeout=500)[1]


def test_the_stagger_is_the_least_time_between_two_starts_on_a_device(sweeps):
    options = ("hydra.launcher.gpus=0.25", "hydra.launcher.stagger=1", "hydra.launcher.timeout=1h")
    sweep = sweeps.start(*options, "+hold=1", "+name=0,1,2")
    for _ in range(3):
        said(sweep, "started on")
    # All have the same time limit, so the remaining times at one moment differ exactly as their starts do.
    left = sorted(lease.left for lease in sweeps.pool().leases)
    assert len(left) == 3
    assert min(later - earlier for earlier, later in itertools.pairwise(left)) > 1 - 1e-6
    sweeps.end(0, 1, 2)
    assert "3 completed" in sweep.communicate(timeout=500)[1]


def test_a_job_that_outlives_its_timeout_is_ended_and_says_so(sweeps):
    output = sweeps.run("hydra.launcher.timeout=0.5", "hydra.launcher.grace=0.2", "+hold=1", "+name=0")
    assert "ran longer than its timeout" in output
    assert "1 failed" in output


def test_devices_are_named_by_uuid_where_that_is_asked_for(gpus):
    assert "1 completed" in gpus.run("hydra.launcher.visible=uuid", "+name=0", devices="[1]")
    assert gpus.told("0")["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb"


def test_jobs_are_pinned_to_the_cpus_near_their_devices_where_that_is_asked_for(gpus, machine, tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("only one CPU is allowed here, so that there is nothing to choose from")
    near = {"0": allowed[0], "1": allowed[1]}
    for gpu, cpu in near.items():
        machine.now(f"{gpu}.pci 00000000:{gpu}A:00.0")
        device = tmp_path / f"sys/bus/pci/devices/0000:{gpu}a:00.0"
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{gpu}\n")
        (device / "local_cpulist").write_text(f"{cpu}\n")
    gpus.app.write_text(SYS_OF_ITS_OWN.format(root=str(tmp_path)) + APP)
    sweep = gpus.start("hydra.launcher.cpu_affinity=auto", "+hold=1", "+name=0,1,2", devices="auto")
    for _ in range(2):
        said(sweep, "started on")
    gpus.end(0, 1, 2)
    assert "3 completed" in sweep.communicate(timeout=500)[1]
    told = [gpus.told(name) for name in "012"]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in told} == {"0", "1"}
    for one in told:
        assert one["cpus"] == [near[one["CUDA_VISIBLE_DEVICES"]]]
    assert "1 completed" in gpus.run("+name=free", devices="auto")
    assert gpus.told("free")["cpus"] == allowed, "unasked, a job is left alone"


def test_mig_instances_are_devices_of_their_own_and_their_gpu_is_none(gpus, machine):
    instances = [*machine.instance(0, 0, "MIG-one"), *machine.instance(0, 1, "MIG-two")]
    machine.has("count 1", *machine.gpu(0, "GPU-aaaa", "mig 1"), *instances)
    sweep = gpus.start("+hold=1", "+name=0,1", devices="auto")
    for _ in range(2):
        said(sweep, "started on MIG 0:")
    gpus.end(0, 1)
    assert "2 completed" in sweep.communicate(timeout=500)[1]
    assert {gpus.told(name)["CUDA_VISIBLE_DEVICES"] for name in "01"} == {"MIG-one", "MIG-two"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gpus=1.5", "neither a number of devices nor a part of one"),
        ("gpus=0", "a job without a GPU has no GPU memory"),
        (
            "memory=100GiB",
            "hydra.launcher.memory: the request is for 100 GiB of memory, but the largest device has",
        ),
        ("priority=1.5", "must be an integer from -"),
        ("timeout=soon", "is not a time span"),
        ("visible=name", "must be one of index, uuid"),
        ("cpu_affinity=yes", "must be one of null, auto"),
        ("stagger=-1", "is not a time span"),
        ("busy_memory=much", "is not an amount of memory"),
    ],
)
def test_nonsense_is_refused_with_the_option_and_the_remedy(sweeps, option, message):
    also = ["hydra.launcher.memory=1GiB"] if option == "gpus=0" else []
    output = sweeps.run(f"hydra.launcher.{option}", *also, "+name=0")
    assert message in output
    assert "hydra.launcher." in output
    assert "Traceback" not in output
    assert not sweeps.has_begun(0)


def test_jobs_whose_memory_is_not_reported_keep_whole_devices_and_one_line_says_so(run, tmp_path):
    done = run(tmp_path, "grid.py", "-m", "n=range(6)", "hydra.launcher.memory=auto")
    assert done.returncode == 0, done.stderr
    assert "6 jobs: 6 completed" in done.stderr
    assert done.stderr.count("memory=auto: the device memory of the first jobs could not be measured") == 1
    planned = run(tmp_path, "grid.py", "-m", "n=range(6)", "hydra.launcher.memory=auto", "hydra.launcher.dry_run=true")
    assert planned.returncode == 0, planned.stderr
    assert "6 jobs need 1 GPU each: 4 can start now, the others when those end" in planned.stderr
    assert "memory=auto: later jobs share devices, as far as the memory that earlier ones used allows" in planned.stderr


@pytest.fixture
def stranger():
    """The process id of a program outside the pool."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process.pid
        process.kill()
