"""`gpu-launcher demo`: a grid and a search on simulated GPUs, to see what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from gpu_launcher.cli import options
from gpu_launcher.cli.streams import print_if_possible
from gpu_launcher.errors import OptionError

LAUNCHER = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4")
GRID = ("lr=1,0.1,0.01,0.001", "width=64,128")
SEARCH = (
    "hydra/sweeper=optuna_async",
    "lr=tag(log, interval(1e-4, 0.5))",
    "width=choice(32,64,128)",
    "hydra.sweeper.pruner=median",
    "hydra.sweeper.n_trials=16",
)
SWEEPS = (
    ("A grid of 8 jobs on 4 GPUs. One job fails, and the others keep running.", GRID, 1),
    ("A search for the best values. Bad trials are pruned.", SEARCH, 0),
)
"""What is shown: a title, the words of the command, and the exit code, which is 1 if a job failed."""
NEXT = """\
That was a made-up program: {program}

In a Hydra project of yours, without a change to its code:
  python train.py -m hydra/launcher=gpu_pool lr=1e-3,1e-4
  python train.py -m hydra/launcher=gpu_pool hydra/sweeper=optuna_async 'lr=tag(log, interval(1e-4, 1e-1))'
For any other program:
  gpu-launcher map --param lr=1e-3,1e-4 -- python train.py --lr {{lr}}
What this machine has, and who uses it:
  gpu-launcher status
"""


@click.command()
@options.directory("--dir", "Directory for the program and its results. Default: a new temporary directory.")
def demo(dir: str | None) -> int:
    """Show a grid and a search on simulated GPUs. Takes about ten seconds and needs no GPU.

    Copies a small Hydra program to a directory and sweeps over it: a grid of 8 jobs, of which one fails, and an
    asynchronous search that prunes bad trials. Ends with what to type in your own project.

    Examples:

    \b
      gpu-launcher demo
      gpu-launcher demo --dir demo
    """
    import shutil
    import signal
    import tempfile

    try:
        directory = Path(tempfile.mkdtemp(prefix="gpu-launcher-demo-") if dir is None else dir).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        program = directory / "train.py"
        shutil.copyfile(Path(__file__).with_name("demo_program.py"), program)
    except OSError as error:
        raise OptionError("--dir", f"cannot write to {error.filename}: {error.strerror}") from None
    # Ctrl-C is for the sweep, which ends its jobs. An ignored signal would be ignored by the sweep, too. The sweep's
    # exit code does not tell: Python returns 1, as for a failed job, if it is interrupted while it starts.
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    for title, arguments, expected in SWEEPS:
        status = 0 if interrupts else _sweep(title, directory, arguments)
        if interrupts:
            return 128 + signal.SIGINT
        if status != expected:
            return status
    print_if_possible("\n" + NEXT.format(program=program))
    return 0


def _sweep(title: str, directory: Path, arguments: Sequence[str]) -> int:
    import os
    import shlex
    import subprocess
    import sys

    words = ("train.py", "-m", *LAUNCHER, *arguments)
    print_if_possible(f"\n{title}\n$ cd {shlex.quote(str(directory))} && python {shlex.join(words)}\n")
    # Its own pool: the simulated GPUs of others are not waited for.
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool")}
    return subprocess.Popen((sys.executable, *words), cwd=directory, env=environment).wait()
