"""A job of about a second that holds a device and no CPU, and notes when its first and its last line ran."""

import importlib
import json
import os
import time

import hydra
from omegaconf import DictConfig

heavy = importlib.import_module(os.environ.get("BENCH_IMPORT", "torch"))

if os.environ.get("BENCH_STAMPS"):
    import stamps

    stamps.install(os.environ["BENCH_STAMPS"])


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> None:
    first = time.monotonic_ns()
    # Spread evenly, and the same in every run: devices become free one by one, or with spread=0 all at once.
    time.sleep(cfg.seconds * (1 + cfg.spread * (2 * (cfg.job * 0.618 % 1) - 1)))
    record = {"job": cfg.job, "device": os.environ["CUDA_VISIBLE_DEVICES"], "first": first}
    with open(os.environ["BENCH_WITNESS"], "a") as witness:
        witness.write(json.dumps({**record, "last": time.monotonic_ns()}) + "\n")


if __name__ == "__main__":
    main()
