"""Reads a zipped dimension of a sweep: `name=zip(model=choice(a,b), lr=choice(0.1,0.2))`.

The syntax is that of Hydra's own proposal (docs/design/zipped_sweeps.md in its repository). Hydra's grammar does not
have it, so the command line quotes it: `+name="zip(...)"`. Hydra keeps that as text, and adds it to the sweep's own
config. Jobs never see it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gpu_launcher.errors import SearchSpaceError

from ._exceptions import parser_message
from ._override_text import holds_sweep, unquoted

_FORM = "write name=zip(key=choice(a,b), other=choice(1,2))"
_QUOTED_FORM = 'write +name="zip(key=choice(a,b), other=choice(1,2))"'
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "'\""


@dataclass(frozen=True)
class Zip:
    """A zipped dimension: a name, and rows of overrides that belong together."""

    name: str
    written: str
    """The override as the user wrote it."""
    keys: tuple[str, ...]
    """The members' keys, as in overrides."""
    rows: tuple[tuple[str, ...], ...]
    """The overrides of each row, in the members' order."""
    values: tuple[tuple[Any, ...], ...]
    """Their values."""


def read_zip(text: str, parser: OverridesParser) -> Zip | None:
    """Read an override; None if it is not a zip. Raises SearchSpaceError with a message that ends with the fix."""
    key, _, value = text.partition("=")
    inner = _unquote(value.strip())
    if re.match(r"(shuffle|sort|tag)\s*\(.*\bzip\s*\(", inner, re.DOTALL):
        raise SearchSpaceError(text, f"a zip cannot be within another function: {_FORM}")
    if not re.match(r"zip\s*\(", inner):
        return None
    name = key.removeprefix("+")
    if not _NAME.fullmatch(name):
        raise SearchSpaceError(text, f"{key!r} is not a name for a zip: {_QUOTED_FORM}")
    if not inner.endswith(")"):
        raise SearchSpaceError(text, "the zip does not end with its closing parenthesis: add )")
    members = [_member(text, member, parser) for member in _split(text, inner[inner.index("(") + 1 : -1])]
    if len(members) < 2:
        raise SearchSpaceError(text, f"a zip has at least two members: {_FORM}")
    keys = [member_key for member_key, _ in members]
    if twice := _first_twice(bare(member_key) for member_key in keys):
        raise SearchSpaceError(text, f"{twice} is a member twice: leave out one of them")
    sizes = {member_key: len(found) for member_key, found in members}
    if len(set(sizes.values())) > 1:
        lengths = ", ".join(f"{member_key} has {size}" for member_key, size in sizes.items())
        raise SearchSpaceError(text, f"its members must have the same number of values, but {lengths}")
    columns = [found for _, found in members]
    rows = tuple(
        zip(*([f"{k}={shown}" for shown, _ in column] for k, column in zip(keys, columns, strict=True)), strict=True)
    )
    values = tuple(zip(*([value for _, value in column] for column in columns), strict=True))
    return Zip(name, text, tuple(keys), rows, values)


def check_zips(zips: Iterable[Zip], others: Iterable[str], config: DictConfig | None = None) -> None:
    """Refuse a key that a zip and another dimension both set, and a name that is taken.

    `others` are the keys of all other overrides. `config` is the sweep's own. Raises SearchSpaceError.
    """
    setters = {bare(key): "is also swept or fixed on its own" for key in others}
    taken = set(setters)
    for found in zips:
        if found.name in taken:
            raise SearchSpaceError(found.written, f"{found.name} is also the key of another override: use another name")
        if config is not None and _is_in(config, found):
            raise SearchSpaceError(
                found.written, f"the program's config has {found.name}: use another name for the zip"
            )
        for key in map(bare, found.keys):
            if key in setters:
                raise SearchSpaceError(found.written, f"{key} {setters[key]}: leave out one of them")
            setters[key] = f"is also a member of the zip {found.name}"


def bare(key: str) -> str:
    """A key without its prefix."""
    return key.lstrip("+~")


def _is_in(config: DictConfig, found: Zip) -> bool:
    if found.name in (config.hydra.runtime.choices or {}):
        return True
    there = OmegaConf.select(config, found.name, throw_on_missing=False, throw_on_resolution_failure=False)
    return there is not None and there != _unquote(found.written.partition("=")[2].strip())  # which Hydra added


def _unquote(value: str) -> str:
    quote = value[:1]
    if len(value) < 2 or quote not in _QUOTES or value[-1] != quote:
        return value
    within = value[1:-1]
    return re.sub(rf"(\\+){quote}", lambda found: "\\" * (len(found[1]) // 2) + quote, within).strip()


def _member(text: str, member: str, parser: OverridesParser) -> tuple[str, list[tuple[str, Any]]]:
    """Read one member: its key, and its values with their texts."""
    if "=" not in member or member.lstrip()[:1] in ("", "=", "(", "[", "{", *_QUOTES):
        raise SearchSpaceError(text, f"{member.strip()!r} is not a member: write key=choice(a,b) or key=[a,b] for each")
    written, _, value = member.partition("=")
    member = f"{written.strip()}={value.strip()}"
    override = _parse(text, member, parser)
    key = override.get_key_element()
    if key.startswith("~") or re.match(r"hydra([./@]|$)", bare(key)):
        raise SearchSpaceError(text, f"{key} cannot be a member: only keys of the program's config can")
    if getattr(override.value(), "shuffle", False):
        raise SearchSpaceError(text, f"{key} is shuffled, so its values would not stay with the others: remove shuffle")
    if not (override.is_discrete_sweep() or isinstance(override.value(), list)):
        raise SearchSpaceError(text, f"{member} has no list of values: write {key}=choice(a,b)")
    found = _texts_and_values(text, override)
    if not found:
        raise SearchSpaceError(text, f"{key} has no values: name them, as in {key}=choice(a,b)")
    return key, found


def _texts_and_values(text: str, override: Override) -> list[tuple[str, Any]]:
    value = override.value()
    items = value if isinstance(value, list) else value.list if isinstance(value, ChoiceSweep) else []
    if any(map(holds_sweep, items)):
        raise SearchSpaceError(text, f"{override.input_line} contains another sweep: give single values")
    if isinstance(value, list):
        return [(Transformer.str(item), unquoted(item)) for item in items]
    try:
        return texts_and_values(override)
    except HydraException as error:  # a glob without a config group
        raise SearchSpaceError(text, f"{override.input_line} cannot be enumerated: {error}") from error


def texts_and_values(override: Override) -> list[tuple[str, Any]]:
    """The values of a discrete sweep, each as Hydra's basic sweeper writes it and as a job sees it."""
    if isinstance(override.value(), Glob):
        return [(str(name), str(name)) for name in override.sweep_iterator()]
    return [(Transformer.str(value), unquoted(value)) for value in override.sweep_iterator()]


def _parse(text: str, member: str, parser: OverridesParser) -> Override:
    try:
        (override,) = parser.parse_overrides([member])
    except HydraException as error:
        raise SearchSpaceError(text, f"{member} cannot be read: {parser_message(error)}") from error
    return override


def _split(text: str, inner: str) -> Iterator[str]:
    """Split at the commas that are neither within quotes nor within brackets."""
    depth, start, quote, escaped = 0, 0, "", False
    for at, character in enumerate(inner):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            yield inner[start:at]
            start = at + 1
        if depth < 0:
            raise SearchSpaceError(text, f"there is a {character!r} without its opening: {_FORM}")
    if depth or quote:
        raise SearchSpaceError(text, f"a {'quote' if quote else 'parenthesis'} is not closed: {_FORM}")
    if inner.strip():
        yield inner[start:]


def _first_twice(words: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None
