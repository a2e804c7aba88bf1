"""Locks the directory of a Hydra sweep before Hydra writes into it, and reports what it already contains."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from functools import partial
from pathlib import Path

from hydra.core.utils import setup_globals
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from gpu_launcher.errors import ManifestError, OptionError
from gpu_launcher.jobs.directory import DirectoryLock, LogFiles
from gpu_launcher.jobs.leaving import OUTPUT, detached_text, over_ssh
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.sweep_finder import newest_sweep
from gpu_launcher.processes.detaching import continue_detached
from gpu_launcher.text import short_path

from ._ending import final, quiet_interrupt
from ._options import spell
from .launcher import GpuPoolLauncher

log = logging.getLogger(__name__)

CONFIG = "multirun.yaml"
"""Name of the file in which Hydra saves the sweep's config."""
ANOTHER = "name another directory with hydra.sweep.dir=..."


class LaunchError(CompactHydraException):
    """The sweep cannot run at all. Hydra shows the message without a traceback."""


def sweep_directory(config: DictConfig) -> Path:
    """The sweep's directory, from the sweep's own config."""
    setup_globals()
    return Path(str(config.hydra.sweep.dir)).absolute()


def detach(launcher: GpuPoolLauncher) -> None:
    """Continue in a process without a terminal: see `processes.detaching`. Raises LaunchError.

    This is the first thing that a launcher does: no sweeper has begun yet.
    """
    assert launcher.config is not None
    directory = sweep_directory(launcher.config)
    try:
        launcher.detachment = continue_detached(directory / OUTPUT, partial(detached_text, "gpu_pool", directory))
    except OptionError as error:
        raise final(LaunchError(str(error.renamed(spell)))) from error


def take_directory(launcher: GpuPoolLauncher) -> None:
    """Create the sweep's directory and lock it for this launcher. Then leave the terminal, if detached.

    Raises LaunchError.
    """
    assert launcher.config is not None
    directory = sweep_directory(launcher.config)
    dated = _is_dated(launcher.config)
    resume = bool(launcher.options.get("resume"))
    try:
        _check_resume(launcher, directory)
        with quiet_interrupt():
            launcher.lock = DirectoryLock.take(directory, Path(sys.argv[0]).name, _remedy(resume, dated), log.info)
        if launcher.detachment is not None:
            launcher.detachment.redirect(directory / OUTPUT)
    except ManifestError as error:
        raise final(LaunchError(str(error))) from error
    except OSError as error:
        raise final(LaunchError(unwritable(directory, error))) from error


def _check_resume(launcher: GpuPoolLauncher, directory: Path) -> None:
    """Raise ManifestError if there can be nothing to resume, because the directory's name is new each time."""
    assert launcher.config is not None
    if launcher.options.get("resume") and _is_dated(launcher.config) and not read(directory):
        raise ManifestError(_nothing_to_resume(directory, launcher.config))


def leave_directory(launcher: GpuPoolLauncher) -> None:
    """Make the sweep's directory as it is now again when the launcher or the program ends, for a dry run.

    Most sweepers save the config there before they call the launcher. Raises LaunchError.
    """
    assert launcher.config is not None
    directory = sweep_directory(launcher.config)
    file = directory / CONFIG
    made = [one for one in (directory, *directory.parents) if not one.exists()]
    try:
        _check_resume(launcher, directory)
        before = file.read_bytes() if file.exists() else None
    except ManifestError as error:
        raise final(LaunchError(str(error))) from error
    except OSError as error:
        raise final(LaunchError(unwritable(directory, error))) from error
    weakref.finalize(launcher, _restore, file, before, OmegaConf.to_yaml(launcher.config), made)


def _restore(file: Path, before: bytes | None, saved: str, made: list[Path]) -> None:
    """Undo that `saved` was written to a file. Directories in `made` are removed if they are empty."""
    with contextlib.suppress(OSError):  # best effort: the file does no harm
        if file.read_bytes() == saved.encode():
            file.unlink() if before is None else file.write_bytes(before)
        for directory in made:
            directory.rmdir()


def make_directory(config: DictConfig) -> Path:
    """Create the sweep's directory and save the config there, as Hydra's own sweeper does. Raises LaunchError."""
    directory = sweep_directory(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, directory / CONFIG)
    except OSError as error:
        raise final(LaunchError(unwritable(directory, error))) from error
    return directory


def unwritable(directory: Path, error: OSError) -> str:
    """The message, on one line, about a sweep directory that cannot be used."""
    return f"cannot write to the sweep directory ({error.strerror}): {short_path(directory)}; {ANOTHER}"


def open_logs(
    launcher: GpuPoolLauncher, directory: Path, *, resume: bool, continued: bool
) -> tuple[LogFiles, list[str]]:
    """The launcher's LogFiles, and notices for the user if this is its first launch.

    `continued`: the sweeper itself continues what the directory contains, as a study does.
    """
    if launcher.logs is not None:
        return launcher.logs, []
    assert launcher.config is not None
    earlier = read(directory)
    notices = over_ssh(sys.stderr, os.environ, f"{spell('detach')}=true")
    if resume and not earlier:
        notices.append(f"{_nothing_to_resume(directory, launcher.config)}; all jobs are run")
    used = None
    if not resume:
        used = "files of jobs with the same numbers are overwritten, their logs are kept"
        if continued:
            used += f"; {ANOTHER}"
        else:
            used = f"its results are dropped, {used}; {spell('resume')}=true runs only what did not complete"
    shared = (
        "each logs to a file of its own, but files of the same name, such as .hydra/config.yaml, are overwritten, "
        "and all jobs append to Hydra's log. hydra.sweep.subdir='${hydra.job.num}' gives each job a directory"
    )
    launcher.logs = LogFiles(directory, earlier, shared=shared, used=used)
    return launcher.logs, notices


def _is_dated(config: DictConfig) -> bool:
    """Whether the directory is named after the time, as by default. No later sweep uses such a directory."""
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    return isinstance(raw, dict) and "${now:" in str(raw.get("dir"))


def _remedy(resume: bool, dated: bool) -> str:
    if resume:
        return "wait for it, or stop it, before you resume"
    if dated:
        return f"both started in the same second. Start this one again, or {ANOTHER}"
    return f"wait for it, or {ANOTHER}"


def _nothing_to_resume(directory: Path, config: DictConfig) -> str:
    """The message that there is nothing to resume.

    It suggests the newest sweep beside this directory or in the directory that Hydra uses by default.
    """
    raw = str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"])  # type: ignore[index,call-overload]
    beside = Path(raw.partition("${")[0]).absolute() if _is_dated(config) else directory.parent
    newest = newest_sweep(beside, Path("multirun").absolute())
    what = f"{spell('resume')}=true: there is nothing to resume in {short_path(directory)}"
    if newest is None or newest == directory:
        return f"{what}: name a sweep's directory with hydra.sweep.dir=..."
    return f"{what}. The newest sweep is {short_path(newest)}: to resume it, give hydra.sweep.dir={short_path(newest)}"
