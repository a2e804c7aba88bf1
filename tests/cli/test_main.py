"""Tests the command line as a whole: help, versions, completion, and which modules it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder

if TYPE_CHECKING:
    from conftest import Cli  # type: ignore[import-not-found]

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {
    "status": "status",
    "top": "status",
    "doctor": "status",
    "jobs": "resume",
    "results": "results",
    "run": "run",
    "map": "map",
    **dict.fromkeys(
        ("sweeps", "log", "cancel", "retry", "rerun", "stop", "pause", "continue", "limit", "attach", "wait"),
        "steering",
    ),
    "web": "web",
    "demo": "index",
    "guide": "guide",
}
"""All commands, each with the page of docs that describes it."""


def test_the_program_is_declared(cli: Cli) -> None:
    (declared,) = re.findall(r'^gpu-launcher = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    module, _, name = declared.partition(":")
    assert callable(getattr(import_module(module), name))
    assert cli.lines("--version")[0].startswith("gpu-launcher ")


def test_without_a_command_it_lists_them(cli: Cli) -> None:
    done = cli()
    assert done.returncode in (0, 2)  # 2 since click 8.2
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
    done = cli(_GPU_LAUNCHER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert done.stdout.split()[0] == f"plain,{completed}"


def test_the_shell_completes_directories_for_the_pool(cli: Cli, tmp_path: Path) -> None:
    words = f"gpu-launcher status --pool-dir {tmp_path}/po"
    done = cli(_GPU_LAUNCHER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="3")
    assert done.stdout.split() == [f"dir,{tmp_path}/po"]


def test_completion_is_installed_once_where_the_shell_looks(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / ".zshrc").write_text("alias l=ls")
    for _ in range(2):
        cli.lines("--install-completion", HOME=str(tmp_path), SHELL="/bin/zsh")
    assert (tmp_path / ".zshrc").read_text().splitlines()[0] == "alias l=ls"
    assert (tmp_path / ".zshrc").read_text().count("fpath") == 1
    script = "\n".join(cli.lines("--show-completion", SHELL="/bin/zsh"))
    assert (tmp_path / ".zfunc" / "_gpu-launcher").read_text().strip() == script.strip()
    assert "_GPU_LAUNCHER_COMPLETE=zsh_complete gpu-launcher" in script


def test_completion_for_an_unknown_shell_is_refused(cli: Cli) -> None:
    done = cli("--install-completion", SHELL="/bin/tcsh")
    assert done.returncode == 2
    assert "no completion for the shell 'tcsh'" in done.stderr


SLOW = {
    "typer",
    "pydantic",
    "rich",
    "hydra",
    "omegaconf",
    "optuna",
    "sqlalchemy",
    "numpy",
    "pynvml",
    "psutil",
    "sqlite3",
}

NOT_NEEDED = SLOW - {"rich", "pynvml"} | {
    "multiprocessing",
    "asyncio",
    "ssl",
    "decimal",
    "statistics",
    "rich.console",
    "gpu_launcher.jobs.machine",
    "gpu_launcher.jobs.recorder",
    "gpu_launcher.jobs.events",
    "gpu_launcher.jobs.steering",
    "gpu_launcher.processes.messages",
}
NOT_NEEDED_TO_READ = NOT_NEEDED | {
    "hashlib",
    "logging",
    "shutil",
    "socket",
    "subprocess",
    "gpu_launcher.allocation",
    "gpu_launcher.devices",
    "gpu_launcher.leases",
}
"""What commands that read the directory of a sweep do without, if no program runs it."""


def loaded(cli: Cli, *arguments: str, cwd: Path | None = None) -> set[str]:
    """The modules that are imported when a command ends."""
    code = (
        f"import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); sys.argv[1:] = {arguments}"
    )
    code += "; from gpu_launcher.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli.environ, cwd=cwd, capture_output=True, text=True, check=False
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("status", "--nonsense")], ids=" ".join)
def test_help_and_wrong_options_import_nothing_slow(cli: Cli, arguments: tuple[str, ...]) -> None:
    modules = loaded(cli, *arguments)
    assert not SLOW & {name.partition(".")[0] for name in modules}
    packages = {name.partition(".")[2].partition(".")[0] for name in modules if name.startswith("gpu_launcher.")}
    assert packages == {"cli", "errors", "text", "redaction"}


def test_short_commands_import_only_what_they_need(cli: Cli, tmp_path: Path) -> None:
    Recorder(tmp_path / "sweep", [Job(0, "lr=1", ["lr=1"])], "train.py").close()
    for arguments in (("status",), ("run", "--devices", "cpu:1", "--", "true")):
        modules = loaded(cli, *arguments, cwd=tmp_path)
        assert "gpu_launcher.leases.file_ledger" in modules, arguments
        assert modules.isdisjoint(NOT_NEEDED | {"gpu_launcher.jobs.manifest"}), arguments
    for arguments in (("sweeps",), ("jobs",), ("results",), ("results", "--json")):
        modules = loaded(cli, *arguments, cwd=tmp_path)
        assert "gpu_launcher.jobs.manifest" in modules, arguments
        assert modules.isdisjoint(NOT_NEEDED_TO_READ), arguments


def test_at_its_end_a_command_does_not_search_for_garbage(cli: Cli) -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
    code += "from gpu_launcher.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], env=cli.environ, capture_output=True, check=True)
    assert done.stdout.split()[-1] == b"True"


def test_importing_the_package_imports_no_part_of_it(cli: Cli) -> None:
    code = "import sys, gpu_launcher; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=cli.environ, capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("gpu_launcher.")]
    assert not SLOW & set(done.stdout.split())


def test_a_look_imports_neither_hydra_nor_optuna(cli: Cli) -> None:
    code = "import sys; from gpu_launcher.allocation.observation import look; "
    code += "look('auto', '1GiB', None); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=cli.environ, capture_output=True, text=True, check=True)
    assert {"hydra", "optuna", "sqlalchemy"}.isdisjoint(done.stdout.split())
