"""`--show-completion` and `--install-completion`: print or install click's completion scripts for bash, zsh, fish."""

from __future__ import annotations

import os
from pathlib import Path

import click

_SCRIPTS = {
    "bash": ".bash_completions/gpu-launcher.sh",
    "zsh": ".zfunc/_gpu-launcher",
    "fish": ".config/fish/completions/gpu-launcher.fish",
}
_START_UP = {
    "bash": (".bashrc", "source ~/.bash_completions/gpu-launcher.sh"),
    "zsh": (".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
}
"""Each shell's start-up file, and the line in it that loads the script. fish finds the script itself."""


def show_completion(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(_script(_shell()))
        context.exit()


def install_completion(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    shell = _shell()
    path = Path.home() / _SCRIPTS[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_script(shell))
    if shell in _START_UP:
        name, line = _START_UP[shell]
        start_up = Path.home() / name
        with start_up.open("ab+") as file:
            file.seek(0)
            before = file.read()
            if line.encode() not in before.splitlines():
                file.write((b"" if not before or before.endswith(b"\n") else b"\n") + line.encode() + b"\n")
    click.echo(f"{shell} completion installed in {path}. It works in new shells.")
    context.exit()


def _shell() -> str:
    """The user's login shell. Raises click.UsageError if there is no completion for it."""
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in _SCRIPTS:
        raise click.UsageError(f"no completion for the shell {shell!r} (from $SHELL): use bash, zsh or fish")
    return shell


def _script(shell: str) -> str:
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None, "click knows the three of them"
    return complete(click.Command("gpu-launcher"), {}, "gpu-launcher", "_GPU_LAUNCHER_COMPLETE").source()
