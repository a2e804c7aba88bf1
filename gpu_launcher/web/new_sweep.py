"""Reads the form for a new sweep, and makes of it the command line that starts the sweep. Pure, except for `open_in`.

The form starts nothing that its user could not start on a terminal, and nothing that the page has not shown before:
what runs is the command line that is shown, word by word, without a shell.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from gpu_launcher.devices.specification import read_specification
from gpu_launcher.errors import OptionError
from gpu_launcher.requests import read_request
from gpu_launcher.safe_files import open_beneath
from gpu_launcher.text import one_line
from gpu_launcher.validation import read_integer

MAP, HYDRA = "map", "hydra"
POOL_DIRECTORY = "GPU_LAUNCHER_POOL_DIR"
LABELS = {
    "kind": "Program",
    "root": "Directory",
    "below": "Directory in it",
    "command": "Command",
    "parameters": "Parameters",
    "devices": "Devices",
    "gpus": "GPUs per job",
    "max_parallel": "Jobs at the same time",
    "timeout": "Time limit of a job",
    "retries": "Retries",
    "priority": "Priority",
}
"""The fields of the form, with the names that the page gives them."""
OPTIONS = ("devices", "gpus", "max_parallel", "timeout", "retries", "priority")
"""Fields that are options of `map` and of the Hydra launcher, under these names. Left out if they are empty."""


@dataclass(frozen=True, slots=True)
class SweepForm:
    """What the user has filled in."""

    kind: str = MAP
    root: str = "0"
    """Index of one of the server's directories."""
    below: str = ""
    """Path of the working directory in it."""
    command: str = ""
    parameters: str = ""
    """One on each line."""
    devices: str = ""
    gpus: str = ""
    max_parallel: str = ""
    timeout: str = ""
    retries: str = ""
    priority: str = ""

    @classmethod
    def read(cls, form: Mapping[str, Sequence[str]]) -> SweepForm:
        given = {field.name: form[field.name][0] for field in fields(cls) if form.get(field.name)}
        stripped = {name: text.strip() for name, text in given.items()}
        return cls(**stripped)

    @property
    def lines(self) -> list[str]:
        """The parameters."""
        return [line.strip() for line in self.parameters.replace("\r\n", "\n").split("\n") if line.strip()]

    @property
    def options(self) -> dict[str, str]:
        return {name: value for name in OPTIONS if (value := getattr(self, name))}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a form asks for: a working directory, and the words that are run in it."""

    root: Path
    parts: tuple[str, ...]
    """The way from `root` to the working directory."""
    start: tuple[str, ...]
    check: tuple[str, ...]
    """The same as a dry run."""
    environ: Mapping[str, str]
    """Variables that are set in addition."""

    @property
    def directory(self) -> Path:
        return self.root.joinpath(*self.parts)

    @property
    def line(self) -> str:
        """The command line that starts the sweep, as a user types it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environ.items()]
        words = shlex.join(self.start)
        return f"cd {shlex.quote(str(self.directory))} && {' '.join([*settings, words])}"

    def open_in(self) -> int:
        """Open the working directory. No symbolic link beneath its root is followed. Raises OSError."""
        return open_beneath(self.root, self.parts, directory=True)


def find_problems(form: SweepForm, roots: Sequence[Path]) -> list[str]:
    """What is wrong in the fields. What they mean together is decided by a dry run, which reads them as they are."""
    problems = [
        f"{label}: there is a line break or another character that cannot be shown"
        for name, label in LABELS.items()
        if not all(line.isprintable() for line in (form.lines if name == "parameters" else [getattr(form, name)]))
    ]
    for check in (_check_kind, _check_directory, _check_command, _check_parameters, *map(_option_check, OPTIONS)):
        try:
            check(form, roots)
        except OptionError as error:
            problems.append(str(error.renamed(LABELS.__getitem__)))
    return problems


def make_plan(form: SweepForm, roots: Sequence[Path], launcher: str, pool_dir: Path | None) -> Plan:
    """Make the command line of a form in which `find_problems` finds none. `launcher` is the program gpu-launcher.

    Raises OptionError if the page cannot show it.
    """
    words = shlex.split(form.command)
    if form.kind == MAP:
        options = [word for name, value in form.options.items() for word in (f"--{name.replace('_', '-')}", value)]
        params = [word for line in form.lines for word in ("--param", line)]
        start, check = ((launcher, "map", mode, *options, *params, "--", *words) for mode in ("--detach", "--dry-run"))
    else:
        options = [f"hydra.launcher.{name}={_hydra_value(value)}" for name, value in form.options.items()]
        # The last of two equal overrides counts, so no parameter makes a check start the sweep.
        start, check = (
            (*words, "hydra/launcher=gpu_pool", *options, *form.lines, f"hydra.launcher.{mode}=true", "--multirun")
            for mode in ("detach", "dry_run")
        )
    environ = {} if pool_dir is None else {POOL_DIRECTORY: str(pool_dir.expanduser().absolute())}
    plan = Plan(roots[int(form.root)], _parts(form.below), tuple(start), tuple(check), environ)
    if not plan.line.isprintable():
        raise OptionError(
            LABELS["root"], "its path, or that of the pool, has a character that cannot be shown: rename it"
        )
    return plan


def _hydra_value(value: str) -> str:
    """A checked value in Hydra's syntax, in which a comma would make two values of it."""
    return f"[{value}]" if "," in value else value


def _parts(below: str) -> tuple[str, ...]:
    return tuple(below.removesuffix("/").split("/")) if below not in ("", ".", "./") else ()


def _check_kind(form: SweepForm, roots: Sequence[Path]) -> None:
    if form.kind not in (MAP, HYDRA):
        raise OptionError("kind", f"{form.kind[:20]!r} is neither {MAP} nor {HYDRA}")


def _check_directory(form: SweepForm, roots: Sequence[Path]) -> None:
    if form.root not in map(str, range(len(roots))):
        raise OptionError("root", "choose one of the directories that `gpu-launcher web` was given")
    root = roots[int(form.root)]
    try:
        os.close(open_beneath(root, _parts(form.below), directory=True))
    except (OSError, ValueError):
        raise OptionError(
            "below",
            f"{form.below[:200]!r} is not a directory below {one_line(str(root))}, or a part of it is a symbolic link: "
            "give a path such as project/train, without ..",
        ) from None


def _check_command(form: SweepForm, roots: Sequence[Path]) -> None:
    try:
        words = shlex.split(form.command)
    except ValueError as error:
        raise OptionError(
            "command", f"{str(error).lower()}: close the quotes, or put a backslash before them"
        ) from None
    if not words or not words[0]:
        example = "python train.py --lr {lr}" if form.kind == MAP else "python train.py"
        raise OptionError("command", f"give a command, such as {example}")


def _check_parameters(form: SweepForm, roots: Sequence[Path]) -> None:
    if not form.lines:
        raise OptionError("parameters", "give one on each line, such as lr=1e-3,1e-4")
    for line in form.lines:
        if line.startswith("-"):
            raise OptionError("parameters", f"{line[:60]!r} is an option, not a parameter: write name=values")


def _option_check(name: str) -> Callable[[SweepForm, Sequence[Path]], None]:
    def check(form: SweepForm, roots: Sequence[Path]) -> None:
        if not (value := form.options.get(name)):
            return
        if name == "devices":
            read_specification(value, name)
        elif name in ("max_parallel", "retries"):
            read_integer(name, value, least=1 if name == "max_parallel" else 0)
        else:
            read_request({name: value})

    return check
