"""`gpu_launcher.optimize` against what `study.optimize` does, with real processes and simulated devices."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import gpu_launcher
from gpu_launcher.errors import JobError, OptionError
from gpu_launcher.jobs.where import Where
from gpu_launcher.processes.exceptions import RemoteTraceback
from tests.waiting import until

# Objectives are defined inside the tests: where the test runner has threads, jobs are spawned, and cannot import this.

OPTUNA_5 = int(optuna.__version__.partition(".")[0]) >= 5


@pytest.fixture(params=["memory", "sqlite", "journal"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> optuna.Study:
    urls = {"memory": None, "sqlite": f"sqlite:///{tmp_path}/study.db", "journal": f"journal:///{tmp_path}/study.log"}
    return optuna.create_study(storage=gpu_launcher.storage(urls[request.param]), sampler=random_sampler())


def random_sampler() -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=0)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name.lower() for trial in study.trials]


def essence(study: optuna.Study) -> list[Any]:
    """What must be as `study.optimize` makes it."""
    return [
        (trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.intermediate_values)
        for trial in study.trials
    ]


def searching(trial: Any) -> float:
    """Conditional, in all kinds of parameters, and pruned."""
    x = trial.suggest_float("x", -10, 10)
    scale = trial.suggest_float("scale", 1e-3, 1e3, log=True)
    kind = trial.suggest_categorical("kind", ["plain", "deep", None])
    depth = trial.suggest_int(f"depth of {kind}", 1, 9, step=2) if kind == "deep" else 0
    for step in range(8):
        trial.report(abs(x) + depth + 1 / (step + 1), step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"at step {step}")
    return float(abs(x) + depth + scale / 1e3)


SAMPLERS: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=1),
    "tpe": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=5),
    "liar": lambda: optuna.samplers.TPESampler(seed=1, multivariate=True, group=True, constant_liar=True),
    "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=1, population_size=5),
}
if find_spec("cmaes"):
    SAMPLERS["cmaes"] = lambda: optuna.samplers.CmaEsSampler(seed=1, n_startup_trials=3)
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
    "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=8, reduction_factor=2),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [*[(name, "median") for name in SAMPLERS], *[("tpe", name) for name in PRUNERS if name != "median"]],
)
def test_one_job_at_a_time_is_study_optimize(sampler: str, pruner: str, pool: Where) -> None:
    def make() -> optuna.Study:
        made = optuna.create_study(study_name="same", sampler=SAMPLERS[sampler](), pruner=PRUNERS[pruner]())
        made.enqueue_trial({"x": 3.0, "kind": "deep"})
        return made

    expected, got = make(), make()
    expected.optimize(searching, n_trials=18)
    gpu_launcher.optimize(got, searching, n_trials=18, n_jobs=1, pool=pool, start_method="fork")
    assert essence(got) == essence(expected)
    pruned = TrialState.PRUNED in {trial.state for trial in expected.trials}
    assert pruned == (pruner != "none")


SCRIPT = """
import sys
import optuna
import gpu_launcher
from gpu_launcher.jobs.where import Where

def objective(trial):
    return abs(trial.suggest_float("x", -10, 10) - 1) + trial.suggest_int("y", 0, 9)

if __name__ == "__main__":
    a, b = (optuna.create_study(sampler=optuna.samplers.GPSampler(seed=1, n_startup_trials=4)) for _ in range(2))
    pool = Where("simulated:1", sys.argv[1])
    gpu_launcher.optimize(b, objective, 8, pool=pool)
    a.optimize(objective, 8)
    print([trial.params for trial in a.trials] == [trial.params for trial in b.trials])
    # The sampler has threads now.
    gpu_launcher.optimize(b, objective, 2, pool=pool)
    print(len(b.trials))
"""


@pytest.mark.skipif(find_spec("torch") is None, reason="the GP sampler needs torch")
def test_the_gp_sampler_and_what_its_threads_mean_for_the_next_search(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "pool"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.stdout.split() == ["True", "10"], done.stderr


def test_trials_run_at_the_same_time_each_with_devices_of_its_own(
    study: optuna.Study, pool: Where, tmp_path: Path
) -> None:
    def objective(trial: Any) -> float:
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("visible", os.environ["CUDA_VISIBLE_DEVICES"])
        began = time.monotonic()
        (tmp_path / f"runs-{trial.number}").touch()
        while trial.number < 2 and not (tmp_path / f"runs-{1 - trial.number}").exists():
            time.sleep(0.01)
        trial.set_user_attr("time", [began, time.monotonic()])
        return float(trial.suggest_float("x", 0, 1))

    gpu_launcher.optimize(study, objective, n_trials=8, pool=pool)
    assert states(study) == ["complete"] * 8
    attributes = [trial.user_attrs for trial in study.trials]
    processes = {attribute["process"] for attribute in attributes}
    assert len(processes) == 8
    assert os.getpid() not in processes
    together = 0
    for number, one in enumerate(attributes):
        for other in attributes[:number]:
            if one["time"][0] < other["time"][1] and other["time"][0] < one["time"][1]:
                together += 1
                assert one["visible"] != other["visible"]
    assert together
    assert {tuple(attribute["gpu_launcher:job"]["devices"]) for attribute in attributes} == {
        ("simulated GPU 0",),
        ("simulated GPU 1",),
    }


def test_n_jobs_that_leaves_devices_idle_is_named(pool: Where, tmp_path: Path) -> None:
    texts: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())
            (tmp_path / "said").touch()

    def objective(trial: optuna.Trial) -> float:
        end = time.monotonic() + 200
        while not (tmp_path / "said").exists() and time.monotonic() < end:
            time.sleep(0.01)
        return 0.0

    handler = Handler(logging.WARNING)
    logging.getLogger("gpu_launcher").addHandler(handler)
    try:
        gpu_launcher.optimize(optuna.create_study(), objective, n_trials=2, n_jobs=1, pool=pool)
    finally:
        logging.getLogger("gpu_launcher").removeHandler(handler)
    assert texts == ["n_jobs=1 leaves 1 of 2 devices idle: raise or remove it to use them"]


def test_n_jobs_is_a_cap(pool: Where) -> None:
    study = optuna.create_study(sampler=random_sampler())

    def objective(trial: Any) -> float:
        end = time.monotonic() + 60
        while True:
            running = [t.number for t in trial.study.get_trials() if t.state == TrialState.RUNNING]
            if trial.number > 1 or len(running) > 1 or time.monotonic() > end:  # the first two wait for each other
                break
            time.sleep(0.05)
        trial.set_user_attr("running", running)
        time.sleep(0.02)
        return 1.0

    gpu_launcher.optimize(study, objective, n_trials=6, gpus=0, n_jobs=2, pool=pool)
    assert max(len(trial.user_attrs["running"]) for trial in study.trials) == 2


def test_an_exception_is_raised_as_it_was_and_caused_by_its_traceback(
    study: optuna.Study, pool: Where, frame_of: Any
) -> None:
    def objective(trial: Any) -> float:
        if trial.number == 1:
            raise FileNotFoundError(2, "No such data", "/data")
        while "FAIL" not in [other.state.name for other in trial.study.trials]:
            time.sleep(0.01)
        return 1.0

    with pytest.raises(FileNotFoundError, match="No such data") as raised:
        gpu_launcher.optimize(study, objective, n_trials=100, pool=pool)
    assert raised.value.filename == "/data"
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert frame_of(__file__, "objective", "raise FileNotFoundError(2,") in str(raised.value.__cause__)
    # What ran was let run to its end, and nothing more was begun.
    assert states(study) == ["complete", "fail"]
    assert "No such data" in study.trials[1].user_attrs["gpu_launcher:failure"]


def test_caught_exceptions_end_their_trials_alone(study: optuna.Study, pool: Where) -> None:
    def objective(trial: Any) -> float:
        x = float(trial.suggest_float("x", 0, 1))
        if trial.number in (1, 3):
            raise ZeroDivisionError
        return x

    told: list[tuple[int, TrialState]] = []
    gpu_launcher.optimize(
        study,
        objective,
        n_trials=6,
        catch=(ArithmeticError,),
        callbacks=[lambda _, trial: told.append((trial.number, trial.state))],
        pool=pool,
    )
    assert states(study) == ["complete", "fail", "complete", "fail", "complete", "complete"]
    assert sorted(told) == [(trial.number, trial.state) for trial in study.trials]
    assert all("x" in trial.params for trial in study.trials)


def test_an_exception_whose_class_cannot_be_pickled_is_told_in_words(pool: Where) -> None:
    def objective(trial: Any) -> float:
        class OddError(Exception):
            lock = threading.Lock()

        raise OddError("number 7")

    study = optuna.create_study()
    with pytest.raises(JobError, match="number 7") as raised:
        gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert "cannot be pickled" in str(raised.value)
    assert states(study) == ["fail"]


@pytest.mark.parametrize("way", ["killed", "exited", "crashed", "sys.exit"])
def test_a_process_that_dies_fails_its_trial_and_counts_as_a_job_error(way: str, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        if trial.number == 1:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif way == "exited":
                os._exit(0)
            elif way == "crashed":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            sys.exit(3)
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=4, catch=JobError, pool=pool)
    assert states(study) == ["complete", "fail", "complete", "complete"]
    assert study.trials[1].params
    assert study.trials[1].user_attrs["gpu_launcher:failure"]
    again = optuna.create_study()
    with pytest.raises(JobError, match="trial 1"):
        gpu_launcher.optimize(again, objective, n_trials=4, pool=pool)
    assert states(again)[1] == "fail"
    assert "running" not in states(again)


@pytest.mark.parametrize("returned", [None, "abc", float("nan"), [1.0, 2.0], object(), {}])
def test_what_is_no_value_fails_its_trial(returned: Any, pool: Where) -> None:
    expected, got = optuna.create_study(), optuna.create_study()
    expected.optimize(lambda trial: returned, n_trials=1)

    def objective(trial: Any) -> Any:
        return object() if type(returned) is object else returned

    gpu_launcher.optimize(got, objective, n_trials=2, pool=pool)
    assert states(got) == ["fail", "fail"]
    assert states(expected) == ["fail"]


@pytest.mark.parametrize("returned", [3, True, 1e400, (2.5,)])
def test_what_is_a_value(returned: Any, pool: Where) -> None:
    expected, got = optuna.create_study(), optuna.create_study()
    expected.optimize(lambda trial: returned, n_trials=1)
    gpu_launcher.optimize(got, lambda trial: returned, n_trials=1, pool=pool)
    assert essence(got) == essence(expected)


def test_failures_are_logged_as_by_optuna(pool: Where, caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    caplog.set_level(logging.INFO, logger="optuna")

    def objective(trial: Any) -> Any:
        x = trial.suggest_float("x", 1, 1)
        if trial.number == 0:
            raise ValueError("bad")
        if trial.number == 1:
            raise optuna.TrialPruned("enough")
        return None if trial.number == 2 else x

    try:
        said = []
        for run in (
            lambda study: study.optimize(objective, n_trials=4, catch=ValueError),
            lambda study: gpu_launcher.optimize(study, objective, n_trials=4, catch=ValueError, n_jobs=1, pool=pool),
        ):
            study = optuna.create_study()
            caplog.clear()
            run(study)
            lines = [record.message for record in caplog.records if record.name.startswith("optuna")]
            said.append(list(dict.fromkeys(lines)))  # pytest has two handlers
    finally:
        optuna.logging.disable_propagation()
    expected = [line.partition(" Best is")[0] for line in said[0]]
    assert [line.partition(" Best is")[0] for line in said[1]] == expected
    assert len(expected) == 6


def test_callbacks_run_here_and_can_stop_the_search(study: optuna.Study, pool: Where) -> None:
    seen: list[int] = []

    def callback(given: optuna.Study, trial: FrozenTrial) -> None:
        assert given is study
        assert trial.state.is_finished()
        seen.append(os.getpid())
        if trial.number == 3:
            given.stop()

    gpu_launcher.optimize(study, lambda trial: trial.suggest_float("x", 0, 1), callbacks=[callback], pool=pool)
    assert seen == [os.getpid()] * len(study.trials)
    assert set(states(study)) == {"complete"}
    assert 4 <= len(study.trials) <= 6


def test_an_exception_of_a_callback_is_raised(pool: Where) -> None:
    study = optuna.create_study()

    def callback(given: optuna.Study, trial: FrozenTrial) -> None:
        raise LookupError(trial.number)

    with pytest.raises(LookupError, match="0"):
        gpu_launcher.optimize(study, lambda trial: 1.0, callbacks=[callback], n_jobs=1, pool=pool)
    assert states(study) == ["complete"]


def test_the_objective_can_stop_the_search(pool: Where) -> None:
    study = optuna.create_study()
    gpu_launcher.optimize(study, lambda trial: trial.study.stop() or 1.0, n_jobs=1, pool=pool)
    assert states(study) == ["complete"]


def test_a_total_over_several_calls_is_optunas_own_callback(pool: Where) -> None:
    study = optuna.create_study()
    total = optuna.study.MaxTrialsCallback(5, states=(TrialState.COMPLETE,))
    for _ in range(2):
        gpu_launcher.optimize(study, lambda trial: 1.0, n_jobs=1, callbacks=[total], pool=pool)
    assert len(study.trials) == 6  # the callback is asked after a trial


def test_the_timeout_ends_the_asking(pool: Where) -> None:
    study = optuna.create_study()

    def objective(trial: Any) -> float:
        time.sleep(0.3)
        return 1.0

    gpu_launcher.optimize(study, objective, timeout=1, pool=pool)
    assert len(study.trials) <= 8
    assert set(states(study)) <= {"complete"}
    before = len(study.trials)
    gpu_launcher.optimize(study, objective, timeout=0, pool=pool)
    gpu_launcher.optimize(study, objective, n_trials=0, pool=pool)
    assert len(study.trials) == before


def test_the_timeout_ends_the_wait_for_devices_that_others_hold(pool: Where, tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    script = tmp_path / "holder.py"
    script.write_text(
        f"import time, optuna, gpu_launcher\nfrom gpu_launcher.jobs.where import Where\n"
        f"def hold(trial):\n"
        f"    open({str(ready)!r}, 'w').close()\n"
        f"    time.sleep(600)\n"
        f"gpu_launcher.optimize(optuna.create_study(), hold, 1, gpus=2, "
        f"pool=Where('simulated:2', {str(pool.pool_dir)!r}))\n"
    )
    holder = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    try:
        until(ready.exists)
        study = optuna.create_study()
        gpu_launcher.optimize(study, lambda trial: 1.0, timeout=0.5, pool=pool)
        assert states(study) == []
    finally:
        holder.kill()
        holder.wait()


def test_a_trial_that_takes_too_long_is_ended(pool: Where) -> None:
    def objective(trial: Any) -> float:
        if trial.number == 0:
            time.sleep(600)
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=2, trial_timeout="3s", catch=JobError, pool=pool)
    assert states(study) == ["fail", "complete"]
    assert "timeout" in study.trials[0].user_attrs["gpu_launcher:failure"]


def test_what_a_trial_knows_and_keeps(study: optuna.Study, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_int("a", 1, 1)
        assert trial.params == {"a": 1}
        assert list(trial.distributions) == ["a"]
        trial.set_user_attr("note", {"deep": [1, 2]})
        assert trial.user_attrs["note"] == {"deep": [1, 2]}
        assert gpu_launcher.current_trial() is trial
        assert trial.datetime_start is not None
        assert trial.study_name == trial.study.study_name
        assert trial.study.direction.name == "MINIMIZE"
        assert trial.study.user_attrs == {"of": "the study"}
        assert [one.number for one in trial.study.trials][-1] == trial.number
        assert trial.study.best_value == 0.5 if trial.number else True
        gpu_launcher.report(4.0, 7)
        return 0.5

    study.set_user_attr("of", "the study")
    gpu_launcher.optimize(study, objective, n_trials=2, n_jobs=1, pool=pool)
    assert states(study) == ["complete", "complete"]
    assert study.trials[0].user_attrs["note"] == {"deep": [1, 2]}
    assert study.trials[1].intermediate_values == {7: 4.0}


def test_errors_of_a_trials_methods_are_raised_where_it_is_asked(tmp_path: Path, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        raised = []
        for attempt in (
            lambda: trial.suggest_float("x", 1, 0),
            lambda: trial.suggest_categorical("x", ["a"]),
            lambda: trial.set_user_attr("lock", object()),
            lambda: trial.report("much", 1),
            lambda: trial.report(1.0, -1),
            lambda: trial.study.delete(),
        ):
            try:
                attempt()
            except Exception as error:
                raised.append(type(error).__name__)
        trial.set_user_attr("raised", raised)
        return 1.0

    study = optuna.create_study(storage=gpu_launcher.storage(f"sqlite:///{tmp_path}/study.db"))
    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert study.trials[0].user_attrs["raised"] == [
        *("ValueError", "ValueError", "TypeError", "TypeError", "ValueError", "AttributeError")
    ]


def test_an_inconsistent_distribution_fails_as_in_optuna(pool: Where) -> None:
    def objective(trial: Any) -> float:
        if trial.number:
            return float(trial.suggest_float("x", 0, 1))
        return float(trial.suggest_int("x", 0, 1))

    raised = []
    for run in (
        lambda study: study.optimize(objective, n_trials=2),
        lambda study: gpu_launcher.optimize(study, objective, n_trials=2, n_jobs=1, pool=pool),
    ):
        study = optuna.create_study()
        with pytest.raises(ValueError, match="distribution") as caught:
            run(study)
        raised.append(str(caught.value))
        assert states(study) == ["complete", "fail"]
    assert raised[0] == raised[1]


def test_a_value_is_reported_once_for_a_step_as_in_optuna(pool: Where) -> None:
    def objective(trial: Any) -> float:
        import warnings

        warnings.simplefilter("ignore")
        trial.report(1.0, 0)
        trial.report(2.0, 0)
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert study.trials[0].intermediate_values == {0: 1.0}


def test_a_pruned_trial_has_its_last_value(study: optuna.Study, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.report(3.0, 0)
        trial.report(2.0, 5)
        raise optuna.TrialPruned

    gpu_launcher.optimize(study, objective, n_trials=2, pool=pool)
    assert states(study) == ["pruned", "pruned"]
    assert [trial.value for trial in study.trials] == [2.0, 2.0]


def test_several_objectives(pool: Where) -> None:
    def objective(trial: Any) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        try:
            trial.report(1.0, 1)
        except NotImplementedError:
            return x, 1 - x
        raise AssertionError("report is not for these")

    study = optuna.create_study(directions=["minimize", "maximize"], sampler=random_sampler())
    gpu_launcher.optimize(study, objective, n_trials=4, pool=pool)
    assert states(study) == ["complete"] * 4
    assert study.best_trials
    gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=1, pool=pool)
    assert states(study)[-1] == "fail"


@pytest.mark.skipif(not OPTUNA_5, reason="from Optuna 5 on")
def test_constraints(pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.set_constraint("size", 0.5 - trial.suggest_float("x", 0, 1))
        return float(trial.params["x"])

    study = optuna.create_study(sampler=random_sampler())
    gpu_launcher.optimize(study, objective, n_trials=6, pool=pool)
    assert all(trial.constraints == {"size": 0.5 - trial.params["x"]} for trial in study.trials)
    assert study.best_value >= 0.5


def test_grids_end_when_all_has_been_tried(pool: Where) -> None:
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1, 2, 3], "y": [4, 5]}, seed=0))
    gpu_launcher.optimize(
        study, lambda trial: trial.suggest_int("x", 0, 9) + trial.suggest_int("y", 0, 9), n_jobs=1, pool=pool
    )
    assert sorted((trial.params["x"], trial.params["y"]) for trial in study.trials) == [
        *((1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5))
    ]


def test_a_liar_knows_what_others_were_given(pool: Where) -> None:
    """Trials that are asked for in the same moment: each is sampled knowing the parameters of those before it."""
    known: list[list[dict[str, Any]]] = []

    class Watching(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            running = study._get_trials(deepcopy=False, states=(TrialState.RUNNING,), use_cache=True)
            known.append([dict(other.params) for other in running if other.number != trial.number])
            return super().sample_independent(study, trial, name, distribution)

    def objective(trial: Any) -> float:
        trial.suggest_float("x", 0, 1)
        while sum(bool(other.params) for other in trial.study.trials) < 2:
            time.sleep(0.01)
        return 1.0

    study = optuna.create_study(sampler=Watching(seed=0))
    gpu_launcher.optimize(study, objective, n_trials=2, pool=pool)
    assert [len(others) for others in known] in ([0, 1], [1, 1])
    assert "x" in known[1][0]


def test_trials_ended_elsewhere_are_cancelled(tmp_path: Path, pool: Where) -> None:
    study = optuna.create_study(storage=gpu_launcher.storage(f"sqlite:///{tmp_path}/study.db"))

    def objective(trial: Any) -> float:
        if trial.number == 0:
            (tmp_path / "runs").touch()
            time.sleep(600)  # longer than a test may take
        return 1.0

    def from_a_dashboard() -> None:
        while not (tmp_path / "runs").exists():
            time.sleep(0.01)
        code = (
            "import optuna, gpu_launcher, sys\n"
            f"storage = gpu_launcher.storage('sqlite:///{tmp_path}/study.db')\n"
            "study = optuna.load_study(study_name=sys.argv[1], storage=storage)\n"
            "study.tell(0, state=optuna.trial.TrialState.FAIL)\n"
        )
        subprocess.run([sys.executable, "-c", code, study.study_name], check=True)

    meddler = threading.Thread(target=from_a_dashboard)
    told: list[int] = []

    def callback(_: optuna.Study, trial: FrozenTrial) -> None:
        told.append(trial.number)
        if not meddler.ident:
            meddler.start()

    gpu_launcher.optimize(study, objective, n_trials=3, callbacks=[callback], pool=pool)
    meddler.join()
    assert states(study) == ["fail", "complete", "complete"]
    assert sorted(told) == [1, 2]


def test_integrations_find_what_they_use(pool: Where) -> None:
    """The likes of optuna_integration's callbacks for XGBoost and Lightning, which are copied with a model."""

    def objective(trial: Any) -> float:
        import copy
        import pickle

        assert isinstance(trial, optuna.trial.BaseTrial)
        assert copy.deepcopy(trial) is trial
        assert pickle.loads(pickle.dumps(trial)) is trial
        assert trial.study.direction == optuna.study.StudyDirection.MINIMIZE
        child = os.fork()
        if child == 0:
            trial.report(1.0, 99)
            assert not trial.should_prune()
            try:
                trial.suggest_float("x", 0, 1)
            except RuntimeError:
                os._exit(17)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        trial.report(1.0, 0)
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert study.trials[0].intermediate_values == {0: 1.0}


def test_threads_of_an_objective_may_share_its_trial(pool: Where) -> None:
    def objective(trial: Any) -> float:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as threads:
            got = list(threads.map(lambda number: trial.suggest_int(f"p{number}", number, number), range(40)))
        assert got == list(range(40))
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert study.trials[0].params == {f"p{number}": number for number in range(40)}


def test_several_searches_of_one_program_on_one_study(tmp_path: Path, pool: Where) -> None:
    study_url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="shared", storage=gpu_launcher.storage(study_url))
    for number in range(3):
        study.enqueue_trial({"x": number})
    errors: list[BaseException] = []

    def objective(trial: Any) -> float:
        time.sleep(0.05)
        return float(trial.suggest_int("x", 0, 9))

    def search() -> None:
        try:
            gpu_launcher.optimize(study, objective, n_trials=2, n_jobs=1, pool=pool)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert states(study) == ["complete"] * 4
    assert [trial.params["x"] for trial in study.trials[:3]] == list(range(3))


def test_many_trials_that_prune_and_fail(pool: Where, tmp_path: Path) -> None:
    wide = Where("simulated:8", tmp_path / "pool")

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", 0, 1)
        for step in range(5):
            trial.report(x, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        if trial.number % 7 == 3:
            raise ValueError(trial.number)
        return float(x)

    study = optuna.create_study(sampler=random_sampler(), pruner=optuna.pruners.MedianPruner())
    told: list[int] = []
    gpu_launcher.optimize(
        study, objective, n_trials=60, catch=ValueError, callbacks=[lambda _, t: told.append(t.number)], pool=wide
    )
    assert sorted(told) == list(range(60))
    assert {"complete", "pruned", "fail"} == set(states(study))
    for trial in study.trials:
        assert set(trial.intermediate_values.values()) == {trial.params["x"]}


SPAWNED = """
import sys
import optuna
import gpu_launcher
from gpu_launcher.jobs.where import Where


class OwnError(Exception):
    def __init__(self, point):
        super().__init__(point)


class Point:
    def __init__(self, x):
        self.x = x


def objective(trial):
    trial.suggest_float("x", 0, 1)
    raise OwnError(Point(trial.number))


if __name__ == "__main__":
    for method in ("fork", "spawn"):
        study = optuna.create_study()
        pool = Where("simulated:1", sys.argv[1])
        gpu_launcher.optimize(study, objective, 2, pool=pool, catch=OwnError, start_method=method)
        try:
            gpu_launcher.optimize(study, objective, 1, pool=pool, start_method=method)
        except OwnError as error:
            print(method, type(error.args[0]) is Point, error.args[0].x, [t.state.name for t in study.trials])
"""


def test_classes_of_the_script_are_the_same_in_both_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SPAWNED)
    command = [sys.executable, "script.py", "pool"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.stdout.splitlines() == [
        "fork True 2 ['FAIL', 'FAIL', 'FAIL']",
        "spawn True 2 ['FAIL', 'FAIL', 'FAIL']",
    ], done.stderr


WRONG_OPTIONS = [
    ({"gpus": 3}, "gpus"),
    ({"gpus": -1}, "gpus"),
    ({"memory": "much"}, "memory"),
    ({"n_jobs": 0}, "n_jobs"),
    ({"n_trials": -1}, "n_trials"),
    ({"n_trials": 1.5}, "n_trials"),
    ({"timeout": "soon"}, "timeout"),
    ({"trial_timeout": 0}, "trial_timeout"),
    ({"trial_timeout": "soon"}, "trial_timeout"),
    ({"retry_stale": "often"}, "retry_stale"),
    ({"start_method": "forkserver"}, "start_method"),
]


@pytest.mark.parametrize(("options", "named"), WRONG_OPTIONS)
def test_wrong_options_are_named(options: dict[str, Any], named: str, pool: Where) -> None:
    study = optuna.create_study()
    with pytest.raises(OptionError, match=f"^{named}: "):
        gpu_launcher.optimize(study, lambda trial: 1.0, **{"n_trials": 1, "pool": pool, **options})
    assert states(study) == []


def test_a_study_can_be_optimized_after_wrong_options(pool: Where) -> None:
    study = optuna.create_study()
    for options, named in WRONG_OPTIONS:
        with pytest.raises(OptionError, match=f"^{named}: "):
            gpu_launcher.optimize(study, lambda trial: 1.0, **{"n_trials": 1, "pool": pool, **options})  # type: ignore[arg-type]
    gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=1, pool=pool)
    assert states(study) == ["complete"]


def test_what_is_no_objective(pool: Where) -> None:
    with pytest.raises(OptionError, match="objective"):
        gpu_launcher.optimize(optuna.create_study(), 3, n_trials=1, pool=pool)  # type: ignore[arg-type]


def test_an_objective_that_cannot_be_pickled_where_it_must_be(pool: Where) -> None:
    lock = threading.Lock()
    with pytest.raises(OptionError, match=r'^objective: .*found at lock, a variable that .*start_method="fork"$'):
        gpu_launcher.optimize(optuna.create_study(), lambda trial: lock, n_trials=1, pool=pool, start_method="spawn")


def test_it_is_not_called_within_itself(pool: Where) -> None:
    study = optuna.create_study()

    def callback(given: optuna.Study, trial: FrozenTrial) -> None:
        gpu_launcher.optimize(given, lambda trial: 1.0, n_trials=1, pool=pool)

    with pytest.raises(RuntimeError, match="Nested"):
        gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=1, callbacks=[callback], pool=pool)


def test_an_error_of_the_sampler_is_raised_and_leaves_no_trial_running(tmp_path: Path, pool: Where) -> None:
    class Broken(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            if trial.number == 1:
                raise LookupError("no idea")

    study = optuna.create_study(sampler=Broken())
    with pytest.raises(LookupError, match="no idea"):
        gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=5, n_jobs=1, pool=pool)
    assert states(study) == ["complete", "fail"]


def test_nothing_of_the_study_is_changed_for_good(pool: Where) -> None:
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    before = set(vars(study._storage))
    gpu_launcher.optimize(study, searching, n_trials=4, pool=pool, start_method="fork")
    assert set(vars(study._storage)) == before
    study.optimize(lambda trial: 1.0, n_trials=1)
    assert "gpu_launcher:owner" not in study.trials[-1].user_attrs


def test_the_public_pool_says_where(tmp_path: Path) -> None:
    study = optuna.create_study()
    with gpu_launcher.Pool("simulated:3", tmp_path / "pool") as pool:
        gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=2, gpus=3, pool=pool)
    devices = [trial.user_attrs["gpu_launcher:job"]["devices"] for trial in study.trials]
    assert devices == [[f"simulated GPU {index}" for index in range(3)]] * 2


def test_progress_is_shown(pool: Where, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_launcher.optimize(optuna.create_study(), lambda trial: 1.0, n_trials=3, show_progress_bar=True, pool=pool)
    assert "3/3" in capsys.readouterr().err


def test_json_of_the_job_says_where_it_ran(pool: Where) -> None:
    study = optuna.create_study()
    gpu_launcher.optimize(study, lambda trial: 1.0, n_trials=1, pool=pool)
    job = json.loads(json.dumps(study.trials[0].user_attrs["gpu_launcher:job"]))
    assert job["started"] <= job["ended"]
    assert job["devices"] == ["simulated GPU 0"]
