"""A job of three ranks: itself, the program started again, and a fork. Each records the verdicts that it gets.

With `attempts=2`, the first attempt fails midway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import optuna
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

import gpu_launcher

STEPS = 12


@dataclass
class Config:
    level: float = 0.0
    attempts: int = 1


ConfigStore.instance().store(name="config", node=Config)


def train(rank: int, directory: Path, level: float, last: int = STEPS) -> bool:
    """Train one rank; return whether it was pruned."""
    attempt = os.environ["GPU_LAUNCHER_ATTEMPT"]
    trial = gpu_launcher.current_trial()
    verdicts = []
    for step in range(last):
        trial.report(level if step >= 3 else 0.0, step)
        verdicts.append(trial.should_prune())
        if verdicts[-1]:
            break
    witness = {"number": trial.number, "level": trial.params["level"], "verdicts": verdicts}
    (directory / f"attempt-{attempt}.rank-{rank}").write_text(json.dumps(witness))
    return bool(verdicts[-1])


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Config) -> float:
    directory = Path(HydraConfig.get().runtime.output_dir)
    fails = int(os.environ["GPU_LAUNCHER_ATTEMPT"]) < cfg.attempts
    last = 2 if fails else STEPS
    forked = os.fork()
    if forked == 0:
        os.environ["RANK"] = "2"
        train(2, directory, cfg.level, last)
        os._exit(0)
    command = [sys.executable, __file__, str(directory), str(cfg.level), str(last)]
    again = subprocess.Popen(command, env={**os.environ, "RANK": "1"})
    pruned = train(0, directory, cfg.level, last)
    assert (again.wait(), os.waitpid(forked, 0)[1]) == (0, 0)
    if pruned:
        raise optuna.TrialPruned("as all ranks are")
    if fails:
        raise RuntimeError("the first attempt fails")
    return cfg.level


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        train(1, Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
