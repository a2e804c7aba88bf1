"""`gpu-launcher status`: what the pool is doing now."""

from __future__ import annotations

from gpu_launcher.cli.options import AsJson, BusyMemory, Devices, PoolDir


def status(
    devices: Devices = "auto",
    busy_memory: BusyMemory = "512MiB",
    pool_dir: PoolDir = None,
    as_json: AsJson = False,
) -> None:
    """Show devices, who holds them, and who waits for them.

    One line for each lease on each device, then the queue in order, with the reason why each ticket waits. In a pipe
    the lines are complete and without colour: made to be searched. For programs there is --json.

    Examples:

    \b
      gpu-launcher status
      gpu-launcher status --devices 0,2
      gpu-launcher status | grep anna
      gpu-launcher status --json | jq '.devices[] | select(.state == "free") | .index'
    """
    from gpu_launcher.cli.look import look, processes_of
    from gpu_launcher.cli.output import print_json, print_lines, terminal_width
    from gpu_launcher.cli.report import report

    survey = look(devices, busy_memory, pool_dir)
    if as_json:
        from gpu_launcher.cli.survey_json import to_json

        print_json(to_json(survey, processes_of(survey.view.leases)))
    else:
        print_lines(report(survey, terminal_width()).lines())
