"""`gpu-launcher map`: runs any command over many parameters."""

from __future__ import annotations

from typing import Any

import click

from gpu_launcher.cli import options


# Arguments after the command's name belong to the command.
@click.command("map", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
@options.value(
    "--param",
    "NAME=VALUES",
    "A parameter and its values, in Hydra's syntax: lr=1e-3,1e-4 or n=range(1,9). Several parameters make all "
    "combinations.",
    multiple=True,
)
@options.value(
    "--from",
    "FILE",
    "Parameters to read, one run for each: JSON objects of a .jsonl file, rows of a .csv file, or JSON objects from "
    "stdin (-) as they arrive. With --param, all combinations for each.",
    None,
    "source",
)
@options.directory("--dir", "Directory for results and output. Default: map/<date>/<time>.")
@options.directory(
    "--resume",
    "Directory of an earlier map: run what did not complete. The command and the options are stored there; options can "
    "be given again to change them.",
)
@options.gpus
@options.value(
    "--memory",
    "MEMORY",
    "Memory that a run needs on each GPU, such as 20GiB. Lets it share a GPU with others. auto: as much as earlier "
    "runs used, with head-room.",
)
@options.priority
@options.timeout
@options.value("--retries", "NUMBER", "How many times to run a failed run again. Default: 0.", type=int)
@options.value(
    "--max-parallel", "NUMBER", "Maximum number of runs at a time. Default: as many as the devices allow.", type=int
)
@options.value("--on-end", "COMMAND", "Command that runs when the map is over. See `gpu-launcher guide notifications`.")
@options.value("--on-job-failure", "COMMAND", "Command that runs for each run that fails and has no retries left.")
@options.flag("--stop-on-failure", "Stop all runs as soon as one has failed and has no retries left.")
@options.flag("--keep-going", "Skip invalid lines of the input.")
@click.option("--shell", is_flag=True, help="Run the command with /bin/sh, for pipes and such. Values stay quoted.")
@options.flag("--csv", "At the end, also write results.csv.")
@options.flag(
    "--detach",
    "Continue without the terminal: the prompt returns when the runs begin, and gpu-launcher attach shows the map.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run nothing: print the first command lines, the number of runs, and what they need of the pool.",
)
@options.nodes("Node to run on (default: local)")
@options.value(
    "--outputs",
    "WHERE",
    "Where runs on other machines leave their files: shared (a file system that all share; the default), or fetch "
    "(each run's directory is brought here when it ends).",
)
@options.devices("Devices to choose from", default=None)
@options.pool_dir
@options.value("--grace", "TIME", "Time between Ctrl-C, or --timeout, and killing what has not ended. Default: 10s.")
def map_command(
    command: tuple[str, ...],
    param: tuple[str, ...],
    source: str | None,
    nodes: tuple[str, ...],
    dir: str | None,
    resume: str | None,
    shell: bool,
    dry_run: bool,
    **others: Any,
) -> int:
    """Run a command over many parameters.

    Each run has devices of its own. Placeholders in the command: {json} is all parameters as one argument, {NAME} the
    value of one, {flags} is --NAME VALUE for each, {index} the number of the run, {gpu} its CUDA_VISIBLE_DEVICES.

    Exit codes: 0 if all runs completed, 1 if not; 2 if the command line or the input is invalid, and nothing ran;
    130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.

    Examples:

    \b
      gpu-launcher map --param lr=1e-3,1e-4 --param seed=1,2 -- python train.py --lr {lr} --seed {seed}
      gpu-launcher map --param lr=1e-3,1e-4 -- python evaluate.py --params {json}
      gpu-launcher map --from params.jsonl --gpus 0.5 --csv -- python evaluate.py {flags}
      make-params | gpu-launcher map --from - --dir results -- ./simulate {flags}
      gpu-launcher map --nodes slurm:4 --param lr=1e-3,1e-4 -- python train.py --lr {lr}
      gpu-launcher map --detach --param seed=1,2,3 -- python train.py --seed {seed}
      gpu-launcher map --resume map/2026-11-21/09-00-00
    """
    from gpu_launcher.cli.mapping.launch import MapArguments, run_map

    others["nodes"] = list(nodes) or None
    given = {name: value for name, value in others.items() if value is not None}
    asked = MapArguments(command=list(command), param=list(param), source=source, shell=shell, options=given)
    try:
        return run_map(asked, dir, resume, dry_run=dry_run)
    except KeyboardInterrupt:  # before the first run or after the last one
        return 130
