from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Witness(Callback):
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        note(Path("multirun_start.json"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        note(Path("multirun_end.json"))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        note(Path(config.hydra.runtime.output_dir, "job_start.json"))

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        note(Path(config.hydra.runtime.output_dir, "job_end.json"))


def note(file: Path) -> None:
    masks = {name: value for name, value in os.environ.items() if name.startswith("CUDA_")}
    file.write_text(json.dumps({"pid": os.getpid(), "environment": masks}))
