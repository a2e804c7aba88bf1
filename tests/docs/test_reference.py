"""docs/reference.md has every command, environment variable and file of a sweep's directory, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gpu_launcher.cli.main import program
from tests.cli.test_main import COMMANDS
from tests.docs.test_howto import ROOT, literals
from tests.docs.test_walkthroughs import DOCS

PAGE = (DOCS / "reference.md").read_text()


def test_all_commands_are_there() -> None:
    rows = re.findall(r"^\| \[`.*", PAGE, flags=re.MULTILINE)
    assert rows == [
        f"| [`{name}`]({COMMANDS[name]}.md) | {command.get_short_help_str(200)} |"
        for name, command in program.commands.items()
    ]


@pytest.mark.skipif(not (ROOT / "gpu_launcher").is_dir(), reason="needs the source tree")
def test_all_environment_variables_are_there() -> None:
    in_code = set(re.findall(r"(?<!_)\bGPU_LAUNCHER_[A-Z_]+\b", literals()))
    assert in_code == set(re.findall(r"GPU_LAUNCHER_[A-Z_]+", PAGE)), "in docs/reference.md, or in the code"


TRAIN = """
import os

import hydra
import gpu_launcher


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    gpu_launcher.report(cfg.lr, 0)
    if os.environ.get("GPU_LAUNCHER_ATTEMPT") == "1" and cfg.get("fails"):
        raise ArithmeticError
    return cfg.lr


if __name__ == "__main__":
    main()
"""
SWEEP = "-m hydra/launcher=gpu_pool hydra.launcher.devices=simulated:2"
COMMAND_LINES = f"""
python train.py {SWEEP} hydra.sweep.dir=grid +lr=1,2 +fails=true hydra.launcher.retries=1 hydra.launcher.retry_on=exception
gpu-launcher rerun 1 --dir grid --run
python train.py {SWEEP} hydra.sweep.dir=search hydra/sweeper=optuna_async '+lr=interval(0,1)' hydra.sweeper.n_trials=2 hydra.sweeper.plots=true hydra.launcher.detach=true
gpu-launcher wait --dir search
gpu-launcher map --devices simulated:2 --dir map --csv --retries 1 --param n=1 -- sh -c 'exit $((2 - GPU_LAUNCHER_ATTEMPT))' {{n}}
"""  # noqa: E501


def patterns(section: str) -> dict[str, str]:
    """What files of a section's tables are called: the name on the page, and a pattern for fnmatch."""
    cells = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return {name: re.sub(r"\bN\b|\bK\b", "[0-9]", name) for name in names}


def test_all_files_of_a_sweep_are_there(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "HYDRA_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "GPU_LAUNCHER_LOG": "debug"}
    environment |= {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["bash", "-ex", "-c", COMMAND_LINES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [
        str(path.relative_to(tmp_path / kind))
        for kind in ("grid", "search", "map")
        for path in sorted((tmp_path / kind).rglob("*"))
        if path.is_file()
    ]
    named = patterns(PAGE.partition("## Files of a sweep's directory")[2])
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in named.values())] == []
    assert [name for name, pattern in named.items() if not any(fnmatch(file, pattern) for file in files)] == []
