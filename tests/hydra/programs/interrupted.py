"""Jobs that are still running when the user interrupts the sweep.

`manners=polite` cleans up, `manners=saving` does so on SIGTERM and SIGHUP, `manners=stubborn` ignores Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> None:
    directory = Path(HydraConfig.get().runtime.output_dir)
    if cfg.manners == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif cfg.manners == "saving":

        def save(signum: int, frame: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(0.5)
            (directory / "cleaned_up").touch()
            sys.exit("saved")

        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, save)
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (directory / "pids.new").write_text(f"{os.getpid()} {child.pid}")
    try:
        (directory / "pids.new").rename(directory / "pids")
        time.sleep(300)
    except KeyboardInterrupt:
        time.sleep(0.2)
        (directory / "cleaned_up").touch()
        raise


if __name__ == "__main__":
    main()
