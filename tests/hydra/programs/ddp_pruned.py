"""A Lightning program on CPU whose `val/loss` is `level`. Each rank records how its training ended."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import hydra
import lightning
import optuna
import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, TensorDataset

import gpu_launcher


class Model(lightning.LightningModule):
    def __init__(self, level: float, seconds: float) -> None:
        super().__init__()
        self.level = level
        self.seconds = seconds
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, number: int) -> None:
        # The sweep has time to judge each epoch.
        time.sleep(self.seconds)
        self.log("val/loss", self.level, rank_zero_only=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@hydra.main(version_base=None, config_path="conf", config_name="ddp_pruned")
def main(cfg: DictConfig) -> float:
    directory = Path(HydraConfig.get().runtime.output_dir)
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if cfg.trainer.devices > 1 else "auto",
        devices=cfg.trainer.devices,
        max_epochs=cfg.epochs,
        callbacks=[instantiate(callback) for callback in cfg.callbacks.values()],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=str(directory),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.rand(8, 4)), batch_size=4)
    ended = "complete"
    try:
        trainer.fit(Model(cfg.level, cfg.seconds), data, data)
    except optuna.TrialPruned as error:
        ended = str(error)
        if trainer.is_global_zero and cfg.linger:
            while any(map(lives, psutil.Process().children())):
                time.sleep(0.05)
            time.sleep(6)  # Lightning checks every 5 s how the other rank ended
        raise
    finally:
        number = gpu_launcher.current_trial().number
        text = f"{os.getpid()} {number} {trainer.current_epoch} {ended}"
        (directory / f"rank-{trainer.global_rank}").write_text(text)
    return float(cfg.level)


if __name__ == "__main__":
    main()
