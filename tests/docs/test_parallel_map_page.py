"""The programs of docs/parallel_map.md print what it says, and the example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
PAGE = TREE / "docs" / "parallel_map.md"
EXAMPLE = TREE / "examples" / "benchmark_models" / "benchmark.py"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")


def programs() -> list[tuple[str, str]]:
    """Each with what it prints."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(script: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "PYTHONWARNINGS": "error::ResourceWarning"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_page_has_programs() -> None:
    assert len(programs()) == PAGE.read_text().count("```python") == 3


@pytest.mark.parametrize("number", range(3))
def test_they_print_what_it_says(number: int, tmp_path: Path) -> None:
    program, printed = programs()[number]
    script = tmp_path / "program.py"
    script.write_text(program)
    done = run(script, tmp_path)
    assert done.stdout == printed, done.stderr
    assert done.returncode == 0
    assert "Error" not in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--gpus", "0", "--workers", "8"), ("--gpus", "0.5", "--models", "words")])
def test_the_example_compares_models(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path, "--records", "300", *arguments)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+): accuracy (\S+)$", done.stdout, flags=re.MULTILINE))
    assert set(found) == ({"words"} if "--models" in arguments else {"words", "letters"})
    assert float(found["words"]) > 0.9
