"""A program that uses many of Hydra's features. Its task records what it finds."""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import expensive
import hydra
import numpy as np
import recording  # noqa: F401
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)
composed_in: list[int] = []

if "SEED" in os.environ:
    np.random.seed(int(os.environ["SEED"]))


@dataclass
class Result:
    """A return value whose class is defined in `__main__`."""

    number: int


def watch_composition() -> None:
    load = ConfigLoaderImpl.load_sweep_config

    def load_sweep_config(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        composed_in.append(os.getpid())
        return load(self, *args, **kwargs)

    ConfigLoaderImpl.load_sweep_config = load_sweep_config


def talkative(text: str) -> str:
    print("printed while composing")
    return text


def append(file: str) -> None:
    with open(file, "a") as opened:
        opened.write(f"{os.getpid()}\n")


def make_task() -> Any:
    captured = "by a closure"
    OmegaConf.register_new_resolver("captured", lambda: f"{captured} of a resolver")
    OmegaConf.register_new_resolver("talkative", talkative)

    @hydra.main(version_base=None, config_path="conf", config_name="contract")
    def task(cfg: DictConfig) -> Result:
        config = HydraConfig.get()
        began = time.monotonic()
        if os.environ.get("RERUN") != "this is one" and cfg.get("rerun"):
            command = [sys.executable, *sys.argv, f"hydra.run.dir={config.run.dir}/again"]
            subprocess.run(command, env={**os.environ, "RERUN": "this is one"}, check=True)
        atexit.register(append, str(Path(config.runtime.output_dir, "at_exit")))
        print("printed to stdout")
        print("printed to stderr", file=sys.stderr)
        libc = ctypes.CDLL(None)
        libc.printf(b"printed by C\n")
        libc.fflush(None)
        subprocess.run(["echo", "printed by a child"], check=True)
        log.info("logged")
        print("unfinished", end="")
        found = {
            "pid": os.getpid(),
            "session": os.getsid(0),
            "stdin": str(Path("/proc/self/fd/0").readlink()),
            "name_of_main": sys.modules["__main__"].__file__,
            "imported_in": expensive.IMPORTED_IN,
            "composed_in": composed_in,
            "captured": captured,
            "cfg": OmegaConf.to_container(cfg, resolve=True),
            "num": config.job.num,
            "id": config.job.id,
            "job_name": config.job.name,
            "overrides": list(config.overrides.task),
            "output_dir": config.runtime.output_dir,
            "run_dir": config.run.dir,
            "mode": config.mode.name,
            "cwd": str(Path.cwd()),
            "original_cwd": get_original_cwd(),
            "argv": sys.argv,
            "environment": dict(os.environ),
            "random": np.random.rand(),
            "time": [began, time.monotonic()],
        }
        Path(config.runtime.output_dir, "found.json").write_text(json.dumps(found))
        return Result(config.job.num)

    return task


if __name__ == "__main__":
    watch_composition()
    temporary = tempfile.TemporaryDirectory()
    Path("temporary").write_text(temporary.name)
    atexit.register(append, str(Path("program_at_exit").absolute()))
    kept = Result(0)
    weakref.finalize(kept, append, str(Path("program_finalized").absolute()))
    make_task()()
    assert Path(temporary.name).is_dir()
    temporary.cleanup()
