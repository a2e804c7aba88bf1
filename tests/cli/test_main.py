"""The command line as a whole: help, versions, completion, and what starting it costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cli  # type: ignore[import-not-found]

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {"status": "status", "top": "status", "doctor": "status", "jobs": "resume", "run": "run", "map": "map"}
"""Each with the page of docs that describes it."""


def test_the_program_is_declared(cli: Cli) -> None:
    (declared,) = re.findall(r'^gpu-launcher = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    module, _, name = declared.partition(":")
    assert callable(getattr(import_module(module), name))
    assert cli.lines("--version")[0].startswith("gpu-launcher ")


def test_without_a_command_it_lists_them(cli: Cli) -> None:
    done = cli()
    assert done.returncode in (0, 2)  # click 8.2 changed its mind
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +[A-Z]", done.stdout + done.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_a_help_with_examples_of_its_own(cli: Cli, command: str, option: str) -> None:
    text = "\n".join(cli.lines(command, option))
    assert f"Usage: gpu-launcher {command} [OPTIONS]" in text
    assert re.search(rf"^    gpu-launcher {command}\b", text.partition("Examples:")[2], re.MULTILINE)
    assert all(re.search(r"  \S", line.strip()) or not re.match("  --[a-z]", line) for line in text.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_document(cli: Cli, command: str) -> None:
    options = set(re.findall(r"^  (--[a-z-]+)", "\n".join(cli.lines(command, "--help")), re.MULTILINE))
    document = (REPOSITORY / "docs" / f"{COMMANDS[command]}.md").read_text()
    assert not {option for option in options if option not in document} - {"--help"}


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("gpu-launcher st", "status"),
        ("gpu-launcher status --de", "--devices"),
        ("gpu-launcher status --devices sim", "simulated:8"),
        ("gpu-launcher run --wa", "--wait"),
        ("gpu-launcher run --devices sim", "simulated:8"),
        ("gpu-launcher map --par", "--param"),
        ("gpu-launcher map --devices sim", "simulated:8"),
    ],
)
def test_the_shell_completes(cli: Cli, words: str, completed: str) -> None:
    done = cli(_GPU_LAUNCHER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert done.stdout.split()[0] == completed


def test_directories_are_completed_for_the_pool(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pool-of-ours").mkdir()
    (tmp_path / "pool-file").touch()
    words = f"gpu-launcher status --pool-dir {tmp_path}/po"
    done = cli(_GPU_LAUNCHER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="3")
    assert done.stdout.split() == [f"{tmp_path}/pool-of-ours/"]


def test_help_and_completion_import_nothing_that_is_slow(cli: Cli) -> None:
    code = "import sys, gpu_launcher.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=cli.environ, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"rich", "pynvml", "hydra", "omegaconf", "optuna", "sqlalchemy", "psutil", "sqlite3"})
    assert not any(name.startswith("gpu_launcher.leases") for name in done.stdout.split())


def test_a_look_imports_neither_hydra_nor_optuna(cli: Cli) -> None:
    code = "import sys; from gpu_launcher.cli.look import look; look('auto', '1GiB', None); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=cli.environ, capture_output=True, text=True, check=True)
    assert {"hydra", "optuna", "sqlalchemy"}.isdisjoint(done.stdout.split())
