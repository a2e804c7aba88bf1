"""What goes wrong in `gpu_launcher.optimize`, and what it does then that `study.optimize` does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

import gpu_launcher
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.where import Where
from gpu_launcher.processes import exceptions, pickling
from gpu_launcher.processes.exceptions import PortableException, RemoteTraceback

# Objectives are defined inside the tests: where the test runner has threads, jobs are spawned, and cannot import this.


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name.lower() for trial in study.trials]


# Exceptions that do not come through pickle


class TwoArgumentsError(Exception):
    """Hands on other arguments than it takes."""

    def __init__(self, metric: str, value: float) -> None:
        super().__init__(f"{metric}={value}")
        self.metric = metric


class HasALockError(Exception):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()
        self.metric = "loss"


class OwnNewError(LookupError):
    def __new__(cls, *, metric: str) -> OwnNewError:
        return super().__new__(cls, metric)

    def __init__(self, *, metric: str) -> None:
        self.metric = metric


class FileError(FileNotFoundError):
    def __init__(self, *, path: str) -> None:
        super().__init__(2, "No such data", path)


class GroupError(ValueError):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "metric"),
    [
        (TwoArgumentsError("loss", 3), "loss"),
        (HasALockError("loss", 3), "loss"),
        (HasALockError(threading.Lock()), "loss"),
        (OwnNewError(metric="loss"), "loss"),
        (FileError(path="/data"), None),
        (GroupError("x"), None),
        (ValueError(threading.Lock()), None),
        (ImportError("x", name="of", path="there"), None),
    ],
)
def test_an_exception_is_rebuilt_where_it_cannot_be_pickled(error: BaseException, metric: str | None) -> None:
    carried = PortableException.of(error, pickling.NOTHING)
    again = carried.load()
    assert type(again) is type(error)
    if not any(isinstance(arg, type(threading.Lock())) for arg in error.args):
        assert again.args == error.args
        assert str(again) == str(error)
    if metric is not None:
        assert getattr(again, "metric", None) == metric
    if isinstance(error, FileError):
        assert (again.errno, again.filename) == (2, "/data")  # type: ignore[attr-defined]
    if isinstance(error, ImportError):
        assert (again.name, again.path) == ("of", "there")  # type: ignore[attr-defined]
    assert isinstance(again.__cause__, RemoteTraceback)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no exception groups before")
def test_a_group_of_exceptions_is_rebuilt_with_them() -> None:
    group = ExceptionGroup("both", [TwoArgumentsError("loss", 3), HasALockError("x"), ValueError(1)])  # noqa: F821
    again = PortableException.of(group, pickling.NOTHING).load()
    assert type(again) is type(group)
    assert str(again) == str(group)
    assert [(type(one), one.args) for one in again.exceptions] == [  # type: ignore[attr-defined]
        (TwoArgumentsError, ("loss=3",)),
        (HasALockError, ("x",)),
        (ValueError, (1,)),
    ]


def test_an_exception_whose_class_cannot_be_sent_is_not_had() -> None:
    class OddError(Exception):
        lock = threading.Lock()

    carried = PortableException.of(OddError("odd"), pickling.NOTHING)
    with pytest.raises(LookupError, match=r"cannot be pickled \(TypeError: .*Remedy"):
        carried.load()
    with pytest.raises(TypeError):
        exceptions.dump(OddError("odd"), pickling.NOTHING)


CAUGHT = """
import sys
import threading
import time
import optuna
import gpu_launcher
import gpu_launcher
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.where import Where

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Stop(Exception):
    def __init__(self, metric, value):
        super().__init__(f"{metric}={value}")


class Locked(Stop):
    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()


def local():
    class Local(Locked):
        bad = threading.Lock() if sys.argv[1] == "fork" else None
    return Local


Local = local()
if __name__ != "__main__":
    raise SystemExit("the script is not to be run again")
pool = Where("simulated:2", "pool")
Inside = local()
for kind in (Stop, Locked, Local, Inside):

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            raise kind("loss", 3)
        return x

    line = objective.__code__.co_firstlineno + 3
    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, 2, n_jobs=1, pool=pool, catch=kind, start_method=sys.argv[1])
    print(*[trial.state.name for trial in study.trials])
    study = optuna.create_study()
    try:
        gpu_launcher.optimize(study, objective, 9, n_jobs=1, pool=pool, start_method=sys.argv[1])
    except Exception as error:
        where = f'File "{__file__}", line {line}, in objective\\n    raise kind("loss", 3)\\n'
        print(type(error).__name__, "loss=3" in str(error), where in str(error.__cause__))
        assert isinstance(error, (Stop, gpu_launcher.JobError)), type(error)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_caught_is_what_is_of_the_class_whatever_pickle_makes_of_it(method: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CAUGHT)
    command = [sys.executable, "script.py", method]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    local = "JobError" if method == "fork" else "Local"
    goes_on = "FAIL COMPLETE"
    expected = [f"{name} True True" for name in ("Stop", "Locked", local, local)]
    assert done.stdout.splitlines() == [line for end in expected for line in (goes_on, end)], done.stderr


# Errors of what the objective asks


class BadPruner(optuna.pruners.BasePruner):
    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if trial.number == 1:
            raise TwoArgumentsError("bad pruner", 1)
        return False


@pytest.mark.parametrize("catch", [(), TwoArgumentsError])
@pytest.mark.parametrize("ours", [False, True])
def test_what_the_pruner_raises_is_raised_where_it_was_asked(catch: Any, ours: bool, pool: Where) -> None:
    def objective(trial: Any) -> float:
        trial.report(1.0, 0)
        pruned = trial.should_prune()
        while trial.number == 0 and "FAIL" not in [other.state.name for other in trial.study.trials]:
            time.sleep(0.01)
        return float(pruned)

    study = optuna.create_study(pruner=BadPruner())
    raised = None
    try:
        if ours:
            gpu_launcher.optimize(study, objective, n_trials=4, n_jobs=2, catch=catch, pool=pool)
        else:
            study.optimize(objective, n_trials=4, n_jobs=2, catch=catch)
    except Exception as error:
        raised = error
    if catch:
        assert raised is None
        assert states(study) == ["complete", "fail", "complete", "complete"]
    else:
        assert str(raised) == "bad pruner=1"
        assert states(study) == ["complete", "fail"]
    if ours:
        assert "bad pruner" in study.trials[1].user_attrs["gpu_launcher:failure"]


def test_reports_that_cannot_be_stored_end_the_search_and_no_trial_that_runs(pool: Where, tmp_path: Path) -> None:
    failed = tmp_path / "failed"

    class FullStorage(optuna.storages.InMemoryStorage):
        def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
            if step == 7:
                raise OSError(28, "No space left")
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)

    def objective(trial: Any) -> float:
        if trial.number == 1:
            while not trial.study.trials[0].intermediate_values:
                time.sleep(0.01)
            trial.report(1.0, 7)
            trial.should_prune()  # by when it has been heard
            failed.touch()
            return 3.0
        trial.report(1.0, 0)
        while not failed.exists():
            time.sleep(0.01)
        trial.report(2.0, 1)
        return 3.0

    study = optuna.create_study(storage=FullStorage())
    with pytest.raises(OSError, match="No space"):
        gpu_launcher.optimize(study, objective, n_trials=6, pool=pool)
    assert states(study) == ["complete"] * 2
    assert study.trials[0].intermediate_values == {0: 1.0, 1: 2.0}


def test_attributes_of_ours_and_names_that_databases_do_not_keep_are_refused(pool: Where) -> None:
    def objective(trial: Any) -> float:
        for name in ("gpu_launcher:owner", "x" * 513):
            with pytest.raises(ValueError, match="name"):
                trial.set_user_attr(name, "me")
        trial.set_user_attr("x" * 512, "me")
        return 1.0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool)
    assert states(study) == ["complete"]
    assert study.trials[0].user_attrs["gpu_launcher:owner"] != "me"


# The study that an objective has from the program


@pytest.mark.parametrize("method", ["fork", "spawn", None])
@pytest.mark.parametrize("storage", ["memory", "sqlite"])
def test_the_objectives_own_study_is_the_programs(method: Any, storage: str, tmp_path: Path, pool: Where) -> None:
    url = None if storage == "memory" else f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(
        study_name="own", storage=gpu_launcher.storage(url), sampler=optuna.samplers.RandomSampler(seed=1)
    )

    def objective(trial: Any) -> float:
        x = trial.suggest_float("x", 0, 1)
        study.set_user_attr(f"seen {trial.number}", [len(study.trials), study.user_attrs.get("seen 0")])
        trial.set_user_attr("best", study.best_value if trial.number else None)
        trial.set_user_attr("named", [study.study_name, study.direction.name, isinstance(study, optuna.Study)])
        trial.set_user_attr("states", [t.state.name for t in study.get_trials(deepcopy=False)])
        if trial.number == 1:
            study.enqueue_trial({"x": 0.25})
        if trial.number == 3:
            study.stop()
        return float(x)

    if method is None:  # what Optuna does
        study.optimize(objective, n_trials=9)
    else:
        gpu_launcher.optimize(study, objective, n_trials=9, n_jobs=1, pool=pool, start_method=method)
    assert states(study) == ["complete"] * 4
    assert study.trials[2].params == {"x": 0.25}
    seen = {"seen 0": [1, None]} | {f"seen {number}": [number + 1, [1, None]] for number in (1, 2, 3)}
    assert study.user_attrs == seen
    assert study.trials[3].user_attrs["best"] == min(trial.value or 0 for trial in study.trials[:3])
    assert study.trials[3].user_attrs["named"] == ["own", "MINIMIZE", True]
    assert study.trials[3].user_attrs["states"] == ["COMPLETE"] * 3 + ["RUNNING"]
    assert type(study) is optuna.Study


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_the_objectives_own_study_cannot_do_it_says(method: Any, pool: Where) -> None:
    study = optuna.create_study()
    stop = study.stop

    def objective(trial: Any) -> float:
        for wrong in (
            lambda: study.tell(0, 1.0),
            lambda: study.ask(),
            lambda: study.optimize(lambda trial: 1.0, n_trials=1),
            lambda: study._storage,
        ):
            with pytest.raises(AttributeError, match="callback, which runs in the program"):
                wrong()
        child = os.fork()
        if child == 0:
            try:
                study.set_user_attr("lost", 1)
            except RuntimeError:
                os._exit(17)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        assert copy.copy(study).trials[0].number == 0
        with pytest.raises(AttributeError, match="callback, which runs in the program"):
            stop()  # which had been looked up in the program
        return 1.0

    gpu_launcher.optimize(study, objective, n_trials=2, n_jobs=1, pool=pool, start_method=method)
    assert states(study) == ["complete"] * 2
    study.optimize(lambda trial: 1.0, n_trials=1)


def test_a_study_that_cannot_be_pickled_needs_not_be(pool: Where) -> None:
    class LockedSampler(optuna.samplers.RandomSampler):
        lock = threading.Lock()

    study = optuna.create_study(sampler=LockedSampler())

    def objective(trial: Any) -> float:
        study.set_user_attr("x", 1)
        return 1.0

    gpu_launcher.optimize(study, objective, n_trials=1, pool=pool, start_method="spawn")
    assert study.user_attrs == {"x": 1}


def test_what_a_trial_here_has_not_is_said(pool: Where) -> None:
    def objective(trial: Any) -> float:
        assert not hasattr(trial, "_trial_id")
        trial.storage.set_trial_system_attr(0, "x", 1)
        return 1.0

    with pytest.raises(AttributeError, match=r"'storage'.* only the program that called optimize"):
        gpu_launcher.optimize(optuna.create_study(), objective, n_trials=1, pool=pool)


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pool": "simulated:2"}, r"^pool: .* Pool\('simulated:2'\)"),
        ({"pool": 3}, "^pool: 3 is not a pool"),
        ({"callbacks": lambda study, trial: None}, r"^callbacks: .* give \[callback\]"),
        ({"callbacks": [3]}, "^callbacks: 3 cannot be called"),
        ({"catch": "ValueError"}, "^catch: 'V' is not a class of exceptions"),
        ({"catch": ValueError()}, r"^catch: ValueError\(\) is not a class"),
        ({"catch": (ValueError, int)}, "^catch: <class 'int'> is not a class of exceptions"),
        ({"trial_timeout": "soon"}, "^trial_timeout: 'soon'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_done(
    options: dict[str, Any], said: str, pool: Where, tmp_path: Path
) -> None:
    study = optuna.create_study()
    with pytest.raises(OptionError, match=said):
        gpu_launcher.optimize(study, lambda trial: 1.0, **{"n_trials": 1, "pool": pool, **options})
    assert states(study) == []
    assert not (tmp_path / "pool").exists()


def test_a_study_and_an_objective_in_the_wrong_order(pool: Where) -> None:
    with pytest.raises(OptionError, match=r"^study: .* give the study, and then the objective"):
        gpu_launcher.optimize(lambda trial: 1.0, optuna.create_study(), 1, pool=pool)  # type: ignore[arg-type]


def test_a_closed_pool_is_refused(tmp_path: Path) -> None:
    with gpu_launcher.Pool("simulated:1", tmp_path / "pool") as pool:
        pass
    with pytest.raises(OptionError, match=r"^pool: .* is closed"):
        gpu_launcher.optimize(optuna.create_study(), lambda trial: 1.0, 1, pool=pool)
    with pytest.raises(OptionError, match=r"^pool: .* is closed"):
        gpu_launcher.PoolExecutor(pool=pool)
    with pytest.raises(OptionError, match=r"^pool: .* is closed"):
        gpu_launcher.parallel_map([1], function=abs, pool=pool)


# What is no Exception

LEAVING = """
import os
import sys
import optuna
import gpu_launcher
from gpu_launcher.jobs.where import Where

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Own(BaseException):
    pass


def objective(trial):
    if trial.number == 0:
        raise GeneratorExit("done")
    if trial.number == 1:
        sys.exit("no data")
    if trial.number == 2:
        child = os.fork()
        if child == 0:
            sys.exit(17)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    raise Own


def callback(study, trial):
    print(trial.state.name, trial.user_attrs["gpu_launcher:failure"])


options = {"n_jobs": 1, "pool": Where("simulated:1", "pool"), "callbacks": [callback]}
gpu_launcher.optimize(optuna.create_study(), objective, 4, catch=gpu_launcher.JobError, **options)
"""


def test_an_objective_that_leaves_fails_its_trial_and_is_printed_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LEAVING)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.stdout.splitlines() == [
        "FAIL raised GeneratorExit: done",
        "FAIL raised SystemExit: no data",
        "FAIL raised SystemExit: 17",
        "FAIL raised Own",
    ], done.stderr
    assert "gpu_launcher" not in done.stderr
    first, middle, last = done.stderr.split("Traceback (most recent call last):\n")
    assert not first
    assert "in objective" in middle
    assert middle.endswith("GeneratorExit: done\nno data\n")
    assert last.endswith("Own\n")
