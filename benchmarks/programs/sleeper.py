"""A trial that holds a device and no CPU for a time that its number decides, and notes when it began and ended."""

import json
import os
import time

import hydra
from hydra.core.hydra_config import HydraConfig
from objectives import OBJECTIVES, seconds
from omegaconf import DictConfig

if os.environ.get("BENCH_STAMPS"):
    import stamps

    stamps.install(os.environ["BENCH_STAMPS"])


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> float:
    first = time.monotonic_ns()
    # On a new study the number of the job is that of the trial, in the official sweeper, too.
    number = int(HydraConfig.get().job.num)
    time.sleep(seconds(cfg.seed, number, median=cfg.median, sigma=cfg.sigma))
    value = OBJECTIVES[cfg.objective].evaluate(cfg)
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    record = {"job": number, "device": device, "value": value, "first": first, "last": time.monotonic_ns()}
    with open(os.environ["BENCH_WITNESS"], "a") as witness:
        witness.write(json.dumps(record) + "\n")
    return value


if __name__ == "__main__":
    main()
