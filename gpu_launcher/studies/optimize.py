"""`study.optimize`, with each trial in its own process with its own devices.

The head has the study, and no other process touches it. The head asks for a trial when a job has its devices, answers
the calls of the objective, and tells the trial when the objective has ended. The node beside it runs the jobs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.progress_bar import _ProgressBar

from gpu_launcher.durations import read_duration
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.ending import recorded_end
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.nodes.engines import read_nodes
from gpu_launcher.nodes.start import start_loop
from gpu_launcher.pool import Pool, read_pool
from gpu_launcher.requests import read_request
from gpu_launcher.studies.objective import Objective
from gpu_launcher.studies.ownership import TrialOwner, working
from gpu_launcher.studies.recorded_search import RecordedSearch, SearchDirectory
from gpu_launcher.studies.search_loop import Callback, SearchLoop, log
from gpu_launcher.studies.stale_trials import NEVER
from gpu_launcher.studies.stopping import Bounds
from gpu_launcher.studies.storage import keep_connections_from_jobs
from gpu_launcher.studies.study_session import StudySession
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.validation import StartMethod, read_integer, read_start_method


def optimize(
    study: optuna.Study,
    objective: Callable[[Any], float | Sequence[float]],
    n_trials: int | None = None,
    timeout: float | str | None = None,
    *,
    gpus: float | None = None,
    n_jobs: int | None = None,
    catch: Iterable[type[Exception]] | type[Exception] = (),
    callbacks: Iterable[Callback] | None = None,
    gc_after_trial: bool = False,
    show_progress_bar: bool = False,
    memory: str | int | None = None,
    priority: int = 0,
    trial_timeout: float | str | None = None,
    retry_stale: int = 0,
    pool: Pool | None = None,
    start_method: StartMethod = "auto",
    nodes: str | Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> None:
    """Run `objective` for trials of `study`, each in its own process with its own devices.

    Works like `study.optimize` and has its parameters, but trials run as devices become free. `objective`, the trial
    that it receives, and what it returns or raises are the same. The study stays in this process, which samples,
    stores, prunes and runs the callbacks. The study may be in memory. This call returns when all trials have ended.

    - `n_trials`: number of trials that this call runs. `timeout`: for how long to ask for new trials, in seconds or as
      text such as `2h`.
    - `gpus`: GPUs per trial, 1 by default: a whole number such as 0 or 2, or a fraction. `memory`: memory of a GPU,
      such as `20GiB`. `priority`: priority among requests that wait for devices. `trial_timeout`: longest time that a
      trial may run.
    - `n_jobs`: maximum number of trials at the same time. None or -1: as many as the devices allow.
    - `catch`: exceptions of the objective after which other trials still run. Any other exception is raised when the
      running trials have ended, with its traceback in the process as its cause. If a process dies, it is as if the
      objective had raised gpu_launcher.JobError.
    - `retry_stale`: how often a lost trial is queued again. A trial is lost if it was running when its program was
      killed (the next call on the study finds out), when a process that runs trials was killed, or when an error ended
      the search. A trial that Ctrl-C interrupted is also queued again, and that does not count. 0: such trials only
      fail.
    - `gc_after_trial`: accepted for compatibility with `study.optimize`; a process's memory is freed when it ends.
    - `pool`: devices to use instead of all of the machine's. `start_method`: how processes are started, fork or spawn.
    - `nodes`: machines to run trials on, as a list of `local`, `ssh:HOST`, `slurm:COUNT`, `sbatch:COUNT`, `ray:COUNT`
      and `command:COMMAND`. Each uses its own devices. See `gpu-launcher guide nodes`. By default, only this machine.
    - `directory`: makes this search a sweep with a directory, which `gpu-launcher sweeps`, `results`, `log`, `cancel`,
      `stop` and the like find. The output of each trial goes into a log there. By default there is none, and the output
      goes where the program's does. See `gpu-launcher guide optimize`.

    Ctrl-C, and `gpu-launcher stop`, interrupt the running trials. They fail, and KeyboardInterrupt is raised.

    Raises OptionError, DeviceError, PoolDirectoryError, NodeStartError and ManifestError before any trial runs;
    whatever the objective, the sampler or a callback raises; and NodeDiedError if the node, the process that starts the
    others, is killed, or no machine of `nodes` is left.
    """
    if not isinstance(study, optuna.Study):
        raise OptionError("study", f"{study!r} is not an optuna.Study: give the study, and then the objective")
    if study._thread_local.in_optimize_loop:
        raise RuntimeError("Nested invocation of `Study.optimize` method isn't allowed.")
    if not callable(objective):
        raise OptionError("objective", f"{objective!r} is not a function: pass one that takes a trial")
    read_start_method(start_method)
    caught, after_each = _exceptions(catch), _callbacks(callbacks)
    try:
        request = read_request({"gpus": gpus, "memory": memory, "priority": priority, "timeout": trial_timeout})
    except OptionError as error:
        raise error.renamed(lambda option: "trial_timeout" if option == "timeout" else option) from None
    most = None if n_jobs in (None, -1) else read_integer("n_jobs", n_jobs, least=1)
    options = read_pool(pool).options(request, most, "n_jobs")
    bounds = Bounds(
        n_trials=None if n_trials is None else read_integer("n_trials", n_trials, least=0),
        timeout=None if timeout is None else read_duration(timeout, "timeout"),
    )
    retries = read_integer("retry_stale", retry_stale, least=0) or NEVER
    specs = read_nodes(nodes)
    sweep = TrialOwner(ProcessIdentity.here())
    storage = StudyStorage(study._storage, sweep)
    with ExitStack() as cleanup:
        # Before the node is started, whose processes hold the lock, too.
        taken = None if directory is None else cleanup.enter_context(closing(SearchDirectory(_path(directory))))
        keep_connections_from_jobs(study._storage)
        program = Objective(objective, request, caught, study, None if taken is None else taken.logs)
        keep = () if taken is None else (taken.descriptor,)
        # Must come before the progress bar, which starts a thread.
        loop = start_loop(specs, program, options, method=start_method, keep=keep)
        study._stop_flag = False
        study._thread_local.in_optimize_loop = True
        try:
            opened = loop.open()
            with working(sweep), nullcontext() if taken is None else recorded_end(taken.path):
                session = StudySession(study, storage, bounds=bounds, max_retries=retries)
                record = None if taken is None else RecordedSearch(taken, session, opened.devices, options)
                with nullcontext() if record is None else closing(record):
                    for line in session.fail_stale_trials("program"):
                        log.warning(line)
                    bar = _ProgressBar(show_progress_bar, bounds.n_trials, bounds.timeout)
                    try:
                        SearchLoop(session, loop, caught, after_each, bar, options, record).run()
                    finally:
                        bar.close()
        finally:
            loop.close()
            study._thread_local.in_optimize_loop = False
    study._storage.remove_session()


def _path(directory: object) -> Path:
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory) or "\0" in os.fsdecode(directory):
        raise OptionError("directory", f"{directory!r} is not a path: give one such as sweeps/first")
    return Path(os.fsdecode(directory)).absolute()


def _exceptions(catch: object) -> tuple[type[BaseException], ...]:
    given = tuple(catch) if isinstance(catch, Iterable) and not isinstance(catch, type) else (catch,)
    for kind in given:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise OptionError(
                "catch", f"{kind!r} is not a class of exceptions: give one such as ValueError, or a tuple"
            )
    return given


def _callbacks(callbacks: object) -> list[Callback]:
    if callbacks is None:
        return []
    if not isinstance(callbacks, Iterable):
        raise OptionError("callbacks", f"{callbacks!r} is not a list: give [callback], also for one")
    given = list(callbacks)
    for callback in given:
        if not callable(callback):
            raise OptionError("callbacks", f"{callback!r} cannot be called: give functions of the study and a trial")
    return given
