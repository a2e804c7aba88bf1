"""A JobReturn on its way from the job's process to the launching program.

It travels in parts that are unpickled one by one, so that a value or an exception that cannot make the journey costs
only itself. Tracebacks do not survive pickling on Hydra 1.3, so their text travels along; on 1.4 JobReturn has them.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from gpu_launcher.errors import JobError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.processes.messages import Report


class RemoteTraceback(Exception):
    """The traceback that a job's exception had in the job's process, as text. Stands as the exception's cause."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What travels."""

    shell: bytes
    """The JobReturn without its value."""
    value: bytes | None
    """The return value or the exception; None if it could not be pickled."""
    traceback: str | None
    """For a failed job."""
    problem: str | None
    """For a failed job: one line, a sentence without its subject."""


def pack(job_return: JobReturn) -> Report:
    """In the job: make the report on what `run_job` returned."""
    value = job_return._return_value
    job_return._return_value = None
    try:
        if job_return.status is JobStatus.COMPLETED:
            try:
                parcel = _Parcel(_dumps(job_return), _dumps(value), None, None)
            except Exception as error:  # anything can be raised by an object that is asked to pickle itself
                job_return.status = JobStatus.FAILED
                problem = f"returned a value of type {type(value).__qualname__} that cannot be pickled: {_brief(error)}"
                parcel = _Parcel(_dumps(job_return), None, None, problem)
        else:
            text = "".join(traceback.format_exception(type(value), value, _without_hydra(value.__traceback__)))
            try:
                pickled = _dumps(value)
            except Exception:  # as above; the text of the traceback travels in any case
                pickled = None
            parcel = _Parcel(_dumps(job_return), pickled, text, describe(value))
    finally:
        job_return._return_value = value
    return Report(parcel.problem is None, parcel.problem, pickle.dumps(parcel))


def unpack(result: JobResult, overrides: list[str], directory: Path) -> JobReturn:
    """In the launching program: the job's JobReturn, whatever became of the job."""
    if result.payload:
        parcel: _Parcel = pickle.loads(result.payload)
        job_return: JobReturn = pickle.loads(parcel.shell)
        if job_return.status is JobStatus.COMPLETED:
            assert parcel.value is not None
            try:
                job_return.return_value = pickle.loads(parcel.value)
                return job_return
            except Exception as error:  # as when pickling
                problem = f"returned a value that cannot be unpickled: {_brief(error)}"
                job_return.status = JobStatus.FAILED
                job_return.return_value = JobError(result.number, result.label, problem, result.log)
                return job_return
        job_return.return_value = _exception(result, parcel, job_return)
        return job_return
    assert result.outcome is not Outcome.COMPLETED, "a completed job has reported"
    return JobReturn(
        overrides=overrides,
        working_dir=str(directory),
        status=JobStatus.FAILED,
        _return_value=JobError(result.number, result.label, result.message or "did not run", result.log),
    )


def describe(error: BaseException) -> str:
    """What a job did that ended it, as one line without a subject."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}) before it returned a value"
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    return f"raised {_brief(error)}"


def _exception(result: JobResult, parcel: _Parcel, job_return: JobReturn) -> BaseException:
    error: BaseException | None = None
    if parcel.value is not None:
        try:
            error = pickle.loads(parcel.value)
        except Exception:  # an exception class whose constructor does not fit what pickle calls it with
            error = None
    if error is None or not isinstance(error, Exception):
        # SystemExit in a job must not end the launching program.
        error = JobError(result.number, result.label, parcel.problem or "failed", result.log)
        carried = False
    else:
        carried = getattr(job_return, "_remote_traceback", None) is not None
    if parcel.traceback and not carried:
        error.__cause__ = RemoteTraceback(parcel.traceback)
    if result.log and hasattr(error, "add_note") and not isinstance(error, JobError):
        error.add_note(f"job {result.number}; its log: {result.log}")
    return error


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__qualname__}: {first}" if first else type(error).__qualname__


def _without_hydra(tb: Any) -> Any:
    """From where the user's code begins: Hydra's own frames come first."""
    start = tb
    while start is not None and start.tb_frame.f_globals.get("__name__") in ("hydra.core.utils", _PROGRAM):
        start = start.tb_next
    return start or tb


_PROGRAM = "hydra_plugins.gpu_pool_launcher._program"


def _dumps(value: object) -> bytes:
    """Pickle; by value where plain pickle cannot, as for what a function defines."""
    try:
        return pickle.dumps(value)
    except Exception:
        import cloudpickle

        pickled: bytes = cloudpickle.dumps(value)
        return pickled
