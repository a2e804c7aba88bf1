"""What a sweep says in the end."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, optuna
from importlib.util import find_spec
from hydra_plugins.optuna_async_sweeper._report import _importances
optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
def objective(trial):
    a, b = trial.suggest_float("a", 0, 1), trial.suggest_float("b", 0, 1)
    return (1.0 if a > 0.9 else 0.0), b
study.optimize(objective, n_trials=50)
print("\\n".join(_importances(study)))
assert "sklearn" not in sys.modules
if find_spec("sklearn"):  # the program can still have the others
    fanova = optuna.importance.FanovaImportanceEvaluator(n_trees=2, seed=0)
    optuna.importance.get_param_importances(study, evaluator=fanova, target=lambda trial: trial.values[0])
"""


def test_importances_do_not_import_scikit_learn() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    head, a, b = done.stdout.splitlines()
    assert head == "parameter importances, by objective:"
    assert a.split()[0] == "a"
    assert float(a.split()[1]) > 0.8 > float(b.split()[1]), "maximized"
    assert float(b.split()[2]) > 0.8 > float(a.split()[2]), "minimized"
    assert done.stderr == ""
    assert done.returncode == 0
