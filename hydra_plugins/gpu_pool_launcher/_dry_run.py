"""Shows what a sweep would run, for `hydra.launcher.dry_run`, and ends the program."""

from __future__ import annotations

import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.dry_run import examine_needs
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.recorder import finished_before
from gpu_launcher.model import Request
from gpu_launcher.processes.exceptions import describe
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, job_name

from ._commands import alone_command, is_basic, is_grid, typed_program
from ._directory import sweep_directory
from ._exceptions import whole_message
from ._options import (
    read_fetches,
    read_hooks,
    read_job_options,
    read_node_specs,
    read_options,
    read_start_method,
)
from ._program import HydraProgram
from .launcher import GpuPoolLauncher

MAX_LINES = 20
"""Maximum number of command lines that are printed."""
MAX_COMPOSED = 100
"""Maximum number of composed configs, which take 50 to 100 ms each."""
MAX_PROBLEMS = 5
"""Maximum number of different problems that are shown."""


def show_grid(launcher: GpuPoolLauncher, jobs: Sequence[Job]) -> NoReturn:
    """Show the jobs that a sweeper launches, and end the program."""
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    if options.resume:
        before, _ = finished_before(jobs, read(sweep_directory(launcher.config)))
        jobs = [job for job in jobs if job.number not in before]
        _say(f"{count(len(before), 'job')} completed before, and would not run again")
    config = launcher.config
    if not is_grid(config) or (is_basic(config) and config.hydra.sweeper.get("max_batch_size") is not None):
        _say("these are the first jobs that the sweeper launches; others may follow")
    show_jobs(launcher, jobs, len(jobs), "job")


def show_jobs(launcher: GpuPoolLauncher, jobs: Sequence[Job], total: int | None, noun: str) -> NoReturn:
    """Print the first commands and what the jobs need, and end the program: with 0 if all can run, else with 1.

    `total` is the number of jobs that the sweep would run, of which `jobs` may be examples. None if it is not limited.
    Raises OptionError, DeviceError and PoolDirectoryError.
    """
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    nodes = read_node_specs(launcher.options)
    read_start_method(launcher.options.get("start_method", "auto"))
    read_fetches(launcher.options)
    read_hooks(launcher.options)
    program = typed_program(sys.argv, sys.orig_argv)
    for job in jobs[:MAX_LINES]:
        command = shlex.join(alone_command(program, sys.argv[1:], launcher.config, job))
        print(command if command.isprintable() else one_line(command), flush=True)
    rest = (total or 0) - min(len(jobs), MAX_LINES)
    number = f"{noun}s without a limit on their number" if total is None else count(total, noun)
    _say(f"{f'... and {rest} more: ' if rest > 0 else ''}{number}; this is a dry run, and nothing is started")
    chosen = sample(jobs, MAX_COMPOSED)
    if len(chosen) < len(jobs):
        _say(f"composing a sample of {len(chosen)} of {len(jobs)} configs ...")
    requests, problems = _examine(launcher, chosen)
    failed = sum(map(len, problems.values()))
    for problem, failing in [*problems.items()][:MAX_PROBLEMS]:
        named = job_name(failing[0].number, failing[0].label)
        such = f"{len(failing)} {noun}s cannot run, such as" if len(failing) > 1 else "cannot run:"
        _say(f"{such} {named}: {problem}")
    if len(problems) > MAX_PROBLEMS:
        _say(f"and {count(len(problems) - MAX_PROBLEMS, 'other problem')}")
    if chosen:
        _say(f"{len(chosen) - failed} of {len(chosen)} examined configs are valid")
    runnable = total - failed if total == len(chosen) else total
    needs = examine_needs(requests, runnable, options, noun, here=not nodes)
    for line in needs.lines:
        _say(line)
    sys.exit(1 if problems or not needs.possible else 0)


def sample(jobs: Sequence[Job], most: int) -> list[Job]:
    """Choose at most `most` jobs, in their order: as many with overrides that no other has as possible."""
    if len(jobs) <= most:
        return list(jobs)
    seen: set[str] = set()
    fresh: list[Job] = []
    rest: list[Job] = []
    for job in random.Random(0).sample(jobs, len(jobs)):
        (rest if seen.issuperset(job.spec) else fresh).append(job)
        seen.update(job.spec)
    return sorted([*fresh, *rest][:most], key=lambda job: job.number)


def _examine(launcher: GpuPoolLauncher, jobs: Iterable[Job]) -> tuple[Mapping[Request, int], Mapping[str, list[Job]]]:
    """Compose the configs of jobs. Returns how many jobs make each request, and by problem the jobs that cannot run."""
    assert launcher.config is not None
    assert launcher.hydra_context is not None
    assert launcher.task_function is not None
    program = HydraProgram(launcher.config, launcher.hydra_context, launcher.task_function, [])
    requests = Counter[Request]()
    problems: dict[str, list[Job]] = {}
    for job in jobs:
        try:
            request, _ = read_job_options(launcher.config, program.compose(job.number, job.spec))
        except OptionError as error:
            problems.setdefault(one_line(str(error)), []).append(job)
        except (HydraException, OmegaConfBaseException) as error:
            problems.setdefault(one_line(" ".join(whole_message(error).split())), []).append(job)
        except Exception as error:  # a resolver of the user can raise anything
            problems.setdefault(one_line(describe(error)), []).append(job)
        else:
            requests[request] += 1
    return requests, problems


def _say(line: str) -> None:
    print(f"[gpu_pool] {line}", file=sys.stderr, flush=True)
