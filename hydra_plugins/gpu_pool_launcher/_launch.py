"""Runs the jobs of `GpuPoolLauncher.launch`."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from gpu_launcher.debug_log import log_into
from gpu_launcher.errors import GpuLauncherError, JobError
from gpu_launcher.jobs.directory import LogFiles
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.head import JobRunner, SweepResult, run_jobs
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.labels import Labels
from gpu_launcher.jobs.manifest import finished_before, read
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.source import JobSource
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.nodes.start import start_nodes
from gpu_launcher.wording import count

from ._commands import closing_lines
from ._directory import LaunchError, open_logs, sweep_directory
from ._ending import final, is_for_basic_sweeper, quiet_interrupt, stop
from ._options import read_node_specs, read_options, read_start_method, spell
from ._program import HydraProgram, job_command
from ._results import JobOptionError, unpack
from .launcher import GpuPoolLauncher


def launch(
    launcher: GpuPoolLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Run one job for each list of overrides; return their JobReturns in the same order.

    Raises LaunchError if no job can run, and KeyboardInterrupt or SystemExit when the user stopped the sweep.
    """
    try:
        returns = _launch(launcher, [list(overrides) for overrides in job_overrides], initial_job_idx)
    except GpuLauncherError as error:
        raise final(LaunchError(str(error))) from error
    except LaunchError as error:
        raise final(error) from error.__cause__
    if is_for_basic_sweeper():
        fail_with_first(returns)
    return returns


def fail_with_first(returns: Sequence[JobReturn]) -> None:
    """If a job failed, end the program as Hydra would, with our message about the first such job."""
    failed = next((one for one in returns if one.status is JobStatus.FAILED), None)
    if failed is not None and isinstance(failed._return_value, (JobError, JobOptionError)):
        raise final(failed._return_value, f"Error executing job with overrides: {failed.overrides}{os.linesep}")


def _launch(launcher: GpuPoolLauncher, job_overrides: list[list[str]], first: int) -> list[JobReturn]:
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    options = _with_failures_so_far(options, launcher.failed)
    directory = sweep_directory(launcher.config)
    logs, notices = open_logs(launcher, directory, resume=options.resume, continued=False)
    log_into(directory)
    launcher.labels = launcher.labels or Labels()
    several = len(job_overrides) > 1
    labels = launcher.labels.of_all(job_overrides if several else [list(filter_overrides(job_overrides[0]))])
    jobs = [
        Job(number, label, overrides)
        for number, (label, overrides) in enumerate(zip(labels, job_overrides, strict=True), start=first)
    ]
    try:
        command = Path(sys.argv[0]).name
        closing = partial(closing_lines, launcher.config, directory)
        node = _node(launcher, logs, idle=lambda: options.resume and _all_finished(jobs, directory))
        with quiet_interrupt():
            sweep = run_jobs(jobs, node, options, directory, command, notices=notices, closing=closing)
    except BaseException:
        _close_node(launcher)  # the next launch starts a new one
        raise
    if not isinstance(node, LocalNode):
        _close_node(launcher)  # a group of nodes is for one run
    launcher.failed += sum(result.outcome is Outcome.FAILED for result in sweep.results)
    if sweep.stopped_by is not None:
        stop(sweep.stopped_by)
    returns = []
    for overrides, result in zip(job_overrides, sweep.results, strict=True):
        ran_in = Path(result.log).parent if result.log else directory
        returns.append(unpack(result, list(filter_overrides(overrides)), ran_in))
    return _with_culprit(sweep, returns)


def _all_finished(jobs: Sequence[Job], directory: Path) -> bool:
    """Whether all jobs completed in earlier launches."""
    return len(finished_before(jobs, read(directory))[0]) == len(jobs)


def _with_culprit(sweep: SweepResult, returns: list[JobReturn]) -> list[JobReturn]:
    """The returns. If failures stopped the sweep, cancelled jobs get the return of the first job that failed.

    Sweepers raise the first error that they find. Otherwise that error could name a cancelled job.
    """
    outcomes = [result.outcome for result in sweep.results]
    if not sweep.stopped or Outcome.FAILED not in outcomes:
        return returns
    culprit = returns[outcomes.index(Outcome.FAILED)]
    victims = (outcome is Outcome.CANCELLED for outcome in outcomes)
    return [culprit if victim else own for victim, own in zip(victims, returns, strict=True)]


def stream(
    launcher: GpuPoolLauncher,
    open_source: Callable[[], tuple[JobSource, int | None]],
    max_parallel: int | None,
    cap: str,
) -> SweepResult:
    """Run the jobs of a source, at most `max_parallel` at a time.

    `cap` is the user's name for the option that sets `max_parallel`. `open_source` is called once the node runs, and
    returns the source and, if known, the number of jobs. Raises GpuLauncherError if no job can run.
    """
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    options = replace(options, resume=False)
    if max_parallel is not None and (options.max_parallel is None or max_parallel < options.max_parallel):
        options = replace(options, max_parallel=max_parallel, cap=cap)
    directory = sweep_directory(launcher.config)
    logs, _ = open_logs(launcher, directory, resume=False, continued=True)
    log_into(directory)
    try:
        node = _node(launcher, logs)
        source, total = open_source()
        command = Path(sys.argv[0]).name
        closing = partial(closing_lines, launcher.config, directory)
        with quiet_interrupt():
            return run_jobs([], node, options, directory, command, source=source, total=total, closing=closing)
    finally:
        _close_node(launcher)


def _with_failures_so_far(options: Options, failed: int) -> Options:
    """The options, with the limit on failures reduced by earlier batches. Raises LaunchError if it is used up.

    Some sweepers launch several batches. `failed` is the number of jobs that failed in earlier batches.
    """
    policy = options.failures
    if policy.most is None or not failed:
        return options
    if failed >= policy.most:
        raise LaunchError(
            f"{count(failed, 'job')} of this sweep failed: hydra.launcher.max_failures={policy.most} ends it"
        )
    return replace(options, failures=replace(policy, most=policy.most - failed))


def _node(launcher: GpuPoolLauncher, logs: LogFiles, *, idle: Callable[[], bool] = lambda: False) -> JobRunner:
    """The launcher's node or nodes. The first launch starts them, and they end with the launcher.

    `idle` says whether there is nothing to run. Then other machines are not reached.
    """
    if launcher.node is None or not launcher.node.is_running:
        assert launcher.config is not None
        assert launcher.hydra_context is not None
        assert launcher.task_function is not None
        program = HydraProgram(launcher.config, launcher.hydra_context, launcher.task_function, job_command(sys.argv))
        method = read_start_method(launcher.options.get("start_method", "auto"))
        keep = (launcher.lock.descriptor,)
        specs = read_node_specs(launcher.options)
        node = start_nodes(
            specs,
            program,
            sweep_directory(launcher.config),
            arguments=sys.argv,
            method=method,
            option=spell("start_method"),
            keep=keep,
            log_file=logs.claim,
            idle=idle,
        )
        weakref.finalize(launcher, node.close)
        launcher.node = node
        node.wait_until_ready()
    return cast("JobRunner", launcher.node)


def _close_node(launcher: GpuPoolLauncher) -> None:
    node, launcher.node = launcher.node, None
    if node is not None:
        node.close()
