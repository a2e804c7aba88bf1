"""docs/resume.md is run, in its order and in one directory, by a shell as its reader's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "resume.md").read_text()
MARK = "-- next --"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def pattern(expected: str) -> str:
    """`...` stands for anything, on a line of its own for any lines."""
    whole = re.sub(r"^\.\.\.\n", "\0", expected, flags=re.MULTILINE)
    return "".join(
        "(?:.*\n)*" if part == "\0" else ".*".join(map(re.escape, part.split("...")))
        for part in re.split("(\0)", whole)
    )


def test_the_walk_through_goes_as_it_says(tmp_path: Path) -> None:
    (program,) = blocks("python")
    (tmp_path / "train.py").write_text(program)
    steps = [part.partition("\n") for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.M)[1:]]
    assert len(steps) >= 6
    script = "\n".join(f"{command}\necho '{MARK}'" for command, _, _ in steps)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "HYDRA_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["GPU_LAUNCHER_POOL_DIR"] = str(tmp_path / "pool")
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{script}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    printed = done.stdout.split(f"{MARK}\n")
    for (command, _, expected), output in zip(steps, printed, strict=False):
        if expected:
            assert re.fullmatch(pattern(expected), output), f"$ {command}\n{output}"
    assert len(printed) == len(steps) + 1
