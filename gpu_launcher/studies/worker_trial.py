"""The trial of an objective that runs in its own process. It forwards calls to the head, which has the study."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalChoiceType
from optuna.study import StudyDirection

from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException
from gpu_launcher.processes.worker import JobContext
from gpu_launcher.studies.optimize_messages import Answer, Call, ObjectiveEnding, Ping, ShouldPrune, unpack
from gpu_launcher.studies.rank_reporters import Intermediate
from gpu_launcher.studies.trial import RemoteTrial, TrialInfo, _number, _step, current_trial, refuse_attribute

STUDY_ATTRIBUTES = frozenset(
    ("best_params", "best_trial", "best_trials", "best_value", "metric_names", "trials", "user_attrs")
)
STUDY_METHODS = frozenset(("enqueue_trial", "get_trials", "set_user_attr", "stop"))
TRIAL_ATTRIBUTES = frozenset(
    ("constraints", "distributions", "params", "relative_params", "system_attrs", "user_attrs")
)
TRIAL_METHODS = frozenset(
    (
        *("suggest_float", "suggest_int", "suggest_categorical"),
        *("suggest_uniform", "suggest_loguniform", "suggest_discrete_uniform"),
        *("set_user_attr", "set_system_attr", "set_constraint"),
    )
)

MAX_UNANSWERED = 200
"""Maximum number of a trial's reports that the head may still have to handle. The next report waits for the head.

Otherwise a trial that reports in a tight loop would delay all others, whose calls would wait behind its reports.
"""


class ObjectiveChannel:
    """The objective's channel to the head. Threads of the job's process may use it; processes that it forks may not."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._calls = 0
        self._unanswered = 0
        """The number of reports since the last answer."""
        self.trial = -1
        """The trial's number."""
        self.known = dict(pickling.main_namespace())
        """The contents of the head's `__main__` by name, as this process had them before the objective ran."""

    @property
    def mine(self) -> bool:
        """Whether this process may use the channel."""
        return os.getpid() == self._process

    def hear(self) -> Any:
        """Wait for the next message from the head."""
        return self._context.hear()

    def say(self, what: ObjectiveEnding) -> None:
        """Send a message that has no answer."""
        with self._lock:
            self._context.say(what)

    def report(self, report: Intermediate) -> None:
        """Send a report. If the head may still have to handle `MAX_UNANSWERED` others, wait for it first."""
        with self._lock:
            if self._unanswered == MAX_UNANSWERED:
                self._ask(Ping)
            self._unanswered += 1
            self._context.say(report)

    def call(self, target: str, name: str, *positional: Any, **named: Any) -> Any:
        """Call a method, or read an attribute, of the trial or study in the head. Raises what it raises."""
        arguments = pickling.dump((positional, named), self.known)
        return self._ask(lambda number: Call(number, target, name, arguments))

    def should_prune(self) -> bool:
        """Whether the trial is to be pruned, judged by all that it has reported."""
        return bool(self._ask(ShouldPrune))

    def _ask(self, question: Callable[[int], Call | Ping | ShouldPrune]) -> Any:
        if not self.mine:
            raise RuntimeError(
                "the trial can be used only in the process that runs the objective: call it there, then pass values on"
            )
        with self._lock:
            self._calls += 1
            number = self._calls
            self._context.say(question(number))
            while True:
                answer = self._context.hear()
                # Other answers belong to calls that a KeyboardInterrupt ended.
                if isinstance(answer, Answer) and answer.call == number:
                    break
            self._unanswered = 0
        if isinstance(answer.result, PortableException):
            raise unpack(answer.result, self.trial)
        return pickling.load(answer.result)


class WorkerTrial(RemoteTrial):
    """The trial of an objective that `gpu_launcher.optimize` runs, used like Optuna's own.

    `suggest_*`, attributes and constraints are those of the trial in the head, so everything behaves as in Optuna,
    including errors. `report` costs one message, and waits only if the head has `MAX_UNANSWERED` to handle. Everything
    else costs a round trip to the head, and waits while the head samples for another trial or runs a callback.

    Several threads may use it. In processes that the objective starts, `report` has no effect, `should_prune` returns
    False, and everything that needs the head raises RuntimeError.
    """

    def __init__(self, info: TrialInfo, channel: ObjectiveChannel) -> None:
        super().__init__(info)
        self._channel = channel
        channel.trial = info.number
        self._reported: set[int] = set()
        self._study = StudyView(info, channel)

    @property
    def study(self) -> StudyView:
        """A view of the study, which is in the head."""
        return self._study

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """See `optuna.trial.Trial`."""
        value: float = self._call("suggest_float", name, low, high, step=step, log=log)
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """See `optuna.trial.Trial`."""
        value: int = self._call("suggest_int", name, low, high, step=step, log=log)
        return value

    def _choose(self, name: str, choices: Sequence[CategoricalChoiceType]) -> Any:
        return self._call("suggest_categorical", name, tuple(choices))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        value: float = self._call("suggest_uniform", name, low, high)
        return value

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        value: float = self._call("suggest_loguniform", name, low, high)
        return value

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Deprecated by Optuna in favour of `suggest_float`."""
        value: float = self._call("suggest_discrete_uniform", name, low, high, q)
        return value

    def report(self, value: float, step: int) -> None:
        """See `optuna.trial.Trial`. Sends one message. Waits only as `ObjectiveChannel.report` says."""
        self._refuse_several_objectives("report")
        number, whole = _number(value), _step(step)
        if whole in self._reported:
            warnings.warn(
                f"The reported value is ignored because this `step={whole}` is already reported.", stacklevel=2
            )
            return
        self._reported.add(whole)
        if self._channel.mine:
            self._channel.report(Intermediate(whole, number))

    def should_prune(self) -> bool:
        """See `optuna.trial.Trial`. Waits for the verdict on everything reported so far."""
        self._refuse_several_objectives("should_prune")
        return self._info.prunes and self._channel.mine and self._channel.should_prune()

    def set_user_attr(self, key: str, value: Any) -> None:
        """See `optuna.trial.Trial`. Raises ValueError for a name that is too long for databases or reserved for us."""
        refuse_attribute(key)
        self._call("set_user_attr", key, value)

    def set_system_attr(self, key: str, value: Any) -> None:
        """Deprecated by Optuna. Only Optuna 4 has it."""
        self._call("set_system_attr", key, value)

    def set_constraint(self, key: str, value: float) -> None:
        """See `optuna.trial.Trial`. Available from Optuna 5."""
        self._call("set_constraint", key, value)

    @property
    def params(self) -> dict[str, Any]:
        """The values of the parameters suggested so far, by name."""
        return dict(self._call("params"))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The distribution from which each parameter was sampled, by name."""
        return dict(self._call("distributions"))

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The trial's user attributes so far."""
        return dict(self._call("user_attrs"))

    @property
    def system_attrs(self) -> dict[str, Any]:
        """Deprecated by Optuna. Only Optuna 4 has it."""
        return dict(self._call("system_attrs"))

    @property
    def constraints(self) -> dict[str, float]:
        """The trial's constraints so far. Available from Optuna 5."""
        return dict(self._call("constraints"))

    @property
    def relative_params(self) -> dict[str, Any]:
        """The values of the parameters that the sampler chose together, by name."""
        return dict(self._call("relative_params"))

    @property
    def storage(self) -> Any:
        """Not available here."""
        raise AttributeError(
            "the trial has neither 'storage' nor '_trial_id' here, because only the program that called optimize uses "
            "the study's storage: use other methods of the trial, or a callback, which runs in the program"
        )

    _trial_id = storage

    def _call(self, name: str, *positional: Any, **named: Any) -> Any:
        return self._channel.call("trial", name, *positional, **named)


class StudyView:
    """`trial.study` in an objective: the part of a study that objectives and Optuna's integrations use.

    It has the name, the directions, `trials`, `best_*`, `user_attrs` and `metric_names`, and the methods `stop`,
    `get_trials`, `enqueue_trial` and `set_user_attr`.
    """

    def __init__(self, info: TrialInfo, channel: ObjectiveChannel) -> None:
        self._channel = channel
        self.study_name = info.study
        self.directions = [StudyDirection(direction) for direction in info.directions]

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (current_trial(), "study")

    @property
    def direction(self) -> StudyDirection:
        """The direction of a study with one objective. Raises RuntimeError if there are several, as Optuna does."""
        if len(self.directions) > 1:
            raise RuntimeError("A single direction cannot be retrieved from a multi-objective study.")
        return self.directions[0]

    def __getattr__(self, name: str) -> Any:
        if name in STUDY_ATTRIBUTES:
            return self._channel.call("study", name)
        if name in STUDY_METHODS:
            return lambda *positional, **named: self._channel.call("study", name, *positional, **named)
        raise AttributeError(absent(name))


def absent(name: str) -> str:
    """The message for a study's attribute that is not available in an objective."""
    return (
        f"{name!r} of a study is not available in an objective, which runs in its own process: use a callback, which "
        "runs in the program"
    )
