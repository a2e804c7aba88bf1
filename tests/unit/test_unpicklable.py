"""An error about what cannot be pickled names the part, whatever it is in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from gpu_launcher.processes.unpicklable import found_at

LOCK = threading.Lock()


class Model:
    """By value, as what programs define."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def train(self) -> None:
        """Do nothing."""


class Slotted:
    __slots__ = ("lock", "name")

    def __init__(self) -> None:
        self.name = "a"
        self.lock = LOCK


def of_main(source: str, **names: Any) -> Any:
    """The last function that a program's `__main__` with this source defines."""
    namespace = {"__name__": "__main__", "LOCK": LOCK, **names}
    exec(source, namespace)
    return list(namespace.values())[-1]


def closure() -> Callable[[], Any]:
    model = Model(LOCK)
    return lambda: model


def default() -> Callable[..., Any]:
    def train(epochs: int = 3, lock: Any = LOCK, *, other: Any = 1) -> None:
        pass

    return train


def config(**values: Any) -> Any:
    return OmegaConf.create(values, flags={"allow_objects": True})


LOOP: list[Any] = [1]
LOOP.append(LOOP)
LOOP.append(LOCK)

CASES: list[tuple[str, Any, str]] = [
    ("item", [1, {"a": (2, LOCK)}], "value[1]['a'][1]"),
    ("attribute", SimpleNamespace(model=Model(LOCK)), "value.model.lock"),
    ("slots", Slotted(), "value.lock"),
    ("cycle", LOOP, "value[2]"),
    ("config", config(model=config(layers=[1, LOCK])), "value.model.layers[1]"),
    ("config in another", {"cfg": config(lock=LOCK)}, "value['cfg'].lock"),
    ("method", Model(LOCK).train, "value.__self__.lock"),
    ("partial", functools.partial(print, 1, end=LOCK), "value.keywords['end']"),
    ("file", {"log": open("/dev/null", "w")}, "value['log']"),
    ("generator", {"records": (n for n in range(3))}, "value['records']"),
    ("closure", closure(), "model.lock, where model is a variable that <lambda>() uses from around it"),
    ("default", default(), "lock, a parameter of train() with a default"),
    ("global", of_main("def main():\n    return LOCK\n"), "LOCK, a global that main() uses"),
    (
        "global of a helper",
        of_main("def helper():\n    return lambda: net.lock\n\ndef main():\n    helper()\n", net=Model(LOCK)),
        "net.lock, where net is a global that helper() uses",
    ),
    (
        "method of a class of main",
        of_main("class Net:\n    def run(self):\n        return LOCK\n\ndef main():\n    Net().run()\n"),
        "LOCK, a global that Net.run() uses",
    ),
    (
        "attribute with the name of a global",
        of_main("def main():\n    return bad[0], main.LOCK\n", bad=[LOCK]),
        "bad[0], where bad is a global that main() uses",
    ),
]


@pytest.mark.parametrize(("value", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_part_is_named(value: Any, expected: str) -> None:
    assert found_at({"fine": 1, "value": value}) == f" (found at {expected})"


@pytest.mark.parametrize("value", [1, LOCK, [1, config(a=1)], lambda: 1])
def test_nothing_is_named_where_there_is_no_part(value: Any) -> None:
    assert found_at({"value": value}) == ""


def test_what_travels_as_something_else_is_not_named() -> None:
    study = SimpleNamespace(lock=LOCK)
    assert found_at({"value": [study, Model(LOCK)]}, instead={id(study): object}) == " (found at value[1].lock)"
