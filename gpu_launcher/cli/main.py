"""The program `gpu-launcher`.

Each command imports its modules when it is called, so that --help, completion and invalid options answer quickly.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, NoReturn

import click

from gpu_launcher.cli.attach import attach, wait
from gpu_launcher.cli.completion import install_completion, show_completion
from gpu_launcher.cli.demo import demo
from gpu_launcher.cli.doctor import doctor
from gpu_launcher.cli.guide import guide
from gpu_launcher.cli.job_log import job_log
from gpu_launcher.cli.jobs import jobs
from gpu_launcher.cli.map import map_command
from gpu_launcher.cli.options import Decorator, as_flag
from gpu_launcher.cli.rerun import rerun
from gpu_launcher.cli.results import results
from gpu_launcher.cli.run import run
from gpu_launcher.cli.status import status
from gpu_launcher.cli.steer import cancel, continue_, limit, pause, retry, stop
from gpu_launcher.cli.streams import lost, tell
from gpu_launcher.cli.sweeps import sweeps
from gpu_launcher.cli.top import top
from gpu_launcher.cli.web import web
from gpu_launcher.errors import GpuLauncherError, OptionError

NAME = "gpu-launcher"
INTERRUPTED = 130


class _Commands(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"{NAME} {version(NAME)}")
        context.exit()


def _flag(name: str, callback: Any, help: str) -> Decorator:
    return click.option(name, is_flag=True, expose_value=False, is_eager=True, callback=callback, help=help)


@click.group(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@_flag("--version", _print_version, "Print the version and exit.")
@_flag("--install-completion", install_completion, "Install completion for the current shell.")
@_flag("--show-completion", show_completion, "Print the completion script for the current shell.")
def program() -> None:
    """Share the GPUs of this machine between all programs and users.

    Start with `gpu-launcher demo`. A Hydra program uses the GPUs with `-m hydra/launcher=gpu_pool`, any other with
    `run` or `map`. Each command has examples in its --help.
    """


for _command in (
    run,
    map_command,
    status,
    top,
    doctor,
    sweeps,
    attach,
    wait,
    jobs,
    results,
    job_log,
    cancel,
    retry,
    rerun,
    stop,
    pause,
    continue_,
    limit,
    web,
    demo,
    guide,
):
    program.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0, 1 if something is wrong, 2 if the command line is invalid, or as `run` and `map` document. The
    status is also 1 if stdout cannot be written; a message that cannot be written to stderr does not change it.
    """
    try:
        code: Any = _run()
    except GpuLauncherError as error:
        if isinstance(error, OptionError):
            error = error.renamed(as_flag)
        tell(str(error))
        code = 2 if isinstance(error, OptionError) else 1
    except OSError as error:
        if error.filename is not None or not lost(probed=True):
            raise
        # If an error message could not be written, the exit code is that of the error.
        code = getattr(error.__context__, "exit_code", 1)
    except SystemExit as end:
        code = end.code
    if sys.stdout in lost():
        code = code or 1
    # As it exits, Python searches all that was imported for garbage. That is a sixth of a short command's CPU time.
    gc.freeze()
    sys.exit(code)


def _run() -> int | None:
    try:
        # In standalone mode, click would answer Ctrl-C with "Aborted!" and status 1.
        code: int | None = program.main(prog_name=NAME, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return INTERRUPTED
    return code
