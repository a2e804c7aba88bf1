"""What calling functions in other processes costs: our executor beside others.

    python benchmarks/functions.py                 eight minutes
    python benchmarks/functions.py --quick         seconds: whether it works

See README.md here for what each part measures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overhead import machine
from overhead.programs import ProgramError
from rich.console import Console
from rich.table import Table

Results = dict[str, Any]
PROGRAM = Path(__file__).parent / "programs" / "calls.py"
WORKERS = 8
PATIENCE = 600.0
"""Seconds that one program may take. ProcessPoolExecutor with a process per call is known to hang at times."""

EXECUTORS = {
    "PoolExecutor": None,
    "PoolExecutor, no devices": None,
    "PoolExecutor, spawn": None,
    "ProcessPoolExecutor, forkserver, a process per call": None,
    "ProcessPoolExecutor, spawn, a process per call": None,
    "ProcessPoolExecutor, fork": None,
    "joblib": "joblib",
    "ray, a process per call": "ray",
    "ray": "ray",
}
"""What programs/calls.py knows, and the module that it takes."""


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: Results = {"machine": machine.describe(), "quick": options.quick}
    about = results["machine"]
    console.print(
        f"{about['date']}: {about['cores']} cores, Linux {about['kernel']}, Python {about['python']}, "
        f"load {' '.join(map(str, about['load_average']))}",
        highlight=False,
    )
    results["executor"] = _executor(options, console)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and short calls, one round")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    return parser.parse_args()


def _executor(options: argparse.Namespace, console: Console) -> Results:
    """Empty calls, and calls that sleep, by every executor that is there. They take turns."""
    calls, sleeps, seconds, rounds = (20, 8, 0.2, 1) if options.quick else (1000, 64, 1.0, options.rounds)
    skipped = {
        name: f"{module} is not installed" for name, module in EXECUTORS.items() if module and not find_spec(module)
    }
    if sys.version_info < (3, 11):
        per_call = [
            name for name in EXECUTORS if name.startswith("ProcessPool") and name.endswith("a process per call")
        ]
        skipped |= dict.fromkeys(per_call, "max_tasks_per_child needs Python 3.11")
    names = [name for name in EXECUTORS if name not in skipped]
    found: dict[str, list[Results]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if name in skipped:
                continue
            try:
                empty = _run(name, "empty", calls)
                sleep = _run(name, "sleep", sleeps, seconds)
            except subprocess.TimeoutExpired:
                skipped[name] = f"it hung ({PATIENCE:.0f} s)"
                continue
            found[name].append({"empty": empty, "sleep": sleep})
    ours = found["PoolExecutor"]
    table = Table(
        title=f"{calls} empty calls, and {sleeps} calls of {seconds} s, {WORKERS} at a time; median of {rounds} rounds",
        title_justify="left",
        title_style="bold",
    )
    columns = (
        "executor",
        "ms per call",
        "ratio",
        "CPU ms per call",
        "processes",
        "first call, s",
        "utilisation",
        "others",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "executor" else "right")
    summary: Results = {}
    for name, runs in found.items():
        if not runs or name in skipped:
            continue
        walls = [run["empty"]["wall"] / calls for run in runs]
        summary[name] = {
            "ms_per_call": 1000 * median(walls),
            "ratio": median(wall / (our["empty"]["wall"] / calls) for wall, our in zip(walls, ours, strict=False)),
            "cpu_ms_per_call": 1000 * median(run["empty"]["cpu"] / calls for run in runs),
            "processes": median(run["empty"]["processes"] for run in runs),
            "first_s": median(run["empty"]["first"] for run in runs),
            "utilisation": median(sleeps * seconds / WORKERS / run["sleep"]["wall"] for run in runs),
            "others_cores": median(run["empty"]["others"] for run in runs),
        }
        of = summary[name]
        table.add_row(
            name,
            f"{of['ms_per_call']:.2f}",
            f"{of['ratio']:.2f}",
            "?" if "forkserver" in name else f"{of['cpu_ms_per_call']:.2f}",  # nobody waits for that server's children
            f"{of['processes']:.0f}",
            f"{of['first_s']:.2f}",
            f"{of['utilisation']:.2f}",
            f"{of['others_cores']:.1f}",
        )
    console.print(table)
    for name, why in skipped.items():
        console.print(f"{name} is skipped: {why}", highlight=False)
    return {
        "calls": calls,
        "sleeps": sleeps,
        "seconds": seconds,
        "executors": summary,
        "skipped": skipped,
        "runs": found,
    }


def _run(name: str, what: str, calls: int, seconds: float | None = None) -> Results:
    """One program, from start to end."""
    rest = [] if seconds is None else [str(seconds)]
    command = [sys.executable, str(PROGRAM), name, str(WORKERS), what, str(calls), *rest]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), *filter(None, sys.path)))
    others = machine.Others()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        errors.seek(0)
        if process.returncode != 0:
            raise ProgramError(f"{name}: {errors.read()}")
    measured: Results = json.loads(out)
    return {**measured, "others": others.cores(measured["cpu"])}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except ProgramError as error:
        sys.exit(f"functions: {error}")
