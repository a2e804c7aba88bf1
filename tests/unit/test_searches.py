"""What happens in the same turn as something else, in both searches: the sweeper's and that of `optimize`.

The node is not run: each test says what the jobs do, and all events that it names together arrive in one turn.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.progress_bar import _ProgressBar
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import NodeDiedError, StudyError
from gpu_launcher.jobs import node_messages as node
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import JobReturned, JobStarted, Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException
from gpu_launcher.studies import optimize_messages as d
from gpu_launcher.studies import search_engine, sweep_search
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.rank_reporters import Intermediate, Verdict
from gpu_launcher.studies.search_loop import SearchLoop
from gpu_launcher.studies.stopping import Bounds
from gpu_launcher.studies.study_session import StudySession, TrialEnding, TrialOutcome
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.sweep_search import SweepSearch

MANY_SECONDS = 60.0


@dataclass(frozen=True)
class Reported:
    """The job reports a value, and asks whether to prune."""

    trial: int
    step: int
    value: float


@dataclass(frozen=True)
class Returned:
    """The job returns this value, and ends."""

    trial: int
    value: float


@dataclass(frozen=True)
class Ended:
    """The job ends otherwise."""

    trial: int
    outcome: Outcome
    unsupervised: bool = False


Happening = Reported | Returned | Ended


def result_of(number: int, happening: Returned | Ended) -> JobResult:
    if isinstance(happening, Returned):
        return JobResult(number, str(happening.value), Outcome.COMPLETED, b"", None, (), None, None)
    failed = happening.outcome is Outcome.FAILED
    why = "was killed" if failed else "was cancelled"
    cause = Cause.CRASH if failed else None
    return JobResult(
        number, "", happening.outcome, None, why, (), None, None, cause, unsupervised=happening.unsupervised
    )


class Said:
    """Statements of a search, which a test waits for."""

    def __init__(self) -> None:
        self._said: list[s.Statement] = []
        self._more = threading.Condition()

    def add(self, statement: s.Statement) -> None:
        with self._more:
            self._said.append(statement)
            self._more.notify_all()

    def find(self, wanted: Callable[[s.Statement], bool]) -> list[s.Statement]:
        with self._more:
            return [statement for statement in self._said if wanted(statement)]

    def wait(self, wanted: Callable[[s.Statement], bool], count: int = 1) -> list[Any]:
        """Return the first `count` such statements."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.find(wanted)) >= count, MANY_SECONDS), self._said
            return self.find(wanted)[:count]


class OfSweep:
    """The search of a sweep, whose jobs have the numbers of their trials."""

    def __init__(self, session: StudySession) -> None:
        session.define = lambda trial: [f"x={trial.suggest_float('x', 0, 1)}"]
        self.said = Said()
        self._search = SweepSearch(
            session,
            lambda asked: Job(asked.trial.number, "", asked.spec),
            self._ending,
            lambda session, summary: [],
        )
        self._over = False
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    @staticmethod
    def _ending(result: JobResult) -> TrialEnding:
        if result.outcome is Outcome.COMPLETED:
            return TrialEnding(TrialOutcome.COMPLETE, (float(result.label),))
        outcome = TrialOutcome.FAILED if result.outcome is Outcome.FAILED else TrialOutcome.INTERRUPTED
        return TrialEnding(outcome, message=result.message)

    def _listen(self) -> None:
        while not self._over:
            if select.select([self._search], [], [], 0.01)[0]:
                try:
                    for statement in self._search.receive():
                        self.said.add(statement)
                except StudyError:
                    return

    def begin(self, count: int) -> None:
        self._search.request_jobs(count)
        for offer in self.said.wait(lambda statement: isinstance(statement, s.Offer), count):
            self._search.started(offer.job, (), None)

    def together(self, *happenings: Happening) -> None:
        with self._search._changed:
            for happening in happenings:
                match happening:
                    case Reported(trial, step, value):
                        self._search.on_message(trial, Intermediate(step, value))
                    case Returned(trial) | Ended(trial):
                        self._search.ended(result_of(trial, happening))

    def verdict(self, trial: int, step: int) -> bool:
        def wanted(statement: s.Statement) -> bool:
            match statement:
                case s.Reply(number, Verdict(about)):
                    return (number, about) == (trial, step)
            return False

        (reply,) = self.said.wait(wanted)
        return bool(reply.what.prune)

    def cancels(self, trial: int) -> Callable[[s.Statement], bool]:
        return lambda statement: isinstance(statement, s.Cancel) and statement.number == trial

    def close(self) -> None:
        self._over = True
        self._listener.join(MANY_SECONDS)
        self._search.close()


class FakeNode:
    """The node of `optimize`, as far as its search uses it."""

    tick_seconds = math.inf
    moves_jobs = False

    def __init__(self) -> None:
        self.known = dict(pickling.main_namespace())
        self.said = Said()
        self._messages: deque[node.Message | Exception | Callable[[], None]] = deque()
        self._count = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._count

    def deliver(self, *messages: node.Message | Exception | Callable[[], None]) -> None:
        """Let messages arrive at once. An exception is raised in their place; a function is called before the next."""
        self._messages.extend(messages)
        os.eventfd_write(self._count, sum(not callable(message) for message in messages))

    def receive_ready(self) -> list[node.Message]:
        try:
            os.eventfd_read(self._count)
        except BlockingIOError:
            return []
        message = self._messages.popleft()
        if callable(message):
            message()
            message = self._messages.popleft()
        assert not callable(message)
        if isinstance(message, Exception):
            raise message
        return [message]

    def say(self, statement: s.Statement) -> None:
        pickle.dumps(statement)  # as a real node's channel does
        self.said.add(statement)

    def close(self) -> None:
        """Nothing runs."""

    def free(self) -> None:
        os.close(self._count)


class OfOptimize:
    """The search of `optimize`, whose jobs are given their trials when they have started."""

    def __init__(self, session: StudySession) -> None:
        self.node = FakeNode()
        self.said = self.node.said
        self.called_back: list[int] = []
        bar = _ProgressBar(False, None, None)
        self.search = SearchLoop(
            session,
            self.node,  # type: ignore[arg-type]
            (),
            [lambda study, trial: self.called_back.append(trial.number)],
            bar,
            SimpleNamespace(max_parallel=None, request=None),  # type: ignore[arg-type]
        )
        self._job_of: dict[int, int] = {}
        self._asked = 0
        self.error: BaseException | None = None
        self.threaded = True
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.search.run()
        except BaseException as error:
            self.error = error

    def begin(self, count: int) -> None:
        if self.threaded and not self._thread.ident:
            self._thread.start()
        self.node.deliver(node.Wanted(count))
        for offer in self.said.wait(lambda statement: isinstance(statement, s.Offer), count):
            job = offer.job.number
            self.node.deliver(JobStarted(time.monotonic(), job, "", (), None, None))
            (reply,) = self.said.wait(
                lambda statement, job=job: isinstance(statement, s.Reply) and statement.number == job  # type: ignore[misc]
            )
            self._job_of[reply.what.number] = job

    def messages(self, *happenings: Happening) -> list[node.Message]:
        messages: list[node.Message] = []
        for happening in happenings:
            job = self._job_of[happening.trial]
            match happening:
                case Reported(_, step, value):
                    messages.append(node.Heard(job, Intermediate(step, value)))
                    messages.append(node.Heard(job, d.ShouldPrune(step)))
                case Returned(_, value):
                    messages.append(node.Heard(job, d.Returned((value,))))
                    messages.append(node.Ended(result_of(job, happening)))
                case Ended():
                    messages.append(node.Ended(result_of(job, happening)))
        return messages

    def together(self, *happenings: Happening) -> None:
        self.node.deliver(*self.messages(*happenings))

    def verdict(self, trial: int, step: int) -> bool:
        answer = self.answer(trial, step)
        if isinstance(answer, PortableException):
            raise answer.load()
        return bool(pickling.load(answer))

    def answer(self, trial: int, step: int) -> bytes | PortableException:
        def wanted(statement: s.Statement) -> bool:
            match statement:
                case s.Reply(number, d.Answer(call)):
                    return (number, call) == (self._job_of[trial], step)
            return False

        (reply,) = self.said.wait(wanted)
        result: bytes | PortableException = reply.what.result
        return result

    def cancels(self, trial: int) -> Callable[[s.Statement], bool]:
        return lambda statement: isinstance(statement, s.Cancel) and statement.number == self._job_of[trial]

    def close(self) -> None:
        self.node.deliver(node.Closed())
        self.join()
        if self.error is not None:
            raise self.error

    def join(self) -> None:
        self._thread.join(MANY_SECONDS)
        assert not self._thread.is_alive()


SEARCHES = {"optuna_async": OfSweep, "optimize": OfOptimize}


class Case:
    """A study, and a search on it."""

    def __init__(self, kind: str, n_trials: int, pruner: optuna.pruners.BasePruner) -> None:
        self.backend = InMemoryStorage()
        storage = StudyStorage(self.backend, TrialOwner(ProcessIdentity.here()))
        self.study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(), pruner=pruner)
        self.session = StudySession(self.study, storage, bounds=Bounds(n_trials=n_trials), max_retries=1)
        self.search: Any = SEARCHES[kind](self.session)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.backend.get_all_trials(self.study._study_id)

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials]

    def end_elsewhere(self, trial: int, state: TrialState = TrialState.COMPLETE) -> None:
        """End a trial as another program does, with the value 5."""
        values = [5.0] if state is TrialState.COMPLETE else None
        self.backend.set_trial_state_values(self.trials[trial]._trial_id, state, values)


@pytest.fixture(autouse=True)
def check_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (search_engine, sweep_search):
        monkeypatch.setattr(module, "CHECK_SECONDS", 0.1)


@pytest.fixture(params=SEARCHES)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield request.param
    optuna.logging.set_verbosity(optuna.logging.INFO)


class Noting(optuna.pruners.BasePruner):
    """Writes to each trial that it judges, as SuccessiveHalvingPruner does, which raises if the trial has ended."""

    def __init__(self) -> None:
        self.before: Callable[[], object] = int

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.before()
        study._storage.set_trial_system_attr(trial._trial_id, "judged", trial.last_step)
        return False


def test_a_trial_ended_elsewhere_that_reports_is_cancelled_alone(kind: str) -> None:
    case = Case(kind, 3, Noting())
    case.search.begin(2)
    case.search.together(Reported(0, 1, 1.0))
    case.search.verdict(0, 1)
    case.end_elsewhere(0)
    for step in range(2, 6):
        case.search.together(Reported(0, step, 1.0), Reported(1, step, 0.5))
        assert case.search.verdict(1, step) is False
    case.search.said.wait(case.search.cancels(0))
    case.search.together(Ended(0, Outcome.CANCELLED), Returned(1, 1.0))
    case.search.close()
    assert len(case.search.said.find(case.search.cancels(0))) == 1
    assert case.states()[:2] == ["COMPLETE", "COMPLETE"]
    assert [trial.value for trial in case.trials][:2] == [5.0, 1.0]
    assert "WAITING" not in case.states(), "it is not queued again"


def test_a_trial_ended_elsewhere_while_it_is_judged_is_cancelled_alone(kind: str) -> None:
    pruner = Noting()
    case = Case(kind, 2, pruner)
    case.search.begin(2)
    pruner.before = lambda: case.end_elsewhere(0)
    case.search.together(Reported(0, 1, 1.0))
    assert case.search.verdict(0, 1) is False
    pruner.before = int
    case.search.together(Reported(1, 1, 0.5))
    assert case.search.verdict(1, 1) is False
    case.search.together(Ended(0, Outcome.CANCELLED), Returned(1, 1.0))
    case.search.close()
    assert case.states() == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    "happens",
    [Returned(0, 1.0), Ended(0, Outcome.FAILED, unsupervised=True), Ended(0, Outcome.CANCELLED)],
    ids=["returns", "lost", "cancelled"],
)
@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL])
def test_a_trial_ended_elsewhere_stays_as_it_is(kind: str, state: TrialState, happens: Happening) -> None:
    case = Case(kind, 2, optuna.pruners.NopPruner())
    case.search.begin(2)
    case.end_elsewhere(0, state)
    attributes = copy.deepcopy(case.trials[0].user_attrs)
    case.search.said.wait(case.search.cancels(0))
    case.search.together(happens, Returned(1, 1.0))
    case.search.close()
    assert case.states() == [state.name, "COMPLETE"]
    assert case.trials[0].value == (5.0 if state is TrialState.COMPLETE else None)
    assert case.trials[0].user_attrs == attributes


class Watched(optuna.pruners.BasePruner):
    """Prunes nothing, and notes the states of all trials at each judgment; or raises."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.error: Exception | None = None

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        self.seen.append([other.state.name for other in study.get_trials(deepcopy=False)])
        if self.error is not None:
            raise self.error
        return False


def test_a_trial_that_returns_with_its_last_report_has_both(kind: str) -> None:
    case = Case(kind, 1, Watched())
    case.search.begin(1)
    case.search.together(Reported(0, 1, 0.5), Returned(0, 1.0))
    case.search.close()
    (trial,) = case.trials
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("COMPLETE", 1.0, {1: 0.5})


def test_the_pruner_sees_what_ended_before_it_was_asked(kind: str) -> None:
    pruner = Watched()
    case = Case(kind, 2, pruner)
    case.search.begin(2)
    case.search.together(Returned(0, 1.0), Reported(1, 1, 0.5))
    assert case.search.verdict(1, 1) is False
    assert pruner.seen == [["COMPLETE", "RUNNING"]]
    case.search.together(Returned(1, 1.0))
    case.search.close()


def test_an_error_of_the_pruner_does_not_fail_a_trial_that_returned(kind: str) -> None:
    pruner = Watched()
    case = Case(kind, 2, pruner)
    case.search.begin(2)
    pruner.error = ArithmeticError("singular")
    case.search.together(Returned(0, 1.0), Reported(1, 1, 0.5))
    if kind == "optimize":
        with pytest.raises(ArithmeticError, match="singular"):
            case.search.verdict(1, 1)
        case.search.together(Returned(1, 1.0))
        case.search.close()
        assert case.states() == ["COMPLETE", "COMPLETE"]
    else:
        with pytest.raises(StudyError, match="singular"):
            case.search.close()
        assert case.states()[:2] == ["COMPLETE", "FAIL"]


def test_a_trial_gets_the_verdict_on_its_last_report_whatever_its_step(kind: str) -> None:
    case = Case(kind, 1, Watched())
    case.search.begin(1)
    case.search.together(Reported(0, 5, 0.5), Reported(0, 3, 0.5))
    assert case.search.verdict(0, 3) is False
    case.search.together(Returned(0, 1.0))
    case.search.close()


class Prunes(optuna.pruners.BasePruner):
    """Prunes every trial."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return True


def test_a_job_that_is_ended_because_it_is_pruned_is_told_so_at_each_report() -> None:
    case = Case("optuna_async", 1, Prunes())
    case.search._search._kill_pruned = True
    case.search.begin(1)
    for step in (1, 2):
        case.search.together(Reported(0, step, 0.5))
        assert case.search.verdict(0, step) is True
    assert case.search.said.wait(case.search.cancels(0))[0].pruned
    case.search.together(Ended(0, Outcome.CANCELLED))
    case.search.close()


def test_a_trial_of_optimize_that_asks_gets_an_answer_even_if_it_was_ended_elsewhere() -> None:
    case = Case("optimize", 1, Noting())
    case.search.begin(1)
    case.search.together(Reported(0, 1, 1.0))
    case.search.verdict(0, 1)
    case.end_elsewhere(0)
    case.search.together(Reported(0, 2, 1.0))
    case.search.answer(0, 2)
    case.search.together(Ended(0, Outcome.CANCELLED))
    case.search.close()


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.FAIL])
def test_trial_of_optimize_that_moves_after_it_was_ended_elsewhere_stays_as_it_is(state: TrialState) -> None:
    case = Case("optimize", 2, optuna.pruners.NopPruner())
    case.search.node.moves_jobs = True
    case.search.begin(2)
    case.search.node.deliver(
        lambda: case.end_elsewhere(0, state),
        JobReturned(time.monotonic(), 0, ""),
        JobStarted(time.monotonic(), 0, "", (), None, None),
    )
    again = case.search.said.wait(lambda said: isinstance(said, s.Reply) and said.number == 0, 2)
    assert [reply.what.number for reply in again] == [0, 0], "it gets the same trial"
    case.search.said.wait(case.search.cancels(0))
    case.search.together(Ended(0, Outcome.CANCELLED), Returned(1, 1.0))
    case.search.close()
    assert case.states() == [state.name, "COMPLETE"]


def test_reports_that_cannot_be_stored_fail_no_trial_of_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("optimize", 2, Watched())
    case.search.begin(2)

    def refuse(reports: object) -> list[int]:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(case.session, "report", refuse)
        case.search.together(Reported(0, 1, 1.0), Returned(1, 1.0))
        assert case.search.verdict(0, 1) is False
    case.search.together(Returned(0, 1.0))
    with pytest.raises(OSError, match="the disk is full"):
        case.search.close()
    assert case.states() == ["COMPLETE", "COMPLETE"]


def test_a_trial_of_optimize_that_returned_before_the_node_died_is_complete() -> None:
    case = Case("optimize", 2, Watched())
    case.search.begin(2)
    died = NodeDiedError("the process that starts jobs was killed")
    case.search.node.deliver(*case.search.messages(Reported(1, 1, 1.0), Returned(0, 1.0)), died)
    case.search.join()
    assert case.search.error is died
    assert case.states()[:2] == ["COMPLETE", "FAIL"]
    assert case.trials[1].intermediate_values == {1: 1.0}


def test_a_trial_of_optimize_that_returned_before_ctrl_c_is_complete() -> None:
    case = Case("optimize", 2, Watched())
    case.search.threaded = False
    failed: list[BaseException] = []

    def play() -> None:
        try:
            case.search.begin(2)
            # The signal is deferred until the search waits again, when it has handled the first messages.
            returned = case.search.messages(Returned(0, 1.0))
            case.search.node.deliver(lambda: signal.raise_signal(signal.SIGINT), *returned)
            case.search.said.wait(lambda statement: isinstance(statement, s.Stop))
            case.search.together(Ended(1, Outcome.CANCELLED))
        except BaseException as error:
            failed.append(error)
        case.search.node.deliver(node.Closed())

    player = threading.Thread(target=play)
    player.start()
    with pytest.raises(KeyboardInterrupt):
        case.search.search.run()
    player.join(MANY_SECONDS)
    assert not failed
    assert case.states() == ["COMPLETE", "FAIL", "WAITING"], "what Ctrl-C interrupted is queued again"
    assert case.search.called_back == [0]


def test_ctrl_c_is_raised_even_if_the_study_cannot_be_used_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("optimize", 1, Watched())
    case.search.threaded = False
    failed: list[BaseException] = []
    looked = threading.Event()

    def refuse(*arguments: object) -> None:
        raise OSError("the disk is full")

    def look() -> list[int]:
        looked.set()
        raise OSError("the disk is broken")

    def play() -> None:
        try:
            case.search.begin(1)
            monkeypatch.setattr(case.backend, "set_trial_state_values", refuse)
            case.search.node.deliver(lambda: signal.raise_signal(signal.SIGINT), node.Wanted(1))
            case.search.said.wait(lambda statement: isinstance(statement, s.Stop))
            monkeypatch.setattr(case.session, "ended_elsewhere", look)
            assert looked.wait(MANY_SECONDS)
            case.search.together(Ended(0, Outcome.CANCELLED))
        except BaseException as error:
            failed.append(error)
        case.search.node.deliver(node.Closed())

    player = threading.Thread(target=play)
    player.start()
    with pytest.raises(KeyboardInterrupt):
        case.search.search.run()
    player.join(MANY_SECONDS)
    assert not failed
    assert case.states() == ["RUNNING", "WAITING"], "the next search fails the trial, and finds that it is queued again"


def test_a_study_of_optimize_that_cannot_be_read_lets_running_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("optimize", 2, Watched())
    case.search.begin(1)
    looked = threading.Event()

    def look() -> list[int]:
        looked.set()
        raise OSError("the disk is broken")

    monkeypatch.setattr(case.session, "ended_elsewhere", look)
    assert looked.wait(MANY_SECONDS)
    case.search.together(Returned(0, 1.0))
    with pytest.raises(OSError, match="the disk is broken"):
        case.search.close()
    assert case.states() == ["COMPLETE"]


def test_a_trial_of_optimize_that_is_lost_is_queued_again_and_called_back() -> None:
    case = Case("optimize", 1, Watched())
    case.search.begin(1)
    case.search.together(Ended(0, Outcome.FAILED, unsupervised=True))
    case.search.close()
    assert case.states() == ["FAIL", "WAITING"]
    assert case.search.called_back == [0]


def test_a_ping_is_answered_when_the_reports_before_it_are_stored() -> None:
    case = Case("optimize", 1, Watched())
    case.search.begin(1)
    job = case.search._job_of[0]
    reports = [node.Heard(job, Intermediate(step, 0.5)) for step in range(3)]
    case.search.node.deliver(*reports, node.Heard(job, d.Ping(7)))
    case.search.answer(0, 7)
    assert case.trials[0].intermediate_values == dict.fromkeys(range(3), 0.5)
    case.search.together(Returned(0, 1.0))
    case.search.close()


def test_a_ping_is_answered_even_if_its_trial_has_ended() -> None:
    case = Case("optimize", 1, Watched())
    case.search.begin(1)
    job = case.search._job_of[0]
    case.search.node.deliver(node.Heard(job, d.Returned((1.0,))), node.Heard(job, d.Ping(7)))
    case.search.answer(0, 7)
    case.search.node.deliver(node.Ended(result_of(job, Returned(0, 1.0))))
    case.search.close()


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_a_queued_trial_of_optimize_may_have_values_that_cannot_be_sent() -> None:
    case = Case("optimize", 1, optuna.pruners.NopPruner())
    choices = (lambda: 0, lambda: 1)
    queued = optuna.trial.create_trial(
        state=TrialState.WAITING,
        params={"f": choices[0]},
        distributions={"f": optuna.distributions.CategoricalDistribution(choices)},  # type: ignore[arg-type]
        user_attrs={"g": choices[1]},
    )
    case.study.add_trial(queued)
    case.search.begin(1)
    case.search.together(Returned(0, 1.0))
    case.search.close()
    assert case.states() == ["COMPLETE"]


def test_no_trial_is_begun_after_an_objective_of_optimize_raised_keyboard_interrupt() -> None:
    case = Case("optimize", 3, Watched())
    case.search.begin(1)
    case.search.node.deliver(node.Wanted(1))
    case.search.said.wait(lambda statement: isinstance(statement, s.Offer) and statement.job.number == 1)
    raised = d.Raised(PortableException.of(KeyboardInterrupt(), {}), caught=False, interrupted=True)
    case.search.node.deliver(node.Heard(0, raised), JobStarted(time.monotonic(), 1, "", (), None, None))
    case.search.said.wait(lambda statement: isinstance(statement, s.Reply) and statement.number == 1)
    case.search.together(Ended(0, Outcome.FAILED))
    with pytest.raises(KeyboardInterrupt):
        case.search.close()
    assert len(case.trials) == 1
