"""A trial for every purpose: `does=...`. Each job records its parameters, start and end in `witness.jsonl`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import optuna
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import gpu_launcher


@dataclass
class Config:
    x: float = 0.0
    y: float = 0.0
    value: Any = None
    does: str = "returns"
    last: int = 0
    steps: int = 5
    seconds: float = 0.0


ConfigStore.instance().store(name="config", node=Config)
WITNESS = Path("witness.jsonl").absolute()


def write(**entry: Any) -> None:
    with WITNESS.open("ab", buffering=0) as file:
        file.write(json.dumps({"time": time.time(), **entry}).encode() + b"\n")


def more(cfg: DictConfig, trial: optuna.Trial) -> None:
    """A custom search space in which the range of `y` depends on `x`."""
    trial.suggest_float("y", trial.params["x"], trial.params["x"] + 1)


def slowly(cfg: DictConfig, trial: optuna.Trial) -> None:
    time.sleep(0.25)


def broken_for_trial_2(cfg: DictConfig, trial: optuna.Trial) -> None:
    if trial.number == 2:
        raise ZeroDivisionError


def hangs_in_trial_1(cfg: DictConfig, trial: optuna.Trial) -> None:
    if trial.number == 1:
        time.sleep(600)
    trial.suggest_float("y", 0.0, 1.0)


def clings_in_trial_1(cfg: DictConfig, trial: optuna.Trial) -> None:
    """A custom search space that only SIGKILL ends."""
    while trial.number == 1:
        with suppress(BaseException):
            time.sleep(600)


class OddFloat:
    def __float__(self) -> float:
        raise RuntimeError("has several elements")

    def __repr__(self) -> str:
        return "an OddFloat"


def as_long_as_trial_1_runs(cfg: DictConfig, trial: optuna.Trial) -> None:
    """A custom search space that, for trial 2, waits until trial 1 runs."""
    while trial.number == 2 and not Path(cfg.hydra.sweep.dir, "second").exists():
        time.sleep(0.01)


def wait_for(file: str) -> None:
    while not Path(HydraConfig.get().sweep.dir, file).exists():
        time.sleep(0.01)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: DictConfig) -> Any:
    number = OmegaConf.select(HydraConfig.get(), "job.num", throw_on_missing=False) or 0  # missing without -m
    value = OmegaConf.to_container(cfg, resolve=True)["value"]
    write(began=number, x=cfg.x, y=cfg.y, value=value, trial=gpu_launcher.current_trial().number)
    result = act(cfg, number)
    write(ended=number, result=repr(result))
    return result


def act(cfg: DictConfig, number: int) -> Any:
    result = (cfg.x - 0.5) ** 2 + cfg.y
    match cfg.does:
        case "returns":
            time.sleep(cfg.seconds)
            return result
        case "first_waits":  # for the last one, which would never start if trials ran in batches
            if number == 0:
                wait_for("last")
            elif number == cfg.last:
                Path(HydraConfig.get().sweep.dir, "last").touch()
            return result
        case "second_ends_sampling":
            if number == 1:
                Path(HydraConfig.get().sweep.dir, "second").touch()
            return result
        case "raises":
            raise ValueError(f"{number} was meant to fail")
        case "odd_ones_raise":
            if number % 2:
                raise ValueError(f"{number} was meant to fail")
            return result
        case "reports":
            for step in range(cfg.steps):
                gpu_launcher.report(number + 1 / (step + 1), step)  # earlier trials are better
                time.sleep(0.01)
            return float(number)
        case "reports_until_pruned":  # as "reports", but trials from number 3 on end in no other way
            for step in itertools.count() if number >= 3 else range(cfg.steps):
                gpu_launcher.report(number + 1 / (step + 1), step)
                time.sleep(0.01)
            return float(number)
        case "reports_later":  # as "reports", but all except the first trials wait
            if number >= 4:
                wait_for("go")
            for step in range(cfg.steps):
                gpu_launcher.report(number + 1 / (step + 1), step)
            return float(number)
        case "reports_and_ignores":
            trial = gpu_launcher.current_trial()
            for step in range(cfg.steps):
                trial.report(number, step)
            if number:
                time.sleep(600)
            return float(number)
        case "hangs":
            time.sleep(600)
        case "clings":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            write(clings=number)
            time.sleep(600)
        case "says_much":
            for step in range(cfg.steps):
                gpu_launcher.current_trial().report(result, step)
            gpu_launcher.current_trial().set_user_attr("said", "everything")
            return result
        case "crashes_at_first":
            gpu_launcher.current_trial().report(result, 0)
            if os.environ["GPU_LAUNCHER_ATTEMPT"] == "1":
                os.kill(os.getpid(), 9)
            return result
        case "annotates_oddly":
            gpu_launcher.current_trial().set_user_attr("odd", 1j)
        case "reports_oddly":
            gpu_launcher.report(1.0, 2**70)
        case "huge":
            return 10**400
        case "odd_float":
            return OddFloat()
        case "annotates":
            gpu_launcher.current_trial().set_user_attr("pid", os.getpid())
            return result
        case "two":
            return result, -result
        case "three":
            return result, result, result
        case "nan" | "inf":
            return float(cfg.does)
        case "none":
            return None
        case "text":
            return "good"
        case "kills_itself":
            os.kill(os.getpid(), 9)
    raise AssertionError(cfg.does)


if __name__ == "__main__":
    if "USE_TORCH" in os.environ:
        import torch

        torch.ones(500, 500) @ torch.ones(500, 500)
        torch.rand(4_000_000).sum()
    main()
