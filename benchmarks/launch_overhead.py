"""What launching costs: a sweep of empty jobs, the pause between two jobs, memory, and the start of other programs.

    python benchmarks/launch_overhead.py                      all parts, about ten minutes on two cores
    python benchmarks/launch_overhead.py handover startup     some parts
    python benchmarks/launch_overhead.py --quick              to see that it works: figures are not worth much

It compares with Hydra's own launchers as far as they are installed (`pip install '.[bench]'`). Figures depend on what
else the machine does, so launchers take turns, and the table says how busy everybody else was ("others", in cores).
See README.md here for what each part measures.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from overhead import handover, machine, memory, startup, sweep
from overhead.launchers import LAUNCHERS, Launcher
from overhead.programs import ProgramError, Run
from overhead.tables import figures, judge, new_table, show_machine, show_targets
from rich.console import Console

Results = dict[str, Any]


def main() -> int:
    options = _options()
    Run.patience = options.patience
    console = Console(width=None if sys.stdout.isatty() else 110)
    skipped = {launcher.name: reason for launcher in LAUNCHERS if (reason := launcher.missing())}
    launchers = [
        launcher for launcher in LAUNCHERS if launcher.name in options.launchers and launcher.name not in skipped
    ]
    results: Results = {
        "machine": machine.describe(),
        "heavy_import": options.heavy,
        "quick": options.quick,
        "skipped": {name: reason for name, reason in skipped.items() if name in options.launchers},
        "parts": {},
    }
    _show_machine(console, results)
    for part in options.parts:
        began = time.monotonic()
        results["parts"][part] = PARTS[part](options, launchers)
        SHOW[part](console, results["parts"][part])
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
    parser.add_argument("--rounds", type=int, help="how often each measurement is repeated")
    parser.add_argument(
        "--heavy",
        metavar="MODULE",
        help=f"what the programs import; default: the first there is of {', '.join(machine.HEAVY)}, json with --quick",
    )
    parser.add_argument(
        "--launchers",
        type=lambda text: text.split(","),
        default=[launcher.name for launcher in LAUNCHERS],
        metavar="NAME,...",
        help="those to compare",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long before each run for an idle machine",
    )
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    options.heavy = options.heavy or ("json" if options.quick else machine.heavy_import())
    for wrong in [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {wrong!r}: choose from {', '.join(PARTS)}")
    known = [launcher.name for launcher in LAUNCHERS]
    for wrong in [name for name in options.launchers if name not in known]:
        parser.error(f"there is no launcher {wrong!r}: choose from {', '.join(known)}")
    return options


def _sweep(options: argparse.Namespace, launchers: list[Launcher]) -> Results:
    jobs, at_once, rounds = (4, 4, 1) if options.quick else (40, 8, options.rounds or 3)
    return sweep.measure(launchers, jobs=jobs, at_once=at_once, rounds=rounds, heavy=options.heavy)


def _handover(options: argparse.Namespace, launchers: list[Launcher]) -> Results:
    jobs, seconds, rounds = (12, 0.3, 1) if options.quick else (40, 1.0, options.rounds or 3)
    return {
        name: handover.measure(jobs=jobs, devices=4, seconds=seconds, spread=spread, rounds=rounds, heavy=options.heavy)
        for name, spread in (("one by one", 0.2), ("all at once", 0.0))
    }


def _memory(options: argparse.Namespace, launchers: list[Launcher]) -> Results:
    jobs = 4 if options.quick else 8
    concurrent = [launcher for launcher in launchers if launcher.name not in ("basic", "gpu_pool+grid_async")]
    rounds = 1 if options.quick else options.rounds or 2
    ours = [launcher for launcher in concurrent if launcher.name == "gpu_pool"]
    return {
        "all jobs run": memory.measure(concurrent, jobs=jobs, ahead=0, rounds=rounds, heavy=options.heavy),
        "more jobs wait": memory.measure(ours, jobs=jobs, ahead=jobs, rounds=rounds, heavy=options.heavy),
    }


def _startup(options: argparse.Namespace, launchers: list[Launcher]) -> Results:
    return startup.measure(pairs=5 if options.quick else 40)


PARTS: dict[str, Callable[[argparse.Namespace, list[Launcher]], Results]] = {
    "sweep": _sweep,
    "handover": _handover,
    "memory": _memory,
    "startup": _startup,
}


def _targets(parts: Results) -> Iterator[tuple[str, float, float]]:
    """What was promised (issue 2) as far as it was measured: description, limit, and value, which may not exceed it."""
    if "sweep" in parts:
        found = parts["sweep"]["launchers"]
        for name, times in (("basic", 1), ("joblib", 3), ("submitit", 10)):
            if "gpu_pool" in found and found.get(name, {}).get("factor"):
                yield f"sweep: time relative to {name}'s", 1 / times, 1 / found[name]["factor"]
    if "handover" in parts:
        for name, found in parts["handover"].items():
            yield f"handover, {name}: median, ms", 45, found["median_ms"]
            yield f"handover, {name}: 99th percentile, ms", 150, found["p99_ms"]
    if "memory" in parts:
        found = parts["memory"]["all jobs run"]["launchers"]
        if "joblib" in found and "gpu_pool" in found:
            yield "memory: relative to joblib's", 0.4, found["gpu_pool"]["pss_mb"] / found["joblib"]["pss_mb"]
    if "startup" in parts:
        yield "startup: CPU added by the plugin, ms", 10, parts["startup"]["cpu"]["added_ms"]


def _show_machine(console: Console, results: Results) -> None:
    show_machine(console, results["machine"])
    console.print(f"programs import {results['heavy_import']}", highlight=False)
    if results["heavy_import"] != "torch" and not results["quick"]:
        console.print("torch is not what they import: the figures are not comparable with those that were promised")
    for name, reason in results["skipped"].items():
        console.print(f"{name} is skipped: {reason}")
    console.print()


def _show_sweep(console: Console, found: Results) -> None:
    table = new_table(
        f"{found['jobs']} empty jobs, {found['at_once']} at a time, median of {found['rounds']} rounds",
        ("launcher", "seconds", "from", "to", "factor", "CPU s", "others"),
    )
    for name, of in found["launchers"].items():
        low, high = of["wall_range"]
        factor = of["factor"] or 1.0
        table.add_row(name, *figures(of["wall"], low, high, factor, of["cpu"], of["others_cores"]))
    console.print(table)


def _show_handover(console: Console, found: Results) -> None:
    first = next(iter(found.values()))
    table = new_table(
        f"idle between two jobs of {first['seconds']} s on {first['devices']} devices, ms",
        ("devices become free", "pauses", "median", "p90", "p99", "max", "others"),
    )
    for name, of in found.items():
        values = (of[key] for key in ("median_ms", "p90_ms", "p99_ms", "max_ms"))
        table.add_row(name, str(of["pauses"]), *figures(*values), *figures(of["others_cores"]))
    console.print(table)
    steps = new_table("where it goes, median of each step, ms", ("up to", *found))
    for step in first["steps_median_ms"]:
        steps.add_row(step, *figures(*(of["steps_median_ms"][step] for of in found.values())))
    console.print(steps)


def _show_memory(console: Console, found: Results) -> None:
    jobs = found["all jobs run"]["jobs"]
    table = new_table(f"{jobs} jobs at the same time, launcher included: PSS", ("launcher", "MB", "processes"))
    for situation, of in found.items():
        for name, look in of["launchers"].items():
            label = name if situation == "all jobs run" else f"{name}, {of['ahead']} more jobs wait"
            table.add_row(label, f"{look['pss_mb']:.0f}", f"{look['processes']:.0f}")
    console.print(table)


def _show_startup(console: Console, found: Results) -> None:
    table = new_table(
        f"start of a Hydra program that does not use the plugin, {found['pairs']} pairs, ms",
        ("", "without", "with", "added", "quartiles", "others"),
    )
    for kind, label in (("cpu", "CPU"), ("wall", "elapsed")):
        of = found[kind]
        low, high = of["added_quartiles_ms"]
        shown = figures(of["without_ms"], of["with_ms"], of["added_ms"])
        table.add_row(label, *shown, f"{low:.1f} to {high:.1f}", *figures(found["others_cores"]))
    console.print(table)


SHOW: dict[str, Callable[[Console, Results], None]] = {
    "sweep": _show_sweep,
    "handover": _show_handover,
    "memory": _show_memory,
    "startup": _show_startup,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the cleanup, so that no program is left running
    try:
        sys.exit(main())
    except ProgramError as error:
        sys.exit(f"launch_overhead: {error}")
