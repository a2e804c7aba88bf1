"""What is pickled by value in one process is the same in the other, down to what a traceback shows of it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from gpu_launcher.processes import pickling

# Each fails in its line `1 / 0`, and is pickled by value because no module has it by name.


def a_function() -> Callable[[], Any]:
    def fails() -> float:
        return 1 / 0

    return fails


def a_lambda() -> Callable[[], Any]:
    return lambda: 1 / 0


def a_function_in_a_function() -> Callable[[], Any]:
    def fails() -> float:
        def inner() -> float:
            return 1 / 0

        return inner()

    return fails


def a_closure() -> Callable[[], Any]:
    divide = a_lambda()
    return lambda: divide()


def a_partial() -> Callable[[], Any]:
    return functools.partial(lambda zero: 1 / zero, 0)  # 1 / 0


def a_method() -> Callable[[], Any]:
    class Model:
        def fails(self) -> float:
            return 1 / 0

    return Model().fails


def a_class() -> Callable[[], Any]:
    class Model:
        def __init__(self) -> None:
            self.value = 1 / 0

    return Model


def a_property() -> Callable[[], Any]:
    class Model:
        @property
        def value(self) -> float:
            return 1 / 0

    model = Model()
    return lambda: model.value


def a_decorated_static_method() -> Callable[[], Any]:
    def decorated(function: Callable[[], float]) -> Callable[[], float]:
        return functools.wraps(function)(lambda: function())

    class Model:
        @staticmethod
        @decorated
        def fails() -> float:
            return 1 / 0

    return lambda: Model.fails()


def a_comprehension() -> Callable[[], Any]:
    return lambda: [one for one in (1,) if one / 0 > 1]  # 1 / 0


def a_generator() -> Callable[[], Any]:
    def numbers() -> Iterator[float]:
        yield 1
        yield 1 / 0

    return lambda: list(numbers())


def an_async_function() -> Callable[[], Any]:
    async def fails() -> float:
        await asyncio.sleep(0)
        return 1 / 0

    return lambda: asyncio.run(fails())


MAKERS = [
    a_function,
    a_lambda,
    a_function_in_a_function,
    a_closure,
    a_partial,
    a_method,
    a_class,
    a_property,
    a_decorated_static_method,
    a_comprehension,
    a_generator,
    an_async_function,
]


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_code_that_travels_by_value_fails_in_its_file_and_line(maker: Callable[[], Callable[[], Any]]) -> None:
    travelled = pickling.load(pickling.dump(maker()))
    with pytest.raises(ZeroDivisionError) as caught:
        travelled()
    *_, last = traceback.extract_tb(caught.value.__traceback__)
    assert last.filename == __file__
    assert "1 / 0" in (last.line or "") or last.line == "return 1 / zero"
    expected, first = inspect.getsourcelines(maker if maker is not a_closure else a_lambda)
    assert first <= (last.lineno or 0) < first + len(expected)
    assert all(code.co_filename == __file__ for code in codes_in(travelled))


def codes_in(thing: Any) -> list[CodeType]:
    """Of what it is and what that has defined in it."""
    found = [getattr(thing, "__code__", None)]
    for code in found:
        found += [const for const in getattr(code, "co_consts", ()) if isinstance(const, CodeType)]
    return [code for code in found if code is not None]


def test_source_that_is_in_no_file_travels_with_its_code() -> None:
    cell = "<a notebook's cell>"
    source = "def first():\n    return 1\n\ndef second():\n    return first() / 0\n"
    linecache.cache[cell] = (len(source), None, source.splitlines(True), cell)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, cell, "exec"), namespace)
    pickled = pickling.dump(namespace["second"])
    assert pickled.count(b"return 1") == 1, "once for all functions of the cell"
    del linecache.cache[cell]
    with pytest.raises(ZeroDivisionError) as caught:
        pickling.load(pickled)()
    *_, text = traceback.format_tb(caught.value.__traceback__)
    assert f'File "{cell}", line 5, in second\n    return first() / 0' in text
    del linecache.cache[cell]


def test_source_of_a_file_is_left_to_its_file(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("def train():\n    return 'a very long text'.pop()\n")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script.read_text(), str(script), "exec"), namespace)
    linecache.getlines(str(script))
    assert b"].pop" not in pickling.dump(namespace["train"])
