"""`gpu-launcher rerun`: the command that runs one job of a sweep alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpu_launcher.cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_launcher.jobs.alone import AloneCommand
    from gpu_launcher.jobs.manifest import Entry


@click.command()
@click.argument("job", metavar="JOB")
@options.sweep_option
@click.option("--run", "runs", is_flag=True, help="Run the command instead of printing it.")
def rerun(job: str, dir: str | None, runs: bool) -> None:
    """Print the command that runs one job again, alone.

    The job can be of a sweep or a map, in any state. The command uses the job's program, overrides or parameters,
    and working directory, and waits for as many devices of the pool. The sweep keeps the job's result. A Hydra
    program gets a new directory, rerun/JOB/<time> in that of the sweep. With --run, the command runs in this terminal.

    Exit code with --run: as for `gpu-launcher run`.

    Examples:

    \b
      gpu-launcher rerun 7
      gpu-launcher rerun 7 --dir multirun/2026-11-21/09-00-00
      gpu-launcher rerun 7 --run
    """
    import os
    import sys
    from pathlib import Path

    from gpu_launcher.cli.run import run
    from gpu_launcher.cli.steer import chosen, read_job
    from gpu_launcher.cli.streams import printable
    from gpu_launcher.errors import ManifestError
    from gpu_launcher.text import short_path

    number = read_job(job)
    directory = chosen(dir).directory
    if runs:
        _refuse_what_others_wrote(directory)
    command = _command(directory, number)
    if not runs:
        line = command.line(str(Path.cwd()))
        if line is None or printable(line, sys.stdout) != line:
            raise ManifestError(
                f"the command of job {number} has characters that cannot be printed in one line: "
                "gpu-launcher rerun --run runs it"
            )
        print(line)
        return
    try:
        os.chdir(command.directory)
    except OSError as error:
        where = short_path(directory)
        raise ManifestError(
            f"job {number} of {where} cannot run in {command.directory!r}, where the sweep was started: "
            f"{error.strerror}"
        ) from error
    run.main(command.arguments(), prog_name="gpu-launcher run", standalone_mode=False)


def _refuse_what_others_wrote(directory: Path) -> None:
    """Raise ManifestError if another user may have written the command that is recorded in a sweep's directory."""
    import os

    from gpu_launcher.cli.mapping.map_directory import MapDirectory
    from gpu_launcher.errors import ManifestError
    from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
    from gpu_launcher.safe_files import why_untrusted
    from gpu_launcher.text import short_path

    home = directory / DIRECTORY
    for path in (home, home / MANIFEST, MapDirectory(directory).settings):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # a Hydra sweep has no settings of a map
        except OSError as error:
            raise ManifestError(f"{short_path(path)} cannot be read ({error.strerror})") from error
        try:
            why = why_untrusted(descriptor)
        finally:
            os.close(descriptor)
        if why is not None:
            raise ManifestError(
                f"{short_path(path)} {why}, who may have written the command: without --run, rerun prints it for you "
                "to check"
            )


def _command(directory: Path, number: int) -> AloneCommand:
    """The command that runs a job alone. Raises ManifestError."""
    from gpu_launcher.cli.mapping.map_directory import MapDirectory
    from gpu_launcher.errors import ManifestError
    from gpu_launcher.jobs.control import ranges_of, spell
    from gpu_launcher.jobs.manifest import alone_commands, read_chosen_sweep
    from gpu_launcher.text import short_path

    _, manifest = read_chosen_sweep(directory)
    name, entry = short_path(directory), manifest.entries.get(number)
    if entry is None:
        known = spell(ranges_of(manifest.entries))
        raise ManifestError(f"{name} has no job {number} (recorded until now: {known})")
    if MapDirectory(directory).settings.exists():
        return _of_map(directory, entry)
    common = alone_commands(directory).get(entry.launch)
    if common is None:
        raise ManifestError(
            f"{name} does not record how its jobs are run by a command: it was started from Python, or by an older "
            "version of gpu-launcher"
        )
    if not isinstance(entry.spec, list) or not all(isinstance(text, str) for text in entry.spec):
        raise _damaged(name, number)
    return common.with_overrides(entry.spec, number)


def _of_map(directory: Path, entry: Entry) -> AloneCommand:
    from gpu_launcher.cli.mapping.launch import MapArguments
    from gpu_launcher.cli.mapping.map_directory import MapDirectory
    from gpu_launcher.cli.mapping.template import Template
    from gpu_launcher.errors import ManifestError, OptionError
    from gpu_launcher.jobs.alone import AloneCommand, pool_options
    from gpu_launcher.requests import read_request
    from gpu_launcher.text import short_path

    name = short_path(directory)
    try:
        asked = MapArguments.of_settings(MapDirectory(directory).read_settings())
        template = Template.parse(asked.command, shell=asked.shell)
        if not isinstance(entry.spec, dict) or template.misfit(entry.spec):
            raise _damaged(name, entry.number)
        given = asked.options
        pool = pool_options(read_request(given, learns=True), given.get("devices", "auto"), given.get("pool_dir"))
    except OptionError as error:
        raise ManifestError(error.problem) from error
    except (TypeError, ValueError) as error:
        raise _damaged(name, entry.number) from error
    return AloneCommand(pool, tuple(template.by_hand(entry.spec, entry.number)), str(asked.directory))


def _damaged(name: str, number: int) -> Exception:
    from gpu_launcher.errors import ManifestError

    return ManifestError(f"what {name} records about job {number} is damaged, so its command is unknown")
