"""Carries a JobReturn from the job's process to the head.

Its parts are unpickled one by one, so a value or an exception that cannot be transferred does not affect the others.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    InstantiationException,
)
from omegaconf import DictConfig

from gpu_launcher.errors import JobError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.json_data import Values, is_value, values_in
from gpu_launcher.processes import cpu_unpickler
from gpu_launcher.processes.exceptions import PortableException, describe, load_chain, origin, pack_chain, reason
from gpu_launcher.processes.messages import INTERRUPTED, Report
from gpu_launcher.processes.out_of_memory import is_out_of_gpu_memory
from gpu_launcher.processes.pickling import main_namespace
from gpu_launcher.processes.unpicklable import found_at

from ._exceptions import dumps, frames_for_hydra, whole_message

MAX_LISTED = 16
"""Maximum length of a list that a job returns for its numbers to get into tables."""


class JobFailedError(JobError, CompactHydraException):
    """A job failed without an exception of its own. Hydra shows the message without a traceback."""


class JobOptionError(ConfigCompositionException):
    """An option in the job's own config keeps it from running. Hydra shows the message without a traceback."""


@dataclass(frozen=True, slots=True)
class _Parcel:
    """The parts of a JobReturn, pickled separately."""

    shell: bytes
    """The JobReturn without its value."""
    value: bytes | None
    """The return value; None for a failed job."""
    error: list[PortableException] | None
    """The exceptions of a failed job; None if it failed because its return value cannot be pickled."""
    problem: str | None
    """The problem of a failed job, as a predicate on one line."""


def pack(job_return: JobReturn, composed: DictConfig | None) -> Report:
    """Create the report from the return of `run_job`. Called in the job.

    `composed` is the job's config before the task received it. It is sent if the task made the config unpicklable.
    """
    value = job_return._return_value
    job_return._return_value = None
    out_of_memory = False
    try:
        if job_return.status is JobStatus.COMPLETED:
            try:
                pickled = dumps(value)
                cpu_unpickler.loads(pickled)  # better to fail here than in the head
                parcel = _Parcel(_shell(job_return, composed), pickled, None, None)
            except Exception as error:  # an object that pickles itself can raise anything
                job_return.status = JobStatus.FAILED
                problem = (
                    f"returned a value of type {type(value).__qualname__} that cannot be pickled: {describe(error)}"
                    f"{found_at({'the value': value})}"
                )
                parcel = _Parcel(_shell(job_return, composed), None, None, problem)
        else:
            out_of_memory = is_out_of_gpu_memory(value)
            chain = pack_chain(value, main_namespace(), frames_for_hydra)
            parcel = _Parcel(_shell(job_return, composed), None, chain, outcome(value))
    finally:
        job_return._return_value = value
    ok = parcel.problem is None
    pruned = not ok and is_pruned(value)
    failed_at = origin(value) if isinstance(value, BaseException) and not ok else ""
    values = table_values(value) if ok else {}
    return Report(ok, parcel.problem, pickle.dumps(parcel), out_of_memory, pruned, failed_at, values)


def table_values(returned: object) -> Values:
    """What a table of results shows of a job's return value: a number, a few, or what a dictionary names.

    Without names they are called `value`, or `values_0`, `values_1`, as Optuna calls them. An array or tensor with one
    element counts as a number.
    """
    try:
        if isinstance(returned, Mapping):
            return values_in({name: one if isinstance(one, str) else _number(one) for name, one in returned.items()})
        if isinstance(returned, (list, tuple)):
            named = {f"values_{place}": _number(one) for place, one in enumerate(returned)}
            return values_in(named) if len(returned) <= MAX_LISTED else {}
        return values_in({"value": _number(returned)})
    except Exception:  # a user's mapping can raise anything
        return {}


def _number(value: object) -> float | None:
    """A value as a number; None if it is not one."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except Exception:  # a user's object that is not a number can raise anything
        return None
    return value if type(value) in (bool, int) and is_value(value) else number  # type: ignore[return-value]


def is_pruned(error: object) -> bool:
    """Whether the error is Optuna's TrialPruned, which a trial raises to end early."""
    optuna = sys.modules.get("optuna.exceptions")
    return optuna is not None and isinstance(error, optuna.TrialPruned)


def _shell(job_return: JobReturn, composed: DictConfig | None) -> bytes:
    """Pickle a JobReturn, whose value was removed, with as much of its configs as possible."""
    try:
        return dumps(job_return)
    except Exception:  # the task may have put anything into its config
        return dumps(replace(job_return, cfg=composed))


def unpack(result: JobResult, overrides: list[str], directory: Path) -> JobReturn:
    """Create the JobReturn of a job, however it ended. Called in the head."""
    if not result.payload:
        assert result.outcome is not Outcome.COMPLETED, "a completed job has reported"
        error = JobFailedError(result.number, result.label, result.message or "did not run", result.log)
        return JobReturn(overrides, working_dir=str(directory), status=JobStatus.FAILED, _return_value=error)
    parcel: _Parcel = pickle.loads(result.payload)
    job_return = _unpack_shell(parcel, overrides, directory)
    if parcel.value is not None:
        try:
            job_return.return_value = cpu_unpickler.loads(parcel.value)
        except Exception as error:  # as when pickling
            problem = f"returned a value that cannot be unpickled: {describe(error)}"
            job_return.status = JobStatus.FAILED
            job_return.return_value = JobFailedError(result.number, result.label, problem, result.log)
    elif parcel.error is not None:
        job_return.return_value = _exception(result, parcel.error, parcel.problem)
    else:
        problem = parcel.problem or "failed"
        job_return.return_value = JobFailedError(result.number, result.label, problem, result.log)
    return job_return


def _unpack_shell(parcel: _Parcel, overrides: list[str], directory: Path) -> JobReturn:
    try:
        job_return: JobReturn = cpu_unpickler.loads(parcel.shell)
    except Exception:  # as when pickling
        status = JobStatus.FAILED if parcel.value is None else JobStatus.COMPLETED
        return JobReturn(overrides, working_dir=str(directory), status=status)
    return job_return


def outcome(error: BaseException) -> str:
    """The way a job ended, as a predicate on one line."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}) before it returned a value"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, JobOptionError):
        return f"cannot be run: {error}"
    # The later lines of Hydra's messages say where, and what to do. An InstantiationException has its own cause.
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        lines = [line.strip().rstrip(".") for line in whole_message(error).splitlines() if line.strip()]
        return f"raised {type(error).__qualname__}: {'. '.join(lines)}".replace(":. ", ": ")
    return reason(error)


def _exception(result: JobResult, chain: list[PortableException], problem: str | None) -> Exception:
    error = load_chain(chain, JobError(result.number, result.label, problem or "failed", result.log))
    if result.log and hasattr(error, "add_note") and not isinstance(error, JobError):
        error.add_note(f"job {result.number}; its log: {result.log}")
    return error
