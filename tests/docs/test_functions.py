"""The programs in docs/functions.md are run, and print what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "functions.md"

if not DOCS.exists():
    pytest.skip("needs the source tree; only the tests are here", allow_module_level=True)

PAIRS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("program", "expected"), PAIRS)
def test_a_program_prints_what_is_below_it(program: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**environment, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert re.fullmatch(pattern, done.stdout), done.stdout


def test_there_are_programs() -> None:
    assert PAIRS
