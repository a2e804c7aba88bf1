"""Jobs that record where they run, each in `witness-<n>`. They return their number, or fail if told to."""

import fcntl
import functools
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import recording  # noqa: F401
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import gpu_launcher
from gpu_launcher.nodes import node_group
from gpu_launcher.nodes.agent_messages import Timing

if os.environ.get("AT_IMPORT") == "raise":
    raise OSError("this machine has no data")
if os.environ.get("AT_IMPORT") == "wait":
    Path("imports").touch()
    time.sleep(600)
if os.environ.get("AT_IMPORT") == "exit":
    raise SystemExit("no GPU here")
if os.environ.get("AT_IMPORT") == "terminate" and not Path("terminated").exists():
    Path("terminated").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
if os.environ.get("AT_IMPORT") == "print":
    print("printed at import")
    os.write(1, b"written at import\n")


@dataclass
class Config:
    n: int = 0
    meet: int = 0
    fails: list[int] = field(default_factory=list)
    crashes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    x: float = 0.0
    reports: bool = False
    squares: bool = False
    holds: bool = False


ConfigStore.instance().store(name="config", node=Config)


class OwnError(Exception):
    """An exception of the program's own."""


def meet(numbers: int) -> None:
    """Wait until this many jobs run at the same time."""
    while len(list(Path.cwd().glob("witness-*"))) < numbers:
        time.sleep(0.01)


def meet_completed(jobs: int) -> None:
    """Wait until the head knows that this many jobs have completed."""
    while Path("sweep/.gpu_launcher/manifest.jsonl").read_text().count('"completed"') < jobs:
        time.sleep(0.01)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: DictConfig) -> Any:
    number, attempt = HydraConfig.get().job.num, os.environ["GPU_LAUNCHER_ATTEMPT"]
    print(f"this is job {cfg.n}, attempt {attempt}")
    if attempt == "1" and cfg.n in cfg.crashes:
        os._exit(3)
    if "BROKEN" in os.environ:
        meet_completed(int(os.environ["BROKEN"]))
        os._exit(3)
    alone = False
    try:
        os.close(os.open("busy", os.O_CREAT | os.O_EXCL))
        alone = True
    except FileExistsError:
        Path("overlap").touch()
    lock = os.open(f"lock-{number}", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path("twice").touch()
    with Path(f"runs-{number}").open("a") as runs:
        runs.write("x")
    where = Path(os.environ["GPU_LAUNCHER_POOL_DIR"]).name
    Path(f"temporary-{number}").write_text(where)
    Path(f"temporary-{number}").rename(f"witness-{number}")
    if number < cfg.meet:
        meet(cfg.meet)
    time.sleep(cfg.seconds)
    while cfg.holds and not Path("release").exists():
        time.sleep(0.01)
    if alone:
        Path("busy").unlink()
    if cfg.reports:
        step = 0
        while step < 3 or number >= 3:  # those that the test wants to be pruned end in no other way
            gpu_launcher.report(number + 1 / (step + 1), step)
            time.sleep(0.01)
            step += 1
        return float(number)
    if cfg.squares:
        return cfg.x**2
    if cfg.n in cfg.fails and not Path("healed").exists():
        raise OwnError(f"{cfg.n} fails")
    return [cfg.n, {"ten times": 10 * cfg.n}]


if __name__ == "__main__":
    # On a busy machine, nodes start so late that sweeps would begin without them.
    node_group.FIRST_NODE_SECONDS = 300.0
    node_group.LATECOMER_SECONDS = float(os.environ.get("LATECOMER_SECONDS", "300"))
    if "IMPATIENT" in os.environ:
        timing = Timing(beat=0.5, quiet=3.0, silence=5.0, lost=12.0)
        if os.environ["IMPATIENT"] == "no":
            timing = Timing(silence=1e6, lost=1e6)
        node_group.NodeGroup = functools.partial(node_group.NodeGroup, timing=timing)
    main()
