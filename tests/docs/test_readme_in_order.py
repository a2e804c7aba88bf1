"""The README's commands, as printed and in order, in a new environment with an empty home. `make matrix` runs this."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_readme import README, SCRIPT, TRAIN

promise, first_minute = re.split(r"^## The first minute$", README, maxsplit=1, flags=re.MULTILINE)


def commands(text: str) -> list[str]:
    """Return the commands of the blocks that a reader types."""
    blocks = re.findall(r"^```(bash|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [(kind, line) for kind, block in blocks for line in block.splitlines()]
    return [line.removeprefix("$ ") for kind, line in lines if kind == "bash" or line.startswith("$ ")]


@pytest.mark.timeout(900)
def test_a_new_user_types_the_readme(nvml_double: Path, tmp_path: Path) -> None:
    if "GPU_LAUNCHER_DIST" not in os.environ:
        pytest.skip("needs the wheel that `make matrix` builds")
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    for name in (".config/pip/pip.conf", ".pip/pip.conf"):  # where this machine finds packages
        if (Path.home() / name).is_file():
            (home / name).parent.mkdir(parents=True)
            shutil.copy(Path.home() / name, home / name)
    project.mkdir()
    (project / "train.py").write_text(TRAIN)
    (project / "script.py").write_text(SCRIPT)
    gpus = [
        "count 2",
        *(f"{one}.{line}" for one in (0, 1) for line in (f"uuid GPU-{one}", "name GPU", "memory 99999999")),
    ]
    (tmp_path / "gpus").write_text("".join(f"{line}\n" for line in gpus))
    new = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(new)], check=True)
    environment = {
        "PATH": f"{new / 'bin'}:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": str(nvml_double),
        "NVML_DOUBLE_STATE": str(tmp_path / "gpus"),
        "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"),  # the machine's own pool is for others
        **{
            name: value
            for name, value in os.environ.items()
            if name.lower().endswith("_proxy") or name.startswith("PIP_")
        },
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_FIND_LINKS": f"{os.environ['GPU_LAUNCHER_DIST']} {os.environ.get('PIP_FIND_LINKS', '')}",
    }
    typed = [*commands(first_minute), *commands(promise)]
    assert typed[:2] == ["pip install gpu-launcher", "gpu-launcher demo"]

    script = "\n".join(["set -ex", *typed])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    summaries = re.findall(r"^\[[\w-]+\] (\d+) jobs: (\d+) completed", done.stderr, flags=re.MULTILINE)
    assert len(summaries) >= len(typed) - 1, done.stderr
    assert all(jobs == completed for jobs, completed in summaries[-(len(typed) - 2) :]), done.stderr
