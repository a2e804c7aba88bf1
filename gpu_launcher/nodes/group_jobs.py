"""The run of a group, and its jobs: what is known about each that has no result, and what becomes of it.

The `Dealer` decides which node gets which job, and `_fate` what the end of a job on its node means. This module carries
that out: it tells the nodes, and posts to the head what it is to know.

If an offer brings a channel, its far end stays here until the job has its result, and is relayed by the node that has
the job (`channel_relay`). A job that has said anything in its channel is not dealt again when its node is lost, because
its source may have answered. It fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import ReportError
from gpu_launcher.jobs.events import JobRetried, JobReturned, JobStarted, Notice, Outcome, StopRequested
from gpu_launcher.jobs.failures import FailureCount
from gpu_launcher.jobs.job import Cause, Job, JobResult, Refusal
from gpu_launcher.jobs.node_messages import BeginRun, Ended, Message, Wanted
from gpu_launcher.jobs.outcome import left_by
from gpu_launcher.jobs.reports import read_report
from gpu_launcher.jobs.source import Cancel, Exhausted, Statement, Stop
from gpu_launcher.nodes.channel_relay import FarEnd
from gpu_launcher.nodes.dealer import MAX_MOVES, Ask, Deal, Dealer, Give, MovedTooOften, TakeBack
from gpu_launcher.nodes.member import Member, MemberPhase
from gpu_launcher.nodes.output_receiver import with_fetched
from gpu_launcher.processes.messages import INTERRUPTED, Report
from gpu_launcher.wording import count

_log = get_logger("nodes.group_jobs")

LATE_SECONDS = 10.0
"""Seconds after which a job that was not started goes to any node that is idle, even to one that has lost it."""


@dataclass(slots=True)
class _Unfinished:
    """What is known about a job that has no result."""

    attempts: int | None = None
    """How often it was started, over all launches. None if no node of the group has reported that."""
    failed: int = 0
    """How many of its attempts failed in this launch."""
    running: JobStarted | None = None
    """How it was started, while it runs."""
    waits_since: float | None = None
    """Since when it waits to be started: at no node, or at the one to which it was offered."""
    taken_back: bool = False
    """Whether its node is asked to give it back if it has not started it."""
    refusal: JobResult | None = None
    """What becomes of it if no node can ever grant its request, as the last one that refused it says."""
    cancel: Cancel | None = None
    """That it is to be ended. It also holds for a node that gets the job later."""
    channel: FarEnd | None = None

    @property
    def has_spoken(self) -> bool:
        """Whether it has said anything in its channel, so that it must not run again when its node is lost."""
        return self.channel is not None and self.channel.has_delivered


class _Fate(Enum):
    """What the end of a job on its node means."""

    CONCLUDED = auto()
    """It has its result."""
    CUT_OFF = auto()
    """Its node ended it, and it cannot run again. It is concluded as cancelled."""
    RETURNED = auto()
    """Its node ended it, and it runs on another one."""
    TAKEN_BACK = auto()
    """It was not started, and goes to another node."""
    REFUSED = auto()
    """Its node can never run it, or ends too soon."""


def _fate(result: JobResult, phase: MemberPhase, *, has_spoken: bool, taken_back: bool) -> _Fate:
    """Decide what the end of a job means that was neither cancelled nor stopped. `phase` is its node's."""
    cancelled = result.outcome is Outcome.CANCELLED
    if phase in (MemberPhase.LEAVING, MemberPhase.RETIRED):
        interrupts = phase is MemberPhase.LEAVING
        killed = result.cause is Cause.CRASH or not (result.payload or result.cause is Cause.TIMEOUT)
        # Many programs turn SIGTERM into an exception.
        ended = cancelled or (result.outcome is Outcome.FAILED and (interrupts or killed))
        if ended and not has_spoken:
            return _Fate.RETURNED
        # Also if it raised SystemExit, which would end the head, to which it is passed on.
        if ended and (cancelled or (interrupts and result.cause is not Cause.TIMEOUT)):
            return _Fate.CUT_OFF
    if taken_back and cancelled:
        return _Fate.TAKEN_BACK
    return _Fate.REFUSED if result.refused else _Fate.CONCLUDED


class GroupJobs:
    """See the module."""

    def __init__(self, members: Mapping[str, Member], post: Callable[[Message], None], *, shares_reports: bool) -> None:
        """Begin without jobs. If the head `shares_reports`, it finds the report of a job whose node is lost."""
        self.dealer = Dealer()
        self.begun: BeginRun | None = None
        """The beginning of the run."""
        self.opened = False
        """Whether the head has waited for the first nodes."""
        self.may_end = False
        """Whether the run is over when every job has its result."""
        self.exhausted_told = False
        """Whether the nodes know that there are no more jobs."""
        self.closed = False
        """Whether the head knows that the run is over."""
        self.stopping = False
        """Whether the user or failures stopped the run."""
        self.forced = False
        """Whether a second stop killed the jobs."""
        self.given_up = False
        """Whether no node is left that starts jobs."""
        self._members = members
        self._post = post
        self._shares_reports = shares_reports
        self._unfinished: defaultdict[int, _Unfinished] = defaultdict(_Unfinished)

    def begin(self, begin: BeginRun, max_jobs: int | None) -> None:
        """Begin the run. At most `max_jobs` are at the nodes at the same time."""
        self.begun, self.dealer = begin, Dealer(max_jobs)
        self._options = begin.options
        self._failed = FailureCount(begin.options.failures.most)
        self._reports = begin.reports

    def close(self) -> None:
        """Close the channels of the jobs that have no result. Idempotent."""
        for job in self._unfinished.values():
            if job.channel is not None:
                job.channel.socket.close()
        self._unfinished.clear()

    @property
    def all_done(self) -> bool:
        """Whether every job that was offered has its result, and the head has no others."""
        return self.dealer.exhausted and self.dealer.idle

    def running_at(self, member: Member) -> list[int]:
        """Return the jobs that run on a node, by number."""
        jobs = self.dealer.jobs_at(member.name)
        return [job.number for job in jobs if self._unfinished[job.number].running is not None]

    def devices_in_use(self) -> Counter[str]:
        """Return how many devices the jobs use that run on each node."""
        running = [(number, job.running) for number, job in self._unfinished.items() if job.running is not None]
        used = {(self.dealer.node_of(number), device.uuid) for number, job in running for device in job.devices}
        return Counter(node for node, _ in used if node is not None)

    def has_spoken(self, number: int) -> bool:
        """Whether a job has said anything in its channel, so that it must not run again when its node is lost."""
        return self._unfinished[number].has_spoken

    # What the head says

    def offered(self, job: Job, descriptors: Sequence[int], *, forgiven: bool = False) -> None:
        """Deal a job, with the job's end of a channel if it has one. Raises OSError if too many files are open.

        `forgiven` is as in `Offer`.
        """
        if forgiven:
            self._failed.forgive()
        self._unfinished.pop(job.number, None)  # if it runs again: it may have been cancelled after its end
        for descriptor in descriptors:
            self._unfinished[job.number].channel = FarEnd(socket.socket(fileno=os.dup(descriptor)))
        self._carry_out(self.dealer.offered(job))

    def cancel(self, what: Cancel) -> None:
        """Conclude a job that no node has, or tell its node to end it."""
        self._unfinished[what.number].cancel = what
        job = self.dealer.cancelled(what.number)
        if job is not None:
            self._conclude_cancelled(job, what)
        else:
            self.tell_node_of(what.number, what)

    def tell_node_of(self, number: int, what: Statement) -> None:
        """Say something to the node of a job, unless the job has ended meanwhile."""
        node = self.dealer.node_of(number)
        if node is not None:
            self._members[node].tell(what)

    def stop(self) -> None:
        """Interrupt the jobs of all nodes, unless that has been done. The second call kills them."""
        self.forced = self.stopping
        self.stopping = True
        self.dealer.stop()
        for member in self._members.values():
            if member.at_work and (self.forced or member.phase is not MemberPhase.LEAVING):
                member.tell(Stop())

    # What a node says

    def wanted(self, member: Member, number: int) -> None:
        """Deal `number` more jobs to a node that has room for them."""
        if member.takes_jobs and not self.stopping and not self.given_up:
            self._carry_out(self.dealer.wanted(member.name, number))

    def started(self, started: JobStarted) -> None:
        """Take note that an attempt of a job has begun."""
        now = self._unfinished[started.number]
        if (job := self.dealer.job(started.number)) is not None:
            job = self._history_of(job)
            now.attempts, now.failed = job.attempts_before + 1, job.failed_before
            self.dealer.started(started.number)
        now.running, now.waits_since, now.taken_back = started, None, False
        self._post(started)

    def retried(self, retried: JobRetried) -> None:
        """Take note that an attempt of a job has failed, and another one follows."""
        now = self._unfinished[retried.number]
        now.running = None
        if self.dealer.node_of(retried.number) is not None:
            # An attempt that never ran counts, too.
            now.attempts, now.failed = retried.attempt - 1, retried.failed
        self._post(retried)

    def ended(self, member: Member, result: JobResult) -> None:
        """Take the result of a job from its node, which may not be final."""
        number = result.number
        if self.dealer.node_of(number) != member.name:
            return
        now = self._unfinished[number]
        taken_back, now.taken_back = now.taken_back, False
        now.running = now.waits_since = None
        if result.outcome in (Outcome.COMPLETED, Outcome.PRUNED):
            member.failures = 0
            member.completed += 1
        fate = _Fate.CONCLUDED
        if not self.stopping and now.cancel is None:
            fate = _fate(result, member.phase, has_spoken=now.has_spoken, taken_back=taken_back)
        match fate:
            case _Fate.RETURNED:
                self._remove_report(number)
                self._post(JobReturned(time.monotonic(), number, result.label))
                self._carry_out(self.dealer.returned(number))
            case _Fate.TAKEN_BACK:
                self._carry_out(self.dealer.taken(number))
            case _Fate.REFUSED:
                too_late = result.refused is Refusal.TOO_LATE and member.can_return
                if not too_late:
                    now.refusal = result
                self._carry_out(self.dealer.refused(number, too_late=too_late))
            case _Fate.CUT_OFF:
                message = f"was ended on {member.name}, which {member.why}"
                result = replace(result, outcome=Outcome.CANCELLED, cause=None, message=message)
                self._conclude_fetched(member, result)
            case _Fate.CONCLUDED:
                member.crashed += result.cause in (Cause.CRASH, Cause.DEVICE_LOST)
                self._conclude_fetched(member, result)

    # What becomes of a node

    def leaves(self, member: Member) -> None:
        """Give no more jobs to a node."""
        self._carry_out(self.dealer.leaves(member.name))

    def set_aside(self, member: Member) -> None:
        """Let a node finish the jobs that it has started, and end its run. It gives the others back."""
        running = self.running_at(member)
        for job in self.dealer.jobs_at(member.name):
            if job.number not in running:
                member.tell(Cancel(job.number, "was not started", unstarted=True))
        member.tell(Exhausted())

    def given_back(self, member: Member) -> None:
        """Take note that a node without jobs is given back."""
        member.discard_outputs()
        self._carry_out(self.dealer.lost(member.name))

    def lost(self, member: Member) -> None:
        """Conclude the jobs of a lost node that ended before, and deal the others again."""
        member.discard_outputs()
        self.leaves(member)
        for job in self.dealer.jobs_at(member.name):
            now = self._unfinished[job.number]
            now.waits_since, now.taken_back = None, False
            member.stop_relaying(job.number)  # a node whose run is over may still be there
            if (report := self._report_of(job, member)) is not None:
                self._conclude_left(job, report)
            elif now.cancel is not None:
                self._conclude_cancelled(job, now.cancel)
            elif now.has_spoken:
                self._fail(job, f"was lost with node {member.name}, which {member.why or member.problem}")
            elif now.running is not None:
                now.running = None
                self._post(JobReturned(time.monotonic(), job.number, job.label))
            if self.dealer.node_of(job.number) is not None:  # it is dealt again
                self._remove_report(job.number)
        self._carry_out(self.dealer.lost(member.name))

    def late(self) -> list[int]:
        """Return the jobs that have waited long, at no node or at one."""
        now = time.monotonic()
        for job in self.dealer.waiting:
            unfinished = self._unfinished[job.number]
            unfinished.waits_since = now if unfinished.waits_since is None else unfinished.waits_since
        since = {number: job.waits_since for number, job in self._unfinished.items() if job.waits_since is not None}
        return sorted((number for number in since if since[number] <= now - LATE_SECONDS), key=since.__getitem__)

    def give_up(self) -> None:
        """Take note that no node is left that starts jobs."""
        self.given_up = True
        self.dealer.stop()

    def deal_late(self, *, paused: bool) -> None:
        """Deal jobs that have waited long to nodes that are idle."""
        if (late := self.late()) and not self.stopping and not paused:
            # A waiting job is not moved to a node that may not use any device now.
            members = self._members.values()
            at_once = {one.name: 0 if one.throttle.devices == 0 else one.at_once or 0 for one in members}
            self._carry_out(self.dealer.deal_late(late, at_once))

    def conclude_refused(self) -> None:
        """Fail jobs whose requests no node can grant. A node that is not there yet may be able to."""
        if not self.stopping and self.dealer.has_refused:
            may_run = {member.name for member in self._members.values() if member.may_run}
            for job in self.dealer.refused_by_all(may_run):
                refusal = self._unfinished[job.number].refusal
                assert refusal is not None
                self._conclude(refusal)

    def conclude_lost(self) -> None:
        """Conclude the jobs that were started at nodes that are lost, when no node is left to run them again."""
        for job in self.dealer.waiting:
            if self._history_of(job).attempts_before > job.attempts_before:
                self.dealer.cancelled(job.number)
                self._fail(job, "was ended because its node was lost, and no node is left")

    def conclude_unreachable(self, member: Member) -> None:
        """Conclude the jobs of a node that cannot be reached after the run was stopped. It ends them by itself."""
        jobs = self.dealer.jobs_at(member.name)
        for job in jobs:
            if (report := self._report_of(job, member)) is not None:
                self._conclude_left(job, report)
                continue
            started = self._unfinished[job.number].running
            may = "may have been started" if started is None else "may still run"
            result = self._unfinished_result(job, Outcome.CANCELLED, f"{may} on {member.name}, which cannot be reached")
            if started is not None:
                duration = time.monotonic() - started.time
                result = replace(result, devices=started.devices, duration=duration, log=started.log)
            self._conclude(result)
        if jobs:
            text = f"node {member.name} cannot be reached: its {count(len(jobs), 'job')}"
            self._post(Notice(time.monotonic(), f"{text} may run until it notices that, in a few seconds"))

    # Results

    def _report_of(self, job: Job, member: Member) -> Report | None:
        """Return the report of a job of a lost node, unless the job failed because the node ended it."""
        if not self._shares_reports:  # the jobs of other machines leave them there, and tell more in messages
            return None
        with contextlib.suppress(FileNotFoundError, ReportError):
            report = read_report(self._reports.path(job.number))
            # The node may have been lost before it said that it ends its jobs.
            ended_with_it = member.why is not None or report.killed or report.message == INTERRUPTED
            if report.ok or report.pruned or not ended_with_it:
                return report
        return None

    def _remove_report(self, number: int) -> None:
        """Remove the report of a job that is dealt again, so that it does not count for the next copy."""
        with contextlib.suppress(OSError):
            self._reports.path(number).unlink()

    def _conclude_left(self, job: Job, report: Report) -> None:
        """Conclude a job that wrote its report before its node was lost, unless it failed and is to be retried."""
        now = self._unfinished[job.number]
        if now.running is None:  # its node did not come to report the start
            self.started(JobStarted(time.monotonic(), job.number, job.label, (), None, None))
        assert now.running is not None
        known = self._history_of(job)
        unwanted = self.stopping or now.cancel is not None
        result = left_by(job, report, now.running, known.attempts_before, unwanted=unwanted)
        policy = self._options.failures
        if result.outcome is Outcome.CANCELLED and now.cancel is not None:
            self._conclude_cancelled(job, now.cancel)
        elif result.cause in policy.retry_on and known.failed_before < policy.retries:
            retried = JobRetried(
                time=time.monotonic(),
                number=job.number,
                label=job.label,
                duration=result.duration,
                message=result.message or "failed",
                log=result.log,
                attempt=result.attempts + 1,
                attempts=known.attempts_before + policy.retries - known.failed_before,
                failed=known.failed_before + 1,
            )
            self.retried(retried)
        else:
            self._conclude(result)

    def _conclude_cancelled(self, job: Job, what: Cancel) -> None:
        outcome = Outcome.PRUNED if what.pruned else Outcome.CANCELLED
        self._conclude(self._unfinished_result(job, outcome, what.problem))

    def _conclude_fetched(self, member: Member, result: JobResult) -> None:
        """Conclude a job that ended on its node, when its outputs have arrived."""
        if member.outputs is not None:
            result, notice = with_fetched(result, member.outputs.finish(result.number), self._reports)
            if notice is not None:
                self._post(Notice(time.monotonic(), notice))
        self._conclude(result)

    def _fail(self, job: Job, message: str) -> None:
        """Conclude a job that was lost with its node. A search does not queue it again."""
        result = self._unfinished_result(job, Outcome.FAILED, message, Cause.CRASH)
        self._conclude(replace(result, unsupervised=True))

    def _unfinished_result(self, job: Job, outcome: Outcome, message: str, cause: Cause | None = None) -> JobResult:
        """Return the result of a job that no node has."""
        attempts = max(1, self._history_of(job).attempts_before)
        return JobResult(job.number, job.label, outcome, None, message, (), None, None, cause, attempts)

    def _conclude(self, result: JobResult) -> None:
        unfinished = self._unfinished.pop(result.number, None)
        if unfinished is not None and unfinished.channel is not None:
            node = self.dealer.node_of(result.number)
            if node is not None:
                self._members[node].stop_relaying(result.number)
            unfinished.channel.socket.close()
        self._post(Ended(result))
        if result.outcome is Outcome.FAILED:
            self._count_failure()  # first: it may stop the dealing
        self._carry_out(self.dealer.ended(result.number))

    def _count_failure(self) -> None:
        too_many = self._failed.add()
        if too_many is None or self.stopping:
            return
        self.stop()
        running = sum(job.running is not None for job in self._unfinished.values())
        self._post(StopRequested(time.monotonic(), running, self._options.grace, forced=False, signal=too_many))

    def _history_of(self, job: Job) -> Job:
        """Return the job with the number of its attempts until now, which it takes along to another node."""
        now = self._unfinished[job.number]
        return job if now.attempts is None else replace(job, attempts_before=now.attempts, failed_before=now.failed)

    def _carry_out(self, deals: list[Deal]) -> None:
        for deal in deals:
            match deal:
                case Ask(number):
                    self._post(Wanted(number))
                case Give(node, job):
                    now, job = self._unfinished[job.number], self._history_of(job)
                    # After a failure, its node may know that it needs more memory.
                    now.waits_since = None if job.failed_before else time.monotonic()
                    self._members[node].offer(job, now.channel)
                case TakeBack(node, job, target):
                    _log.info("job %d is taken back from %s for %s", job.number, node, target)
                    now = self._unfinished[job.number]
                    now.waits_since, now.taken_back = None, True
                    self._members[node].tell(Cancel(job.number, "was not started", unstarted=True))
                case MovedTooOften(job):
                    message = f"was not finished: {MAX_MOVES + 1} nodes that had it were lost or ended"
                    self._conclude(self._unfinished_result(job, Outcome.FAILED, message, Cause.CRASH))
