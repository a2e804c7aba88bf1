"""Arrays of a GPU that calls, records and trials hand over are on the CPU in the program, which needs no GPU for that.

No GPU is needed here, either: what is returned is pickled as a CuPy array is, and there is no CuPy.
"""

from __future__ import annotations

from typing import Any

import optuna
import pytest

import gpu_launcher
from gpu_launcher import PoolExecutor, parallel_map
from gpu_launcher.jobs.where import Where


def gpu_array(numbers: list[int]) -> Any:
    import sys
    from types import ModuleType

    core = sys.modules["cupy._core.core"] = ModuleType("cupy._core.core")
    sys.modules["cupy"] = sys.modules["cupy._core"] = ModuleType("cupy")
    core.array = array = lambda numbers: numbers  # type: ignore[attr-defined]
    array.__module__, array.__qualname__ = "cupy._core.core", "array"

    class GpuArray:
        def __reduce__(self) -> Any:
            return array, (numbers,)

    return GpuArray()


def returned(number: int) -> Any:
    return gpu_array([number])


def returned_with_much_else(number: int) -> Any:
    return gpu_array([number]), b"x" * 2**21


def raised(number: int) -> Any:
    raise ValueError("of a GPU", gpu_array([number]))


def test_calls_return_and_raise_them(pool: Where) -> None:
    with PoolExecutor(pool=pool, start_method="fork") as executor:
        assert executor.submit(returned, 3).result() == [3]
        assert executor.submit(returned_with_much_else, 3).result() == ([3], b"x" * 2**21)
        error = executor.submit(raised, 3).exception()
        assert (type(error), error.args) == (ValueError, ("of a GPU", [3]))


def test_records_return_and_raise_them(pool: Where) -> None:
    results = list(parallel_map([1, 2], function=returned, pool=pool, start_method="fork"))
    assert results == [[1], [2]]
    with pytest.raises(ValueError, match="of a GPU") as caught:
        list(parallel_map([3], function=raised, pool=pool, start_method="fork"))
    assert caught.value.args == ("of a GPU", [3])


def test_trials_set_attributes_and_raise_them(pool: Where) -> None:
    study = optuna.create_study()

    def objective(trial: Any) -> float:
        if trial.number == 0:
            trial.set_user_attr("numbers", gpu_array([1, 2]))
            return 1.0
        return float(raised(3))

    with pytest.raises(ValueError, match="of a GPU") as caught:
        gpu_launcher.optimize(study, objective, n_trials=2, n_jobs=1, pool=pool, start_method="fork")
    assert study.trials[0].user_attrs["numbers"] == [1, 2]
    assert caught.value.args == ("of a GPU", [3])
