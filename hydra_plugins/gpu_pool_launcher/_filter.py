"""Evaluates `hydra.sweeper.filter`, an expression such as `batch * accumulate <= 512`, for the values of one job.

The expression has Python's syntax and meaning, as far as it goes: numbers, text, true, false, null and lists, keys of
overrides, comparisons, `in`, arithmetic, `and`, `or`, `not` and parentheses. Python's own parser reads it, but it is
never executed: each node of the syntax tree becomes one of the functions below, and a node that has none is refused.
So an expression cannot call, import or change anything. The limits keep its time and memory small: it has no loops,
and no number in it can grow beyond `MAX_BITS`.

Where Python would guess, it is stricter. Numbers are not truth values, and truth values are not numbers.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gpu_launcher.errors import OptionError
from gpu_launcher.text import short_repr

OPTION = "hydra.sweeper.filter"
MAX_LENGTH = 2000
"""Maximum number of characters of an expression."""
MAX_DEPTH = 50
"""Maximum depth of its syntax tree."""
MAX_BITS = 4096
"""Maximum size of an integer that multiplication and power may give, in bits."""

Values: TypeAlias = Mapping[str, Any]
_Evaluate: TypeAlias = Callable[[Values], Any]

_WORDS = {"true": True, "false": False, "null": None}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_INSTEAD = {
    ast.Call: "functions cannot be called",
    ast.Subscript: "values cannot be indexed",
    ast.IfExp: "there is no if: use and, or, not",
    ast.Is: "write == instead of is",
    ast.IsNot: "write != instead of is not",
    ast.BitAnd: "write and instead of &",
    ast.BitOr: "write or instead of |",
    ast.Invert: "write not instead of ~",
}
_OFFERS = "use numbers, text in quotes, keys, comparisons, in, + - * / // % **, and, or, not and parentheses"


@dataclass(frozen=True)
class Filter:
    """An expression over the values of a job's overrides."""

    text: str
    names: tuple[str, ...]
    """The keys whose values it uses, in the order of their first use."""
    _evaluate: _Evaluate

    def keeps(self, values: Values) -> bool:
        """Whether a job with these values is to run. Raises OptionError if the expression does not fit the values."""
        try:
            kept = self._evaluate(values)
            if not isinstance(kept, bool):
                raise _MisfitError(
                    f"gives {_shown(kept)}, which is neither true nor false: compare it, as in ... <= 512"
                )
        except _MisfitError as misfit:
            job = " ".join(f"{name}={short_repr(values[name])}" for name in self.names if name in values)
            raise OptionError(OPTION, f"{self.text}: {misfit}" + (f" (for {job})" if job else "")) from None
        return kept

    def check_names(self, known: Sequence[str]) -> None:
        """Raise OptionError if the expression uses a key that is not among these."""
        for name in self.names:
            if name not in known:
                keys = ", ".join(sorted(known)) or "none"
                raise OptionError(
                    OPTION,
                    f"{self.text}: {name} is not the key of an override (there are: {keys}): add it, as in "
                    f"{name}=VALUE, or put text in quotes",
                )


class _MisfitError(Exception):
    """The expression does not fit the values."""


def read_filter(text: str) -> Filter:
    """Read an expression. Raises OptionError that names the position of a mistake."""
    text = " ".join(text.split("\n")).strip()
    if not text:
        raise OptionError(OPTION, "is empty: give an expression such as batch * accumulate <= 512, or null")
    if len(text) > MAX_LENGTH:
        raise OptionError(OPTION, f"has {len(text)} characters: {MAX_LENGTH} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about text such as "\d", which is as good as any
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        at = error.offset or 0
        where = f"at character {at}" if 0 < at <= len(text) else "at the end"
        raise OptionError(OPTION, f"{text}: {error.msg} {where}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # a null byte, or too deep for Python
        raise OptionError(OPTION, f"{text}: cannot be read: {error or 'it is nested too deeply'}") from None
    names: dict[str, None] = {}
    evaluate = _ExpressionReader(text, names).read(tree, 0)
    return Filter(text, tuple(names), evaluate)


@dataclass(frozen=True)
class _ExpressionReader:
    """Turns the nodes of a syntax tree into functions of the values."""

    text: str
    names: dict[str, None]

    def read(self, node: ast.expr, depth: int) -> _Evaluate:
        if depth > MAX_DEPTH:
            raise OptionError(OPTION, f"{self.text}: is nested too deeply: {MAX_DEPTH} levels at most")
        depth += 1
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return lambda _: value
            case ast.Name(id=word) if word in _WORDS:
                return lambda _: _WORDS[word]
            case ast.Name() | ast.Attribute():
                return self._key(node)
            case ast.List(elts=items):
                return _sequence(list, [self.read(item, depth) for item in items])
            case ast.Tuple(elts=items):
                return _sequence(tuple, [self.read(item, depth) for item in items])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._not(self._truth(operand, depth))
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                return self._signed(node, isinstance(sign, ast.USub), self.read(operand, depth))
            case ast.BoolOp(op=op, values=operands):
                return self._junction(isinstance(op, ast.And), [self._truth(one, depth) for one in operands])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(node, type(op), self.read(left, depth), self.read(right, depth))
            case ast.Compare(left=left, ops=ops, comparators=others) if not any(type(op) in _INSTEAD for op in ops):
                sides = [self.read(one, depth) for one in (left, *others)]
                return self._comparison(node, [type(op) for op in ops], sides)
        raise self._unsupported(node)

    def _unsupported(self, node: ast.expr) -> OptionError:
        parts = [node, *ast.iter_child_nodes(node)]
        why = next((_INSTEAD[type(part)] for part in parts if type(part) in _INSTEAD), _OFFERS)
        where = f"{self._source(node)!r} at character {self._column(node)}"
        return OptionError(OPTION, f"{self.text}: {where} is not supported: {why}")

    def _source(self, node: ast.expr) -> str:
        source = ast.get_source_segment(self.text, node) or self.text
        return source if len(source) <= 60 else f"{source[:57]}..."

    def _column(self, node: ast.expr) -> int:
        return len(self.text.encode()[: node.col_offset].decode()) + 1  # Python counts bytes, from 0

    def _key(self, node: ast.Name | ast.Attribute) -> _Evaluate:
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise self._unsupported(node)
        name = ".".join((inner.id, *reversed(parts)))
        self.names[name] = None

        def value(values: Values) -> Any:
            if name not in values:
                raise _MisfitError(f"the job has no {name}")
            found = values[name]
            if isinstance(found, str) and "${" in found:
                raise _MisfitError(f"the value of {name} is an interpolation, which only the job resolves")
            return found

        return value

    def _truth(self, node: ast.expr, depth: int) -> Callable[[Values], bool]:
        evaluate = self.read(node, depth)

        def truth(values: Values) -> bool:
            value = evaluate(values)
            if not isinstance(value, bool):
                raise _MisfitError(f"{self._source(node)!r} must be true or false here, got {_shown(value)}")
            return value

        return truth

    def _not(self, operand: Callable[[Values], bool]) -> _Evaluate:
        return lambda values: not operand(values)

    def _junction(self, every: bool, operands: list[Callable[[Values], bool]]) -> _Evaluate:
        combine = all if every else any
        return lambda values: combine(operand(values) for operand in operands)

    def _signed(self, node: ast.expr, minus: bool, operand: _Evaluate) -> _Evaluate:
        def signed(values: Values) -> Any:
            value = operand(values)
            if not _is_number(value):
                raise _MisfitError(f"{self._source(node)!r} needs a number, got {_shown(value)}")
            return -value if minus else +value

        return signed

    def _arithmetic(self, node: ast.expr, op: type[ast.operator], left: _Evaluate, right: _Evaluate) -> _Evaluate:
        apply = _ARITHMETIC[op]

        def compute(values: Values) -> Any:
            one, other = left(values), right(values)
            for value in (one, other):
                if not _is_number(value):
                    raise _MisfitError(f"{self._source(node)!r} needs numbers, got {_shown(value)}")
            if op in (ast.Mult, ast.Pow) and _too_large(op, one, other):
                raise _MisfitError(f"{self._source(node)!r} is too large")
            try:
                result = apply(one, other)
            except ZeroDivisionError:
                raise _MisfitError(f"{self._source(node)!r} divides by zero") from None
            except OverflowError:
                raise _MisfitError(f"{self._source(node)!r} is too large") from None
            if isinstance(result, complex):
                raise _MisfitError(f"{self._source(node)!r} is a root of a negative number")
            return result

        return compute

    def _comparison(self, node: ast.expr, ops: list[type[ast.cmpop]], operands: list[_Evaluate]) -> _Evaluate:
        first, *others = operands

        def compare(values: Values) -> bool:
            left = first(values)
            for op, operand in zip(ops, others, strict=True):
                right = operand(values)
                if not self._holds(node, op, left, right):
                    return False
                left = right
            return True

        return compare

    def _holds(self, node: ast.expr, op: type[ast.cmpop], left: Any, right: Any) -> bool:
        if op is ast.Eq or op is ast.NotEq:
            return (left == right) is (op is ast.Eq)
        if op is ast.In or op is ast.NotIn:
            if not (isinstance(right, (list, tuple)) or (isinstance(right, str) and isinstance(left, str))):
                raise _MisfitError(f"{self._source(node)!r} cannot look for {_shown(left)} in {_shown(right)}")
            return (left in right) is (op is ast.In)
        both = [_is_number(one) for one in (left, right)], [isinstance(one, str) for one in (left, right)]
        if not any(map(all, both)):
            raise _MisfitError(f"{self._source(node)!r} cannot compare {_shown(left)} with {_shown(right)}")
        return _ORDER[op](left, right)


def _sequence(kind: type[list[Any]] | type[tuple[Any, ...]], items: list[_Evaluate]) -> _Evaluate:
    return lambda values: kind(item(values) for item in items)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _too_large(op: type[ast.operator], one: Any, other: Any) -> bool:
    """Whether an integer would get more bits than allowed."""
    if not (isinstance(one, int) and isinstance(other, int)):
        return False
    if op is ast.Mult:
        return one.bit_length() + other.bit_length() > MAX_BITS
    return other > 0 and abs(one) > 1 and one.bit_length() * other > MAX_BITS


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kind = "the text " if isinstance(value, str) else ""
    return f"{kind}{short_repr(value)}"
