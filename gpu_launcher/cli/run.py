"""`gpu-launcher run`: runs any command with devices of the pool."""

from __future__ import annotations

import signal

import click

from gpu_launcher.cli import options


# Arguments after the command's name belong to the command.
@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGUMENT]...")
@options.gpus
@options.memory
@options.priority
@options.timeout
@options.value("--grace", "TIME", "Time between SIGTERM and SIGKILL after --timeout. Default: 10s.", "10s")
@options.value(
    "--wait", "TIME", "Longest time to wait for devices, such as 90s or 10m; 0 tries once. Default: no limit."
)
@options.devices("Devices to choose from")
@options.busy_memory
@options.pool_dir
def run(
    command: tuple[str, ...],
    gpus: str | None,
    memory: str | None,
    priority: str | None,
    timeout: str | None,
    grace: str,
    wait: str | None,
    devices: str,
    busy_memory: str,
    pool_dir: str | None,
) -> None:
    """Run a command with devices of its own.

    Waits for the devices, and says on stderr who holds them. The command gets CUDA_VISIBLE_DEVICES, this terminal, and
    the signals sent to gpu-launcher. When the command ends, gpu-launcher ends the processes that it left behind, frees
    the devices, and exits as the command did.

    Exit codes: the command's own; 75 if --wait expired, 124 if --timeout did, 125 if the pool cannot be used, 126 if
    the command cannot be executed, 127 if it is not found, 2 if an option is invalid.

    Examples:

    \b
      gpu-launcher run -- python train.py --epochs 3
      gpu-launcher run --gpus 2 -- torchrun --nproc-per-node 2 train.py
      gpu-launcher run --memory 20GiB --wait 10m -- python evaluate.py
      gpu-launcher run --gpus 0.5 --timeout 2h -- jupyter lab
      gpu-launcher run --devices simulated:8 -- sh -c 'echo $CUDA_VISIBLE_DEVICES'
    """
    from gpu_launcher.processes.command_front import fill_standard_descriptors

    fill_standard_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGINT may end the process until there is something to clean up
    from gpu_launcher.cli.command import RunOptions, run_on_pool
    from gpu_launcher.durations import read_duration
    from gpu_launcher.requests import read_request
    from gpu_launcher.sizes import read_memory

    request = read_request({"gpus": gpus, "memory": memory, "priority": priority or 0, "timeout": timeout})
    run_on_pool(
        command,
        RunOptions(
            request=request,
            devices=devices,
            wait=None if wait is None else read_duration(wait, "wait"),
            grace=read_duration(grace, "grace"),
            pool_dir=pool_dir,
            busy_memory=None if busy_memory == "null" else read_memory(busy_memory, "busy-memory"),
        ),
    )
