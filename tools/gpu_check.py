"""Check on a real NVIDIA GPU what only hardware can show. Takes under four minutes and prints one line for each check.

    python tools/gpu_check.py               # all checks, on the first usable GPU
    python tools/gpu_check.py --only fork   # those whose name contains the word

It needs PyTorch with CUDA, and a GPU that is otherwise idle. It uses a pool directory of its own.

Exit status: 0 if all checks passed, 1 if one failed, 3 if some could not run (no PyTorch, no time), 77 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_launcher.devices import NvmlProbe, environment
from gpu_launcher.devices.monitor import ConditionMonitor
from gpu_launcher.errors import DeviceError
from gpu_launcher.model import Device

MAX_SECONDS = 230
"""Time for all checks. What has not begun by then is skipped."""
MAX_CHECK_SECONDS = 60
"""Time for each program that a check runs."""
NO_GPU, INCOMPLETE = 77, 3

# A Hydra program. `+do` says what a job does; `first` what the program does before it launches.
TRAIN = """
import json, os, sys, time
started = time.time()
import hydra, torch

def on_gpu(part=0.01):
    '''Allocate that part of the GPU's memory, and compute.'''
    total = torch.cuda.get_device_properties(0).total_memory
    block = torch.empty(int(total * part), dtype=torch.uint8, device="cuda")
    block[:1024].fill_(1)
    assert int(block[:1024].sum()) == 1024
    torch.cuda.synchronize()
    return block

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    begun = time.time()
    on_gpu(cfg.get("part", 0.01))
    time.sleep(cfg.get("sleep", 0))
    with open(os.path.join(os.environ["FACTS"], f"{cfg.i}-{time.time_ns()}.json"), "w") as file:
        json.dump({
            "i": cfg.i, "begun": begun, "count": torch.cuda.device_count(), "pid": os.getpid(),
            "mask": os.environ["CUDA_VISIBLE_DEVICES"], "share": os.environ["GPU_LAUNCHER_MEMORY_FRACTION"],
            "ended": time.time(),
        }, file)

if __name__ == "__main__":
    if os.environ.get("CUDA_FIRST"):
        kept = on_gpu()
    main()
"""

FOREIGN = """
import sys, time, torch
block = torch.ones(2**30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("there", flush=True)
sys.stdin.read()
"""

LEASING = """
import json, sys, gpu_launcher
with gpu_launcher.Pool(sys.argv[1], pool_dir=sys.argv[2]) as pool:
    try:
        pool.lease(timeout=float(sys.argv[3])).release()
        print(json.dumps("free"))
    except gpu_launcher.LeaseTimeout as error:
        print(json.dumps(str(error)))
"""

RESULTS = """
import json, sys, torch, gpu_launcher
from gpu_launcher import Pool, PoolExecutor, parallel_map

def numbers(n):
    return {"tensor": torch.arange(float(n), device="cuda"), "net": torch.nn.Linear(2, 2).to("cuda")}

def fails(n):
    raise ValueError("with a tensor", torch.ones(n, device="cuda"))

pool = Pool(sys.argv[1], pool_dir=sys.argv[2])
with PoolExecutor(pool=pool) as executor:
    value = executor.submit(numbers, 3).result()
    error = executor.submit(fails, 2).exception()
(record,) = parallel_map([4], function=numbers, pool=pool)
tensors = [value["tensor"], record["tensor"], error.args[1], *value["net"].parameters()]
devices = sorted({str(tensor.device) for tensor in tensors})
print(json.dumps([devices, value["tensor"].tolist(), torch.cuda.is_initialized()]))
"""

SEEN = """
import json, torch
uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
print(json.dumps([torch.cuda.device_count(), torch.cuda.get_device_name(0), None if uuid is None else str(uuid)]))
"""


class SkippedError(Exception):
    """The check cannot run here; the message says why."""


@dataclass
class Machine:
    """What the checks have: the GPU, a directory, and the time that is left."""

    gpu: Device
    directory: Path
    deadline: float
    sweeps: int = 0
    output: str = field(default="", init=False)
    """What the last sweep printed."""

    @property
    def device(self) -> str:
        """What the option `devices` calls the GPU."""
        return self.gpu.uuid if self.gpu.index is None else str(self.gpu.index)

    @property
    def pool_dir(self) -> Path:
        return self.directory / "pool"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a fresh process, which sees all GPUs unless `variables` say otherwise."""
        hidden = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
        clean = {name: value for name, value in os.environ.items() if name not in hidden}
        seconds = min(MAX_CHECK_SECONDS, max(1.0, self.deadline - time.monotonic()))
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.directory,
            env={**clean, "GPU_LAUNCHER_POOL_DIR": str(self.pool_dir), **variables},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def read(self, code: str, *arguments: str, **variables: str) -> Any:
        """What the program prints last, as JSON."""
        done = self.run("-c", code, *arguments, **variables)
        assert done.returncode == 0, last_line(done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def sweep(self, *overrides: str, jobs: int = 1, fails: bool = False, **variables: str) -> list[dict[str, Any]]:
        """Run that many jobs of TRAIN on the GPU; what they wrote, in the order in which they began."""
        self.sweeps += 1
        facts = self.directory / f"facts-{self.sweeps}"
        facts.mkdir()
        (self.directory / "train.py").write_text(TRAIN)
        pool = ["hydra/launcher=gpu_pool", f"hydra.launcher.devices={self.device}"]
        numbers = f"+i={','.join(map(str, range(jobs)))}"
        sweep_dir = f"hydra.sweep.dir={self.directory / f'sweep-{self.sweeps}'}"
        done = self.run("train.py", "-m", *pool, sweep_dir, numbers, *overrides, FACTS=str(facts), **variables)
        self.output = done.stdout + done.stderr
        assert (done.returncode != 0) is fails, last_line(self.output)
        found = [json.loads(file.read_text()) for file in facts.iterdir()]
        return sorted(found, key=lambda fact: fact["begun"])


def last_line(text: str) -> str:
    return ["", *text.strip().splitlines()][-1]


def probe(machine: Machine) -> str:
    gpu = machine.gpu
    assert gpu.uuid.startswith(("GPU-", "MIG-")), gpu.uuid
    assert gpu.memory is not None
    assert gpu.memory > 2**30, gpu.memory
    return f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB, {gpu.uuid}"


def conditions(machine: Machine) -> str:
    monitor = ConditionMonitor([machine.gpu])
    try:
        monitor.ask(0.0)
        began = time.monotonic()
        while (reading := monitor.receive()) is None:
            assert time.monotonic() < began + 30, "no answer in 30 s"
            time.sleep(0.01)
    finally:
        monitor.close()
    assert reading.problem is None, reading.problem
    (seen,) = reading.conditions
    assert seen.fault is None, seen.fault
    assert seen.processes is not None, "the driver lists no processes"
    assert seen.memory_used is not None, "the driver does not say how much memory is used"
    used = seen.memory_used / 2**20
    return f"{used:.0f} MiB used, {len(seen.processes)} processes, answered in {time.monotonic() - began:.1f} s"


def masks(machine: Machine) -> str:
    count, name, _ = machine.read(SEEN, **environment([machine.gpu]))
    assert (count, name) == (1, machine.gpu.name), (count, name)
    return f"CUDA sees {count} GPU, {name}"


def uuids(machine: Machine) -> str:
    count, _, uuid = machine.read(SEEN, **environment([machine.gpu], by_uuid=True))
    assert count == 1, count
    if uuid is not None:
        assert uuid.removeprefix("GPU-") == machine.gpu.uuid.removeprefix("GPU-"), uuid
    return "CUDA and NVML mean the same GPU" if uuid else "CUDA takes the UUID; this PyTorch does not tell it"


def foreign_process(machine: Machine) -> str:
    variables = {**os.environ, **environment([machine.gpu])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", FOREIGN], env=variables, text=True, **pipes) as stranger:  # type: ignore[call-overload]
        try:
            assert stranger.stdout.readline() == "there\n", "the other program could not use the GPU"
            said = machine.read(LEASING, machine.device, str(machine.pool_dir), "3")
            assert said != "free", "the GPU was granted while another program used it"
        finally:
            stranger.stdin.close()
            stranger.wait(30)
    after = machine.read(LEASING, machine.device, str(machine.pool_dir), "30")
    assert after == "free", after
    return f"not granted ({said}); granted when it had ended"


def fork_with_torch(machine: Machine) -> str:
    (fact,) = machine.sweep()
    assert "(spawn)" not in machine.output, last_line(machine.output)
    assert fact["count"] == 1, fact
    return "a job forked from a program that imported torch computes on the GPU"


def spawn_after_cuda(machine: Machine) -> str:
    (fact,) = machine.sweep(CUDA_FIRST="1")
    assert "(spawn): CUDA is already initialised" in machine.output, last_line(machine.output)
    assert fact["count"] == 1, fact
    return "the launcher noticed that CUDA was in use, and its job computes on the GPU"


def results_on_the_cpu(machine: Machine) -> str:
    devices, numbers, initialised = machine.read(RESULTS, machine.device, str(machine.pool_dir))
    assert devices == ["cpu"], devices
    assert numbers == [0.0, 1.0, 2.0], numbers
    assert initialised is False, "reading results initialised CUDA in the program"
    return "tensors of calls, records and exceptions are on the CPU, and CUDA was not initialised"


def enforce_memory(machine: Machine) -> str:
    half = ("hydra.launcher.gpus=0.5", "hydra.launcher.enforce_memory=true")
    (fact,) = machine.sweep(*half, "+part=0.4")
    assert fact["share"] == "0.5", fact
    assert machine.sweep(*half, "+part=0.6", fails=True) == []
    assert re.search("out of memory", machine.output, re.IGNORECASE), last_line(machine.output)
    return "with half a GPU, 40 % of its memory can be allocated and 60 % cannot"


def out_of_memory(machine: Machine) -> str:
    half = ("hydra.launcher.gpus=0.5", "hydra.launcher.enforce_memory=true", "hydra.launcher.retries=1")
    (fact,) = machine.sweep(*half, "hydra.launcher.retry_on=[oom]", "+part=0.6")
    assert fact["share"] == "1", fact
    return "recognised with half a GPU, and the job ran again on the whole GPU"


def sharing(machine: Machine) -> str:
    one, other = machine.sweep("hydra.launcher.gpus=0.5", "+sleep=5", jobs=2)
    assert one["mask"] == other["mask"], (one, other)
    assert one["pid"] != other["pid"], one
    overlap = one["ended"] - other["begun"]
    assert overlap > 0, "they did not run at the same time"
    return f"two jobs on one GPU, at the same time for {overlap:.1f} s"


def idle_gap(machine: Machine) -> str:
    facts = machine.sweep(jobs=6)
    assert len(facts) == 6, facts
    gaps = [after["begun"] - before["ended"] for before, after in itertools.pairwise(facts)]
    assert min(gaps) >= 0, "two jobs had the GPU at the same time"
    assert max(gaps) < 10, gaps
    median = statistics.median(gaps) * 1000
    return f"{median:.0f} ms at the median between jobs with a CUDA context, {max(gaps):.2f} s at most"


ON_NVML = [probe, conditions]
WITH_TORCH = [
    masks,
    uuids,
    fork_with_torch,
    results_on_the_cpu,
    spawn_after_cuda,
    out_of_memory,
    enforce_memory,
    sharing,
    foreign_process,
    idle_gap,
]


def check(function: Callable[[Machine], str], machine: Machine) -> str:
    """Run one check and print its line; `ok`, `FAIL` or `skip`."""
    began = time.monotonic()
    try:
        if began >= machine.deadline:
            raise SkippedError(f"{MAX_SECONDS} s are over")
        if function in WITH_TORCH and importlib.util.find_spec("torch") is None:
            raise SkippedError("needs PyTorch")
        outcome, said = "ok", function(machine)
    except SkippedError as why:
        outcome, said = "skip", str(why)
    except subprocess.TimeoutExpired as late:
        outcome, said = "FAIL", f"took longer than {late.timeout:.0f} s"
    except Exception as error:  # a check that fails does not keep the others from running
        outcome, said = "FAIL", f"{type(error).__name__}: {error}"
    name = function.__name__.replace("_", " ")
    print(f"{outcome:4}  {name:18}  {time.monotonic() - began:5.1f} s  {' '.join(said.split())}", flush=True)
    return outcome


def first_gpu() -> Device | None:
    try:
        devices = NvmlProbe().inventory().devices
    except DeviceError:
        return None
    return devices[0] if devices else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="only checks whose name contains it")
    options = parser.parse_args()
    gpu = first_gpu()
    if gpu is None:
        print("skip  no usable NVIDIA GPU on this machine: nothing was checked")
        return NO_GPU
    chosen = [one for one in (*ON_NVML, *WITH_TORCH) if options.only in one.__name__.replace("_", " ")]
    if not chosen:
        parser.error(f"no check has this word in its name: {options.only}")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        machine = Machine(gpu, Path(directory), time.monotonic() + MAX_SECONDS)
        outcomes = [check(one, machine) for one in chosen]
    return 1 if "FAIL" in outcomes else INCOMPLETE if "skip" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
