"""The trial that a job sees. It sends reports over the job's channel and receives verdicts over it.

It never touches the study's database. Each report costs the job one small message.
"""

from __future__ import annotations

import datetime
import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from gpu_launcher.processes import job_channel
from gpu_launcher.processes.rank_decisions import RankDecisions, is_later_rank
from gpu_launcher.studies.rank_reporters import DetachedReporter, FollowerReporter, MainReporter, NullReporter, Reporter
from gpu_launcher.studies.trial_attrs import PREFIX

if TYPE_CHECKING:
    from gpu_launcher.studies.worker_trial import WorkerTrial

STEP_LIMIT = 2**31
"""Steps must be less than this, because databases store them as 32-bit integers."""
MAX_NAME_LENGTH = 512
"""Maximum number of characters of a user attribute's name. A longer one would fail in the head, for all trials."""


@dataclass(frozen=True, slots=True)
class TrialInfo:
    """What a job knows about its trial from the beginning."""

    number: int
    study: str
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    user_attrs: dict[str, Any]
    datetime_start: datetime.datetime | None
    prunes: bool
    """Whether the study has a pruner."""
    directions: tuple[int, ...]
    """As the values of optuna.study.StudyDirection."""


class RemoteTrial(BaseTrial):
    """A trial whose study is in another process.

    A copied or unpickled trial is what `current_trial` returns in the process that copies or unpickles it.
    """

    def __init__(self, info: TrialInfo) -> None:
        self._info = info

    def __reduce__(self) -> tuple[Any, ...]:
        return current_trial, ()

    @property
    def number(self) -> int:
        """The trial's number in its study. In a sweep, it is also the job's."""
        return self._info.number

    @property
    def study_name(self) -> str:
        """The name of the trial's study."""
        return self._info.study

    @property
    def datetime_start(self) -> datetime.datetime | None:
        """When the trial was asked for."""
        return self._info.datetime_start

    @overload
    def suggest_categorical(self, name: str, choices: Sequence[None]) -> None: ...
    @overload
    def suggest_categorical(self, name: str, choices: Sequence[bool]) -> bool: ...
    @overload
    def suggest_categorical(self, name: str, choices: Sequence[int]) -> int: ...
    @overload
    def suggest_categorical(self, name: str, choices: Sequence[float]) -> float: ...
    @overload
    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str: ...
    @overload
    def suggest_categorical(self, name: str, choices: Sequence[CategoricalChoiceType]) -> CategoricalChoiceType: ...
    def suggest_categorical(self, name: str, choices: Sequence[CategoricalChoiceType]) -> CategoricalChoiceType:
        """See `BaseTrial`. The returned value equals one of the `choices` and may be a copy of it."""
        value: CategoricalChoiceType = self._choose(name, choices)
        return value

    @abstractmethod
    def _choose(self, name: str, choices: Sequence[CategoricalChoiceType]) -> Any:
        """See `suggest_categorical`."""

    def _refuse_several_objectives(self, method: str) -> None:
        if len(self._info.directions) > 1:
            raise NotImplementedError(f"Trial.{method} is not supported for multi-objective optimization.")


class JobTrial(RemoteTrial):
    """The trial of a job of `hydra/sweeper=optuna_async`, as `gpu_launcher.current_trial` returns it there.

    Its parameters are fixed: `suggest_*` returns the job's value. It raises ValueError for a parameter that the job
    does not have, and for a distribution that does not contain the value.

    In other processes of the job it is a view of the same trial: the later ranks of a distributed job follow the first.
    Several threads may use it, and it works after a fork.
    """

    def __init__(self, info: TrialInfo, reporter: Reporter) -> None:
        super().__init__(info)
        self._reporters = (os.getpid(), reporter)
        self._user_attrs = dict(info.user_attrs)

    @property
    def _reporter(self) -> Reporter:
        """The reporter of this process. It changes after a fork."""
        process, reporter = self._reporters
        if process != os.getpid():
            reporter = _trial_of_job()._reporter
            self._reporters = (os.getpid(), reporter)
        return reporter

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value to the study, such as the validation loss after epoch `step`.

        Raises the same errors as Optuna's own: TypeError if the value is not a number or the step is not an integer,
        ValueError for a negative step, NotImplementedError in a study with several objectives. In the later ranks of a
        distributed job it has no effect, whatever the value, because often only the first rank has the value.
        """
        self._refuse_several_objectives("report")
        reporter = self._reporter
        if not isinstance(reporter, FollowerReporter):
            reporter.report(_number(value), _step(step))

    def should_prune(self) -> bool:
        """Whether this job should end now by raising `optuna.TrialPruned`.

        False if the study has no pruner or nothing has been reported. Waits at most `rank_reporters.VERDICT_SECONDS`
        for the verdict on the last report. If the verdict takes longer, a later call returns it.

        In the later ranks of a distributed job, each call waits for the same call of the first rank and returns its
        result, so all ranks stop at the same step. Call it only in the first rank, or alike in all ranks.
        """
        self._refuse_several_objectives("should_prune")
        return self._info.prunes and self._reporter.should_prune()

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store a user attribute with the trial. Only the job's main process can do this.

        Raises TypeError or ValueError for a value that JSON cannot represent, such as a NumPy number: use `float(...)`.
        Raises ValueError for a name that is too long for databases, or has the prefix of the sweep's own attributes.
        """
        refuse_attribute(key)
        reporter = self._reporter
        if not isinstance(reporter, FollowerReporter):
            reporter.set_user_attr(str(key), value)
            self._user_attrs[str(key)] = value

    @property
    def params(self) -> dict[str, Any]:
        """The values of all parameters by name. The name is the key of the override."""
        return dict(self._info.params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The distribution from which each parameter was sampled, by name."""
        return dict(self._info.distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The user attributes that the trial had when the job began, and those that this job has set."""
        return dict(self._user_attrs)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """See `BaseTrial`."""
        return float(self._settled(name, FloatDistribution(low, high, step=step, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """See `BaseTrial`."""
        return int(self._settled(name, IntDistribution(low, high, step=step, log=log)))

    def _choose(self, name: str, choices: Sequence[CategoricalChoiceType]) -> Any:
        return self._settled(name, CategoricalDistribution(choices))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high, step=q)

    @property
    def system_attrs(self) -> dict[str, Any]:
        """Always empty, because a job knows none. Optuna 4 requires every trial to have this property."""
        return {}

    def set_system_attr(self, key: str, value: Any) -> None:
        """Not supported, because system attributes are the study's own. Optuna 4 requires every trial to have it."""
        raise NotImplementedError("system attributes are the study's own: use set_user_attr")

    def set_constraint(self, key: str, value: float) -> None:
        """Not supported: the sweep gets only what a job reports and returns."""
        raise NotImplementedError("constraints are not supported in a job: return another objective instead")

    def _settled(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._info.params:
            known = ", ".join(self._info.params) or "none"
            raise ValueError(
                f"{name!r} is not a parameter of this sweep (it has {known}): add {name!r} to the search space"
            )
        value = self._info.params[name]
        if not distribution._contains(distribution.to_internal_repr(value)):
            raise ValueError(f"{name!r} is {value!r} in this trial, which {distribution} does not contain")
        return value


class NullTrial(JobTrial):
    """The trial outside a sweep: it ignores reports, is never pruned and has no parameters.

    With it, the same program also runs alone.
    """

    def __init__(self) -> None:
        super().__init__(TrialInfo(0, "", {}, {}, {}, None, prunes=False, directions=(1,)), NullReporter())


def refuse_attribute(key: object) -> None:
    """Raise ValueError for a name that a user's attribute must not have."""
    if (length := len(str(key))) > MAX_NAME_LENGTH:
        raise ValueError(f"the name of a user attribute must have at most {MAX_NAME_LENGTH} characters, got {length}")
    if str(key).startswith(PREFIX):
        raise ValueError(f"names that begin with {PREFIX!r} are reserved, got {key!r}: use another name")


_here: tuple[int, JobTrial] | None = None
"""A process id and the trial of that process. Another process, such as a later fork, ignores it."""
_objectives: tuple[int, WorkerTrial] | None = None
"""The same for a process that runs an objective of `gpu_launcher.optimize`."""


def become(trial: WorkerTrial) -> None:
    """Record that this process runs the objective of `trial`."""
    global _objectives
    _objectives = (os.getpid(), trial)


def current_trial() -> JobTrial | WorkerTrial:
    """The trial of this process's job. Every call returns the same object.

    In the process of an objective that `gpu_launcher.optimize` runs, it is the trial that the objective was called
    with. In a later rank of a distributed Hydra job, it follows the trial of the first rank. In any other process that
    a job started, its reports have no effect. Outside a sweep of `hydra/sweeper=optuna_async` it also has no
    parameters.
    """
    if _objectives is not None and _objectives[0] == os.getpid():
        return _objectives[1]
    return _trial_of_job()


def _trial_of_job() -> JobTrial:
    global _here
    if _here is not None and _here[0] == os.getpid():
        return _here[1]
    channel = job_channel.current()
    decisions = RankDecisions.find() if channel is None else channel.decisions
    if decisions is None or not isinstance(decisions.about, TrialInfo):
        return NullTrial()
    later = None if channel is not None else is_later_rank(decisions.inherited)
    if channel is None and later is None:
        return JobTrial(decisions.about, NullReporter())  # not kept: the process may still learn that it is a rank
    trial = JobTrial(decisions.about, MainReporter(channel) if channel is not None else _rank(decisions, bool(later)))
    _here = (os.getpid(), trial)
    return trial


def _rank(decisions: RankDecisions, later: bool) -> Reporter:
    if later:
        return FollowerReporter(decisions, anew=job_channel.runs_anew())
    return DetachedReporter(decisions) if decisions.become_leader() else NullReporter()


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"The `value` argument is of type {type(value)} but supposed to be a float.") from None
    return math.nan if math.isnan(number) else number


def _step(step: Any) -> int:
    try:
        number = int(step)
    except (TypeError, ValueError):
        raise TypeError(f"The `step` argument is of type {type(step)} but supposed to be an int.") from None
    if not 0 <= number < STEP_LIMIT:
        raise ValueError(f"The `step` argument is {step} but cannot be negative, or {STEP_LIMIT} or more.")
    return number
