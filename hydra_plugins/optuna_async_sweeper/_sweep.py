"""Runs the search of `OptunaAsyncSweeper.sweep`.

With our launcher, trials are streamed: the study is asked for each when one more job can be prepared. Other launchers
take batches, and each batch waits for its slowest job.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import optuna
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from optuna import TrialPruned

from gpu_launcher.errors import GpuLauncherError, StudyError
from gpu_launcher.jobs.ending import recorded_end
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.labels import Labels
from gpu_launcher.jobs.notifications import Notifier
from gpu_launcher.jobs.result_table import value_names
from gpu_launcher.processes.exceptions import reason
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.stopping import SearchEnded
from gpu_launcher.studies.study_session import (
    AskedTrial,
    SearchSummary,
    StudySession,
    TrialEnding,
    TrialOutcome,
    UnusablePoint,
)
from gpu_launcher.studies.sweep_search import SweepSearch
from hydra_plugins.gpu_pool_launcher._commands import override
from hydra_plugins.gpu_pool_launcher._directory import make_directory
from hydra_plugins.gpu_pool_launcher._ending import final, stop
from hydra_plugins.gpu_pool_launcher.launcher import GpuPoolLauncher

from ._composition import check_composition
from ._options import SweeperOptions, read_options
from ._report import finish
from ._search_space import SearchSpace, read_search_space
from ._study import StudyPlan
from .sweeper import OptunaAsyncSweeper

log = logging.getLogger(__name__)

BATCH = 2
"""Number of trials in a batch, for launchers that take batches, as in the official sweeper."""


MAX_CLOSING_SECONDS = 20.0
"""Seconds to wait for the search to end after the sweep is stopped."""


class SweepError(CompactHydraException):
    """The sweep cannot begin or has no result. Hydra shows the message without a traceback."""


def sweep(sweeper: OptunaAsyncSweeper, arguments: list[str]) -> None:
    """Run the trials and write `optimization_results.yaml`.

    Raises SweepError, and KeyboardInterrupt or SystemExit when the user stopped the sweep.
    """
    assert sweeper.config is not None
    assert sweeper.hydra_context is not None
    try:
        options = read_options(sweeper.options)
        space = read_search_space(
            arguments, sweeper.hydra_context.config_loader, params=options.params, config=sweeper.config
        )
        points: list[dict[str, Any]] = []
        if sweeper.options.get("custom_search_space") is None:  # the config may need parameters from a custom one
            if options.filter is not None:
                options.filter.check_names(space.job_keys)
            points = check_composition(sweeper.hydra_context.config_loader, sweeper.config, space)
        if isinstance(sweeper.launcher, GpuPoolLauncher) and sweeper.launcher.options.get("dry_run"):
            _show(sweeper.launcher, options, space, points)
        directory = make_directory(sweeper.config)
        plan = StudyPlan(sweeper.config, sweeper.options, options, space, TrialOwner(ProcessIdentity.here()))
        if isinstance(sweeper.launcher, GpuPoolLauncher):
            from hydra_plugins.gpu_pool_launcher._launch import open_notifier

            with recorded_end(directory), open_notifier(sweeper.launcher) as notifier, _quiet_optuna():
                _stream(sweeper, plan, directory, notifier)
        else:
            _batches(sweeper, plan, directory)
    except GpuLauncherError as error:
        raise final(SweepError(str(error))) from error
    except SweepError as error:
        raise final(error) from error.__cause__


def _show(
    launcher: GpuPoolLauncher, options: SweeperOptions, space: SearchSpace, points: Sequence[Mapping[str, Any]]
) -> NoReturn:
    """Show the search and what its trials need, with the `points` of the search space as examples. Ends the program."""
    from hydra_plugins.gpu_pool_launcher._dry_run import show_jobs

    for line in space.words():
        log.info(line)
    if not points:
        log.info("hydra.sweeper.custom_search_space suggests parameters as trials run: no trial can be shown before")
    specs = []
    for point in points:
        if options.filter is None or options.filter.keeps(space.job_values(point)):
            specs.append(space.overrides(point))
    labels = Labels(common=space.fixed).of_all(specs)
    jobs = [Job(number, label, spec) for number, (label, spec) in enumerate(zip(labels, specs, strict=True))]
    trials = options.bounds.n_trials or options.bounds.total_trials
    if options.bounds.total_trials is not None:
        log.info("hydra.sweeper.total_trials includes the trials that the study has already")
    show_jobs(launcher, jobs, trials, "trial")


def _stream(sweeper: OptunaAsyncSweeper, plan: StudyPlan, directory: Path, notifier: Notifier | None) -> None:
    from hydra_plugins.gpu_pool_launcher._launch import stream

    launcher = sweeper.launcher
    assert isinstance(launcher, GpuPoolLauncher)
    if launcher.options.get("resume"):
        log.info(
            "hydra.launcher.resume is ignored: a study always continues, by n_trials more; "
            "hydra.sweeper.total_trials runs what it lacks"
        )
    objectives = len(plan.options.directions)
    labels = Labels(common=[entry for _, entry in plan.space.entries if isinstance(entry, str)])
    searches: list[SweepSearch] = []

    def open_search() -> tuple[SweepSearch, int | None, bool]:
        session, remarks = _open(plan)
        for remark in remarks:
            log.info(remark)
        expected, is_new = session.expected, session.is_new
        search = SweepSearch(
            session,
            lambda asked: Job(asked.trial.number, labels.of(asked.spec), asked.spec, about=asked.trial),
            lambda result: ending(result, objectives, directory),
            finish=lambda session, summary: finish(session, summary, plan, directory),
            kill_pruned=plan.options.kill_pruned,
        )
        searches.append(search)
        return search, expected, is_new

    try:
        named = dict(zip(value_names(objectives), plan.options.directions, strict=True))
        result = stream(launcher, open_search, plan.options.n_jobs, "hydra.sweeper.n_jobs", named, notifier)
    except BaseException:
        for search in searches:
            with contextlib.suppress(GpuLauncherError):  # the original error is raised instead
                _close(search, MAX_CLOSING_SECONDS)
            log.info(_how_to_go_on(plan, directory, None))
        raise
    (search,) = searches
    stopped_by = result.stopped_by
    try:
        # A sweep that ended by itself waits for its report. A stopped one does not wait for a slow sampler or plot.
        summary, lines = _close(search, MAX_CLOSING_SECONDS if result.stopped else None)
    except (GpuLauncherError, KeyboardInterrupt) as error:
        log.info(_how_to_go_on(plan, directory, None))
        if isinstance(error, KeyboardInterrupt):
            stop(signal.SIGINT)
        if stopped_by is None:
            raise
        log.warning(str(error))
        stop(stopped_by)
    failed = search.failed
    if result.stopped and stopped_by is None:
        failed = "the sweep was stopped because hydra.launcher.on_failure or max_failures says so"
        log.info(_how_to_go_on(plan, directory, summary.left))
    elif result.given_up is not None and stopped_by is None:
        failed = failed or f"the sweep ended early, because each further trial {result.given_up}"
        log.info(_how_to_go_on(plan, directory, summary.left))
    _conclude(plan, directory, summary, lines, failed, interrupted=stopped_by is not None)
    if stopped_by is not None:
        stop(stopped_by)


def _open(plan: StudyPlan) -> tuple[StudySession, list[str]]:
    """Open the study; return the session and lines for the user."""
    try:
        return plan.open()
    except GpuLauncherError:
        raise
    except Exception as error:  # a sampler, a storage or the user's search space can raise anything
        traceback.print_exc()
        raise StudyError(f"the search failed: {type(error).__name__}: {error}") from error


def _close(search: SweepSearch, patience: float | None) -> tuple[SearchSummary, list[str]]:
    """End the search, and tell the study about running trials if possible. The study is not used afterwards."""
    try:
        return search.close(patience)
    except BaseException:
        search.abandon()
        raise


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Make Optuna log only warnings in this block, because the display shows the rest."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _batches(sweeper: OptunaAsyncSweeper, plan: StudyPlan, directory: Path) -> None:
    launcher = sweeper.launcher
    assert launcher is not None
    size = plan.options.n_jobs or BATCH
    kind = type(launcher).__name__
    log.warning(
        f"{kind} takes jobs in batches of {size}, and each batch waits for its slowest job; nothing is pruned. "
        "With hydra/launcher=gpu_pool no job waits for another"
    )
    session, remarks = plan.open()
    for remark in remarks:
        log.info(remark)
    over: SearchEnded | None = None
    try:
        while over is None:
            batch: list[AskedTrial] = []
            while len(batch) < size and over is None:
                answer = session.ask()
                match answer:
                    case SearchEnded():
                        over = answer
                    case UnusablePoint(message):
                        if message is not None:
                            log.warning(message)
                    case AskedTrial():
                        batch.append(answer)
            for run in _consecutive(batch):
                # Directories are numbered like trials, and other sweeps may have taken some of the numbers.
                for asked in run:
                    session.started(asked.trial.number, [], None, None)
                returns = launcher.launch([asked.spec for asked in run], run[0].trial.number)
                for asked, job_return in zip(run, returns, strict=True):
                    number = asked.trial.number
                    session.ran_in(number, _directory_of(job_return))
                    told = _ending_of(job_return, len(plan.options.directions))
                    if told.outcome is TrialOutcome.FAILED:
                        log.warning(f"trial {number} failed: {told.message}")
                    session.tell(number, told)
    except BaseException:
        session.close()  # tells the study about all trials
        log.info(_how_to_go_on(plan, directory, session.summary().left))
        raise
    session.close()
    summary = session.summary()
    if over.reason:
        log.info(over.reason)
    lines = finish(session, summary, plan, directory)
    _conclude(plan, directory, summary, lines, over.reason if over.failed else None, interrupted=False)


def _directory_of(job_return: JobReturn) -> str | None:
    """The job's output directory if known, because all jobs may share one working directory."""
    found = OmegaConf.select(job_return.hydra_cfg, "hydra.runtime.output_dir") if job_return.hydra_cfg else None
    return str(found) if found else job_return.working_dir


def _consecutive(batch: Sequence[AskedTrial]) -> list[list[AskedTrial]]:
    runs: list[list[AskedTrial]] = []
    for asked in batch:
        if runs and runs[-1][-1].trial.number + 1 == asked.trial.number:
            runs[-1].append(asked)
        else:
            runs.append([asked])
    return runs


def ending(result: JobResult, objectives: int, directory: Path) -> TrialEnding:
    """Convert the result of a job to the ending of its trial."""
    from hydra_plugins.gpu_pool_launcher._results import unpack

    if result.outcome is Outcome.PRUNED:
        return TrialEnding(TrialOutcome.PRUNED, message=result.message)
    if result.withdrawn:
        return TrialEnding(TrialOutcome.FAILED, message=result.message)
    if result.outcome is Outcome.CANCELLED:
        return TrialEnding(TrialOutcome.INTERRUPTED, message="the sweep was stopped")
    if result.outcome is Outcome.FAILED:
        return TrialEnding(TrialOutcome.FAILED, message=result.message)
    return _ending_of(unpack(result, [], directory), objectives)


def _ending_of(job_return: JobReturn, objectives: int) -> TrialEnding:
    if job_return.status is not JobStatus.COMPLETED:
        error = job_return._return_value
        outcome = TrialOutcome.PRUNED if isinstance(error, TrialPruned) else TrialOutcome.FAILED
        return TrialEnding(outcome, message=reason(error))
    returned = job_return.return_value
    try:
        return TrialEnding(TrialOutcome.COMPLETE, values_of(returned, objectives))
    except ValueError as error:
        return TrialEnding(
            TrialOutcome.FAILED, message=str(error), remarkable=True, hopeless=isinstance(error, _NotANumberError)
        )


class _NotANumberError(ValueError):
    """The task function did not return one number for each direction."""


def values_of(returned: Any, objectives: int) -> tuple[float, ...]:
    """Read the values of a trial. Raises ValueError for a return value that Optuna refuses or no search can use."""
    if objectives == 1:
        given = [returned]
    else:
        try:
            given = [] if isinstance(returned, (str, bytes, Mapping)) else list(returned)
        except Exception:  # raised by a user's class
            given = []
        if not given:
            raise _NotANumberError(f"returned {_shown(returned)} instead of {objectives} numbers")
    if len(given) != objectives:
        raise _NotANumberError(f"returned {len(given)} values, and the sweep has {objectives} directions")
    values = []
    for one in given:
        try:
            value = float(one)
        except Exception:  # a user's class, a number too large for a float, or a tensor of several elements
            raise _NotANumberError(f"returned {_shown(one)}, which is not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"returned {value}, which no search can use")
        values.append(value)
    return tuple(values)


def _shown(value: object) -> str:
    if value is None:
        return "None (does the task function return its value?)"
    try:
        text = repr(value)
    except Exception:  # raised by a user's class
        text = f"a {type(value).__qualname__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _conclude(
    plan: StudyPlan, directory: Path, summary: SearchSummary, lines: list[str], failed: str | None, *, interrupted: bool
) -> None:
    """Save and log the sweep's outcome. Raises SweepError if the sweep failed or no trial completed."""
    for line in lines:
        log.info(line)
    if summary.best:
        _save(plan.space, summary, directory, several=len(plan.options.directions) > 1)
    if interrupted:
        log.info(_how_to_go_on(plan, directory, summary.left))
    elif failed is not None:
        raise SweepError(f"{failed}. The first: {summary.first_failure}")
    elif not summary.best:
        what = f"; the first: {summary.first_failure}" if summary.first_failure else ""
        raise SweepError(f"no trial of study {plan.name!r} completed, so there is no best trial{what}")


def _how_to_go_on(plan: StudyPlan, directory: Path, left: int | None) -> str:
    overrides: dict[str, Any] = {"hydra.sweep.dir": str(directory)}
    if plan.raw.get("storage") is not None:
        overrides["hydra.sweeper.study_name"] = plan.name
    if left:
        overrides["hydra.sweeper.n_trials"] = left
    words = shlex.join(override(name, value) for name, value in overrides.items())
    return f"to continue the study, run the same command with {words}"


def _save(space: SearchSpace, summary: SearchSummary, directory: Path, *, several: bool) -> None:
    """Write the best trials to `optimization_results.yaml`, in the official sweeper's format."""
    results: dict[str, Any] = {"name": "optuna"}
    if several:
        results["solutions"] = [{"params": space.values(best.params), "values": best.values} for best in summary.best]
    else:
        (best,) = summary.best
        results |= {"best_params": space.values(best.params), "best_value": best.values[0]}
    OmegaConf.save(OmegaConf.create(results, flags={"allow_objects": True}), directory / "optimization_results.yaml")
