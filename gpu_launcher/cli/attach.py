"""`gpu-launcher attach` and `gpu-launcher wait`: what a sweep does, and how it ends, in another terminal."""

from __future__ import annotations

import click

from gpu_launcher.cli import options


@click.command()
@options.sweep_option
def attach(dir: str | None) -> int:
    """Show the live view of a running sweep.

    Several terminals can show it, each with the keys of the live view. q or Ctrl-C leaves the view, and the sweep
    continues. Where stdout is not a terminal, prints a line for each event.

    Exit code: that of the sweep when it has ended; 130 if you leave before; 1 if there is no running sweep to show.

    Examples:

    \b
      gpu-launcher attach
      gpu-launcher attach --dir multirun/2026-11-21/09-00-00
    """
    from gpu_launcher.cli.steer import chosen
    from gpu_launcher.cli.sweep_view import follow

    return follow(chosen(dir))


@click.command()
@options.sweep_option
def wait(dir: str | None) -> int:
    """Wait until a sweep has ended, and return its exit code.

    Returns at once if it has ended. The exit code is that of the sweep's program: 0 if all went well, 1 if jobs
    failed, 130 after Ctrl-C or `stop`. It is 1 if the program was killed.

    Examples:

    \b
      gpu-launcher wait && python evaluate.py
      gpu-launcher wait --dir multirun/2026-11-21/09-00-00
    """
    from gpu_launcher.cli.steer import chosen
    from gpu_launcher.cli.sweep_view import wait_for_end

    try:
        ending = wait_for_end(chosen(dir).directory)
    except KeyboardInterrupt:
        return 130
    print(ending.text)
    return ending.exit_code
