"""What one sweep does with one study: each trial is told once, whatever happens in between."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies import stale_trials
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.stopping import Bounds, SearchEnded
from gpu_launcher.studies.study_session import (
    DRAW_EVERY,
    MAX_LEFT_OUT,
    AskedTrial,
    LeftOutError,
    StudySession,
    TrialEnding,
    TrialOutcome,
    UnusablePoint,
)
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.trial_attrs import FAILURE, JOB, LEFT_OUT, LOST, OWNER, RETRY_OF

HERE = ProcessIdentity.here()
DEAD = replace(HERE, pid=2**22)
"""No process has such an id."""


@pytest.fixture
def storage():
    return optuna.storages.InMemoryStorage()


def define(trial):
    return [f"x={trial.suggest_float('x', 0, 1)}"]


def session(storage, bounds=Bounds(), identity=HERE, define=define, pruner=None):  # noqa: B008  (frozen)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    used = StudyStorage(storage, TrialOwner(identity))
    study = optuna.create_study(
        study_name="one",
        storage=used,
        sampler=optuna.samplers.RandomSampler(),
        pruner=pruner or optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    return StudySession(study, used, define, bounds, max_retries=1)


def test_a_trial_has_its_owner_its_parameters_and_what_it_is_called_with(storage):
    asked = session(storage).ask()
    assert isinstance(asked, AskedTrial)
    assert asked.spec == [f"x={asked.trial.params['x']}"]
    assert ProcessIdentity.from_json(asked.trial.user_attrs[OWNER]) == HERE


def test_a_trial_that_cannot_be_defined_is_told_and_the_error_comes_through(storage):
    def broken(trial):
        trial.suggest_float("x", 0, 1)
        raise KeyError("no such thing")

    broken_desk = session(storage, define=broken)
    with pytest.raises(KeyError):
        broken_desk.ask()
    (trial,) = broken_desk.study.trials
    assert trial.state is TrialState.FAIL
    assert "no such thing" in trial.user_attrs[FAILURE]


def test_a_trial_that_cannot_be_sampled_is_told(storage):
    class Broken(optuna.samplers.RandomSampler):
        def before_trial(self, study, trial):
            raise ArithmeticError("singular")

    broken = session(storage)
    broken.study.sampler = Broken()
    with pytest.raises(ArithmeticError):
        broken.ask()
    assert [trial.state for trial in broken.study.trials] == [TrialState.FAIL]


def test_a_queued_trial_of_which_no_job_can_be_made_fails_alone(storage):
    def choose(trial):
        return [f"x={trial.suggest_categorical('x', [1, 2])}"]

    asking = session(storage, Bounds(n_trials=1), define=choose)
    asking.enqueue([{"x": 7}])
    answer = asking.ask()
    assert isinstance(answer, UnusablePoint)
    assert answer.message.startswith("trial 0 failed: it was queued with x=7, which do not define a job: ")
    assert asking.study.trials[0].state is TrialState.FAIL
    assert isinstance(asking.ask(), AskedTrial)
    asking.tell(1, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert asking.ask() == SearchEnded(None)


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("when", ["sampled", "defined"])
def test_a_trial_whose_sampling_is_interrupted_is_told_and_queued_again_if_it_was_queued(storage, when, queued):
    def stops(*arguments):
        raise KeyboardInterrupt

    asking = session(storage, define=stops if when == "defined" else define)
    if when == "sampled":
        asking.study.sampler.before_trial = stops
    if queued:
        asking.enqueue([{"x": 0.5}])
    with pytest.raises(KeyboardInterrupt):
        asking.ask()
    states = [trial.state.name for trial in asking.study.trials]
    assert states == ["FAIL", "WAITING"] if queued else ["FAIL"]
    assert asking.study.trials[0].user_attrs[FAILURE] == "the sweep was stopped"
    if queued:
        assert session(storage).ask().trial.params == {"x": 0.5}


@pytest.mark.parametrize("outcome", list(TrialOutcome))
def test_what_is_told_is_in_the_study(storage, outcome):
    asking = session(storage)
    asking.ask()
    asking.started(0, ["GPU 3"], "/there/0", "/there/0/job.log")
    asking.report({0: {0: 4.0, 1: 2.0}})
    asking.tell(
        0,
        TrialEnding(
            outcome,
            (1.5,) if outcome is TrialOutcome.COMPLETE else (),
            "because" if outcome is not TrialOutcome.COMPLETE else None,
        ),
    )
    trial = asking.study.trials[0]
    states = {TrialOutcome.COMPLETE: TrialState.COMPLETE, TrialOutcome.PRUNED: TrialState.PRUNED}
    assert trial.state is states.get(outcome, TrialState.FAIL)
    assert trial.values == {TrialOutcome.COMPLETE: [1.5], TrialOutcome.PRUNED: [2.0]}.get(outcome)
    assert trial.intermediate_values == {0: 4.0, 1: 2.0}
    assert trial.user_attrs[JOB].items() >= {"devices": ["GPU 3"], "directory": "/there/0"}.items()
    assert len(asking.study.trials) == (2 if outcome is TrialOutcome.INTERRUPTED else 1)


def test_a_trial_that_was_ended_elsewhere_is_not_told_again(storage):
    asking = session(storage)
    asking.ask()
    storage.set_trial_state_values(asking.running[0].id, TrialState.FAIL)
    assert asking.ended_elsewhere() == [0]
    asking.started(0, [], None, None)
    asking.tell(0, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert asking.study.trials[0].state is TrialState.FAIL
    assert asking.ended_elsewhere() == []


def test_closing_tells_whatever_was_not(storage):
    asking = session(storage)
    asking.ask()
    asking.ask()
    asking.close()
    assert sorted(trial.state.name for trial in asking.study.trials) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    assert asking.summary().best == []


def test_trials_of_the_dead_are_settled_and_those_of_others_left_alone(storage):
    dead = session(storage, identity=DEAD)
    dead.ask()
    dead.started(0, [], "/there/0", None)
    dead.ask()
    elsewhere = session(storage, identity=replace(DEAD, boot="of another machine", host="other"))
    elsewhere.ask()
    mine = session(storage)
    (remark,) = mine.fail_stale_trials()
    assert remark == "marked 2 trials of a dead sweep as failed, and 2 of them queued again"
    states = [trial.state.name for trial in mine.study.trials]
    assert states == ["FAIL", "FAIL", "RUNNING", "WAITING", "WAITING"]
    assert [(t.user_attrs[RETRY_OF], t.user_attrs[LOST]) for t in mine.study.trials[3:]] == [([0], 1), ([1], 0)]
    again = mine.ask()
    assert again.trial.params == mine.study.trials[0].params


def test_what_ran_when_its_sweep_died_is_queued_again_so_often_and_no_more(storage):
    for left in ("WAITING", "FAIL"):
        dead = session(storage, identity=DEAD)
        asked = dead.ask()
        dead.started(asked.trial.number, [], None, None)
        session(storage).fail_stale_trials()
        assert storage.get_all_trials(dead.study._study_id)[-1].state.name == left


def test_a_trial_that_nobody_owns_is_left_alone(storage):
    foreign = optuna.create_study(study_name="one", storage=storage)
    foreign.ask()
    assert session(storage).fail_stale_trials() == []
    assert foreign.trials[0].state is TrialState.RUNNING


def test_the_asking_ends_where_the_bounds_are(storage):
    two = session(storage, Bounds(n_trials=2))
    assert two.expected == 2
    two.ask()
    two.ask()
    assert two.ask() == SearchEnded(None)
    total = session(storage, Bounds(total_trials=3))
    assert total.expected == 1
    total.ask()
    assert total.ask() == SearchEnded(None)


def test_failures_do_not_keep_a_total_from_being_reached(storage):
    asking = session(storage, Bounds(total_trials=2))
    for number in range(2):
        asking.ask()
        asking.tell(number, TrialEnding(TrialOutcome.FAILED, message="raised"))
    assert asking.ask() == SearchEnded(None)


def test_a_rate_of_failures_means_something_when_there_are_a_few_trials(storage):
    asking = session(storage, Bounds(max_failure_rate=0.5))
    for number in range(9):
        asking.ask()
        asking.tell(number, TrialEnding(TrialOutcome.FAILED, message="raised"))
    last = asking.ask()
    assert isinstance(last, AskedTrial)
    asking.tell(9, TrialEnding(TrialOutcome.FAILED, message="raised"))
    assert asking.ask() == SearchEnded(
        "no more trials are asked for: 10 of 10 trials failed, more than max_failure_rate=0.5 allows", failed=True
    )


def test_verdicts_are_those_of_the_studys_pruner(storage):
    asking = session(storage, pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    asking.ask()
    asking.ask()
    assert asking.report({0: {0: 0.5}, 1: {0: 1.5}, 7: {0: 9.0}}) == []
    assert asking.judge([0, 1, 7]) == {0: False, 1: True}


def test_an_earlier_sweep_of_the_same_program_is_dead(storage):
    session(storage).ask()
    assert session(storage).fail_stale_trials() == [
        "marked 1 trial of a dead sweep as failed, and 1 of them queued again"
    ]


def test_who_loses_the_race_for_a_queued_trial_does_not_become_its_owner(tmp_path):
    storage, other = (gpu_launcher.storage(tmp_path / "study.db") for _ in range(2))
    winner, loser = session(storage), session(other, identity=DEAD)
    winner.study.enqueue_trial({"x": 0.5})
    (waiting,) = storage.get_all_trials(winner.study._study_id)
    winner.ask()
    assert not loser.study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    assert winner.storage.sweep.owns(storage.get_trial(waiting._trial_id))
    winner.tell(0, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert not loser.study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING), "it is over"


def test_a_queued_trial_whose_taker_died_at_once_is_settled(storage):
    taker = session(storage, identity=DEAD)
    taker.study.enqueue_trial({"x": 0.5})
    (waiting,) = storage.get_all_trials(taker.study._study_id)
    set_attr = storage.set_trial_user_attr

    def dies_before_it_names_itself(trial_id, key, value):
        if key == OWNER:
            raise KeyboardInterrupt
        set_attr(trial_id, key, value)

    storage.set_trial_user_attr = dies_before_it_names_itself
    with pytest.raises(KeyboardInterrupt):
        taker.study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    storage.set_trial_user_attr = set_attr
    assert storage.get_trial(waiting._trial_id).state is TrialState.RUNNING
    assert len(session(storage).fail_stale_trials()) == 1


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_grid_is_over_when_everything_was_tried_and_nothing_is_queued(storage):
    def choose(trial):
        return [f"x={trial.suggest_categorical('x', [1, 2])}"]

    asking = session(storage, define=choose)
    asking.study.sampler = optuna.samplers.BruteForceSampler()
    asking.combinations = 2
    assert asking.expected == 2
    asking.ask()
    asking.ask()
    asking.tell(0, TrialEnding(TrialOutcome.INTERRUPTED))
    again = asking.ask()
    assert isinstance(again, AskedTrial), "what was interrupted is tried again"
    assert again.trial.user_attrs[RETRY_OF] == [0]
    asking.tell(1, TrialEnding(TrialOutcome.FAILED))
    asking.tell(2, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert isinstance(asking.ask(), SearchEnded)


def test_who_dies_between_queueing_a_trial_again_and_failing_it_has_it_queued_once(storage, monkeypatch):
    session(storage, identity=DEAD).ask()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stale_trials, "fail", killed)
        with pytest.raises(KeyboardInterrupt):
            session(storage).fail_stale_trials()
    next_one = session(storage)
    assert [trial.state.name for trial in next_one.study.trials] == ["RUNNING", "WAITING"]
    assert next_one.fail_stale_trials() == ["marked 1 trial of a dead sweep as failed, and 1 of them queued again"]
    assert [trial.state.name for trial in next_one.study.trials] == ["FAIL", "WAITING"]


def test_a_trial_that_has_ended_leaves_no_copy(storage):
    dead = session(storage, identity=DEAD)
    dead.ask()
    (trial,) = storage.get_all_trials(dead.study._study_id)
    dead.tell(0, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert not stale_trials.queue_again(dead.study, trial, 0, "lost")
    assert [trial.state.name for trial in dead.study.trials] == ["COMPLETE"]


def test_a_trial_that_ends_while_it_is_queued_again_is_not_repeated(storage, monkeypatch):
    dead = session(storage, identity=DEAD)
    dead.ask()
    (trial,) = storage.get_all_trials(dead.study._study_id)
    create = storage.create_new_trial

    def ends_now(*arguments):
        monkeypatch.undo()
        dead.tell(0, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
        return create(*arguments)

    monkeypatch.setattr(storage, "create_new_trial", ends_now)
    assert not stale_trials.queue_again(dead.study, trial, 0, "lost")
    assert [trial.state.name for trial in dead.study.trials] == ["COMPLETE", "FAIL"]


def test_a_search_ends_when_none_of_the_first_returns_a_value(storage):
    one = session(storage, Bounds(n_trials=20))
    for _ in range(3):
        asked = one.ask()
        assert isinstance(asked, AskedTrial)
        one.tell(asked.trial.number, TrialEnding(TrialOutcome.FAILED, message="returned None", hopeless=True))
    over = one.ask()
    assert isinstance(over, SearchEnded)
    assert over.failed
    assert "none of the first 3 returned a usable value" in (over.reason or "")


@pytest.mark.parametrize(
    "other",
    [
        TrialEnding(TrialOutcome.COMPLETE, (1.0,)),
        TrialEnding(TrialOutcome.FAILED, message="raised"),
        TrialEnding(TrialOutcome.PRUNED),
    ],
)
def test_a_search_goes_on_if_another_trial_ended_otherwise(storage, other):
    one = session(storage, Bounds(n_trials=20))
    for ending in [other, *[TrialEnding(TrialOutcome.FAILED, message="returned None", hopeless=True)] * 5]:
        asked = one.ask()
        assert isinstance(asked, AskedTrial)
        one.tell(asked.trial.number, ending)
    assert isinstance(one.ask(), AskedTrial)


def even_only(trial):
    x = trial.suggest_int("x", 0, 9)
    if x % 2:
        raise LeftOutError("x is odd")
    return [f"x={x}"]


def test_a_trial_that_is_left_out_is_pruned_and_counts_for_nothing(storage):
    one = session(storage, Bounds(total_trials=6), define=even_only)
    one.study.sampler = optuna.samplers.RandomSampler(seed=3)
    asked = []
    while not isinstance(answer := one.ask(), SearchEnded):
        if isinstance(answer, UnusablePoint):
            assert answer.message is None
        else:
            asked.append(answer)
            one.tell(answer.trial.number, TrialEnding(TrialOutcome.COMPLETE, (1.0,)))
    assert len(asked) == one.asked == 6
    assert all(asked.trial.params["x"] % 2 == 0 for asked in asked)
    out = [trial for trial in one.study.trials if trial.state is TrialState.PRUNED]
    assert len(out) == one.left_out > 0
    assert {trial.user_attrs[LEFT_OUT] for trial in out} == {"x is odd"}


def test_a_queued_trial_that_is_left_out_is_named(storage):
    one = session(storage, define=even_only)
    one.enqueue([{"x": 3}])
    assert one.ask() == UnusablePoint("trial 0 was queued, but is left out: x is odd")


class AlwaysOne(optuna.samplers.RandomSampler):
    def sample_independent(self, *_):
        return 1


def test_a_sampler_that_proposes_only_what_is_left_out_gets_drawn_points(storage):
    one = session(storage, define=even_only)
    one.study.sampler = AlwaysOne()
    one.draw = lambda: {"x": 4}
    answers = [one.ask() for _ in range(DRAW_EVERY + 1)]
    assert isinstance(answers[-1], AskedTrial)
    assert answers[-1].spec == ["x=4"]
    assert all(isinstance(answer, UnusablePoint) for answer in answers[:-1])


def test_a_search_ends_when_everything_is_left_out(storage):
    one = session(storage, define=even_only)
    one.study.sampler = AlwaysOne()
    answers = [one.ask() for _ in range(MAX_LEFT_OUT + 1)]
    assert isinstance(answers[-1], SearchEnded)
    assert "100 proposals in a row were left out, the last because x is odd; allow more" in answers[-1].reason
    assert all(isinstance(answer, UnusablePoint) for answer in answers[:-1])
