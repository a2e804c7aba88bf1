"""`gpu-launcher log`: prints the log of a job, also while it grows."""

from __future__ import annotations

import click

from gpu_launcher.cli import options


@click.command("log")
@click.argument("job", metavar="JOB")
@options.sweep_option
@click.option("--follow", "-f", is_flag=True, help="Print what the job adds to its log, until the job has ended.")
def job_log(job: str, dir: str | None, follow: bool) -> None:
    """Print the log of a job of a sweep or a map.

    With -f, waits for a job that has not been started. For a job of a map, the log is what the command printed: first
    its stdout, then its stderr, or both as they grow.

    Examples:

    \b
      gpu-launcher log 7
      gpu-launcher log 7 -f --dir multirun/2026-11-21/09-00-00
    """
    import sys

    from gpu_launcher.cli.log_output import print_log
    from gpu_launcher.cli.steer import check_directory, read_job

    check_directory("--dir", dir)
    print_log(dir, read_job(job), sys.stdout.buffer, follow=follow)
