"""A job that records the effects of its options. It fails until attempt number `good`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path=None)
def main(cfg: Any) -> None:
    attempt = int(os.environ["GPU_LAUNCHER_ATTEMPT"])
    seen = {"attempt": attempt, "environment": dict(os.environ), "pid": os.getpid(), "argv": sys.argv}
    child = subprocess.Popen(["sleep", "100"]) if "until" in cfg else None
    directory = Path(HydraConfig.get().runtime.output_dir)
    (directory / "seen.json").write_text(json.dumps(seen))
    while "until" in cfg and not Path(cfg.until).exists():
        time.sleep(0.05)
    if child is not None:
        child.kill()
        child.wait()
    if attempt < OmegaConf.select(cfg, "good", default=1):
        raise ValueError("not yet")


if __name__ == "__main__":
    main()
