"""The commands of the README are run, and the table of options is that of the config."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


TRAIN = """
import hydra
from omegaconf import OmegaConf

CONFIG = {"lr": 0.1, "hidden": 1, "trainer": {"devices": 1}}
hydra.core.config_store.ConfigStore.instance().store(name="config", node=OmegaConf.create(CONFIG))

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    return cfg.lr

if __name__ == "__main__":
    main()
"""
"""Stands for the reader's own program."""
SCRIPT = """
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
print(parser.parse_args().lr)
"""
"""Stands for the reader's program without Hydra."""


COMMANDS = [
    command
    for block in re.findall(r"^```console\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    for command in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works_in_the_readers_own_program(command: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    words = shlex.split(command)
    if words[0] == "python":
        words.append("hydra.launcher.devices=simulated:2")
    else:
        words.insert(2, "--devices=simulated:2")

    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert re.search(r"(\d) jobs: \1 completed", done.stderr), done.stderr


def test_the_readme_has_commands_and_is_short() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"python", "gpu-launcher"}
    assert len(README.encode()) <= 6000


def test_the_table_of_options_is_the_documentation_of_the_config() -> None:
    from hydra_plugins.gpu_pool_launcher.config import HELP, GpuPoolLauncherConf

    text = (ROOT / "docs" / "options.md").read_text()
    shown = re.search(r"<!-- options.*?-->\n(.*?)<!-- end of options -->", text, flags=re.DOTALL)
    assert shown is not None
    defaults = GpuPoolLauncherConf()
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, text in HELP.items():
        default = getattr(defaults, name)
        value = f"[{', '.join(default)}]" if isinstance(default, list) else default
        rows.append(f"| `{name}` | `{'null' if value is None else value}` | {text} |")
    assert shown.group(1).splitlines() == rows


def test_every_option_is_documented_and_nothing_else() -> None:
    from dataclasses import fields

    from hydra_plugins.gpu_pool_launcher.config import HELP, GpuPoolLauncherConf

    assert list(HELP) == [
        field.name for field in fields(GpuPoolLauncherConf) if field.name not in ("_target_", "unresolved", "help")
    ]
