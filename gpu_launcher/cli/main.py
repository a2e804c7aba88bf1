"""The program `gpu-launcher`. Each command imports what it needs when it is called: completion and help are fast."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

from gpu_launcher.cli.doctor import doctor
from gpu_launcher.cli.jobs import jobs
from gpu_launcher.cli.map import map_command
from gpu_launcher.cli.run import run
from gpu_launcher.cli.status import status
from gpu_launcher.cli.streams import lost, tell
from gpu_launcher.cli.top import top
from gpu_launcher.errors import GpuLauncherError, OptionError

app = typer.Typer(
    name="gpu-launcher",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What stands behind the command's name is the command's.
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command("map", context_settings={"allow_interspersed_args": False})(map_command)
app.command()(status)
app.command()(top)
app.command()(doctor)
app.command()(jobs)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"gpu-launcher {version('gpu-launcher')}")
        raise typer.Exit


@app.callback()
def gpu_launcher(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One pool of GPU leases per machine, shared by every process and user of it.

    Sweeps join the pool with `hydra/launcher=gpu_pool`. Each command has examples in its --help.
    """


def _flag(option: str) -> str:
    return option if option.startswith("-") else f"--{option.replace('_', '-')}"


def main() -> NoReturn:
    """Run the command line. Exit codes: 0, 1 if something is wrong, 2 if the command line is, or as `run` says.

    1 also if what it should print cannot be written. What it would complain of on stderr has its code all the same.
    """
    try:
        app(prog_name="gpu-launcher")
    except GpuLauncherError as error:
        if isinstance(error, OptionError):
            error = error.written(_flag)
        tell(str(error))
        code: Any = 2 if isinstance(error, OptionError) else 1
    except OSError as error:
        if error.filename is not None or not lost(probed=True):
            raise
        # What was about to be complained of, if so.
        code = getattr(error.__context__, "exit_code", 1)
    except SystemExit as end:
        code = end.code
    if sys.stdout in lost():
        code = code or 1
    sys.exit(code)
