"""The pure state machine that decides what each job of a run does next: stimuli and a time in, instructions out.

Theory of operation. The loop tells the machine what happened, a stimulus, and carries out the instructions that it
returns, in their order. The machine knows no processes, files or devices, so every history can be played in a test.

    QUEUED ----> PREPARING ----> PREPARED ----> RUNNING ----> ENDED
       ^             |               |                          |
       +-------------+---------------+--------------------------+
           the fork server was lost before the job ran, or the job is retried

| phase     | ends with                                       | instructions                       |
|-----------|-------------------------------------------------|------------------------------------|
| QUEUED    | there is room to prepare one more job           | StartProcess                       |
| PREPARING | Prepared: it composed its config and waits      | TakeTicket, or Go without devices  |
| PREPARED  | LeaseGranted: its ticket became a lease         | Go                                 |
| RUNNING   | Exited: its process tree is gone                | Release, then Conclude             |
| ENDED     | Retry: the loop decided to retry the job        |                                    |

A job may end in any phase: its process dies, it is cancelled, the sweep is stopped or given up. Each time it ends, it
gets exactly one Conclude. Three rules shape the rest:

- At most one ticket is out, so that several sweeps on one machine alternate, and the tickets of the first do not fill
  the queue.
- The devices of a job that ended go to the next job before the result is read: Release and what follows from it come
  before Conclude.
- Few jobs are prepared ahead of need. More would cost memory, and a search would choose them from fewer results.

The machine keeps each job's last transitions: its story. A stimulus that is impossible in the job's phase raises
IllegalTransitionError with that story.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from gpu_launcher.jobs.job import Refusal
from gpu_launcher.jobs.source import UNTHROTTLED, AllOffered, Cancel, Throttle
from gpu_launcher.jobs.term import Term
from gpu_launcher.model import ENDING, WHOLE, Request, Share
from gpu_launcher.wording import duration

MAX_STORY = 20
"""Maximum number of transitions kept for each job."""


class Phase(Enum):
    """Where a job is in its life."""

    QUEUED = auto()
    """It has no process."""
    PREPARING = auto()
    """Its process composes its config."""
    PREPARED = auto()
    """Its process waits for devices."""
    RUNNING = auto()
    """The user's code runs."""
    ENDED = auto()
    """Its process has ended. It was concluded, or will be."""


_TRANSITIONS = {
    Phase.QUEUED: {Phase.PREPARING, Phase.ENDED},
    Phase.PREPARING: {Phase.PREPARED, Phase.ENDED, Phase.QUEUED},
    Phase.PREPARED: {Phase.RUNNING, Phase.ENDED, Phase.QUEUED},
    Phase.RUNNING: {Phase.ENDED},
    Phase.ENDED: {Phase.QUEUED},
}
"""The phases that may follow each phase."""

_LIVE = frozenset({Phase.PREPARING, Phase.PREPARED, Phase.RUNNING})
"""Phases in which a job has a process."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on simultaneous work."""

    parallel: int | None
    """Cap on running jobs; None for as many as the devices allow."""
    without_devices: int
    """Cap on running jobs that need no devices. Nothing else limits them."""
    ahead: int
    """Cap on jobs that have a process but do not run yet."""
    preparing: int
    """Cap on jobs that prepare at the same time. Each of them keeps a CPU busy."""
    grace: float
    """Seconds between the first request to stop and SIGKILL."""
    at_once: int = 1
    """How many jobs are expected to run at the same time."""
    listed: bool = False
    """Whether the next jobs do not depend on the results of others, so that up to `ahead` of them are wanted early."""
    term: Term | None = None
    """How long jobs can run here. None if that is not limited, or unknown."""


# Stimuli. `AllOffered`, `Cancel` and `Throttle`, statements of the head, are others.


@dataclass(frozen=True, slots=True)
class Arrived:
    """One more job arrived. If no more jobs are started, it is concluded at once."""

    number: int


@dataclass(frozen=True, slots=True)
class NoMore:
    """All jobs have arrived."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job is ready for its devices."""

    number: int
    request: Request
    """What the job needs. Here `timeout` is how long the job may run; the ticket's timeout also covers its ending."""
    refusal: str | None = None
    """Why these devices could never grant the request, as the end of a sentence after `is`."""


@dataclass(frozen=True, slots=True)
class ShareLearned:
    """Jobs with `memory=auto` need this share of a device, as far as earlier ones have shown. None: a whole one."""

    share: Share | None


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """The ticket of a job became a lease."""

    number: int
    devices: frozenset[str] = frozenset()
    """UUIDs of the devices."""


@dataclass(frozen=True, slots=True)
class Exited:
    """A job's process tree is gone, or could not be started."""

    number: int
    problem: str | None = None
    """Why the job could not be started, as a sentence without its subject. None if it was started."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A job that was just concluded is to run again. Only valid while the machine `takes_more`."""

    number: int
    last: bool = False
    """Whether it runs after all others: it may wait long, and only one job waits for devices at a time."""


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The fork server died. Each of its live jobs will still be reported as Exited."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No more jobs can be started. Running jobs continue."""

    problem: str
    """The reason: a sentence without its subject, which is a job."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The sweep is to end. The first time, jobs are interrupted; the second time, they are killed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Stimulus = (
    Arrived
    | AllOffered
    | NoMore
    | Cancel
    | Throttle
    | Prepared
    | ShareLearned
    | LeaseGranted
    | Exited
    | Retry
    | ServerLost
    | GiveUp
    | StopAsked
    | Tick
)

# Instructions


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start the job's process, which composes the job's config."""

    number: int


@dataclass(frozen=True, slots=True)
class TakeTicket:
    """Queue for the job's devices. The answer is LeaseGranted."""

    number: int
    request: Request
    among: frozenset[str] | None = None
    """UUIDs of the devices that it may get. None for any."""


@dataclass(frozen=True, slots=True)
class DropTicket:
    """Leave the queue."""

    number: int


@dataclass(frozen=True, slots=True)
class Go:
    """Let the job run, on the devices of its lease if it has a lease."""

    number: int


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Ask the job to end, as Ctrl-C does."""

    number: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """Tell the job to end: its time is over, or it was cancelled."""

    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the job's process tree."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Close the job's lease: its devices are free."""

    number: int


@dataclass(frozen=True, slots=True)
class Conclude:
    """Make the result of a job that has ended, or answer with Retry."""

    number: int
    stopped: bool
    """Whether the sweep was stopped."""
    problem: str | None
    """What went wrong, as far as the machine knows."""
    timed_out: bool = False
    refused: Refusal | None = None
    """Why it cannot run here, if it ended because of that."""
    cancelled: bool = False
    """Whether its source cancelled it."""


Instruction = StartProcess | TakeTicket | DropTicket | Go | Interrupt | Terminate | Kill | Release | Conclude


class IllegalTransitionError(RuntimeError):
    """A stimulus is impossible in the job's phase: a defect of the loop. The error carries the job's story."""

    def __init__(self, problem: str, stimulus: Stimulus, story: Iterable[Transition] = ()) -> None:
        self.stimulus = stimulus
        self.story = tuple(story)
        past = "".join(f"\n  {transition}" for transition in self.story) or " nothing"
        super().__init__(f"{problem}, upon {stimulus}. What happened to the job before:{past}")


@dataclass(frozen=True, slots=True)
class Transition:
    """One step in a job's life."""

    time: float
    before: Phase
    after: Phase
    stimulus: Stimulus

    def __str__(self) -> str:
        return f"{self.time:.3f} {self.before.name} -> {self.after.name}, upon {self.stimulus}"


@dataclass(frozen=True, slots=True)
class _Where:
    """That a request may get devices now: `among` these, or any if that is None."""

    among: frozenset[str] | None


@dataclass(slots=True)
class _Job:
    story: deque[Transition] = field(default_factory=lambda: deque(maxlen=MAX_STORY))
    """The last transitions, over all attempts."""
    phase: Phase = Phase.QUEUED
    request: Request | None = None
    devices: frozenset[str] = frozenset()
    """UUIDs of its devices, once they were granted."""
    problem: str | None = None
    lost: bool = False
    """Whether its fork server died before it ran."""
    ends: float | None = None
    """When to end it: with SIGTERM when its time limit is reached, with SIGKILL once it was told to end."""
    told: bool = False
    """Whether it was told that its time is over."""
    refused: Refusal | None = None
    """Why it cannot run here, if it ends because of that."""
    cancelled: bool = False
    """Whether its source cancelled it."""


class Machine:
    """The jobs of one sweep."""

    def __init__(self, limits: Limits) -> None:
        """Begin without jobs."""
        self._limits = limits
        self._more = True
        """Whether more jobs may arrive."""
        self._listed = limits.listed
        """Whether the next jobs are known, so that all of them arrive some time."""
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[int] = deque()
        self._after_all: deque[int] = deque()
        """Jobs to retry after all others. Used while others may still arrive."""
        self._live: set[int] = set()
        """Jobs that have a process."""
        self._ticket: int | None = None
        self._among: frozenset[str] | None = None
        """To which devices the ticket that is out is restricted."""
        self._throttle = UNTHROTTLED
        self._stops = 0
        self._given_up: str | None = None
        self._kill_at: float | None = None
        self._now = 0.0
        self._stimulus: Stimulus = Tick()
        """The stimulus that is being handled, for the stories."""

    @property
    def finished(self) -> bool:
        """Whether all jobs have ended and no more will be started."""
        return not self._queue and not self._live and not (self._more and self.takes_more)

    @property
    def wanted(self) -> int:
        """How many more jobs to ask the source for now.

        While devices are free, enough jobs are wanted to use them. Beyond that, few are wanted ahead of need (see
        `_few_ahead`): a source that chooses jobs by the results of others chooses better later. If the jobs do not
        depend on each other, up to `ahead` are wanted.
        """
        if not self._more or not self.takes_more or self._queue:
            return 0
        if self._throttle.paused or self._throttle.devices == 0:
            return 0
        preparing, prepared = len(self._in(Phase.PREPARING)), len(self._in(Phase.PREPARED))
        ahead = (self._limits.ahead if self._listed else self._few_ahead) - prepared
        if prepared:  # a prepared job waits, so no device is free
            return max(0, ahead - preparing)
        free = self._limits.at_once - len(self._in(Phase.RUNNING)) - preparing
        return max(ahead - preparing, min(free, self._limits.preparing - preparing), 0)

    @property
    def _few_ahead(self) -> int:
        return min(1 + self._limits.at_once // 8, self._limits.ahead)

    @property
    def stopping(self) -> bool:
        """Whether the sweep was asked to stop."""
        return self._stops > 0

    @property
    def takes_more(self) -> bool:
        """Whether jobs may still be started."""
        return not self.stopping and self._given_up is None

    @property
    def capped(self) -> Request | None:
        """The request of a prepared job that waits only because the maximum number of jobs is running."""
        if not self.takes_more or self._ticket is not None or not self._parallel_full():
            return None
        if self._throttle != UNTHROTTLED:
            return None
        for number in sorted(self._in(Phase.PREPARED)):
            job = self._jobs[number]
            if job.problem is None and not job.lost and job.request is not None and job.request.gpus > 0:
                return job.request
        return None

    @property
    def deadline(self) -> float | None:
        """Time at which the machine needs a Tick, on the clock of `now`. None if it needs none."""
        ends = (self._jobs[number].ends for number in self._live)
        return min((at for at in (self._kill_at, *ends) if at is not None), default=None)

    def running(self) -> list[int]:
        """Return the numbers of the running jobs, in order."""
        return sorted(self._in(Phase.RUNNING))

    def live(self) -> list[int]:
        """Return the numbers of the jobs that have a process, in order."""
        return sorted(self._live)

    def phase(self, number: int) -> Phase:
        """Return the phase of a job."""
        return self._jobs[number].phase

    def story(self, number: int) -> tuple[Transition, ...]:
        """Return the last transitions of a job, the oldest first."""
        return tuple(self._jobs[number].story)

    def forget(self, number: int) -> None:
        """Delete what is known about a job that has been concluded."""
        assert number not in self._live
        del self._jobs[number]

    def handle(self, stimulus: Stimulus, now: float) -> list[Instruction]:
        """Take note of what happened, and return what to do, in this order.

        If it raises IllegalTransitionError, nothing has changed.
        """
        self._now, self._stimulus = now, stimulus
        match stimulus:
            case Arrived(number):
                return self._arrived(number, now)
            case AllOffered():
                return self._end_of_list(now)
            case NoMore():
                self._more = False
                return self._end_of_list(now)
            case Cancel(number, problem):
                return self._cancel(number, problem, now)
            case Throttle():
                self._throttle = stimulus
                return self._fill(now)
            case Prepared(number, request, refusal):
                return self._prepared(number, request, refusal, now)
            case ShareLearned(share):
                return self._share_learned(share, now)
            case LeaseGranted(number, devices):
                return self._granted(number, devices, now)
            case Exited(number, problem):
                return self._exited(number, problem, now)
            case Retry(number, last):
                return self._retry(number, last, now)
            case ServerLost():
                return self._server_lost()
            case GiveUp(problem):
                return self._give_up(problem)
            case StopAsked():
                return self._stop(now)
            case Tick():
                return self._tick(now)

    def _arrived(self, number: int, now: float) -> list[Instruction]:
        if number in self._jobs:
            raise self._illegal(number, f"job {number} arrives twice")
        self._jobs[number] = _Job()
        if not self.takes_more:
            self._move(number, Phase.ENDED)
            return [Conclude(number, self.stopping, None if self.stopping else self._given_up)]
        self._queue.append(number)
        return self._fill(now)

    def _end_of_list(self, now: float) -> list[Instruction]:
        self._listed = False
        self._queue.extend(self._after_all)
        self._after_all.clear()
        return self._fill(now)

    def _cancel(self, number: int, problem: str, now: float) -> list[Instruction]:
        job = self._jobs.get(number)
        if job is None or job.phase is Phase.ENDED or job.cancelled:
            return []
        job.cancelled = True
        job.problem = job.problem or problem
        if job.phase is Phase.QUEUED:
            (self._after_all if number in self._after_all else self._queue).remove(number)
            self._move(number, Phase.ENDED)
            return [Conclude(number, self.stopping, job.problem, cancelled=True)]
        if job.phase is Phase.RUNNING:
            job.ends = now + self._limits.grace
            return [Terminate(number)]
        return [Kill(number), *self._drop_ticket(number), *self._fill(now)]

    def _prepared(self, number: int, request: Request, refusal: str | None, now: float) -> list[Instruction]:
        job = self._expect(number, Phase.PREPARING)
        self._move(number, Phase.PREPARED)
        job.request = request
        if job.cancelled:
            return []  # it is being killed
        if refusal is not None:
            job.problem = f"cannot be run: its request is {refusal}"
            job.refused = Refusal.NEVER
            return [Kill(number)]
        return [*self._refuse_late(number, now), *self._fill(now)]

    def _share_learned(self, share: Share | None, now: float) -> list[Instruction]:
        """Change what prepared jobs ask for, but not the ticket that is out: it would lose its place in the queue."""
        for number in self._in(Phase.PREPARED):
            job = self._jobs[number]
            if number != self._ticket and job.request is not None and job.request.auto_memory:
                job.request = replace(job.request, share=share or WHOLE)
        return self._fill(now)

    def _refuse_late(self, number: int, now: float) -> list[Instruction]:
        """End a prepared job that can no longer run here until its timeout."""
        job = self._jobs[number]
        assert job.request is not None
        if self._limits.term is None or job.problem is not None or job.lost or not self.takes_more:
            return []
        why = self._limits.term.refusal(job.request.timeout, now)
        if why is None:
            return []
        assert job.request.timeout is not None
        job.problem = f"cannot be run: {self._limits.term.explain(job.request.timeout, why, now)}"
        job.refused = why
        return [Kill(number), *self._drop_ticket(number)]

    def _granted(self, number: int, devices: frozenset[str], now: float) -> list[Instruction]:
        self._expect(number, Phase.PREPARED)
        if number != self._ticket:
            raise self._illegal(number, f"job {number} was granted devices, but the ticket out is {self._ticket}'s")
        self._ticket = None
        self._jobs[number].devices = devices
        return [self._go(number, now), *self._fill(now)]

    def _exited(self, number: int, problem: str | None, now: float) -> list[Instruction]:
        job = self._expect(number, Phase.PREPARING, Phase.PREPARED, Phase.RUNNING)
        job.problem = job.problem or problem
        instructions = self._drop_ticket(number)
        has_devices = job.phase is Phase.RUNNING and job.request is not None and job.request.gpus > 0
        if job.lost and self.takes_more and not job.cancelled:
            self._requeue(number)
            return [*instructions, *self._fill(now)]
        self._move(number, Phase.ENDED)
        if has_devices:
            # Drop first: to release devices may grant them to the ticket that is out.
            instructions += [*self._withdraw_ticket(), Release(number)]
        # The next job starts before this one's result is read: devices should not wait for that.
        problem = job.problem or (self._given_up if job.lost else None)
        conclusion = Conclude(
            number, self.stopping, problem, timed_out=job.told, refused=job.refused, cancelled=job.cancelled
        )
        return [*instructions, *self._fill(now), conclusion]

    def _retry(self, number: int, last: bool, now: float) -> list[Instruction]:
        self._expect(number, Phase.ENDED)
        if not self.takes_more:
            raise self._illegal(number, f"job {number} is retried, but no more jobs are started")
        self._requeue(number, last=last)
        return self._fill(now)

    def _server_lost(self) -> list[Instruction]:
        for number in self._live:
            job = self._jobs[number]
            if job.phase is Phase.RUNNING:
                job.problem = "was ended because the fork server was killed"
            elif job.problem is None:
                job.lost = True
        return self._drop_ticket()  # otherwise a dying job might be granted devices

    def _give_up(self, problem: str) -> list[Instruction]:
        if self._given_up is not None:
            return []
        self._given_up = problem
        instructions = self._drop_ticket()
        for number in sorted(self._live):
            job = self._jobs[number]
            if job.phase is not Phase.RUNNING:
                job.problem = job.problem or problem
                instructions.append(Kill(number))
        return [*instructions, *self._conclude_queue(problem)]

    def _conclude_queue(self, problem: str | None) -> list[Instruction]:
        instructions: list[Instruction] = []
        self._queue.extend(self._after_all)
        self._after_all.clear()
        while self._queue:
            number = self._queue.popleft()
            self._move(number, Phase.ENDED)
            instructions.append(Conclude(number, self.stopping, problem))
        return instructions

    def _stop(self, now: float) -> list[Instruction]:
        self._stops += 1
        if self._stops > 1:
            self._kill_at = None
            return [Kill(number) for number in sorted(self._live)]
        self._kill_at = now + self._limits.grace
        instructions = self._drop_ticket()
        for number in sorted(self._live):
            ask = Interrupt if self._jobs[number].phase is Phase.RUNNING else Kill
            instructions.append(ask(number))
        return [*instructions, *self._conclude_queue(None)]

    def _tick(self, now: float) -> list[Instruction]:
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            return [Kill(number) for number in sorted(self._live)]
        over = [self._time_is_over(number, now) for number in sorted(self._live) if self._is_due(number, now)]
        # While it waited for devices, a job may have become too late.
        late = [one for number in sorted(self._in(Phase.PREPARED)) for one in self._refuse_late(number, now)]
        return [*over, *late, *(self._fill(now) if late else ())]

    def _is_due(self, number: int, now: float) -> bool:
        ends = self._jobs[number].ends
        return ends is not None and now >= ends

    def _time_is_over(self, number: int, now: float) -> Instruction:
        job = self._jobs[number]
        assert job.request is not None
        if job.told or job.cancelled:
            job.ends = None
            return Kill(number)
        job.told = True
        job.ends = now + self._limits.grace
        if job.problem is None:
            job.problem = f"ran longer than its timeout of {duration(job.request.timeout or 0.0)}, and was ended"
        return Terminate(number)

    def _declared(self, request: Request) -> Request:
        """Return the request for the pool: a job needs its devices until some time after it is told to end."""
        if request.timeout is None:
            return request
        return replace(request, timeout=request.timeout + self._limits.grace + ENDING)

    def _go(self, number: int, now: float) -> Instruction:
        job = self._jobs[number]
        self._move(number, Phase.RUNNING)
        if job.request is not None and job.request.timeout is not None:
            job.ends = now + job.request.timeout
        return Go(number)

    def _fill(self, now: float) -> list[Instruction]:
        """Start as many jobs, and let as many run, as the limits allow."""
        if not self.takes_more:
            return []
        instructions = self._withdraw_ticket()
        if self._throttle.paused:
            return instructions
        for number in sorted(self._in(Phase.PREPARED)):
            job = self._jobs[number]
            assert job.request is not None
            if job.problem is not None or job.lost or self._parallel_full():
                continue
            if job.request.gpus == 0:
                if len(self._running_without_devices()) < self._limits.without_devices:
                    instructions.append(self._go(number, now))
            elif self._ticket is None and (where := self._where(job.request)) is not None:
                self._ticket, self._among = number, where.among
                instructions.append(TakeTicket(number, self._declared(job.request), where.among))
        while self._queue and self._room_to_prepare():
            number = self._queue.popleft()
            self._move(number, Phase.PREPARING)
            instructions.append(StartProcess(number))
        return instructions

    def _withdraw_ticket(self) -> list[Instruction]:
        """Drop the ticket that is out if it would not be taken now, or not for the same devices."""
        if self._ticket is None:
            return []
        request = self._jobs[self._ticket].request
        assert request is not None
        where = None if self._throttle.paused else self._where(request)
        return [] if where is not None and where.among == self._among else self._drop_ticket()

    def _drop_ticket(self, number: int | None = None) -> list[Instruction]:
        """Drop the ticket that is out, if there is one. With a `number`, only if it is that job's."""
        ticket = self._ticket
        if ticket is None or number not in (None, ticket):
            return []
        self._ticket = None
        return [DropTicket(ticket)]

    def _where(self, request: Request) -> _Where | None:
        """Return which devices a request may get without exceeding the limit. None if it must wait."""
        limit = self._throttle.devices
        if limit is None:
            return _Where(None)
        used = frozenset(uuid for number in self._in(Phase.RUNNING) for uuid in self._jobs[number].devices)
        if len(used) + request.gpus <= limit:
            return _Where(None)
        if not request.share.whole and 0 < len(used) <= limit:
            return _Where(used)  # it may still share a device that is in use
        return None

    def _parallel_full(self) -> bool:
        taken = len(self._in(Phase.RUNNING)) + (self._ticket is not None)
        return self._limits.parallel is not None and taken >= self._limits.parallel

    def _room_to_prepare(self) -> bool:
        preparing = len(self._in(Phase.PREPARING))
        ahead = preparing + len(self._in(Phase.PREPARED))
        return preparing < self._limits.preparing and ahead < self._limits.ahead

    def _running_without_devices(self) -> list[int]:
        running = ((number, self._jobs[number].request) for number in self._in(Phase.RUNNING))
        return [number for number, request in running if request is not None and request.gpus == 0]

    def _in(self, phase: Phase) -> list[int]:
        return [number for number in self._live if self._jobs[number].phase is phase]

    def _expect(self, number: int, *phases: Phase) -> _Job:
        job = self._jobs[number]
        if job.phase not in phases:
            allowed = ", ".join(phase.name for phase in phases)
            raise self._illegal(number, f"job {number} is {job.phase.name}, expected one of: {allowed}")
        return job

    def _illegal(self, number: int, problem: str) -> IllegalTransitionError:
        return IllegalTransitionError(problem, self._stimulus, self._jobs[number].story)

    def _move(self, number: int, phase: Phase) -> None:
        job = self._jobs[number]
        if phase not in _TRANSITIONS[job.phase]:
            raise self._illegal(number, f"job {number} cannot go from {job.phase.name} to {phase.name}")
        job.story.append(Transition(self._now, job.phase, phase, self._stimulus))
        job.phase = phase
        if phase in _LIVE:
            self._live.add(number)
        else:
            self._live.discard(number)

    def _requeue(self, number: int, *, last: bool = False) -> None:
        """Put a job back in the queue, at its front unless it is to be the `last`."""
        self._move(number, Phase.QUEUED)
        self._jobs[number] = _Job(self._jobs[number].story)
        if last:
            (self._after_all if self._more and self._listed else self._queue).append(number)
        else:
            self._queue.appendleft(number)
