"""The study that an objective reaches through a global variable or its closure, and not through its trial.

In the job's process it is a copy, and changes to it would be lost. So it becomes a proxy for the study in the head, as
`trial.study` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optuna

from gpu_launcher.studies.worker_trial import STUDY_ATTRIBUTES, STUDY_METHODS, StudyView, absent

if TYPE_CHECKING:
    _Base = optuna.Study
else:
    _Base = object

_VIEW = "_gpu_launcher_view"
KNOWN_ATTRIBUTES = frozenset(("direction", "directions", "study_name"))
"""Attributes that a view knows without asking the head."""
UNAVAILABLE = frozenset(
    (
        *("add_trial", "add_trials", "ask", "optimize", "set_metric_names", "set_system_attr", "tell"),
        *("_storage", "_thread_local"),  # these would be the copy's
    )
)


class StudyProxy(_Base):
    """Mixin for a study's class that forwards to a view.

    Methods that only read the study's trials, such as `trials_dataframe`, work because the trials come from the view.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in STUDY_ATTRIBUTES or name in STUDY_METHODS or name in KNOWN_ATTRIBUTES:
            return getattr(_view(self), name)
        if name in UNAVAILABLE:
            raise AttributeError(absent(name))
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(absent(name))

    def __reduce_ex__(self, protocol: object) -> Any:
        return _view(self).__reduce__()


def install_proxy(study: optuna.Study, view: StudyView) -> None:
    """Turn `study` into a proxy that answers with the study in the head."""
    if not isinstance(study, StudyProxy):
        study.__class__ = _proxy_class(type(study))
    vars(study)[_VIEW] = view


def unpickled() -> optuna.Study:
    """The placeholder for a study in a fresh interpreter, until it becomes a proxy."""
    kind = _proxy_class(optuna.Study)
    return kind.__new__(kind)


def _proxy_class(kind: type[optuna.Study]) -> type[optuna.Study]:
    return type(kind.__name__, (StudyProxy, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _view(proxy: StudyProxy) -> StudyView:
    view = vars(proxy).get(_VIEW)
    if view is None:
        raise RuntimeError("the study is not available here yet: use it inside the objective")
    assert isinstance(view, StudyView)
    return view
