"""`gpu-launcher sweeps`: lists the sweeps below a directory."""

from __future__ import annotations

import click

from gpu_launcher.cli import options


@click.command()
@options.sweep
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `gpu-launcher guide steering` describes it.")
def sweeps(directory: object, as_json: bool) -> None:
    """List the sweeps and maps below a directory, running ones first.

    DIR is the current directory by default. Shows for each sweep the states of its jobs, the program that runs it
    and where, and the best value of a search.

    Examples:

    \b
      gpu-launcher sweeps
      gpu-launcher sweeps ~/project
      gpu-launcher sweeps --json | jq -r '.sweeps[] | select(.state == "running") | .directory'
    """
    from pathlib import Path

    from gpu_launcher.cli.printing import print_json, print_lines, terminal_width
    from gpu_launcher.cli.sweep_table import lines, to_json
    from gpu_launcher.errors import ManifestError
    from gpu_launcher.jobs.sweep_finder import sweeps_below
    from gpu_launcher.jobs.sweep_overview import describe

    root = directory if isinstance(directory, Path) else Path()
    if not root.is_dir():
        raise ManifestError(f"{root} is not a directory")
    found = [described for one in sweeps_below(root) if (described := describe(one)) is not None]
    found.sort(key=lambda one: one.state == "ended")
    if as_json:
        print_json(to_json(found))
    elif found:
        print_lines(lines(found, terminal_width()))
    else:
        raise ManifestError(f"there is no sweep below {root.absolute()}")
