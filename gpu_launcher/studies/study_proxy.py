"""The study that an objective has from the program, as one of its globals or in its closure, and not from its trial.

It is a copy there, and changes to it would be lost. So it becomes a proxy for the program's study, as `trial.study` is.
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
SEEN = frozenset(("direction", "directions", "study_name"))
"""What a view knows without asking."""
NOT_HERE = frozenset(
    (
        *("add_trial", "add_trials", "ask", "optimize", "set_metric_names", "set_system_attr", "tell"),
        *("_storage", "_thread_local"),  # the copy's own
    )
)


class StudyProxy(_Base):
    """Mixed into the class of a study; what only reads the study's trials, as `trials_dataframe`, works by that."""

    def __getattribute__(self, name: str) -> Any:
        if name in STUDY_ATTRIBUTES or name in STUDY_METHODS or name in SEEN:
            return getattr(_view(self), name)
        if name in NOT_HERE:
            raise AttributeError(absent(name))
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(absent(name))

    def __reduce_ex__(self, protocol: object) -> Any:
        return _view(self).__reduce__()


def install_proxy(study: optuna.Study, view: StudyView) -> None:
    """Have everything that is asked of this study answered by the program's."""
    if not isinstance(study, StudyProxy):
        study.__class__ = _proxy_class(type(study))
    vars(study)[_VIEW] = view


def unpickled() -> optuna.Study:
    """What a study is in a fresh interpreter, until it becomes a proxy."""
    kind = _proxy_class(optuna.Study)
    return kind.__new__(kind)


def _proxy_class(kind: type[optuna.Study]) -> type[optuna.Study]:
    return type(kind.__name__, (StudyProxy, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _view(proxy: StudyProxy) -> StudyView:
    view = vars(proxy).get(_VIEW)
    if view is None:
        raise RuntimeError("a study can be used by the objective only, and not before it is called")
    assert isinstance(view, StudyView)
    return view
