"""`gpu-launcher jobs`: lists the jobs recorded in a sweep's directory."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_launcher.cli import options


@click.command()
@options.sweep
@click.option("--failed", is_flag=True, help="Show only jobs that failed, were cancelled, or died with their launcher.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `gpu-launcher guide resume` describes it.")
def jobs(directory: Path | None, failed: bool, as_json: bool) -> None:
    """List the jobs of a sweep or a map.

    DIR is the directory of a sweep (hydra.sweep.dir) or of a map (--dir), by default of the newest one below the
    current directory. Shows the outcome, the devices and the attempts of each job.

    To run what did not complete, start the sweep again with hydra.launcher.resume=true and the same hydra.sweep.dir.

    Examples:

    \b
      gpu-launcher jobs
      gpu-launcher jobs multirun/2026-11-21/09-00-00
      gpu-launcher jobs --failed multirun/2026-11-21/09-00-00
      gpu-launcher jobs --json sweep | jq -r '.jobs[] | select(.state == "failed") | .log'
    """
    from gpu_launcher.cli.job_table import lines, to_json, unfinished
    from gpu_launcher.cli.printing import print_json, print_lines, terminal_width
    from gpu_launcher.jobs.manifest import read_chosen_sweep

    directory, manifest = read_chosen_sweep(directory)
    entries = list(manifest.entries.values())
    shown = [entry for entry in entries if unfinished(entry)] if failed else entries
    if as_json:
        print_json(to_json(directory, shown))
    else:
        print_lines(lines(directory, entries, shown, terminal_width()))
