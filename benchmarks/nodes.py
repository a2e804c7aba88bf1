"""What several nodes cost: empty jobs beside one machine and submitit, verdicts on reports, and a head with 64 agents.

    python benchmarks/nodes.py                  all parts: a quarter of an hour on two idle cores
    python benchmarks/nodes.py verdicts many    some parts
    python benchmarks/nodes.py --quick          to see that it works: figures are not worth much

All nodes are on this machine, each with a pool of its own, so they share its CPUs with each other and the head. `sweep`
starts a real Slurm where one is installed and root runs this. See README.md here for what each part measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import reporting
from overhead import machine, slurm, sweep
from overhead.handover import percentile
from overhead.launchers import Launcher
from overhead.programs import LIMIT, PROGRAMS, ProgramError, Run, scratch
from overhead.tables import figures, judge, new_table, show_machine, show_targets
from rich.console import Console

Results = dict[str, Any]
ON_NODE = PROGRAMS / "on_node.sh"
GATE = PROGRAMS / "gate.sh"
SUBMITIT = "submitit on that Slurm"
EVERY = 0.25
"""Seconds between two looks at a head."""


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 110)
    results: Results = {"machine": machine.describe(), "quick": options.quick, "parts": {}}
    show_machine(console, results["machine"])
    for part in options.parts:
        began = time.monotonic()
        results["parts"][part] = PARTS[part](options, console)
        console.print(f"[dim]{part}: {time.monotonic() - began:.0f} s[/dim]\n")
    results["targets"] = judge(_targets(results["parts"]))
    results["machine"]["load_average_after"] = machine.describe()["load_average"]
    show_targets(console, results["targets"])
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few and short jobs, one round")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated; default: 3")
    parser.add_argument("--agents", type=int, help="of the part many; default: 64")
    parser.add_argument("--jobs", type=int, help="of the part many; default: 5000")
    options = parser.parse_args()
    for wrong in [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {wrong!r}: choose from {', '.join(PARTS)}")
    # The part sweep comes first: its Slurm must start before anything is run.
    options.parts = [part for part in PARTS if part in (options.parts or PARTS)]
    options.rounds = 1 if options.quick else options.rounds
    options.agents = options.agents or (4 if options.quick else 64)
    options.jobs = options.jobs or (40 if options.quick else 5000)
    return options


def _two_nodes(devices: int) -> list[str]:
    """The launcher's options for two nodes, each with this number of devices."""
    nodes = ",".join(f"'command:env NODE={name} sh {ON_NODE}'" for name in "ab")
    return [f"hydra.launcher.devices=simulated:{devices}", f"hydra.launcher.nodes=[{nodes}]"]


# Empty jobs


def _launchers(at_once: int) -> list[Launcher]:
    ours, half = ["hydra/launcher=gpu_pool"], at_once // 2
    return [
        Launcher("one machine", lambda _: [*ours, f"hydra.launcher.devices=simulated:{at_once}"]),
        Launcher("two nodes", lambda _: [*ours, *_two_nodes(half)]),
        Launcher(
            "two nodes of Slurm",
            lambda _: [
                *ours,
                f"hydra.launcher.devices=simulated:{half}",
                f"hydra.launcher.nodes='slurm:2 --gpus={half} sh {ON_NODE}'",
            ],
        ),
        Launcher(
            SUBMITIT,
            lambda _: [
                "hydra/launcher=submitit_slurm",
                "hydra.launcher.partition=main",
                "hydra.launcher.gpus_per_node=1",
                "hydra.launcher.cpus_per_task=1",
                "hydra.launcher.timeout_min=10",
                f"hydra.launcher.array_parallelism={at_once}",
            ],
            "hydra-submitit-launcher",
        ),
    ]


def _sweep(options: argparse.Namespace, console: Console) -> Results:
    jobs, at_once = (4, 4) if options.quick else (40, 8)
    heavy = "json" if options.quick else machine.heavy_import()
    skipped = {launcher.name: reason for launcher in _launchers(at_once) if (reason := launcher.missing())}
    if (reason := slurm.missing()) is not None:
        skipped |= {launcher.name: reason for launcher in _launchers(at_once) if "Slurm" in launcher.name}
    launchers = [launcher for launcher in _launchers(at_once) if launcher.name not in skipped]
    with contextlib.ExitStack() as cleanup:
        elsewhere: Callable[[], float] = lambda: 0.0  # noqa: E731
        if reason is None:
            directory = cleanup.enter_context(scratch())
            elsewhere = cleanup.enter_context(slurm.Slurm(directory, nodes=2, gpus=at_once // 2)).cpu
        found = sweep.measure(
            launchers, jobs=jobs, at_once=at_once, rounds=options.rounds, heavy=heavy, elsewhere=elsewhere
        )
    table = new_table(
        f"{jobs} empty jobs that import {heavy}, {at_once} at a time, median of {options.rounds} rounds",
        ("", "seconds", "from", "to", "of one machine's", "CPU s", "others"),
    )
    for name, of in found["launchers"].items():
        low, high = of["wall_range"]
        table.add_row(name, *figures(of["wall"], low, high, of["factor"] or 1.0, of["cpu"], of["others_cores"]))
    console.print(table)
    for name, why in skipped.items():
        console.print(f"{name} is skipped: {why}")
    return {**found, "heavy_import": heavy, "skipped": skipped}


# Verdicts on reports


def _verdicts(options: argparse.Namespace, console: Console) -> Results:
    trials, steps, interval = (6, 4, 0.2) if options.quick else (16, 40, 0.5)
    where = {"one machine": ["hydra.launcher.devices=simulated:8"], "two nodes": _two_nodes(4)}
    runs: dict[str, list[Results]] = {name: [] for name in where}
    for _ in range(options.rounds):
        for name, options_of in where.items():
            runs[name].append(
                reporting.measure(jobs=8, trials=trials, steps=steps, interval=interval, where=options_of)
            )
    found = {name: _verdicts_of(of) for name, of in runs.items()}
    table = new_table(
        f"from a report to the verdict on it, 8 jobs that report every {interval} s, "
        f"median of {options.rounds} rounds, ms",
        ("", "reports", "median", "95 %", "longest", "without a verdict", "others"),
    )
    for name, of in found.items():
        shown = figures(of["median_ms"], of["p95_ms"], of["max_ms"])
        table.add_row(name, str(of["reports"]), *shown, str(of["missing"]), *figures(of["others_cores"]))
    console.print(table)
    return found


def _verdicts_of(runs: list[Results]) -> Results:
    """Summarise the rounds. A verdict that did not come within half an interval counts as if it came then."""
    times, missing = [], 0
    for run in runs:
        without = run["report_ns"]["calls"] - len(run["verdicts_ms"])
        missing += without
        times.append([*run["verdicts_ms"], *[1000 * run["interval_s"] / 2] * without])
    return {
        "reports": sum(map(len, times)),
        "median_ms": median(map(median, times)),
        "p95_ms": median(percentile(of, 95) for of in times),
        "max_ms": max(map(max, times)),
        "missing": missing,
        "states": "; ".join(sorted({run["states"] for run in runs})),
        "others_cores": median(run["others_cores"] for run in runs),
        "rounds": [{"median_ms": median(of), "p95_ms": percentile(of, 95)} for of in times],
    }


# Many agents


def _many(options: argparse.Namespace, console: Console) -> Results:
    found = _head_of_many(options.agents, options.jobs, 2.0 if options.quick else 10.0)
    table = new_table(
        f"the head of a map of {options.jobs} empty commands on {options.agents} nodes with one device each",
        ("", "seconds", "CPU s", "cores"),
    )
    for phase, of in found["phases"].items():
        table.add_row(phase, *figures(of["wall"], of["cpu"], of["cores"]))
    console.print(table)
    memory = ", ".join(f"{look / 1e6:.1f} MB after {done}" for done, look in _some(found["memory"]))
    console.print(
        f"{found['jobs_per_second']:.0f} jobs/s, {found['ms_per_job']:.2f} ms of the head's CPU per job; "
        f"its own memory: {memory} jobs; others used {found['others_cores']:.2f} cores",
        highlight=False,
    )
    return found


def _some(memory: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Five looks, evenly spaced."""
    return [memory[place * (len(memory) - 1) // 4] for place in range(5)]


def _head_of_many(agents: int, jobs: int, idle: float) -> Results:
    """Run a map whose first jobs wait until every node has one, and look at its head. Raises ProgramError."""
    with scratch() as directory:
        waiting, results = directory / "waiting", directory / "map" / "results.jsonl"
        waiting.mkdir()
        shutil.copy(GATE, directory)
        command = [str(Path(sys.executable).with_name("gpu-launcher")), "map", "--param", f"n=range({jobs})"]
        command += ["--devices", "simulated:1", "--dir", "map"]
        for number in range(agents):
            command += ["--nodes", f"command:env NODE={number} sh {ON_NODE}"]
        began = Look(time.monotonic(), 0.0, 0)
        with Run([*command, "--", "sh", GATE.name, "{index}"], directory, {}) as run:
            head = psutil.Process(run.tree()[0])
            while len(list(waiting.iterdir())) < agents and not run.ended and time.monotonic() < began.time + LIMIT:
                time.sleep(EVERY)
            ready = Look.of(head)
            time.sleep(idle)
            opened = Look.of(head)
            (directory / "go").touch()
            looks = [(0, opened)]
            while not run.ended:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    looks.append((_lines(results), Look.of(head)))
                time.sleep(EVERY)
            usage = run.wait()
        if _lines(results) != jobs:
            raise ProgramError(f"{_lines(results)} of {jobs} jobs have a result")
        last = looks[-1][1]
        return {
            "agents": agents,
            "jobs": jobs,
            "phases": {
                "until every node has a job": ready.since(began),
                "while these jobs wait": opened.since(ready),
                "while all jobs run": last.since(opened),
            },
            "jobs_per_second": jobs / (last.time - opened.time),
            "ms_per_job": 1000 * (last.cpu - opened.cpu) / jobs,
            "memory": [(done, look.memory) for done, look in looks],
            "others_cores": usage.others,
        }


@dataclass(frozen=True)
class Look:
    """What a process has used until a moment."""

    time: float
    cpu: float
    memory: int
    """Bytes that no other process shares."""

    @classmethod
    def of(cls, process: psutil.Process) -> Look:
        """Look now. Raises psutil.Error if it has ended."""
        used, memory = process.cpu_times(), process.memory_full_info().uss
        if not memory:  # it is about to end
            raise psutil.NoSuchProcess(process.pid)
        return cls(time.monotonic(), used.user + used.system, memory)

    def since(self, before: Look) -> dict[str, float]:
        """What it used between two looks."""
        wall, cpu = self.time - before.time, self.cpu - before.cpu
        return {"wall": wall, "cpu": cpu, "cores": cpu / wall}


def _lines(file: Path) -> int:
    """How many lines a file has, if it is there."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _growth(memory: list[tuple[int, int]]) -> float:
    """Bytes by which memory grew per job, in the second half of the jobs."""
    half = next(place for place, (done, _) in enumerate(memory) if 2 * done >= memory[-1][0])
    (done, bytes_then), (done_last, bytes_last) = memory[half], memory[-1]
    return (bytes_last - bytes_then) / max(1, done_last - done)


def _targets(parts: Results) -> Iterator[tuple[str, float, float]]:
    """What was promised (issue 14) as far as it was measured: description, limit, and value, at most that."""
    if "sweep" in parts:
        found = parts["sweep"]["launchers"]
        for name in ("two nodes", "two nodes of Slurm"):
            if name in found:
                yield f"sweep, {name}: time relative to one machine's", 1.5, found[name]["factor"]
        if SUBMITIT in found:
            ratio = found["two nodes of Slurm"]["factor"] / found[SUBMITIT]["factor"]
            yield "sweep, two nodes of Slurm: time relative to submitit's", 1 / 3, ratio
    if "verdicts" in parts:
        found = parts["verdicts"]
        more = found["two nodes"]["p95_ms"] - found["one machine"]["p95_ms"]
        yield "verdicts, 95 %: more on two nodes than on one machine, ms", 20, more
    if "many" in parts:
        yield "many: cores of the head while all jobs run", 0.2, parts["many"]["phases"]["while all jobs run"]["cores"]
        yield "many: growth of the head's memory, kB per job", 1, _growth(parts["many"]["memory"]) / 1000


PARTS: dict[str, Callable[[argparse.Namespace, Console], Results]] = {
    "sweep": _sweep,
    "verdicts": _verdicts,
    "many": _many,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except (ProgramError, slurm.SlurmError) as error:
        sys.exit(f"nodes: {error}")
