"""The trial that a job sees: what it reports goes over the job's channel, and the verdicts come back over it.

It never touches the study's database, and costs a job one small message for each report.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from gpu_launcher.processes import conversation
from gpu_launcher.processes.conversation import Conversation

PATIENCE = 0.05
"""Seconds for which `should_prune` waits for the verdict on the last report. What comes later counts the next time."""


@dataclass(frozen=True, slots=True)
class TrialSeen:
    """What a job knows of its trial."""

    number: int
    study: str
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    user_attrs: dict[str, Any]
    datetime_start: datetime.datetime | None
    prunes: bool
    """Whether the study has a pruner."""
    objectives: int


# From a job.


@dataclass(frozen=True, slots=True)
class Intermediate:
    """A value reported."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Attribute:
    """A user attribute set."""

    name: str
    value: Any


# To a job.


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to prune, after what was reported up to this step."""

    step: int
    prune: bool


class JobTrial(BaseTrial):
    """The trial of a job of `hydra/sweeper=optuna_async`; what `gpu_launcher.current_trial` returns there.

    Its parameters are settled: `suggest_*` returns what the job has, and raises ValueError for what it has not.
    """

    def __init__(self, seen: TrialSeen, channel: Conversation) -> None:
        self._seen = seen
        self._channel = channel
        self._user_attrs = dict(seen.user_attrs)
        self._reported: int | None = None
        """The step that was reported last."""
        self._judged: int | None = None
        """The step that the latest verdict is about."""
        self._prune = False

    def report(self, value: float, step: int) -> None:
        """Tell the study a value on the way, such as the validation loss after epoch `step`.

        Raises what Optuna's own raises: TypeError for a value that is no number, or a step that is no whole one,
        ValueError for a negative step, NotImplementedError in a study with several objectives.
        """
        if self._seen.objectives > 1:
            raise NotImplementedError("Trial.report is not supported for multi-objective optimization.")
        number = _number(value)
        step = _step(step)
        self._reported = step
        self._channel.say(Intermediate(step, number))
        self._listen(0.0)

    def should_prune(self) -> bool:
        """Whether the study wants this job to end now, by raising `optuna.TrialPruned`.

        False where the study has no pruner, or nothing has been reported. Waits at most `PATIENCE` for the verdict on
        the last report; a verdict that takes longer is heard by a later call.
        """
        if self._seen.objectives > 1:
            raise NotImplementedError("Trial.should_prune is not supported for multi-objective optimization.")
        if not self._seen.prunes or self._reported is None:
            return False
        if self._judged != self._reported:
            self._listen(PATIENCE)
        return self._prune

    def _listen(self, patience: float) -> None:
        for answer in self._channel.hear(patience):
            if isinstance(answer, Verdict):
                self._judged, self._prune = answer.step, self._prune or answer.prune

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store something with the trial. `value` must be one that JSON has."""
        self._user_attrs[key] = value
        self._channel.say(Attribute(key, value))

    @property
    def number(self) -> int:
        """The trial's, which is also the job's."""
        return self._seen.number

    @property
    def study_name(self) -> str:
        """Of the study that the trial belongs to."""
        return self._seen.study

    @property
    def params(self) -> dict[str, Any]:
        """Values of all parameters, by name, which is the key of the override."""
        return dict(self._seen.params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What each was sampled from."""
        return dict(self._seen.distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """Those that it had at its beginning, and what this job has set."""
        return dict(self._user_attrs)

    @property
    def datetime_start(self) -> datetime.datetime | None:
        """When it was asked for."""
        return self._seen.datetime_start

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """See `BaseTrial`."""
        return float(self._settled(name, FloatDistribution(low, high, step=step, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """See `BaseTrial`."""
        return int(self._settled(name, IntDistribution(low, high, step=step, log=log)))

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
        """See `BaseTrial`."""
        value: CategoricalChoiceType = self._settled(name, CategoricalDistribution(choices))
        return value

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        return self.suggest_float(name, low, high, step=q)

    def set_constraint(self, key: str, value: float) -> None:
        """Not supported: the sweep knows of a job what it reports and returns."""
        raise NotImplementedError("constraints are not supported in a job: return another objective instead")

    def _settled(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._seen.params:
            known = ", ".join(self._seen.params) or "none"
            raise ValueError(
                f"{name!r} is not a parameter of this sweep (which has {known}): add it to the sweep's search space"
            )
        value = self._seen.params[name]
        if not distribution._contains(distribution.to_internal_repr(value)):
            raise ValueError(f"{name!r} is {value!r} in this sweep, which {distribution} does not contain")
        return value


class NoTrial(JobTrial):
    """Outside a sweep: nobody hears what is reported, nothing is ever pruned, and there are no parameters.

    So the same program runs alone.
    """

    def __init__(self) -> None:
        super().__init__(TrialSeen(0, "", {}, {}, {}, None, prunes=False, objectives=1), _Nobody())


class _Nobody(Conversation):
    def __init__(self) -> None:
        pass

    def say(self, what: Any) -> bool:
        return False

    def hear(self, patience: float) -> list[Any]:
        return []


_trial: JobTrial | None = None


def current_trial() -> JobTrial:
    """The trial whose job this process is: one object, however often it is asked for.

    Outside a sweep of `hydra/sweeper=optuna_async`, one to which nothing happens.
    """
    global _trial
    channel = conversation.current()
    if channel is None or not isinstance(channel.about, TrialSeen):
        return NoTrial()
    if _trial is None:
        _trial = JobTrial(channel.about, channel)
    return _trial


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
    if number < 0:
        raise ValueError(f"The `step` argument is {step} but cannot be negative.")
    return number
