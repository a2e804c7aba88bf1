"""The head's loop while `optimize` runs: it passes messages between the jobs and the study.

It answers messages one after another. While the sampler or a callback runs, all other messages wait. Meanwhile the node
supervises the jobs.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.progress_bar import _ProgressBar
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import GpuLauncherError, JobError, NodeDiedError
from gpu_launcher.jobs import node_messages as node
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import GaveUp, JobReturned, JobStarted, JobWaiting, NodesChanged, Notice, Outcome
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node_client import RemoteLoop
from gpu_launcher.jobs.notice_log import log_event, log_left_behind
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.where import GRACE
from gpu_launcher.model import ENDING, MILLIONTHS, WHOLE
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException
from gpu_launcher.studies import optimize_messages as d
from gpu_launcher.studies.deferred_sigint import DeferredSigint
from gpu_launcher.studies.recorded_search import ENDED_BEFORE, RecordedSearch
from gpu_launcher.studies.search_engine import SearchEngine
from gpu_launcher.studies.study_session import STATES, AskedTrial, StudySession, TrialEnding, TrialOutcome
from gpu_launcher.studies.trial import TrialInfo
from gpu_launcher.studies.worker_trial import STUDY_ATTRIBUTES, STUDY_METHODS, TRIAL_ATTRIBUTES, TRIAL_METHODS

if TYPE_CHECKING:
    from gpu_launcher.nodes.group_loop import GroupLoop

log = logging.getLogger("gpu_launcher")
_logger = optuna.logging.get_logger("optuna.study._optimize")
"""The logger that Study.optimize uses for pruned and failed trials."""

MAX_LOST = 3
"""Processes in a row that die before they have a trial, at which the search ends: more are not an accident."""
MAX_MESSAGES = 1000
"""Messages handled in one turn."""
INTERRUPTED = "was interrupted"

Callback = Callable[[optuna.Study, FrozenTrial], None]


class SearchLoop(SearchEngine):
    """Runs the trials of one call of `optimize`. Call `run` once, in the thread that called `optimize`."""

    def __init__(
        self,
        session: StudySession,
        loop: RemoteLoop | GroupLoop,
        catch: tuple[type[BaseException], ...],
        callbacks: list[Callback],
        bar: _ProgressBar,
        options: Options,
        record: RecordedSearch | None = None,
    ) -> None:
        """`loop` must be open and have these `options`. `record` is that in the search's directory, if it has one."""
        super().__init__(session)
        self._study = session.study
        self._loop = loop
        self._catch = catch
        self._callbacks = callbacks
        self._bar = bar
        self._options = options
        self._record = record
        self._sigint = DeferredSigint()
        self._began = time.monotonic()

        self._heard: deque[node.Message] = deque()
        """Messages received but not yet handled. They are kept here because KeyboardInterrupt may come in between."""
        self._jobs = 0
        """Number of jobs offered so far, and so the number of the next job."""
        self._wanted = 0
        """Number of jobs that the node still wants."""
        self._waiting: set[int] = set()
        """Jobs that have no trial yet."""
        self._interruptions: dict[int, d.Raised] = {}
        """Interruptions of jobs that have not ended. If the job's node ends, the job runs again on another node."""
        self._started: dict[int, JobStarted] = {}
        """The jobs that have started, and so have their devices, and have not ended."""
        self._early: set[int] = set()
        """Jobs that have started but wait for a trial until the end of the job that had their devices is known."""
        self._sampled: set[int] = set()
        """Trials that have asked for a parameter."""
        self._lost = 0
        """Number of processes in a row that died without a trial."""
        self._exhausted = False
        self._closed = False
        self._interrupted = False
        self._error: BaseException | None = None
        """The error to raise at the end."""
        self._stops_wanted = 0
        """Number of interruptions that requests have asked for and that are not handled."""
        self._withdrawn: dict[int, str] = {}
        """Jobs that requests have cancelled, with the reason."""

    def run(self) -> None:
        """Run the trials until all have ended. Raises what `optimize` raises."""
        why = ENDED_BEFORE
        with self._sigint:
            try:
                self._serve(math.inf)
            except KeyboardInterrupt:
                why = INTERRUPTED
                self._interrupt()
                raise
            finally:
                self._loop.close()  # ends all jobs that are still running
                self._close_session(why)
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # otherwise the error's own traceback would keep it alive

    # Turns

    def _serve(self, until: float) -> None:
        while not self._closed and time.monotonic() < until:
            self._offer()
            self._hear(until)
            self._turn(self._heard)
            for job in sorted(self._early):
                if self._has_room(job):
                    self._early.remove(job)
                    self._job_started(job)

    def _hear(self, until: float) -> None:
        """Receive messages. Waits until there is one or something else must be done."""
        moments = [until, self._next_check, time.monotonic() + self._loop.tick_seconds]
        if not self._exhausted and self._session.bounds.timeout is not None:
            moments.append(self._began + self._session.bounds.timeout)
        patience = max(0.0, min(moments) - time.monotonic())
        poll = select.poll()
        poll.register(self._loop, select.POLLIN)
        if self._record is not None and (control := self._record.fileno()) is not None:
            poll.register(control, select.POLLIN)
        with self._sigint.allowed():
            # One millisecond more; otherwise poll would return slightly too early again and again.
            poll.poll(patience and patience * 1000 + 1)
        while len(self._heard) < MAX_MESSAGES and (arrived := self._receive()):
            self._heard += arrived
            if any(isinstance(message, node.Closed) for message in arrived):
                break
        if self._record is not None:
            for statement in self._record.serve_requests():
                self._obey(statement)
        if self._stops_wanted:
            self._stops_wanted -= 1
            raise KeyboardInterrupt

    def _receive(self) -> list[node.Message]:
        try:
            return self._loop.receive_ready()
        except NodeDiedError as error:  # raised when the messages before it have been handled
            return [node.Closed(error)]

    def _handle(self, event: node.Message) -> None:
        match event:
            case node.Wanted(count):
                self._wanted += count
            case JobStarted(number=job):
                self._started[job] = event
                self._early.add(job)
            case node.Heard(job, d.Call() as call):
                self._call(job, call)
            case node.Heard(job, d.Ping(number)):
                self._say(s.Reply(job, d.Answer(number, pickling.dump(None))))
            case node.Heard(job, (d.Returned() | d.Pruned() | d.Raised()) as ending):
                self._objective_ended(job, ending)
            case JobReturned(number=job):
                self._job_returned(job)
            case node.Ended(result):
                log_left_behind(result)
                self._job_ended(result)
            case Notice() | GaveUp() | JobWaiting():
                log_event(event)
            case NodesChanged(text=text):
                log.warning("%s", text)
            case node.Closed(error):
                self._closed = True
                if error is not None:
                    self._end_with(error)
        if self._record is not None:
            self._record.take(event)

    # Jobs

    @property
    def _over(self) -> bool:
        """Whether no more trials are asked for."""
        if self._exhausted or self._error is not None or self._interrupted or self._study._stop_flag:
            return True
        return self._session.over() is not None

    def _offer(self) -> None:
        """Offer the jobs that the node wants, or tell it that there are no more."""
        if self._exhausted:
            return
        if self._over:
            self._exhausted = True
            for job in self._waiting:
                self._cancel(job, "is not needed any more")
            self._say(s.Exhausted())
            return
        n_trials = self._session.bounds.n_trials
        left = math.inf if n_trials is None else n_trials - self._session.asked - len(self._waiting)
        for _ in range(int(min(self._wanted, left))):
            self._wanted -= 1
            self._waiting.add(self._jobs)
            self._say(s.Offer(Job(self._jobs, "", None)))
            self._jobs += 1

    def _has_room(self, job: int) -> bool:
        """Whether the jobs known to be running leave room for this one, which already has its devices.

        When a job dies, the node gives its devices to the next job before it reports the death. Until the report
        arrives, the next job appears to be one too many.
        """
        most = self._options.max_parallel
        running = [other for other in self._trials if other in self._started and other != job]
        if most is not None and len(running) >= most:
            return False
        share = self._options.request.share if self._options.request is not None else WHOLE
        for device in self._started[job].devices:
            others = sum(device in self._started[other].devices for other in running)
            if (others + 1) * share.of(device.memory).millionths > MILLIONTHS:
                return False
        return True

    def _job_started(self, job: int) -> None:
        """Answer a job that has started: with a trial, or that there is none."""
        self._waiting.discard(job)
        self._lost = 0
        devices = [device.label for device in self._started[job].devices]
        answer: TrialInfo | d.NothingToRun = d.NothingToRun()
        try:
            if job in self._trials:  # the node that ran it was lost
                answer = self._trials[job]
                self._note_start(job, answer.number, devices)
            elif not self._over and job not in self._cancelled:
                asked = self._session.ask()
                if isinstance(asked, AskedTrial):
                    self._note_start(job, asked.trial.number, devices)
                    # The objective asks for these when it needs them. The node may lack the classes of their values.
                    self._trials[job] = answer = replace(asked.trial, params={}, distributions={}, user_attrs={})
        except Exception as error:  # from the sampler or the storage
            self._end_with(error)
        self._say(s.Reply(job, answer))

    def _note_start(self, job: int, trial: int, devices: list[str]) -> None:
        log = None if self._record is None else self._record.began(self._started[job], trial)
        self._session.started(trial, devices, None if log is None else os.path.dirname(log), log)  # noqa: PTH120

    def _job_returned(self, job: int) -> None:
        """Take note that a job will be started again, on another node, with the trial that it has."""
        self._started.pop(job, None)
        self._interruptions.pop(job, None)
        self._early.discard(job)
        if job not in self._trials:  # its trial has ended, or it got none
            self._waiting.add(job)
            if self._exhausted:
                self._cancel(job, "is not needed any more")

    def _job_ended(self, result: JobResult) -> None:
        """Handle the end of a job. If its trial has already ended, only its entries here are removed."""
        job = result.number
        interruption = self._interruptions.pop(job, None)
        if job in self._trials and interruption is not None:
            self._raised(job, interruption)
        elif job in self._trials:
            number = self._trials[job].number
            problem = INTERRUPTED if self._interrupted else result.message or "ended without a result"
            log_file = result.log if self._record is None else self._record.log_of(number)
            error = JobError(number, f"trial {number}", problem, log_file)
            self._failed(job, error, problem, lost=result.unsupervised)
        elif job in self._waiting:
            self._waiting.discard(job)
            self._lost += job not in self._cancelled
            accident = result.outcome is Outcome.CANCELLED or result.cause in (Cause.CRASH, Cause.OOM)
            if not accident or self._lost == MAX_LOST:
                self._end_with(JobError(job, "", result.message or "ended before it began", result.log))
        self._started.pop(job, None)
        self._early.discard(job)

    def _interrupt(self) -> None:
        """Give running trials some time to end, unless the user presses Ctrl-C again."""
        self._interrupted = True
        if self._record is not None:
            self._record.interrupted()
        if self._stops_wanted:  # a second one
            return
        with suppress(KeyboardInterrupt, GpuLauncherError):
            self._say(s.Stop())
            self._serve(time.monotonic() + GRACE + ENDING)

    def _say(self, statement: s.Statement) -> None:
        with suppress(NodeDiedError):  # `_hear` finds out, too, when it has received what the node sent before
            self._loop.say(statement)

    def _end_with(self, error: BaseException) -> None:
        """Stop asking for trials, and raise this error when the running trials have ended."""
        if self._error is None:
            self._error = error

    def _obey(self, statement: s.Statement) -> None:
        """Do what a request has told the search."""
        match statement:
            case s.Cancel(job, why):
                self._withdrawn[job] = why
                self._cancel(job, why)
            case s.Stop():
                self._stops_wanted += 1
            case _:
                self._say(statement)

    # Messages from jobs

    def _store(self, events: Iterable[Any]) -> None:
        try:
            super()._store(events)
        except Exception as error:  # from the storage
            self._end_with(error)

    def _check_trials(self) -> None:
        try:
            super()._check_trials()
            if self._record is not None:
                self._record.look()
        except Exception as error:  # from the storage
            self._end_with(error)

    def _answer(self, job: int, question: int, verdict: bool | Exception) -> None:
        """`should_prune` raises the exception."""
        known = self._loop.known
        answer = PortableException.of(verdict, known) if isinstance(verdict, Exception) else pickling.dump(verdict)
        self._say(s.Reply(job, d.Answer(question, answer)))

    def _call(self, job: int, call: d.Call) -> None:
        if job not in self._trials:
            return
        try:
            positional, named = pickling.load(call.arguments, on_cpu=True)
            result = self._called(self._trials[job].number, call, positional, named)
            answer: bytes | PortableException = pickling.dump(result, self._loop.known)
        except Exception as error:  # any error is raised in the objective
            answer = PortableException.of(error, self._loop.known)
        self._say(s.Reply(job, d.Answer(call.number, answer)))

    def _called(self, number: int, call: d.Call, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call a method, or read an attribute, of the trial or its study. Raises what it raises."""
        thing: object = self._study
        attributes, methods = STUDY_ATTRIBUTES, STUDY_METHODS
        if call.target == "trial":
            thing = self._session.running[number].trial
            attributes, methods = TRIAL_ATTRIBUTES, TRIAL_METHODS
            if number not in self._sampled and (call.name.startswith("suggest_") or call.name == "relative_params"):
                self._sampled.add(number)
                # Optuna caches all trials per thread from one `ask` to the next. The sampler must also see the
                # parameters that other trials have been given meanwhile.
                self._study._thread_local.cached_all_trials = None
        if call.name in attributes:
            return getattr(thing, call.name)
        assert call.name in methods, call.name
        return getattr(thing, call.name)(*positional, **named)

    # Ends of trials

    def _objective_ended(self, job: int, ending: d.ObjectiveEnding) -> None:
        if job not in self._trials:
            return
        match ending:
            case d.Raised(interrupted=True) if self._loop.moves_jobs:
                self._interruptions[job] = ending
            case d.Raised():
                self._raised(job, ending)
            case d.Pruned(text):
                self._tell(job, TrialOutcome.PRUNED, said=text)
            case d.Returned(values):
                problem = _infeasible(values, len(self._study.directions))
                if problem is None:
                    self._tell(job, TrialOutcome.COMPLETE, values)
                else:
                    shown = values[0] if values is not None and len(values) == 1 else values
                    self._tell(job, TrialOutcome.FAILED, said=problem, returned=shown)

    def _raised(self, job: int, ending: d.Raised) -> None:
        error = d.unpack(ending.error, self._trials[job].number)
        self._failed(job, error, ending.error.summary, caught=ending.caught)

    def _failed(self, job: int, error: BaseException, said: str, *, caught: bool = False, lost: bool = False) -> None:
        ended_by_us = isinstance(error, (KeyboardInterrupt, JobError))
        if (why := self._withdrawn.get(job)) is not None and ended_by_us:
            self._tell(job, TrialOutcome.FAILED, said=why, caught=True)
        elif (self._interrupted or job in self._cancelled) and ended_by_us:
            self._tell(job, TrialOutcome.INTERRUPTED, said=INTERRUPTED)
        else:
            caught = caught or isinstance(error, self._catch)
            self._tell(job, TrialOutcome.FAILED, said=said, error=error, caught=caught, lost=lost)

    def _tell(
        self,
        job: int,
        outcome: TrialOutcome,
        values: tuple[float | d.NotANumber, ...] | None = None,
        *,
        said: str = "",
        error: BaseException | None = None,
        caught: bool = False,
        returned: object = None,
        lost: bool = False,
    ) -> None:
        """End a trial. If its job was `lost`, the trial did not cause that, and is queued again."""
        number = self._trials.pop(job).number
        numbers = tuple(float(value) for value in values or () if not isinstance(value, d.NotANumber))
        try:
            if lost and (trial := self._session.retry_lost(number, said)) is not None:
                _logger.warning(f"Trial {number} {said}; it failed, and is queued again.")
                self._note_end(job, trial, said)
                self._call_back(trial)
                return
            trial = self._session.tell(
                number, TrialEnding(outcome, numbers, None if outcome is TrialOutcome.PRUNED else said or None)
            )
            self._note_end(job, trial, said, stopped=outcome is TrialOutcome.INTERRUPTED)
        except Exception as wrong:  # from the sampler or the storage
            self._end_with(wrong)
            return
        if trial.state is not STATES.get(outcome):
            return  # it was interrupted, or already ended elsewhere
        self._log(trial, said, error, returned)
        if error is not None and not caught:
            self._end_with(error)
        elif not self._interrupted:
            self._call_back(trial)

    def _note_end(self, job: int, trial: FrozenTrial, said: str, *, stopped: bool = False) -> None:
        if self._record is not None:
            self._record.told(job, trial, said, stopped=stopped)

    def _log(self, trial: FrozenTrial, said: str, error: BaseException | None, returned: object) -> None:
        """Log the end of a trial, in the words of Study.optimize."""
        if trial.state is TrialState.COMPLETE:
            self._study._log_completed_trial(trial.values, trial.number, trial.params)
        elif trial.state is TrialState.PRUNED:
            _logger.info(f"Trial {trial.number} pruned. {said}")
        else:
            _logger.warning(
                f"Trial {trial.number} failed with parameters: {trial.params} because of the following error: "
                f"{said if error is None else repr(error)}.",
                exc_info=error,
            )
            _logger.warning(f"Trial {trial.number} failed with value {returned!r}.")

    def _call_back(self, trial: FrozenTrial) -> None:
        try:
            for callback in self._callbacks:
                callback(self._study, copy.deepcopy(trial))
        except Exception as error:
            self._end_with(error)
        self._bar.update(time.monotonic() - self._began, self._study)

    def _close_session(self, why: str) -> None:
        try:
            self._session.close(why, interrupted=why is INTERRUPTED)
        except Exception:  # from the storage, whose failure may have ended the search
            log.warning(
                "trials that were running could not be marked as failed; the next gpu_launcher.optimize on the study "
                "does that",
                exc_info=True,
            )


def _infeasible(values: tuple[float | d.NotANumber, ...] | None, objectives: int) -> str | None:
    """The problem with the values that an objective returned, in Optuna's words; None if there is none."""
    if values is None:
        return "The value None could not be cast to float."
    problems = []
    for value in values:
        if isinstance(value, d.NotANumber):
            problems.append(f"The value {value!r} could not be cast to float")
        elif math.isnan(value):
            problems.append(f"The value {value} is not acceptable")
    if problems:
        return "; ".join(problems)
    if len(values) != objectives:
        return f"The number of the values {len(values)} did not match the number of the objectives {objectives}"
    return None
