"""Registers OmegaConf resolvers with the function that the installed release provides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register a resolver, and replace any with the same name.

    In OmegaConf 2.3, `register_resolver` is a different, deprecated function. Later releases deprecate
    `register_new_resolver` instead, with a warning whenever a Hydra program starts.
    """
    register: Any = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)
