"""`parallel_map` over tiny records, beside `multiprocessing.Pool.imap_unordered` at its best chunk size.

    python benchmarks/functions_map.py            a minute
    python benchmarks/functions_map.py --quick    seconds: whether it works

Each measurement is a program of its own, with as many workers as the machine has cores, in turn with the others. The
records per second are those of workers that run: imap_unordered's have each done something before; `parallel_map`,
which has no pool to warm up, is timed from its first result (of a chunk of one) on. *first* and *all*: seconds from
nothing to that, and until the workers are gone. *CPU*: of all processes, from nothing to the end, per record. *memory*:
by how much the program's own peak grew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overhead import machine
from rich.console import Console
from rich.table import Table

CHUNKS = (100, 500, 1000, 2000, 5000, 10_000)


def nothing(record: int) -> int:
    """The call is all there is."""
    return record


def ten_microseconds(record: int) -> int:
    for number in range(200):
        record += number
    return record


WORK: dict[str, Callable[[int], int]] = {"nothing": nothing, "ten_microseconds": ten_microseconds}


def main() -> int:
    options = _options()
    if options.one:
        how, work, count = options.one
        print(json.dumps(one(how, WORK[work], int(count))))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    count, rounds = (20_000, 1) if options.quick else (options.records, options.rounds)
    chunks = (500,) if options.quick else CHUNKS
    hows = [*(f"imap_unordered {size}" for size in chunks), "parallel_map ordered", "parallel_map"]
    found: dict[str, Any] = {"machine": machine.describe(), "records": count, "quick": options.quick, "work": {}}
    for work in WORK:
        runs: dict[str, list[dict[str, float]]] = {how: [] for how in hows}
        for _ in range(rounds):
            for how in hows:
                runs[how].append(measure(how, work, count))
        found["work"][work] = {how: {key: median(run[key] for run in of) for key in of[0]} for how, of in runs.items()}
        console.print(_table(work, count, found["work"][work]))
    many = 100_000 if options.quick else 1_000_000
    found["memory"] = {how: measure(how, "nothing", many)["memory"] for how in hows[-2:]}
    for how, size in found["memory"].items():
        console.print(f"{how}, {many:,} records: the program grew by {size / 1e6:.1f} MB", highlight=False)
    found["workers_64"] = measure("64 workers", "nothing", 64)
    console.print(f"64 workers with gpus=0 are at work after {found['workers_64']['first']:.2f} s", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few records, once")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _table(work: str, count: int, found: dict[str, dict[str, float]]) -> Table:
    best = max(of["rate"] for how, of in found.items() if how.startswith("imap"))
    table = Table(title=f"{count:,} records, {work}", title_justify="left")
    for place, column in enumerate(("how", "records/s", "of the best imap", "first s", "all s", "CPU us", "memory MB")):
        table.add_column(column, justify="right" if place else "left")
    for how, of in found.items():
        figures = (f"{of['rate']:,.0f}", f"{of['rate'] / best:.2f}", f"{of['first']:.3f}", f"{of['all']:.3f}")
        table.add_row(how, *figures, f"{of['cpu'] * 1e6:.2f}", f"{of['memory'] / 1e6:.1f}")
    return table


def measure(how: str, work: str, count: int) -> dict[str, float]:
    """Run one measurement in a program of its own."""
    command = [sys.executable, __file__, "--one", how, work, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{how}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def one(how: str, work: Callable[[int], int], count: int) -> dict[str, float]:
    import gpu_launcher

    gpu_launcher.parallel_map  # noqa: B018  (imported before anything is timed)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        before, cpu = _peak(), _cpu()
        began = time.perf_counter()
        if how.startswith("imap"):
            with multiprocessing.Pool(cores) as pool:
                pool.map(nothing, range(100 * cores), 1)
                first = time.perf_counter()
                _, last = _timed(pool.imap_unordered(work, range(count), chunksize=int(how.split()[1])), count)
        elif how == "64 workers":
            first, last = _sixty_four(directory)
        else:
            results = gpu_launcher.parallel_map(
                range(count), function=work, gpus=0, num_workers=cores, ordered="ordered" in how, pool=_pool(directory)
            )
            first, last = _timed(results, count)
            assert list(results) == []
        ended = time.perf_counter()
        return {
            "rate": (count - 1) / (last - first),
            "first": first - began,
            "all": ended - began,
            "memory": _peak() - before,
            "cpu": (_cpu() - cpu) / count,
        }


def _pool(directory: str) -> Any:
    from gpu_launcher import Pool

    return Pool(devices="simulated:1", pool_dir=f"{directory}/pool")


def _timed(results: Any, count: int) -> tuple[float, float]:
    """When the first result and the last one came."""
    iterator: Iterator[int] = iter(results)
    next(iterator)
    first = time.perf_counter()
    assert sum(1 for _ in itertools.islice(iterator, count - 1)) == count - 1
    return first, time.perf_counter()


def _sixty_four(directory: str) -> tuple[float, float]:
    """Each record waits until there are 64 workers that wait."""
    here = Path(directory) / "here"
    here.mkdir()

    def meet(record: int) -> int:
        (here / str(os.getpid())).touch()
        while len(list(here.iterdir())) < 64:
            time.sleep(0.02)
        return record

    import gpu_launcher

    return _timed(
        gpu_launcher.parallel_map(range(64), function=meet, gpus=0, num_workers=64, pool=_pool(directory)), 64
    )


def _cpu() -> float:
    """Seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
