"""Jobs that leave files in their output directories. They return their number, or fail if told to."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import recording  # noqa: F401
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gpu_launcher.nodes import node_group


@dataclass
class Config:
    n: int = 0
    fails: list[int] = field(default_factory=list)
    huge: list[int] = field(default_factory=list)
    links: bool = False
    waits: bool = False


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: DictConfig) -> Any:
    print(f"this is job {cfg.n}, attempt {os.environ['GPU_LAUNCHER_ATTEMPT']}")
    outputs = Path(HydraConfig.get().runtime.output_dir)
    with Path(f"ran-{cfg.n}").open("a") as ran:
        ran.write(Path(os.environ["GPU_LAUNCHER_POOL_DIR"]).name + "\n")
    (outputs / "checkpoints").mkdir(exist_ok=True)
    (outputs / "checkpoints" / "model").write_bytes(bytes([cfg.n]) * 3_000_000)
    (outputs / "checkpoints" / "last").unlink(missing_ok=True)
    (outputs / "checkpoints" / "last").symlink_to("model")
    if cfg.links:
        (outputs / "data").symlink_to("/etc")
    if cfg.n in cfg.huge:
        (outputs / "huge").touch()
        os.truncate(outputs / "huge", 2**50)
    while cfg.waits:
        time.sleep(0.01)
    if cfg.n in cfg.fails and not Path("healed").exists():
        raise ValueError(f"{cfg.n} fails")
    return [cfg.n, str(outputs)]


if __name__ == "__main__":
    node_group.FIRST_NODE_SECONDS = node_group.LATECOMER_SECONDS = 300.0
    main()
