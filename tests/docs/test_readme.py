"""The README is run: its commands, their output, and the table of options."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _missing(expected: str, output: str) -> list[str]:
    """Lines of `expected` that `output` lacks. `...` stands for anything; which of several jobs is first is chance."""
    lines = output.splitlines()
    wanted = [line for line in expected.splitlines() if line != "..."]
    patterns = [".*".join(re.escape(part) for part in line.split("...")) for line in wanted]
    return [
        line
        for line, pattern in zip(wanted, patterns, strict=True)
        if not any(map(re.compile(pattern).fullmatch, lines))
    ]


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


def _commands(*, with_output: bool) -> list[tuple[str, str]]:
    """The commands in console blocks that show output, or that do not, and the output."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if bool(output) == with_output:
                found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "expected"), _commands(with_output=True))
def test_a_command_of_the_readme_prints_what_the_readme_says(command: str, expected: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    program, *arguments = shlex.split(command)
    line = {"python": [sys.executable], "gpu-launcher": [sys.executable, "-m", "gpu_launcher.cli"]}[program]

    done = subprocess.run(
        [*line, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert not _missing(expected, done.stderr), done.stderr


@pytest.mark.parametrize("command", [command for command, _ in _commands(with_output=False)])
def test_a_command_of_the_readme_works_in_the_readers_own_program(command: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    program, *arguments = shlex.split(command)
    assert program == "python"

    done = subprocess.run(
        [sys.executable, *arguments, "hydra.launcher.devices=simulated:2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"(\d) jobs: \1 completed", done.stderr), done.stderr


def test_the_python_of_the_readme_prints_what_the_readme_says(tmp_path: Path) -> None:
    found = re.findall(
        r"^```python\n(import os\n.*?)^```\n\n```text\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE
    )
    ((program, expected),) = found
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (expected, "")


def test_the_readme_has_commands_to_run() -> None:
    assert len(_commands(with_output=True)) >= 2
    assert len(_commands(with_output=False)) >= 2


def test_the_table_of_options_is_the_documentation_of_the_config() -> None:
    from hydra_plugins.gpu_pool_launcher.config import HELP, GpuPoolLauncherConf

    shown = re.search(r"<!-- options.*?-->\n(.*?)<!-- end of options -->", README, flags=re.DOTALL)
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
