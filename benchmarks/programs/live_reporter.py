"""A trial that reports at each step the seconds since BENCH_EPOCH: so those who show it know how late they are."""

import os
import time

import hydra
from omegaconf import DictConfig

import gpu_launcher


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> float:
    trial = gpu_launcher.current_trial()
    epoch = float(os.environ["BENCH_EPOCH"])
    due = time.monotonic()
    for step in range(cfg.steps):
        due += cfg.interval
        time.sleep(max(0.0, due - time.monotonic()))
        trial.report(time.time() - epoch, step)
    return float(cfg.x)


if __name__ == "__main__":
    main()
