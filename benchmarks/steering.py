"""What it costs a sweep that it can be steered, and that others look at it.

    python benchmarks/steering.py            two minutes
    python benchmarks/steering.py --quick    seconds: whether it works

The same map runs without a control socket, with one that nobody uses, while another program asks for its status ten
times a second, and while one watches all that happens. They take turns, and the ratios compare with the first of the
same round. The jobs do nothing, so what the head does weighs as much as it can.

The second table has the milliseconds from a request until it is answered, and until the one who watches is told that it
has taken effect: that no job is started any more, that the limit holds for jobs to come, that the cancelled job, which
ends at once, has ended and waits again after `retry`, or that all jobs of the stopped map have ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overhead import machine
from overhead.programs import ProgramError, Run, Usage, program, scratch
from rich.console import Console
from rich.table import Table

from gpu_launcher import SteeringError, Sweep
from gpu_launcher.jobs.events import JobEnded, JobsRequeued, JobStarted, Throttled
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.steering import Watch

WAYS = ("no socket", "socket", "asked", "watched")
ASK = 0.1
"""Seconds between two questions."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few jobs, one round")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.rounds = 20, 1
    found: dict[str, Any] = {"machine": machine.describe(), "quick": options.quick, "jobs": options.jobs}
    rounds: list[dict[str, Usage]] = [{way: measure(way, options.jobs) for way in WAYS} for _ in range(options.rounds)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"a map of {options.jobs} jobs, {options.rounds} rounds", title_justify="left")
    for place, column in enumerate(("", "seconds", "ratio", "CPU seconds", "ratio", "others")):
        table.add_column(column, justify="right" if place else "left")
    found["ways"] = {}
    for way in WAYS:
        figures = {
            "wall": median(one[way].wall for one in rounds),
            "wall_ratio": median(one[way].wall / one[WAYS[0]].wall for one in rounds),
            "cpu": median(one[way].cpu for one in rounds),
            "cpu_ratio": median(one[way].cpu / one[WAYS[0]].cpu for one in rounds),
            "others": median(one[way].others for one in rounds),
        }
        found["ways"][way] = figures
        table.add_row(way, *(f"{value:.3g}" for value in figures.values()))
    console.print(table)
    found["requests"] = requests(3 if options.quick else 30)
    table = Table("", "answered", "worst", "took effect", "worst", title="requests, in ms", title_justify="left")
    for name, times in found["requests"].items():
        answered, done = ([one[place] for one in times] for place in (0, 1))
        table.add_row(name, *(f"{value:.3g}" for one in (answered, done) for value in (median(one), max(one))))
    console.print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def measure(way: str, jobs: int) -> Usage:
    """Run the map once."""
    answers = 0
    with scratch() as directory:
        sweep = directory / "sweep"
        numbers = f"n={','.join(map(str, range(jobs)))}"
        arguments = ["map", "--devices", "simulated:4", "--dir", str(sweep), "--param", numbers, "--", "true", "{n}"]
        command = program("steered.py", "closed" if way == WAYS[0] else "open", *arguments)
        with Run(command, directory, {}) as run:
            while way in ("asked", "watched") and not run.ended:
                with contextlib.suppress(SteeringError):  # it has not begun yet, or has just ended
                    if way == "asked":
                        Sweep(sweep).status()
                        answers += 1
                    else:
                        answers += watch(Sweep(sweep))
                time.sleep(ASK)
            usage = run.wait()
    if way in ("asked", "watched") and not answers:
        raise ProgramError("the sweep did not answer once")
    return usage


def requests(count: int) -> dict[str, list[tuple[float, float]]]:
    """Steer a map of jobs that sleep. Returns the times of each request, in ms: until the answer, and the effect."""
    found: dict[str, list[tuple[float, float]]] = {}

    def steer(name: str, ask: Callable[[], object], done: Callable[[object], bool]) -> None:
        before = time.perf_counter()
        ask()
        answered = time.perf_counter() - before
        follow(watched, running, done)
        found.setdefault(name, []).append((1000 * answered, 1000 * (time.perf_counter() - before)))

    with scratch() as directory:
        numbers = f"n={','.join(map(str, range(2 * count + 8)))}"
        sweep_directory = str(directory / "sweep")
        arguments = [
            "map",
            "--devices",
            "simulated:4",
            "--dir",
            sweep_directory,
            "--param",
            numbers,
            "--",
            "sh",
            "-c",
            "exec sleep 600",
            "{n}",
        ]
        with (
            Run(program("steered.py", "open", *arguments), directory, {}) as run,
            contextlib.closing(begun(run, directory / "sweep")) as watched,
        ):
            sweep = Sweep(directory / "sweep")
            running: set[int] = set()
            for turn in range(count):
                follow(watched, running, lambda event: len(running) == 4)
                number = min(running)
                steer("pause", sweep.pause, lambda event: isinstance(event, Throttled) and event.paused)
                steer("continue", sweep.resume, lambda event: isinstance(event, Throttled) and not event.paused)
                steer("cancel", lambda: sweep.cancel(number), lambda event: number not in running)  # noqa: B023
                steer("retry", lambda: sweep.retry(number), lambda event: isinstance(event, JobsRequeued))  # noqa: B023
                for devices in (3, None):
                    steer(
                        "limit",
                        lambda: sweep.limit(devices),  # noqa: B023
                        lambda event: isinstance(event, Throttled) and event.devices == devices,  # noqa: B023
                    )
                if run.ended:
                    raise ProgramError(f"the map has ended in turn {turn}")
            steer("stop", sweep.stop, lambda event: not running)
            while not run.ended:
                time.sleep(ASK)
    return found


def begun(run: Run, directory: Path) -> Watch:
    while not run.ended:
        with contextlib.suppress(SteeringError):  # it has not begun yet
            return Sweep(directory).watch()
        time.sleep(ASK)
    raise ProgramError("the map does not run")


def follow(watched: Watch, running: set[int], done: Callable[[object], bool]) -> None:
    """Receive events until `done` is true of one, and keep `running`, the numbers of the jobs that run."""
    is_done = done(None)
    while not is_done:
        for event in watched.receive():  # first: the state may have come with the answer
            match event:
                case SweepTally():
                    running.update(event.running)
                case JobStarted():
                    running.add(event.number)
                case JobEnded():
                    running.discard(event.number)
            is_done = is_done or done(event)
        if watched.is_over and not is_done:
            raise ProgramError("the map has ended")
        if not is_done:
            select.select([watched], [], [], 60)


def watch(sweep: Sweep) -> int:
    """Read what the sweep sends until it ends, and return how many times something came."""
    arrivals = 0
    with contextlib.closing(sweep.watch()) as watched:
        while not watched.is_over:
            select.select([watched], [], [])
            arrivals += bool(watched.receive())
    return arrivals


if __name__ == "__main__":
    sys.exit(main())
