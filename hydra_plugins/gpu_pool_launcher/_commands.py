"""Builds the commands that a sweep suggests at its end: to run one job alone, and to continue the sweep."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import filter_overrides
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from gpu_launcher.jobs.alone import AloneCommand, pool_options
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.text import short_path

from ._override_text import override_text
from ._program import config_options

MAX_ALONE = 3
"""Maximum number of failed jobs for which a sweep shows the command that runs the job alone."""

_OF_THE_SWEEP = re.compile(r"[+~]*hydra[./](?:launcher|sweeper|sweep|mode)\b")
"""Overrides that do not matter to a single job."""
_RERUN_DIRECTORY = "hydra.run.dir=${hydra.sweep.dir}/rerun/${hydra.job.num}/${now:%Y-%m-%d_%H-%M-%S}"
_SET_ANEW = re.compile(r"\+*hydra\.(?:sweep\.dir|launcher\.resume)=")
_PATH = re.compile(r"(?:/|[A-Za-z_]\w*[./:-])[\w./:-]*", re.ASCII)
"""Text that `override_text` would quote but that Hydra reads unchanged, because its grammar gives it no meaning."""


def closing_lines(config: DictConfig, directory: Path, failed: Sequence[Job], incomplete: int) -> list[str]:
    """The lines to show at the end of a sweep.

    `failed` holds one job for each way in which jobs failed; `incomplete` is the number of jobs that did not complete.
    """
    program = typed_program(sys.argv, sys.orig_argv)
    lines = [f"results: {short_path(directory)}"]
    lines += _line("table", ["gpu-launcher", "results", short_path(directory)])
    if incomplete and is_grid(config):
        lines += _line("to run the rest", continue_command(program, sys.argv[1:], directory))
    for job in failed[:MAX_ALONE]:
        lines += _line(f"to run job {job.number} alone", alone_command(program, sys.argv[1:], config, job))
    return lines


def how_to_resume(config: DictConfig, directory: Path) -> str:
    """The command line that runs the rest of the sweep in `directory`. Empty if `resume` cannot do that."""
    if not is_grid(config):
        return ""
    return shlex.join(continue_command(typed_program(sys.argv, sys.orig_argv), sys.argv[1:], directory))


def _line(what: str, command: list[str]) -> list[str]:
    text = shlex.join(command)
    return [f"{what}: {text}"] if text.isprintable() else []  # escaped text would run something else


def typed_program(argv: Sequence[str], original: Sequence[str]) -> list[str]:
    """The command that the user typed, without arguments: `python train.py`, `python -m package.train`, or a script.

    `argv` is `sys.argv`, which the program may have changed; `original` is `sys.orig_argv`.
    """
    arguments = list(argv[1:])
    head = list(original[: len(original) - len(arguments)])
    if list(original[len(head) :]) != arguments or not head:
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        module = spec.name.removesuffix(".__main__") if spec is not None else None
        return [original[0] if original else "python", *(["-m", module] if module else [argv[0]])]
    script = head[-1]
    if len(head) == 2 and shutil.which(Path(script).name) == script:
        return [Path(script).name]
    return head


def alone_command(program: Sequence[str], arguments: Sequence[str], config: DictConfig, job: Job) -> list[str]:
    """The command that runs one job of a sweep alone."""
    overrides = [*_of_all_jobs(config), *(text for text in filter_overrides(job.spec) if not _OF_THE_SWEEP.match(text))]
    overrides += _mode(arguments)
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    if re.search(r"hydra[:.]job\.num", f"{OmegaConf.to_yaml(own)}{overrides}"):
        overrides.append(f"hydra.job.num={job.number}")
    return [*program, *config_options(arguments), *dict.fromkeys(overrides)]


def rerun_command(
    program: Sequence[str], arguments: Sequence[str], config: DictConfig, directory: Path, options: Options
) -> AloneCommand:
    """The command that runs a job of the sweep in `directory` alone, in a new directory, if its overrides follow.

    Unlike `alone_command`, it always sets the job's number, which names the directory.
    """
    of_sweep = [override("hydra.sweep.dir", short_path(directory)), _RERUN_DIRECTORY]
    words = [*program, *config_options(arguments), *_of_all_jobs(config), *_mode(arguments), *of_sweep]
    pool = pool_options(options.request, options.devices, options.pool_dir, options.busy_memory)
    return AloneCommand(pool, tuple(words), str(Path.cwd()))


def _of_all_jobs(config: DictConfig) -> list[str]:
    """The overrides of `hydra` that matter to each job."""
    of_hydra = cast("list[str]", OmegaConf.to_container(config.hydra.overrides.hydra))
    return [text for text in of_hydra if not _OF_THE_SWEEP.match(text)]


def _mode(arguments: Sequence[str]) -> list[str]:
    """The override that is needed if the config or an override makes the program a sweep."""
    return [] if {"-m", "--multirun"} & set(arguments) else ["hydra.mode=RUN"]


def continue_command(program: Sequence[str], arguments: Sequence[str], directory: Path) -> list[str]:
    """The command that runs the jobs of the sweep in `directory` that did not complete."""
    kept = [argument for argument in arguments if not _SET_ANEW.match(argument)]
    return [*program, *kept, override("hydra.sweep.dir", short_path(directory)), "hydra.launcher.resume=true"]


def override(name: str, value: object) -> str:
    """The text of an override, quoted where Hydra needs quotes."""
    plain = isinstance(value, str) and _PATH.fullmatch(value)
    return f"{name}={value if plain else override_text(value)}"


def is_grid(config: DictConfig) -> bool:
    """Whether the sweeper runs the same jobs each time, so that `resume` can identify them by number."""
    sweeper = get_class(config.hydra.sweeper._target_)
    # Compared by name: when Hydra looks for plugins again, it imports them again as new classes with the same names.
    names = {f"{one.__module__}.{one.__qualname__}" for one in sweeper.__mro__}
    return f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}" in names


def is_basic(config: DictConfig) -> bool:
    """Whether the sweeper is Hydra's own, which composes the configs of a whole batch before it launches the batch."""
    return bool(config.hydra.sweeper._target_ == f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}")
