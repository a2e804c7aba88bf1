"""The command that runs one job of a sweep alone, on a lease of its own. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from gpu_launcher.model import BUSY_MEMORY, MILLIONTHS, Request
from gpu_launcher.sizes import MIB


@dataclass(frozen=True, slots=True)
class AloneCommand:
    """A command line, and where it runs."""

    pool: tuple[str, ...]
    """Options of `gpu-launcher run`."""
    words: tuple[str, ...]
    """The program and its arguments."""
    directory: str
    """The working directory."""

    def with_overrides(self, overrides: Sequence[str], number: int) -> AloneCommand:
        """The command of one job of a Hydra sweep; this is what all of its jobs have in common."""
        own = [text for text in overrides if not text.startswith("hydra.")]
        return AloneCommand(self.pool, (*self.words, *own, f"hydra.job.num={number}"), self.directory)

    def arguments(self) -> list[str]:
        """The arguments of `gpu-launcher run`."""
        return [*self.pool, "--", *self.words]

    def line(self, here: str) -> str | None:
        """The command as a user in the directory `here` would type it. None if one line of text cannot show it."""
        typed = shlex.join(["gpu-launcher", "run", *self.arguments()])
        line = typed if self.directory == here else f"cd {shlex.quote(self.directory)} && {typed}"
        return line if line.isprintable() else None


def pool_options(
    request: Request | None, devices: object, pool_dir: str | None, busy_memory: int | None = BUSY_MEMORY
) -> tuple[str, ...]:
    """The options with which `gpu-launcher run` asks for what a job asked for.

    A request that is None, because each job stated its own, becomes the default: one device.
    """
    options = []
    if request is None or request.auto_memory or request.share.millionths == MILLIONTHS:
        options += ["--gpus", "1" if request is None else str(request.gpus)]
    elif request.share.millionths:
        options += ["--gpus", str(request.share.millionths / MILLIONTHS)]
    if request is not None and (memory := request.share.memory):
        options += ["--memory", str(memory) if memory % MIB else f"{memory // MIB}MiB"]
    if isinstance(devices, (list, tuple)):
        options += ["--devices", ",".join(map(str, devices))]
    elif devices != "auto":
        options += ["--devices", str(devices)]
    if busy_memory != BUSY_MEMORY:
        options += ["--busy-memory", "null" if busy_memory is None else str(busy_memory)]
    if pool_dir:
        options += ["--pool-dir", pool_dir]
    return tuple(options)
