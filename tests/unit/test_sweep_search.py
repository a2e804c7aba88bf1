"""Stopping a search while it samples, without cutting what is done to the database."""

from __future__ import annotations

import select
import sys
import threading
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage

from gpu_launcher.errors import StudyError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.study_session import StudySession, TrialEnding, TrialOutcome
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.sweep_search import SweepSearch

MANY_SECONDS = 60.0


class Sampler(optuna.samplers.RandomSampler):
    """Samples its second trial until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = threading.Event()
        self.go_on = threading.Event()
        self.left: list[type[BaseException]] = []

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 1:
            self.samples.set()
            assert self.go_on.wait(MANY_SECONDS)
            try:
                study._storage.set_trial_user_attr(trial._trial_id, "sampled", True)
            except BaseException as error:
                self.left.append(type(error))
                raise


def begin(backend: InMemoryStorage, sampler: optuna.samplers.BaseSampler) -> tuple[SweepSearch, StudySession]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = StudyStorage(backend, TrialOwner(ProcessIdentity.here()))
    session = StudySession(optuna.create_study(storage=storage, sampler=sampler), storage, _define)
    search = SweepSearch(
        session,
        lambda asked: Job(asked.trial.number, "", asked.spec),
        lambda result: TrialEnding(TrialOutcome.COMPLETE, (1.0,)),
        lambda session, summary: ["the report"],
    )
    return search, session


def _define(trial: optuna.Trial) -> list[str]:
    return [f"x={trial.suggest_float('x', 0, 1)}"]


def hear(search: SweepSearch, kind: type[Any]) -> Any:
    """What the search says next of this kind."""
    while True:
        assert select.select([search], [], [], MANY_SECONDS)[0]
        for statement in search.receive():
            if isinstance(statement, kind):
                return statement


def complete(search: SweepSearch, job: Job) -> None:
    search.ended(JobResult(job.number, "", Outcome.COMPLETED, b"", None, (), None, None))


def sampling(backend: InMemoryStorage) -> tuple[SweepSearch, StudySession, Sampler]:
    """The first trial runs, the second one is being sampled."""
    sampler = Sampler()
    search, session = begin(backend, sampler)
    search.request_jobs(2)
    search.started(hear(search, s.Offer).job, (), None)
    assert sampler.samples.wait(MANY_SECONDS)
    return search, session, sampler


def states(session: StudySession) -> list[str]:
    trials = session.storage.backend.get_all_trials(session.study._study_id)
    return [trial.state.name for trial in trials]


def test_a_stopped_search_does_not_wait_for_a_sample_and_tells_what_ended() -> None:
    search, session, sampler = sampling(InMemoryStorage())
    complete(search, Job(0, "", []))
    _, lines = search.close(patience=MANY_SECONDS)
    assert sorted(states(session)) == ["COMPLETE", "FAIL"]
    assert lines == ["the report"]
    sampler.go_on.set()
    for thread in threading.enumerate():
        if thread.name == "gpu-launcher search":
            thread.join(MANY_SECONDS)
    assert [error.__name__ for error in sampler.left] == ["SamplingInterrupted"], "it may not use the study any more"
    assert states(session) == ["COMPLETE", "FAIL"]


def test_what_runs_when_a_search_is_stopped_is_queued_again() -> None:
    search, session, sampler = sampling(InMemoryStorage())
    search.close(patience=MANY_SECONDS)
    sampler.go_on.set()
    assert states(session) == ["FAIL", "FAIL", "WAITING"], "the third repeats the first"


def test_a_search_that_ends_by_itself_waits_for_its_sample() -> None:
    search, session, sampler = sampling(InMemoryStorage())
    threading.Timer(0.1, sampler.go_on.set).start()
    search.close()
    assert not sampler.left
    assert states(session) == ["FAIL", "FAIL", "WAITING", "WAITING"], "both were interrupted"


def test_a_search_space_that_exits_ends_the_search() -> None:
    class Leaves(optuna.samplers.RandomSampler):
        def sample_relative(self, *arguments: Any) -> Any:
            sys.exit("no such space")

    search, _ = begin(InMemoryStorage(), Leaves())
    search.request_jobs(1)
    assert select.select([search.fileno()], [], [], MANY_SECONDS)[0]
    with pytest.raises(StudyError, match="SystemExit: no such space"):
        search.close()


def test_a_trial_whose_process_of_ours_died_is_queued_again() -> None:
    search, session = begin(InMemoryStorage(), optuna.samplers.RandomSampler())
    session.max_retries = 1
    search.request_jobs(1)
    search.started(hear(search, s.Offer).job, (), None)
    lost = JobResult(0, "", Outcome.FAILED, None, "was killed", (), None, None, Cause.CRASH, unsupervised=True)
    search.ended(lost)
    assert hear(search, s.Remark).text == "trial 0 was lost, and is queued again"
    summary, _ = search.close()
    assert states(session) == ["FAIL", "WAITING"]
    assert summary.first_failure == "trial 0 was lost"


class Held(InMemoryStorage):
    """Creates its second trial when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.creates = threading.Event()
        self.go_on = threading.Event()

    def create_new_trial(self, *arguments: Any, **options: Any) -> int:
        if self.get_all_trials(0):
            self.creates.set()
            assert self.go_on.wait(MANY_SECONDS)
        return super().create_new_trial(*arguments, **options)


def _held() -> tuple[SweepSearch, StudySession, Held]:
    backend = Held()
    search, session = begin(backend, optuna.samplers.RandomSampler())
    search.request_jobs(2)
    hear(search, s.Offer)
    assert backend.creates.wait(MANY_SECONDS)
    return search, session, backend


def test_an_operation_on_the_database_that_has_begun_is_waited_for() -> None:
    search, session, backend = _held()
    complete(search, Job(0, "", []))
    threading.Timer(0.1, backend.go_on.set).start()
    search.close(patience=MANY_SECONDS)
    # If it came as far as an offer before the end was noticed, it is queued again.
    told = sorted(state for state in states(session) if state != "WAITING")
    assert told == ["COMPLETE", "FAIL"], "the second trial was created, and is told"


def test_a_database_that_does_not_answer_is_not_waited_for_longer() -> None:
    search, _, backend = _held()
    with pytest.raises(StudyError, match="did not end within 0 s"):
        search.close(patience=0.1)
    search.abandon()
    backend.go_on.set()


def test_an_error_of_the_sampler_ends_the_search_with_nothing_untold() -> None:
    class Broken(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            raise ArithmeticError("singular")

    search, session = begin(InMemoryStorage(), Broken())
    search.request_jobs(1)
    with pytest.raises(StudyError, match="the search failed: ArithmeticError: singular"):
        hear(search, s.Offer)
    assert states(session) == ["FAIL"]
