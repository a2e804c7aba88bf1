"""Sweeps for as long as it takes, in which jobs die in every way, and the fork server, too. `make soak` calls this.

Real Hydra, real processes, simulated devices; three sweeps: forked jobs in one launch, forked jobs in many launches,
and spawned jobs. While they run, the launching program and all its descendants are looked at. In the end every job
must have exactly the result that it should have, and nothing may have grown with the number of jobs, and nothing may be
left.

    python tools/soak.py                 # 5000 jobs: ten minutes on two idle cores
    python tools/soak.py --jobs 500      # a tenth of that
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SOAKING = Path(__file__).resolve().parent / "soaking"
sys.path.insert(0, str(SOAKING))

from fates import COMPLETES, RETRIED, fate_of, value_of  # noqa: E402

MARKER = "GPU_LAUNCHER_SOAK"
"""Environment variable that every process of a sweep inherits."""
EVERY = 0.2
"""Seconds between two looks."""
MEMORY_PER_JOB = 250_000
"""Bytes by which the launching program may grow: Hydra's JobReturn is about 100 kB, an exception comes on top."""
LONGEST = 3600
"""Seconds for one sweep; many times what it needs."""


@dataclass(frozen=True)
class Sweep:
    name: str
    jobs: int
    options: tuple[str, ...]
    server_kills: int
    """How many times its fork server is killed."""


@dataclass
class Look:
    """At one moment of a sweep."""

    ended: int
    descriptors: int
    """Of the launching program, the guard, and the fork server."""
    processes: int
    zombies: int
    threads: int
    memory: int
    """Bytes that only the launching program has."""
    server_memory: int


@dataclass
class Watched:
    looks: list[Look] = field(default_factory=list)
    killed_at: list[int] = field(default_factory=list)
    """After how many jobs the fork server was killed."""
    seconds: float = 0.0


class SoakError(Exception):
    """Something does not hold."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Long sweeps with many deaths.")
    parser.add_argument("--jobs", type=int, default=5000, help="in all (default: 5000)")
    parser.add_argument("--seed", type=int, default=None, help="of the deaths (default: another one each time)")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    tenth = max(40, options.jobs // 10)
    sweeps = (
        Sweep("forked", max(1, options.jobs - 2 * tenth), ("hydra.launcher.start_method=fork",), 2),
        Sweep(
            "in-launches",
            tenth,
            ("hydra.launcher.start_method=fork", f"hydra.sweeper.max_batch_size={max(8, tenth // 25)}"),
            1,
        ),
        Sweep("spawned", tenth, ("hydra.launcher.start_method=spawn",), 1),
    )
    failed = False
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        for sweep in sweeps:
            try:
                soak(sweep, seed, Path(scratch))
            except SoakError as error:
                failed = True
                print(f"{sweep.name}: FAILED: {error}", flush=True)
    return 1 if failed else 0


def soak(sweep: Sweep, seed: int, scratch: Path) -> None:
    """Run one sweep and check everything. Raises SoakError."""
    directory = scratch / sweep.name
    directory.mkdir()
    watched = watch(sweep, seed, directory)
    results = check_results(sweep, seed, directory, watched)
    check_growth(sweep, watched.looks)
    check_nothing_left(directory)
    first, last = quarters(watched.looks)
    print(
        f"{sweep.name}: {sweep.jobs} jobs in {watched.seconds:.0f} s ({watched.seconds / sweep.jobs * 1000:.0f} ms "
        f"each), fork server killed {len(watched.killed_at)} times\n"
        f"  {', '.join(f'{number} {what}' for what, number in results.most_common())}\n"
        f"  most in the first and the last quarter: {first.descriptors}, {last.descriptors} descriptors; "
        f"{first.processes}, {last.processes} processes; {first.threads}, {last.threads} threads; "
        f"{first.memory / 1e6:.0f}, {last.memory / 1e6:.0f} MB (the fork server "
        f"{first.server_memory / 1e6:.0f}, {last.server_memory / 1e6:.0f})",
        flush=True,
    )


def watch(sweep: Sweep, seed: int, directory: Path) -> Watched:
    """Run it, look at it, and kill its fork server now and then."""
    chance = random.Random(seed)
    kills = sorted(chance.randrange(sweep.jobs // 5, sweep.jobs * 4 // 5) for _ in range(sweep.server_kills))
    command = [
        sys.executable,
        str(SOAKING / "program.py"),
        "-m",
        "hydra/launcher=gpu_pool",
        "hydra/sweeper=grid_async",
        "hydra.launcher.devices=simulated:8",
        "hydra.launcher.retries=1",
        "hydra.launcher.retry_on=[crash,timeout]",
        "hydra.launcher.timeout=8",
        "hydra.launcher.grace=1",
        *sweep.options,
        f"hydra.sweep.dir={directory / 'sweep'}",
        f"diary={directory / 'diary.txt'}",
        f"seed={seed}",
        f"n=range({sweep.jobs})",
    ]
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), MARKER: str(directory)}
    watched = Watched()
    began = time.monotonic()
    with (directory / "output.txt").open("wb") as output:
        program = psutil.Popen(command, cwd=directory, env=environment, stdout=output, stderr=output)
    manifest = Tally(directory / "sweep" / ".gpu_launcher" / "manifest.jsonl")
    while program.poll() is None:
        if time.monotonic() - began > LONGEST:
            program.kill()
            raise SoakError(f"did not end in {LONGEST} s; {manifest.ended()} jobs had ended")
        with suppress(psutil.NoSuchProcess):
            guard = next(iter(program.children()), None)
            server = next(iter(guard.children()), None) if guard else None
            if guard and server:
                watched.looks.append(look(manifest.ended(), program, guard, server))
                if kills and manifest.ended() >= kills[0]:
                    watched.killed_at.append(kills.pop(0))
                    server.kill()
        time.sleep(EVERY)
    watched.seconds = time.monotonic() - began
    return watched


class Tally:
    """How many jobs a manifest knows to have ended; reads only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._ended = 0

    def ended(self) -> int:
        """As of now."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
            complete = added[: added.rfind(b"\n") + 1]
            self._offset += len(complete)
            self._ended += complete.count(b'"ended"')
        return self._ended


def look(ended: int, program: psutil.Process, guard: psutil.Process, server: psutil.Process) -> Look:
    """Raises psutil.NoSuchProcess if one has just ended."""
    family = [program, *program.children(recursive=True)]
    zombies = 0
    for process in family:
        with suppress(psutil.NoSuchProcess):
            zombies += process.status() == psutil.STATUS_ZOMBIE
    return Look(
        ended=ended,
        descriptors=sum(process.num_fds() for process in (program, guard, server)),
        processes=len(family),
        zombies=zombies,
        threads=program.num_threads(),
        memory=program.memory_full_info().uss,
        server_memory=server.memory_full_info().uss,
    )


def check_results(sweep: Sweep, seed: int, directory: Path, watched: Watched) -> Counter[str]:
    """Every job has the result it should have, and ran as often as it should have."""
    listed = subprocess.run(
        [sys.executable, "-m", "gpu_launcher.cli", "jobs", "--json", str(directory / "sweep")],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        raise SoakError(f"gpu-launcher jobs: {listed.stderr}")
    jobs = {job["number"]: job for job in json.loads(listed.stdout)["jobs"]}
    if sorted(jobs) != list(range(sweep.jobs)):
        raise SoakError(f"{len(jobs)} jobs have a result, of {sweep.jobs}")
    diary: dict[int, list[tuple[str, int]]] = {number: [] for number in jobs}
    for line in (directory / "diary.txt").read_text().splitlines():
        entry = json.loads(line)
        diary[entry["n"]].append((entry["did"], entry["attempt"]))
    wrong = []
    results: Counter[str] = Counter()
    spared = 0
    for number, job in jobs.items():
        fate = fate_of(number, seed)
        results[job["state"]] += 1
        results["retried"] += job["attempts"] > 1
        begun = [attempt for did, attempt in diary[number] if did == "began"]
        if len(begun) != len(set(begun)) or len(begun) > 2:
            wrong.append(f"job {number} ran more often than it had attempts: {diary[number]}")
        expected = "completed" if fate in COMPLETES else "failed"
        attempts = 2 if fate in RETRIED else 1
        if job["state"] == expected and job["attempts"] == attempts:
            if expected == "completed" and ("ended", attempts) not in diary[number]:
                wrong.append(f"job {number} ({fate}) completed, but never came to its end")
            continue
        # What ran when the fork server was killed ended with it, which is a crash, and one more attempt.
        if watched.killed_at and ("fork server" in (job["message"] or "") or job["attempts"] == 2):
            spared += 1
        else:
            wrong.append(f"job {number} ({fate}) {job['state']} in {job['attempts']} attempts: {job['message']}")
    if spared > 16 * len(watched.killed_at):
        wrong.append(f"{spared} jobs did not end as they should have, for {len(watched.killed_at)} dead fork servers")
    wrong += wrong_returns(directory, jobs)
    if wrong:
        raise SoakError(f"{len(wrong)} wrong: " + "; ".join(wrong[:5]))
    return results


def wrong_returns(directory: Path, jobs: dict[int, dict[str, Any]]) -> list[str]:
    """What the launches returned to the sweeper must be the same, and in order."""
    try:
        returned = [json.loads(line) for line in (directory / "returns.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return [f"the launcher did not return; its last words: {(directory / 'output.txt').read_bytes()[-800:]!r}"]
    wrong = []
    if [one["number"] for one in returned] != sorted(jobs):
        wrong.append(f"{len(returned)} JobReturns were returned, or not in order")
    for one in returned:
        completed = jobs[one["number"]]["state"] == "completed"
        expected = value_of(one["number"]) if completed else None
        if (one["status"] == "COMPLETED", one["value"]) != (completed, expected):
            wrong.append(f"job {one['number']} returned {one}, and is {jobs[one['number']]['state']}")
    return wrong


def quarters(looks: list[Look]) -> tuple[Look, Look]:
    """The most of everything early, once all is under way, and late."""
    total = looks[-1].ended
    early = [look for look in looks if total * 0.1 <= look.ended <= total * 0.35]
    late = [look for look in looks if look.ended >= total * 0.75]

    def most(part: list[Look]) -> Look:
        return Look(**{name: max(getattr(look, name) for look in part) for name in Look.__dataclass_fields__})

    if not early or not late:
        raise SoakError(f"too few looks: {len(early)} early, {len(late)} late")
    return most(early), most(late)


def check_growth(sweep: Sweep, looks: list[Look]) -> None:
    """Nothing but results grows."""
    early, late = quarters(looks)
    for what, slack in (("descriptors", 6), ("processes", 8), ("zombies", 8), ("threads", 0)):
        before, after = getattr(early, what), getattr(late, what)
        if after > before + slack:
            raise SoakError(f"{what} grew from at most {before} to {after}")
    if late.memory - early.memory > MEMORY_PER_JOB * sweep.jobs + 10_000_000:
        raise SoakError(f"the launching program grew from {early.memory} to {late.memory} bytes")
    if late.server_memory - early.server_memory > 10_000_000:
        raise SoakError(f"the fork server grew from {early.server_memory} to {late.server_memory} bytes")


def check_nothing_left(directory: Path) -> None:
    """No process, no lease, no ticket."""
    alive = []
    mark = f"{MARKER}={directory}".encode()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [pid for pid in psutil.pids() if mark in environment_of(pid)]
        if not alive:
            break
        time.sleep(EVERY)
    if alive:
        names = [psutil.Process(pid).cmdline() for pid in alive if psutil.pid_exists(pid)]
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise SoakError(f"{len(alive)} processes are left: {names[:5]}")
    status = subprocess.run(
        [
            sys.executable,
            "-m",
            "gpu_launcher.cli",
            "status",
            "--json",
            "--devices",
            "simulated:8",
            "--pool-dir",
            str(directory / "pool"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if status.returncode != 0:
        raise SoakError(f"gpu-launcher status: {status.stderr}")
    pool = json.loads(status.stdout)
    if pool["leases"] or pool["queue"]:
        raise SoakError(f"left in the pool: {pool['leases']} {pool['queue']}")


def environment_of(pid: int) -> list[bytes]:
    """Empty for what is not ours, or no more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


if __name__ == "__main__":
    sys.exit(main())
