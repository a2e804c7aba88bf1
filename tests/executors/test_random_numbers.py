"""Each call, worker and trial draws random numbers of its own from what was not seeded, whatever refers to it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("numpy")

PROGRAM = """
import json, random, sys
import numpy as np
import optuna
import gpu_launcher

random.seed(5)
np.random.seed(5)
UNSEEDED = np.random.default_rng(), random.Random()
SEEDED = np.random.default_rng(5), random.Random(5)
BIG = 2**60

def draw(more=()):
    unseeded = [int(UNSEEDED[0].integers(BIG)), UNSEEDED[1].getrandbits(60), *(int(rng.integers(BIG)) for rng in more)]
    seeded = [int(SEEDED[0].integers(BIG)), SEEDED[1].getrandbits(60)]
    return unseeded, [*seeded, random.getrandbits(60), int(np.random.randint(BIG))]

class Model:
    def __init__(self):
        self.rng = np.random.default_rng()

    def draw(self, argument):
        unseeded, seeded = draw([self.rng])
        return unseeded, [*seeded, int(argument.integers(BIG))]

def in_one_process(record):
    return draw([inner])

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    inner = np.random.default_rng()
    model = Model()
    argument = np.random.default_rng()
    found = {}
    for method in ("fork", "spawn"):
        pool = gpu_launcher.Pool("simulated:3", sys.argv[1])
        options = {"pool": pool, "start_method": method}
        with gpu_launcher.PoolExecutor(**options) as executor:
            calls = [executor.submit(model.draw, argument) for _ in range(3)]
            found[f"calls {method}"] = [call.result() for call in calls]
        made = np.random.default_rng()
        with gpu_launcher.PoolExecutor(**options) as executor:
            calls = [executor.submit(lambda: draw([made, *made.spawn(2)])) for _ in range(2)]
            found[f"closures {method}"] = [call.result() for call in calls]
        found[f"records {method}"] = records = []
        for _ in range(2):
            records += gpu_launcher.parallel_map([1], function=in_one_process, progress=False, **options)
        study = optuna.create_study()

        def objective(trial):
            trial.set_user_attr("drawn", draw([inner]))
            return 0.0

        gpu_launcher.optimize(study, objective, n_trials=3, **options)
        found[f"trials {method}"] = [trial.user_attrs["drawn"] for trial in study.trials]
    print(json.dumps([found, draw()[1], int(argument.integers(BIG))]))
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By entry and start method: of each process, the numbers of unseeded and seeded generators."""
    directory = tmp_path_factory.mktemp("drawn")
    (directory / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(directory / "pool")]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "cannot tell" not in done.stderr
    return json.loads(done.stdout)


ENTRIES = pytest.mark.parametrize(
    "entry",
    [f"{entry} {method}" for entry in ("calls", "closures", "records", "trials") for method in ("fork", "spawn")],
)


@ENTRIES
def test_unseeded_generators_differ_between_processes(drawn: Any, entry: str) -> None:
    numbers = [number for unseeded, _ in drawn[0][entry] for number in unseeded]
    assert len(numbers) >= 6
    assert len(set(numbers)) == len(numbers)


@ENTRIES
def test_seeded_generators_and_arguments_are_as_in_the_program(drawn: Any, entry: str) -> None:
    found, seeded, argument = drawn
    expected = [*seeded, argument] if entry.startswith("calls") else seeded
    assert [numbers for _, numbers in found[entry]] == [expected] * len(found[entry])
