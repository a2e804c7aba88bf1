"""Runs the jobs of `GpuPoolLauncher.launch`."""

from __future__ import annotations

import os
import shlex
import sys
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig

from gpu_launcher.debug_log import log_into
from gpu_launcher.errors import GpuLauncherError, JobError
from gpu_launcher.jobs.alone import AloneCommand
from gpu_launcher.jobs.directory import LogFiles
from gpu_launcher.jobs.ending import exit_code_of, recorded_end
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.head import JobRunner, SweepResult, run_jobs
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.labels import Labels
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.node_client import LocalNode
from gpu_launcher.jobs.notifications import Notifier
from gpu_launcher.jobs.progress.stream import Output
from gpu_launcher.jobs.recorder import finished_before
from gpu_launcher.jobs.result_table import write_results
from gpu_launcher.jobs.source import JobSource, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.nodes.start import start_nodes
from gpu_launcher.processes.detaching import Detachment
from gpu_launcher.wording import count

from ._commands import closing_lines, how_to_resume, rerun_command, typed_program
from ._directory import LaunchError, open_logs, sweep_directory
from ._dry_run import show_grid
from ._ending import final, is_for_basic_sweeper, quiet_interrupt, stop
from ._options import read_fetches, read_hooks, read_node_specs, read_options, read_start_method, spell
from ._program import HydraProgram, job_command
from ._results import JobOptionError, unpack
from .launcher import GpuPoolLauncher


def launch(
    launcher: GpuPoolLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
) -> Sequence[JobReturn]:
    """Run one job for each list of overrides; return their JobReturns in the same order.

    Raises LaunchError if no job can run, and KeyboardInterrupt or SystemExit when the user stopped the sweep. A dry run
    raises SystemExit, because there is nothing to return.
    """
    assert launcher.config is not None
    overrides = [list(one) for one in job_overrides]
    try:
        if launcher.options.get("dry_run"):
            show_grid(launcher, _jobs(launcher, overrides, initial_job_idx))
        with recorded_end(sweep_directory(launcher.config)) as end:
            with open_notifier(launcher) as notifier:
                returns = _launch(launcher, overrides, initial_job_idx, notifier)
            # Sweepers raise the error of the first job that did not complete. Cancelled jobs have one, too.
            failed = _first_failed(returns)
            end.value = int(launcher.failed > 0) if failed is None else exit_code_of(failed._return_value)
    except GpuLauncherError as error:
        raise final(LaunchError(str(error))) from error
    except LaunchError as error:
        raise final(error) from error.__cause__
    if is_for_basic_sweeper():
        fail_with_first(returns)
    return returns


def fail_with_first(returns: Sequence[JobReturn]) -> None:
    """If a job failed, end the program as Hydra would, with our message about the first such job."""
    failed = _first_failed(returns)
    if failed is not None and isinstance(failed._return_value, (JobError, JobOptionError)):
        raise final(failed._return_value, f"Error executing job with overrides: {failed.overrides}{os.linesep}")


def _first_failed(returns: Sequence[JobReturn]) -> JobReturn | None:
    return next((one for one in returns if one.status is JobStatus.FAILED), None)


@contextmanager
def open_notifier(launcher: GpuPoolLauncher) -> Iterator[Notifier | None]:
    """Create what runs the hooks of a sweep. None if there are none. The hook for the end runs when the block ends.

    Raises OptionError, and KeyboardInterrupt or SystemExit if the user stops the program while that hook runs.
    """
    assert launcher.config is not None
    hooks = read_hooks(launcher.options)
    if not hooks:
        yield None
        return
    command = shlex.join([*typed_program(sys.argv, sys.orig_argv), *sys.argv[1:]])
    display = Output(sys.stderr)
    tell = partial(_tell, display)
    with Notifier(hooks, sweep_directory(launcher.config), command, spell=spell, tell=tell) as notifier:
        yield notifier
    if notifier.interrupted is not None:
        stop(notifier.interrupted)


def _tell(display: Output, line: str) -> None:
    display.write(f"[gpu_pool] {line}\n")


def _launch(
    launcher: GpuPoolLauncher, job_overrides: list[list[str]], first: int, notifier: Notifier | None
) -> list[JobReturn]:
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    options = _with_failures_so_far(options, launcher.failed)
    directory = sweep_directory(launcher.config)
    anew = launcher.logs is None and first == 0 and not options.resume
    logs, notices = open_logs(launcher, directory, resume=options.resume, continued=False)
    log_into(directory)
    jobs = _jobs(launcher, job_overrides, first)
    try:
        command = Path(sys.argv[0]).name
        closing = partial(_close_sweep, launcher.config, directory, range(first + len(jobs)))
        node = _node(launcher, logs, lambda: _lowest(_unfinished(jobs, directory, options), options.max_parallel))
        with quiet_interrupt():
            sweep = run_jobs(
                jobs,
                node,
                options,
                directory,
                command,
                notices=notices,
                closing=closing,
                how_to_resume=how_to_resume(launcher.config, directory),
                alone=_alone(launcher.config, directory, options),
                notifier=notifier,
                begun=_begun(launcher),
                anew=anew,
                throttle=launcher.throttle or Throttle(),
            )
    except BaseException:
        _close_node(launcher)  # the next launch starts a new one
        raise
    if not isinstance(node, LocalNode):
        _close_node(launcher)  # a group of nodes is for one run
    launcher.throttle = sweep.throttle
    launcher.failed += sum(result.outcome is Outcome.FAILED for result in sweep.results)
    if sweep.stopped_by is not None:
        stop(sweep.stopped_by)
    returns = []
    for overrides, result in zip(job_overrides, sweep.results, strict=True):
        ran_in = Path(result.log).parent if result.log else directory
        returns.append(unpack(result, list(filter_overrides(overrides)), ran_in))
    return _with_culprit(sweep, returns)


def _jobs(launcher: GpuPoolLauncher, job_overrides: list[list[str]], first: int) -> list[Job]:
    """The jobs of one launch, numbered from `first`."""
    launcher.labels = launcher.labels or Labels()
    several = len(job_overrides) > 1
    labels = launcher.labels.of_all(job_overrides if several else [list(filter_overrides(job_overrides[0]))])
    return [
        Job(number, label, overrides)
        for number, (label, overrides) in enumerate(zip(labels, job_overrides, strict=True), start=first)
    ]


def _alone(config: DictConfig, directory: Path, options: Options) -> AloneCommand:
    return rerun_command(typed_program(sys.argv, sys.orig_argv), sys.argv[1:], config, directory, options)


def _begun(launcher: GpuPoolLauncher) -> Callable[[], None]:
    """Return what to call when the sweep has begun."""
    return (lambda: None) if launcher.detachment is None else cast("Detachment", launcher.detachment).begun


def _unfinished(jobs: Sequence[Job], directory: Path, options: Options) -> int:
    """Return how many jobs are to run: those that did not complete in earlier launches."""
    return len(jobs) - (len(finished_before(jobs, read(directory))[0]) if options.resume else 0)


def _lowest(*limits: int | None) -> int | None:
    """Return the lowest of several limits, where None means no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


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
    open_source: Callable[[], tuple[JobSource, int | None, bool]],
    max_parallel: int | None,
    cap: str,
    objectives: Mapping[str, str],
    notifier: Notifier | None,
) -> SweepResult:
    """Run the jobs of a source, at most `max_parallel` at a time. `objectives` has the direction of each, by name.

    `cap` is the user's name for the option that sets `max_parallel`. `open_source` is called once the node runs, and
    returns the source, the number of jobs if it is known, and whether the source begins anew, so that jobs that the
    sweep's directory already has are not of this sweep. Raises GpuLauncherError if no job can run.
    """
    assert launcher.config is not None
    options = read_options(launcher.options, launcher.config)
    options = replace(options, resume=False, directions=tuple(objectives.values()), objectives=tuple(objectives))
    if max_parallel is not None and (options.max_parallel is None or max_parallel < options.max_parallel):
        options = replace(options, max_parallel=max_parallel, cap=cap)
    directory = sweep_directory(launcher.config)
    logs, notices = open_logs(launcher, directory, resume=False, continued=True)
    log_into(directory)
    try:
        node = _node(launcher, logs, lambda: options.max_parallel)
        source, total, anew = open_source()
        command = Path(sys.argv[0]).name
        closing = partial(_close_sweep, launcher.config, directory, ())  # the sweeper names the best one
        with quiet_interrupt():
            return run_jobs(
                [],
                node,
                options,
                directory,
                command,
                source=source,
                total=total,
                notices=notices,
                closing=closing,
                alone=_alone(launcher.config, directory, options),
                notifier=notifier,
                begun=_begun(launcher),
                anew=anew,
            )
    finally:
        _close_node(launcher)


def _close_sweep(
    config: DictConfig, directory: Path, best_of: Container[int], failed: Sequence[Job], incomplete: int
) -> list[str]:
    """Write the table of results, and return the last lines of the sweep. `best_of` is as in `write_results`."""
    best, problems = write_results(directory, best_of=best_of)
    return [*best, *problems, *closing_lines(config, directory, failed, incomplete)]


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


def _node(launcher: GpuPoolLauncher, logs: LogFiles, at_once: Callable[[], int | None]) -> JobRunner:
    """The launcher's node or nodes. The first launch starts them, and they end with the launcher.

    `at_once` is that of `start_nodes`.
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
            at_once=at_once,
            fetches=read_fetches(launcher.options),
        )
        weakref.finalize(launcher, node.close)
        launcher.node = node
        node.wait_until_ready()
    return cast("JobRunner", launcher.node)


def _close_node(launcher: GpuPoolLauncher) -> None:
    node, launcher.node = launcher.node, None
    if node is not None:
        node.close()
