"""Creates one of Optuna's pruners from `hydra.sweeper.pruner`."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.pruners import BasePruner, NopPruner, PatientPruner

from gpu_launcher.errors import OptionError

from ._classes import Family, own_options, plain

OPTION = "hydra.sweeper.pruner"
_NAMES = {
    "none": "NopPruner",
    "nop": "NopPruner",
    "median": "MedianPruner",
    "hyperband": "HyperbandPruner",
    "asha": "SuccessiveHalvingPruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "patient": "PatientPruner",
    "percentile": "PercentilePruner",
    "threshold": "ThresholdPruner",
    "wilcoxon": "WilcoxonPruner",
}
_PRUNERS: Family[BasePruner] = Family(OPTION, BasePruner, optuna.pruners, _NAMES, ("wrapped_pruner",))


def make_pruner(node: object) -> BasePruner:
    """Create the pruner that a node describes.

    The node is a name (`median`, `MedianPruner`), a mapping with `name` or `_target_` and options, a pruner, or None
    for no pruning. `patient` takes another node as `wrapped`. Raises OptionError.
    """
    node = plain(node)
    if node is None:
        return NopPruner()
    if isinstance(node, str):
        return _PRUNERS.build(_PRUNERS.find(node), {}, make_pruner)
    if not isinstance(node, Mapping):
        return _PRUNERS.checked(node)
    if "_target_" in node:
        return _PRUNERS.from_target(node, make_pruner)
    if not isinstance(node.get("name"), str):
        raise OptionError(OPTION, "the name is missing: give one, such as {name: median, n_startup_trials: 5}")
    cls, options = _PRUNERS.find(node["name"]), own_options(node)
    if cls is PatientPruner and "wrapped" in options:
        options["wrapped_pruner"] = options.pop("wrapped")
    return _PRUNERS.build(cls, options, make_pruner)
