"""The walk-throughs in docs/ are run, each in its order and in one directory, by a shell as its reader's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARK = "-- next --"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def pattern(expected: str) -> str:
    """`...` stands for anything, on a line of its own for any lines."""
    whole = re.sub(r"^\.\.\.\n", "\0", expected, flags=re.MULTILINE)
    return "".join(
        "(?:.*\n)*" if part == "\0" else ".*".join(map(re.escape, part.split("...")))
        for part in re.split("(\0)", whole)
    )


def follow(text: str, directory: Path, timeout: float = 250) -> int:
    """Run the commands of a page in order in `directory`, and compare what they print. Return how many there are."""
    steps = [
        part.partition("\n") for block in blocks(text, "console") for part in re.split(r"^\$ ", block, flags=re.M)[1:]
    ]
    commands = "\n".join(f"{command}\necho '{MARK}'" for command, _, _ in steps)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "HYDRA_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["GPU_LAUNCHER_POOL_DIR"] = str(directory / "pool")
    environment["PYTHONWARNINGS"] = "ignore"  # of Hydra 1.4 and Optuna 4, about what the page's programs use
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{commands}"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    printed = done.stdout.split(f"{MARK}\n")
    for (command, _, expected), output in zip(steps, printed, strict=False):
        if expected:
            assert re.fullmatch(pattern(expected), output), f"$ {command}\n{output}"
    assert len(printed) == len(steps) + 1
    return len(steps)


def write_programs(text: str, directory: Path) -> None:
    """Write each block of Python on a page that begins with the name of a file."""
    for block in blocks(text, "python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (directory / named[1]).write_text(block)


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("grid", "train"),
        ("resume", "train"),
        ("optuna", "train"),
        ("run", "train"),
        ("map", "evaluate"),
        ("optimize", "train"),
        ("guide", "train"),
        pytest.param("results", "train", marks=pytest.mark.thorough),
    ],
)
def test_the_walk_through_goes_as_it_says(name: str, script: str, tmp_path: Path) -> None:
    text = (DOCS / f"{name}.md").read_text()
    program, *_ = blocks(text, "python")
    (tmp_path / f"{script}.py").write_text(program)
    write_programs(text, tmp_path)
    assert follow(text, tmp_path) >= 6


def test_the_table_of_the_sweepers_options_is_the_documentation_of_its_config() -> None:
    from dataclasses import fields

    from hydra_plugins.optuna_async_sweeper.config import HELP, OptunaAsyncSweeperConf

    shown = re.search(
        r"<!-- options.*?-->\n(.*?)<!-- end of options -->", (DOCS / "optuna.md").read_text(), flags=re.DOTALL
    )
    assert shown is not None
    defaults = {field.name: getattr(OptunaAsyncSweeperConf(), field.name) for field in fields(OptunaAsyncSweeperConf)}
    defaults["sampler"] = "auto"  # which the defaults list says
    rows = ["| option | default | meaning |", "|---|---|---|"]
    rows += [
        f"| `{name}` | `{'null' if defaults[name] is None else defaults[name]}` | {text} |"
        for name, text in HELP.items()
    ]
    assert shown.group(1).splitlines() == rows
