"""Runs one job of a Hydra sweep in its process: composes the config, waits for devices, runs the task, reports.

Theory of operation. The job composes its own config, so its request may depend on it. Before the grant, Hydra's
`run_job` also creates the output directory, saves the config and sets up logging, so that no device is idle meanwhile.
The job then waits in `on_job_start`, which Hydra calls just before the task. If Hydra's own config reads the mask
(CUDA_VISIBLE_DEVICES), for example in the name of a directory or log file, the job waits earlier.

`sys.argv` is set so that the program, if started again, runs this job alone. Lightning's DDP starts other ranks that
way. Any exception ends only this job, and reaches the head in the report (`_results.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.errors import OptionError
from gpu_launcher.processes.exceptions import users_part
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.worker import JobContext, print_exception

from ._options import read_job_options
from ._results import JobOptionError, is_pruned, pack

if TYPE_CHECKING:
    from hydra._internal.callbacks import Callbacks
    from hydra.conf import HydraConf

LOG = "job.log"
"""Name of the file in a job's output directory that receives its stdout and stderr.

If the directory's name depends on the job's devices, the file is `<number>.job.log` in the sweep's directory.
"""


@dataclass
class HydraProgram:
    """The program of a Hydra sweep's jobs. It is called once, in each job's process.

    With `spawn`, cloudpickle carries it there together with Hydra's state.
    """

    config: DictConfig
    """The sweep's own config."""
    hydra_context: HydraContext
    task_function: TaskFunction
    command: list[str]
    """The command line that runs one job when its overrides are appended."""

    def __reduce__(self) -> tuple[Any, ...]:
        # `_blank_program` is called before the state is unpickled.
        return _blank_program, (), {**self.__dict__, "singletons": Singleton.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        setup_globals()
        singletons = state.pop("singletons")
        singletons["instances"][Plugins] = Plugins.instance()  # otherwise Hydra would look for plugins again
        Singleton.set_state(singletons)
        self.__dict__.update(state)

    def __call__(self, number: int, spec: list[str], context: JobContext) -> Report:
        """Run job `number` with the overrides `spec`."""
        job = os.getpid()
        composed = None
        job_return = JobReturn(overrides=list(filter_overrides(spec)))
        try:
            config = self.compose(number, spec)
            sys.argv = [*self.command, *self._overrides_of_sweep(), *spec, *_as_single_run(number)]
            job_return.cfg = composed = _without_hydra_node(config)
            try:
                job_return.working_dir = str(_prepare(number, self.config, config, context))
            except OptionError as error:
                raise JobOptionError(str(error)) from None
            except OmegaConfBaseException as error:
                raise ConfigCompositionException(str(error)) from None  # Hydra shows this one without a traceback
            except OSError as error:
                directory = os.fsdecode(error.filename)
                problem = f"cannot write to the output directory ({error.strerror}): {directory}"
                raise JobOptionError(f"{problem}; name another with hydra.sweep.subdir=...") from None
            job_return = self._run(config, context)
        except BaseException as error:  # any exception of the task ends only this job
            if os.getpid() != job:
                raise  # raised in a child that the task forked
            # Hydra 1.4 attaches the JobReturn to an exception that it passes on. The two then cannot be pickled.
            vars(error).pop("_hydra_job_return_handoff", None)
            job_return.status = JobStatus.FAILED
            job_return.return_value = error
        if job_return.status is JobStatus.FAILED:
            raised = job_return._return_value
            if is_pruned(raised):
                print(f"this trial was pruned: {raised}", file=sys.stderr)
            else:
                print_exception(raised, users_part(raised.__traceback__) or raised.__traceback__)
        return pack(job_return, composed)

    def _overrides_of_sweep(self) -> list[str]:
        """The overrides of Hydra's own config that the user gave for all jobs.

        Without them, for example without `hydra.searchpath=[...]`, a job may fail to compose.
        """
        overrides = cast("list[str]", OmegaConf.to_container(self.config.hydra.overrides.hydra))
        return [override for override in overrides if not override.startswith("hydra.mode=")]

    def compose(self, number: int, overrides: list[str]) -> DictConfig:
        """Compose the config of job `number`. Raises what Hydra, OmegaConf and the user's resolvers raise."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            config.hydra.launcher.help = {}  # would only clutter each job's hydra.yaml
            config.hydra.launcher.unresolved = []
        # For `${hydra:...}`, until `run_job` sets the config properly. `set_config` would copy the whole config.
        HydraConfig.instance().cfg = cast("HydraConf", config)
        return config

    def _run(self, config: DictConfig, context: JobContext) -> JobReturn:
        if _depends_on_devices(config.hydra):
            context.wait()
        callbacks = cast("Callbacks", _GatedCallbacks(self.hydra_context.callbacks, context))
        hydra_context = replace(self.hydra_context, callbacks=callbacks)
        return run_job(
            hydra_context=hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _blank_program() -> HydraProgram:
    """Create an empty program in a fresh interpreter, after Hydra has looked for plugins.

    Hydra's search for plugins runs their modules, even if they were already imported, and so replaces their classes. It
    must happen before the config's objects are created from these classes: an instance of a replaced class cannot be
    pickled.
    """
    Plugins.instance()
    return HydraProgram.__new__(HydraProgram)


def _as_single_run(number: int) -> list[str]:
    """Overrides that make the program, if the job starts it again, run as this job and not as a sweep."""
    return ["hydra.mode=RUN", f"hydra.job.num={number}", f"hydra.job.id='{number}'"]


class _GatedCallbacks:
    """Hydra's callbacks, delayed so that none of the user's code runs before the job has its devices.

    `run_job` creates the output directory, saves the config and sets up logging before it calls `on_job_start`. All of
    that happens before the grant.
    """

    def __init__(self, callbacks: Any, context: JobContext) -> None:
        self._callbacks = callbacks
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callbacks, name)

    def on_job_start(self, *args: Any, **kwargs: Any) -> None:
        self._context.wait()
        self._callbacks.on_job_start(*args, **kwargs)


def _prepare(number: int, sweep: DictConfig, config: DictConfig, context: JobContext) -> Path:
    """Tell the node what the job needs and where its log is; return the output directory."""
    request, options = read_job_options(sweep, config)
    if _depends_on_devices(config.hydra.sweep):  # the output directory is unknown before the grant
        context.prepared(request, Path(str(config.hydra.sweep.dir), f"{number}.{LOG}").absolute(), options)
        context.wait()
        return _choose_directory(config)
    directory = _choose_directory(config)
    context.prepared(request, directory / LOG, options)
    return directory


def _choose_directory(config: DictConfig) -> Path:
    directory = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.run.dir = str(directory)  # for libraries that start the program again, as Lightning does
    return directory


def _depends_on_devices(node: DictConfig) -> bool:
    """Whether a part of Hydra's own config depends on the job's devices, such as a log file named after the GPU."""
    return _reads_mask(OmegaConf.to_container(node, resolve=False))


def _reads_mask(value: object) -> bool:
    """Whether a value contains an interpolation of the mask. Plain text may mention it, as our options' help does."""
    if isinstance(value, str):
        return "${" in value and "CUDA_VISIBLE_DEVICES" in value
    if isinstance(value, dict):
        return any(map(_reads_mask, value.values()))
    return isinstance(value, list) and any(map(_reads_mask, value))


def _without_hydra_node(config: DictConfig) -> DictConfig:
    task_config: DictConfig = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return task_config


def job_command(argv: list[str]) -> list[str]:
    """The sweep's command line without its overrides. With a job's overrides appended, it runs that job.

    It keeps options that choose the config, such as `--config-name`, and drops `--multirun`. Paths are made absolute,
    because a job may have another working directory.
    """
    script, *arguments = argv
    program = str(Path(script).absolute()) if Path(script).exists() else script
    return [program, *config_options(arguments, lambda path: str(Path(path).absolute()))]


def config_options(arguments: Sequence[str], path: Callable[[str], str] = str) -> list[str]:
    """The arguments of a command line that choose the config. `path` converts those that are paths."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, assigned, value = argument.partition("=")
        if name in _WITH_VALUE:
            if not assigned:
                value = next(rest, "")
            if name in _RELATIVE_TO_HERE:
                value = path(value)
            kept += [f"{name}={value}"] if assigned else [name, value]
    return kept


_RELATIVE_TO_HERE = ("--config-dir", "-cd")
_WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", *_RELATIVE_TO_HERE)
