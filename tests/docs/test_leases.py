"""docs/leases.md and its example do what they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "leases.md"
EXAMPLE = ROOT / "examples" / "leases"


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `directory`, on a pool of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "PYTHONWARNINGS": "error"}
    environment["PYTHONUNBUFFERED"] = "1"  # lines appear in the order of the page, as on a terminal
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_code_on_the_page_prints_what_the_page_says(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)
    code = "".join(text for kind, text in blocks if kind == "python")
    expected = "".join(text for kind, text in blocks if kind == "text")
    assert code.count("lease") > 10
    (tmp_path / "page.py").write_text(code)
    done = run(tmp_path, "page.py")
    assert done.returncode == 0, done.stderr
    pattern = "".join(".*" if part == "..." else re.escape(part) for part in re.split(r"(\.\.\.)", expected))
    assert re.fullmatch(pattern, done.stdout), done.stdout


def test_the_example_prints_what_its_readme_says(tmp_path: Path) -> None:
    text = (EXAMPLE / "README.md").read_text()
    found = re.search(r"^```console\n\$ python leases.py (.*?)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    done = run(tmp_path, str(EXAMPLE / "leases.py"), *found[1].split())
    assert done.returncode == 0, done.stderr
    assert done.stdout == found[2]
    assert done.stderr == "", "simulated devices were asked for, and are no news"


@pytest.mark.parametrize("devices", ["cpu:3", "auto"])
def test_the_example_runs_on_what_there_is(tmp_path: Path, devices: str) -> None:
    done = run(tmp_path, str(EXAMPLE / "leases.py"), "--devices", devices)
    assert done.returncode == 0, done.stderr
    assert "squares: [0, 1, 4, 9, 16, 25, 36, 49]" in done.stdout
