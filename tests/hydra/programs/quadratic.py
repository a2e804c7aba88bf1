"""A function to minimise. Each job writes its return value to `value` in its directory."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig


@dataclass
class Config:
    x: float = 0.0
    kind: str = "a"


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Config) -> float:
    value = (cfg.x - 0.5) ** 2 + (1.0 if cfg.kind == "b" else 0.0)
    Path(HydraConfig.get().runtime.output_dir, "value").write_text(repr(value))
    return value


if __name__ == "__main__":
    main()
