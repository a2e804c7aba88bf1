from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from . import again

log = logging.getLogger(__name__)


class KeepAndTell(Callback):
    """Saves a job's config and JobReturn and logs how it ended, as two callbacks of Hydra 1.3 do."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.directory = Path(config.hydra.runtime.output_dir)
        self.keep("config", config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self.keep("job_return", job_return)
        log.info("%s with %r", job_return.status.name, job_return._return_value)

    def keep(self, name: str, what: object) -> None:
        (self.directory / f"{name}-{again.rank()}.pickle").write_bytes(pickle.dumps(what))
