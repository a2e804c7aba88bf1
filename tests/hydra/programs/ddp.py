"""A Lightning program with two processes on CPU. `fail=1` fails in rank 1; with `wait=true`, it waits for `go`."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import hydra
import lightning
import recording  # noqa: F401
import torch
from ddp_witness import testify, until
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, TensorDataset


class Model(lightning.LightningModule):
    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layer = torch.nn.Linear(4, 1)

    def on_train_start(self) -> None:
        config = HydraConfig.get()
        print(f"rank {self.global_rank} trains")
        testify(
            self.global_rank,
            Path(config.runtime.output_dir),
            config.job.num,
            lambda value: float(self.trainer.strategy.reduce(torch.tensor(value), reduce_op="sum")),
            output_dir=config.runtime.output_dir,
            original_cwd=get_original_cwd(),
            mode=config.mode.name,
            world_size=self.trainer.world_size,
            cfg=OmegaConf.to_container(self.cfg, resolve=True),
        )

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        if number == 1 and self.cfg.fail is not None:
            if self.cfg.fail == self.global_rank:
                raise ArithmeticError(f"rank {self.global_rank} fails")
            if self.cfg.fail == 0:  # the other rank does not notice, and ignores SIGTERM
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(300)
        if self.cfg.wait and self.cfg.fail is None:
            until(Path(get_original_cwd(), "go").exists, "nobody says go")
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@hydra.main(version_base=None, config_path="conf", config_name="ddp")
def main(cfg: DictConfig) -> int:
    directory = HydraConfig.get().runtime.output_dir
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=cfg.trainer.devices,
        max_epochs=1,
        log_every_n_steps=1,
        logger=CSVLogger(directory, name="csv", version=""),
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(cfg), DataLoader(TensorDataset(torch.rand(16, 4)), batch_size=4))
    return int(trainer.global_step)


if __name__ == "__main__":
    main()
