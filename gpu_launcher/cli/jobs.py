"""`gpu-launcher jobs`: lists the jobs recorded in a sweep's directory."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--failed", is_flag=True, help="Show only jobs that failed, were cancelled, or died with their launcher.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/resume.md documents it.")
def jobs(directory: Path, failed: bool, as_json: bool) -> None:
    """List the jobs of a sweep or a map.

    DIR is the directory of a sweep (hydra.sweep.dir) or of a map (--dir). Says of each job what became of it, where,
    and in how many attempts.

    To run what did not complete, start the sweep again with hydra.launcher.resume=true and the same hydra.sweep.dir.

    Examples:

    \b
      gpu-launcher jobs multirun/2026-11-21/09-00-00
      gpu-launcher jobs --failed multirun/2026-11-21/09-00-00
      gpu-launcher jobs --json sweep | jq -r '.jobs[] | select(.state == "failed") | .log'
    """
    from gpu_launcher.cli.job_table import lines, to_json, unfinished
    from gpu_launcher.cli.printing import print_json, print_lines, terminal_width
    from gpu_launcher.errors import ManifestError
    from gpu_launcher.jobs.directory import newest_sweep
    from gpu_launcher.jobs.manifest import read
    from gpu_launcher.jobs.reports import read_header

    try:
        entries = list(read(directory).values())
    except OSError as error:
        raise ManifestError(f"cannot read {directory} ({error.strerror}): give a sweep's directory") from error
    if not entries:
        newest = newest_sweep(directory)
        instead = "give the directory that hydra.sweep.dir named"
        instead = instead if newest is None else f"the newest sweep in it is {newest}"
        what = "is not the directory of a sweep" if directory.exists() else "does not exist"
        raise ManifestError(f"{directory} {what}: {instead}")
    shown = [entry for entry in entries if unfinished(entry)] if failed else entries
    if as_json:
        reports = {entry.number: read_header(entry.report) for entry in shown if entry.report is not None}
        values = {number: report.values for number, report in reports.items() if report is not None}
        print_json(to_json(directory, shown, values))
    else:
        print_lines(lines(directory, entries, shown, terminal_width()))
