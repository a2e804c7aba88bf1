"""Registering OmegaConf resolvers under whichever name its release has for that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register a resolver, in the place of one of that name.

    OmegaConf 2.3 means by `register_resolver` another thing, which it deprecates. Later releases deprecate
    `register_new_resolver` instead, with a warning at every start of a Hydra program.
    """
    register: Any = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)
