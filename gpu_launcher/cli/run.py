"""`gpu-launcher run`: any command, with devices of the pool."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from gpu_launcher.cli.options import BusyMemory, PoolDir, UsedDevices


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="What to run, with its arguments; best after --.", show_default=False),
    ],
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="NUMBER",
            help="Devices that it needs: 0, 1, 2, ..., or a part of one such as 0.5. Default: one, or with --memory as "
            "much of one as that says.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="MEMORY",
            help="Memory that it needs on each device, such as 20GiB. Whoever declares it shares a device.",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[
        str,
        typer.Option(
            "--priority",
            metavar="NUMBER",
            help="Higher goes first among those that wait, machine-wide; below 0 after others. Above 0 is for root and "
            "the owner of the pool directory.",
        ),
    ] = "0",
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout",
            metavar="TIME",
            help="Longest time that it may run, such as 90, 30m or 2h. Then it gets SIGTERM, and after --grace "
            "SIGKILL. What is short and says so may start while something large waits.",
            show_default=False,
        ),
    ] = None,
    grace: Annotated[
        str,
        typer.Option("--grace", metavar="TIME", help="Time between SIGTERM and SIGKILL when --timeout is over."),
    ] = "10s",
    wait: Annotated[
        str | None,
        typer.Option(
            "--wait",
            metavar="TIME",
            help="Longest time to wait for devices; 0 to take them now or not at all. Default: any time.",
            show_default=False,
        ),
    ] = None,
    devices: UsedDevices = "auto",
    busy_memory: BusyMemory = "512MiB",
    pool_dir: PoolDir = None,
) -> None:
    """Run a command with devices of its own.

    It waits for its devices, and says on stderr for whom. The command then has CUDA_VISIBLE_DEVICES set, this terminal,
    and the signals sent to gpu-launcher. When it ends, what it left running is ended, its devices are free, and
    gpu-launcher ends as the command did.

    Exit codes: the command's own, or 75 if --wait was over, 124 if --timeout was, 125 if the pool cannot be used,
    126 or 127 if the command cannot be run or is not found, 2 if the options are invalid.

    Examples:

    \b
      gpu-launcher run -- python train.py --epochs 3
      gpu-launcher run --gpus 2 -- torchrun --nproc-per-node 2 train.py
      gpu-launcher run --memory 20GiB --wait 10m -- python evaluate.py
      gpu-launcher run --gpus 0.5 --timeout 2h -- jupyter lab
      gpu-launcher run --devices simulated:8 -- sh -c 'echo $CUDA_VISIBLE_DEVICES'
    """
    from gpu_launcher.processes.command import fill_standard_descriptors

    fill_standard_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to give back
    from gpu_launcher.cli.command import Options, run_on_pool
    from gpu_launcher.durations import read_duration
    from gpu_launcher.requests import read_request
    from gpu_launcher.sizes import read_memory

    request = read_request({"gpus": gpus, "memory": memory, "priority": priority, "timeout": timeout})
    options = Options(
        request=request,
        devices=devices,
        wait=None if wait is None else read_duration(wait, "wait"),
        grace=read_duration(grace, "grace"),
        pool_dir=pool_dir,
        busy_memory=None if busy_memory == "null" else read_memory(busy_memory, "busy-memory"),
    )
    run_on_pool(command, options)
