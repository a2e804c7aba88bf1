"""What goes wrong in `gpu_launcher.optimize`, and what it does then that `study.optimize` does."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from gpu_launcher.jobs.where import Where
from gpu_launcher.processes import exceptions, pickling
from gpu_launcher.processes.exceptions import Carried, RemoteTraceback

# Objectives are defined inside the tests: where the test runner has threads, jobs are spawned, and cannot import this.


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.fixture
def pool(tmp_path: Path) -> Where:
    return Where("simulated:2", tmp_path / "pool")


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
    carried = Carried.of(error, pickling.NOTHING)
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


def test_an_exception_whose_class_cannot_be_sent_is_not_had() -> None:
    class OddError(Exception):
        lock = threading.Lock()

    carried = Carried.of(OddError("odd"), pickling.NOTHING)
    with pytest.raises(LookupError, match="cannot be pickled: TypeError"):
        carried.load()
    with pytest.raises(TypeError):
        exceptions.dump(OddError("odd"), pickling.NOTHING)


CAUGHT = """
import sys
import threading
import optuna
import gpu_launcher
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
        if trial.number == 1:
            raise kind("loss", 3)
        return x

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, 4, pool=pool, catch=kind, start_method=sys.argv[1])
    print(*[trial.state.name for trial in study.trials])
    study = optuna.create_study()
    try:
        gpu_launcher.optimize(study, objective, 9, pool=pool, start_method=sys.argv[1])
    except Exception as error:
        print(type(error).__name__, "loss=3" in str(error), "in objective" in str(error.__cause__))
        assert isinstance(error, (Stop, gpu_launcher.JobError)), type(error)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_caught_is_what_is_of_the_class_whatever_pickle_makes_of_it(method: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(CAUGHT)
    command = [sys.executable, "script.py", method]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    local = "JobError" if method == "fork" else "Local"
    goes_on = "COMPLETE FAIL COMPLETE COMPLETE"
    expected = [f"{name} True True" for name in ("Stop", "Locked", local, local)]
    assert done.stdout.splitlines() == [line for end in expected for line in (goes_on, end)], done.stderr
