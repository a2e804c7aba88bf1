"""Creates Optuna's samplers and pruners from a name, a class name or a `_target_`, and checks their options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

import hydra.utils
from omegaconf import OmegaConf

from gpu_launcher.errors import OptionError

T = TypeVar("T")

_MARKS = ("_target_", "_partial_", "_recursive_", "_convert_", "name")


@dataclass(frozen=True)
class Family(Generic[T]):
    """One kind of object that a config can name: the samplers, or the pruners."""

    option: str
    """The option's name as users write it, such as `hydra.sweeper.sampler`."""
    base: type
    module: ModuleType
    names: Mapping[str, str]
    """Class names by short name, in the order in which messages list them."""
    nested: tuple[str, ...]
    """Options whose values belong to this family, too."""

    def find(self, name: str) -> type[T]:
        """Find a class by its short name or class name. Raises OptionError, which suggests the most similar name."""
        wanted = {short.replace("_", ""): cls for short, cls in self.names.items()}
        found = getattr(self.module, wanted.get(name.lower().replace("_", ""), name), None)
        if isinstance(found, type) and issubclass(found, self.base) and not inspect.isabstract(found):
            return cast("type[T]", found)
        near = difflib.get_close_matches(name.lower(), self.names, 1)
        hint = f"did you mean {near[0]}? Known are" if near else "known are"
        raise OptionError(
            self.option, f"{name!r} is unknown: {hint} {', '.join(self.names)}, Optuna's class names, and any _target_"
        )

    def build(self, cls: type[T], options: Mapping[str, Any], make: Callable[[Any], T]) -> T:
        """Create an object of one of Optuna's classes. An option that is None gets Optuna's default.

        `make` creates nested objects. Raises OptionError.
        """
        known = inspect.signature(cls).parameters
        given = {option: value for option, value in options.items() if value is not None}
        for option in given:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise OptionError(
                    f"{self.option}.{option}", f"{cls.__name__} has no such option: {hint} {', '.join(known)}"
                )
        for option, parameter in known.items():
            if parameter.default is parameter.empty and option not in given:
                if option in self.nested:
                    given[option] = None
                else:
                    raise OptionError(
                        f"{self.option}.{option}",
                        f"{cls.__name__} needs it: give {self.option}={{name: ..., {option}: ...}}",
                    )
        for option, value in given.items():
            if option in self.nested and value is not None:
                given[option] = make(value)
            elif isinstance(value, Mapping) and "_target_" in value:
                given[option] = instantiate(value, f"{self.option}.{option}")
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise OptionError(self.option, f"{cls.__name__} does not take its options: {_one_line(error)}") from error

    def from_target(self, node: Mapping[str, Any], make: Callable[[Any], T]) -> T:
        """Create the object that a node with a `_target_` describes. Raises OptionError."""
        cls = self.class_of(str(node["_target_"]))
        if cls is not None and "_args_" not in node:
            return self.build(cls, own_options(node), make)
        if "name" in node:  # the user replaced a named node, whose options remain as null
            node = {key: value for key, value in node.items() if value is not None}
        made = instantiate({key: value for key, value in node.items() if key not in ("name", "_partial_")}, self.option)
        return self.checked(made)

    def class_of(self, target: str) -> type[T] | None:
        """The class, if the target is one of Optuna's classes in this family; otherwise None."""
        package, _, name = target.rpartition(".")
        found = getattr(self.module, name, None)
        optunas = package == self.module.__name__ or package.startswith(self.module.__name__ + ".")
        ours = optunas and isinstance(found, type) and issubclass(found, self.base)
        return cast("type[T]", found) if ours else None

    def checked(self, made: object) -> T:
        if not isinstance(made, self.base):
            raise OptionError(
                self.option,
                f"a {type(made).__name__} is not a {self.base.__name__}: name one, or give a _target_ of one",
            )
        return cast("T", made)


def own_options(node: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a node, without the keys that name the object."""
    return {key: value for key, value in node.items() if key not in _MARKS}


def plain(node: object) -> Any:
    """A node as a plain mapping, list, string or object, without OmegaConf."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def instantiate(node: Mapping[str, Any], option: str) -> Any:
    """Create the object that the user's config names, with Hydra's `instantiate`. Raises only OptionError."""
    named = tuple(_targets(node))
    # Hydra 1.4 must be told what a config may execute. Hydra 1.3 would pass the list on as an option.
    allowed = {"_execution_whitelist_": named} if hasattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS") else {}
    try:
        return hydra.utils.instantiate({"_convert_": "all", **node}, **allowed)
    except Exception as error:
        raise OptionError(option, f"{named[0]} cannot be made: {_one_line(error)}") from error


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
