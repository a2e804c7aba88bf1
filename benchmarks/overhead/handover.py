"""How long a device stands idle between one job's last line and the next one's first."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from overhead.programs import Run, program, scratch

ENDING = ("returned", "hydra done", "packed", "pickled", "written", "finished", "reaped", "exited")
"""Stamps of the job that ends (see programs/stamps.py), in order; the first follows its last line."""
BEGINNING = ("claimed", "granted", "woken")
"""Stamps of the job that follows on the device; its first line follows the last."""

Record = dict[str, Any]


def measure(*, jobs: int, devices: int, seconds: float, spread: float, rounds: int, heavy: str) -> dict[str, Any]:
    """Run a sweep of jobs of about so many `seconds`, and look at each device's pauses.

    Jobs differ by the fraction `spread` of that, up and down; with 0 all devices become free at the same time. Half of
    the rounds also note where the time goes, which itself takes a little: their pauses do not count.
    """
    pauses: list[float] = []
    steps: dict[str, list[float]] = defaultdict(list)
    others = []
    for detailed in [False, True] * rounds:
        with scratch() as directory:
            witness, stamps = directory / "witness", directory / "stamps"
            environment = {"BENCH_IMPORT": heavy, "BENCH_WITNESS": str(witness)}
            if detailed:
                environment["BENCH_STAMPS"] = str(stamps)
            command = program(
                "busy.py",
                "-m",
                "hydra/launcher=gpu_pool",
                f"hydra.launcher.devices=simulated:{devices}",
                "hydra.launcher.start_method=fork",
                "hydra.sweep.dir=sweep",
                f"+job=range({jobs})",
                f"+seconds={seconds}",
                f"+spread={spread}",
            )
            with Run(command, directory, environment) as run:
                others.append(run.wait().others)
            followed = successions(_read(witness))
            if detailed:
                for step, times in breakdown(followed, _read(stamps)).items():
                    steps[step].extend(times)
            else:
                pauses.extend((after["first"] - before["last"]) / 1e6 for before, after in followed)
    return {
        "jobs": jobs,
        "devices": devices,
        "seconds": seconds,
        "spread": spread,
        "rounds": rounds,
        "pauses": len(pauses),
        "median_ms": median(pauses),
        "p90_ms": percentile(pauses, 90),
        "p99_ms": percentile(pauses, 99),
        "max_ms": max(pauses),
        "others_cores": median(others),
        "steps_median_ms": {step: median(times) for step, times in steps.items()},
    }


def percentile(values: list[float], percent: int) -> float:
    """The value that so many percent do not exceed, interpolated."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def successions(records: list[Record]) -> list[tuple[Record, Record]]:
    """Pairs of jobs that followed each other on a device."""
    by_device: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: int(record["first"])):
        by_device[record["device"]].append(record)
    return [pair for jobs in by_device.values() for pair in pairwise(jobs)]


def breakdown(followed: list[tuple[Record, Record]], stamps: list[Record]) -> dict[str, list[float]]:
    """Milliseconds of each step on the way from a job's last line to the next one's first.

    The medians of steps do not add up to the median of their sums, but nearly.
    """
    number_of = {stamp["pid"]: stamp["number"] for stamp in stamps if stamp["name"] == "forked"}
    times: dict[int, dict[str, int]] = defaultdict(dict)
    for stamp in stamps:
        number = stamp["number"] if stamp["number"] is not None else number_of.get(stamp["pid"])
        if number is not None:
            times[number].setdefault(stamp["name"], stamp["time"])
    steps: dict[str, list[float]] = defaultdict(list)
    for before, after in followed:
        now = before["last"]
        for job, names in ((before, ENDING), (after, BEGINNING)):
            for name in names:
                steps[name].append((times[job["job"]][name] - now) / 1e6)
                now = times[job["job"]][name]
        steps["first line"].append((after["first"] - now) / 1e6)
    return steps


def _read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]
