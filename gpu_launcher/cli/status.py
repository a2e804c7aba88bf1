"""`gpu-launcher status`: shows the current state of the pool."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_launcher.cli import options


@click.command()
@options.devices("Devices to show")
@options.busy_memory
@options.pool_dir
@options.as_json
def status(devices: str, busy_memory: str, pool_dir: str | None, as_json: bool) -> None:
    """Show devices, who holds them, and who waits for them.

    Prints one line for each lease on each device, then the queue in order, with the reason why each request waits, and
    then the devices that your running sweeps below the current directory have on other machines. In a pipe the lines
    are complete and have no colour, so that they can be searched. --json is for programs.

    Examples:

    \b
      gpu-launcher status
      gpu-launcher status --devices 0,2
      gpu-launcher status | grep anna
      gpu-launcher status --json | jq '.devices[] | select(.state == "free") | .index'
    """
    show_status(devices, busy_memory, pool_dir, as_json=as_json)


def show_status(devices: str, busy_memory: str, pool_dir: str | None, *, as_json: bool = False) -> None:
    from gpu_launcher.allocation.observation import look, processes_of
    from gpu_launcher.cli.printing import print_json, print_lines, terminal_width
    from gpu_launcher.cli.render import render
    from gpu_launcher.jobs.node_devices import nodes_of_running
    from gpu_launcher.jobs.sweep_finder import sweeps_below

    survey = look(devices, busy_memory, pool_dir)
    nodes = nodes_of_running(sweeps_below(Path()))
    if as_json:
        from gpu_launcher.cli.survey_json import to_json

        print_json(to_json(survey, processes_of(survey.view.leases), nodes))
    else:
        print_lines(render(survey, terminal_width(), nodes=nodes).lines())
