"""`gpu-launcher map`: any command over many parameters."""

from __future__ import annotations

from typing import Annotated

import typer

from gpu_launcher.cli.options import PoolDir, _device_kinds, _directories
from gpu_launcher.errors import OptionError


def map_command(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND [ARGUMENT]...", help="What to run, with placeholders.", show_default=False),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUES",
            help="A parameter and its values, in Hydra's syntax: lr=1e-3,1e-4 or n=range(1,9). With several, all "
            "combinations are run.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A run for each JSON object of a .jsonl file, each row of a .csv file, or each JSON object that comes "
            "in on stdin (-), as devices become free. With --param, all combinations for each of them.",
            show_default=False,
        ),
    ] = None,
    directory: Annotated[
        str | None,
        typer.Option(
            "--dir",
            metavar="DIRECTORY",
            help="Where to keep results and output. Default: map/<date>/<time>.",
            show_default=False,
            autocompletion=_directories,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="DIRECTORY",
            help="Run what did not complete of the map in that directory. It knows its command and options; other "
            "options may be given.",
            show_default=False,
            autocompletion=_directories,
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", metavar="NUMBER", help="GPUs of each run: 0, 1, 2, ... or a part such as 0.5. Default: 1."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="MEMORY", help="GPU memory of each run, to share GPUs by it: 20GiB."),
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(
            "--priority", metavar="NUMBER", help="Runs with a higher one get their devices first. Default: 0."
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="How long a run may take: 90s, 30m, 2h. Then it is ended."),
    ] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", help="How many times a run that fails is run again. Default: 0.")
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option("--max-parallel", help="How many runs at a time. Default: as many as get devices."),
    ] = None,
    stop_on_failure: Annotated[
        bool, typer.Option("--stop-on-failure", help="End them all when one has failed for good.")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out lines of the input that cannot be used.")
    ] = False,
    shell: Annotated[
        bool,
        typer.Option("--shell", help="Have the command read by /bin/sh, for pipes and the like. Values arrive quoted."),
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write the results to results.csv as well, in the end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first command lines, and how many there are.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="DEVICES",
            help="Which to use, written as hydra.launcher.devices is: auto (the default), 0,2, cpu:4, simulated:8.",
            autocompletion=_device_kinds,
        ),
    ] = None,
    pool_dir: PoolDir = None,
    grace: Annotated[
        str | None,
        typer.Option("--grace", metavar="TIME", help="Between Ctrl-C and the end of what does not end. Default: 10s."),
    ] = None,
) -> None:
    """Run a command over many parameters, each run on devices of its own.

    Placeholders: {json} is all parameters as one argument, {NAME} one of them, {flags} becomes --NAME VALUE for each,
    {index} is the number of the run and {gpu} what CUDA_VISIBLE_DEVICES is. Exit codes: 0, 1 if not all completed, 2
    if it was refused before anything ran, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Examples:

    \b
      gpu-launcher map --param lr=1e-3,1e-4 --param seed=1,2 -- python train.py --lr {lr} --seed {seed}
      gpu-launcher map --param lr=1e-3,1e-4 -- python evaluate.py --params {json}
      gpu-launcher map --from params.jsonl --gpus 0.5 --csv -- python evaluate.py {flags}
      make-params | gpu-launcher map --from - --dir results -- ./simulate {flags}
      gpu-launcher map --resume map/2026-11-21/09-00-00
    """
    from gpu_launcher.cli.mapping.launch import Asked, run_map

    options = {
        "gpus": gpus,
        "memory": memory,
        "priority": priority,
        "timeout": timeout,
        "retries": retries,
        "max_parallel": max_parallel,
        "stop_on_failure": stop_on_failure or None,
        "keep_going": keep_going or None,
        "csv": csv or None,
        "devices": devices,
        "pool_dir": pool_dir,
        "grace": grace,
    }
    asked = Asked(
        command=command or [],
        param=param or [],
        source=source,
        shell=shell,
        options={name: value for name, value in options.items() if value is not None},
    )
    try:
        code = run_map(asked, directory, resume, dry_run=dry_run)
    except OptionError as error:
        raise error.written(lambda option: f"--{option.replace('_', '-')}") from error
    except KeyboardInterrupt:  # before anything ran, or after everything
        code = 130
    raise typer.Exit(code)
