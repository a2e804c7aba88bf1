"""A job that starts its ranks with torchrun. `fail=1` fails in rank 1; with `wait=true`, it waits for `go`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
from ddp_witness import RANKS, testify, until
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path="conf", config_name="ddp")
def main(cfg: DictConfig) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    go = str(Path(get_original_cwd(), "go")) if cfg.wait else ""
    config = HydraConfig.get()
    rank = [str(Path(__file__)), config.runtime.output_dir, str(config.job.num), str(cfg.fail), go]
    subprocess.run([*torchrun, *rank], check=True)


def run_rank(directory: str, number: str, fail: str, go: str) -> None:
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    rank = distributed.get_rank()

    def sum_over_ranks(value: float) -> float:
        tensor = torch.tensor(value)
        distributed.all_reduce(tensor)
        return float(tensor)

    print(f"rank {rank} trains", flush=True)
    testify(rank, Path(directory), int(number), sum_over_ranks)
    if fail == str(rank):
        raise ArithmeticError(f"rank {rank} fails")
    if go:
        until(Path(go).exists, "nobody says go")
    sum_over_ranks(1.0)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run_rank(*sys.argv[1:])
    else:
        import recording  # noqa: F401

        main()
