"""The command with its placeholders, and what becomes of them. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpu_launcher.cli.mapping.values import Params, text, to_json
from gpu_launcher.errors import OptionError

OURS = ("json", "flags", "index", "gpu")
"""Placeholders that are no parameter's name."""
GPU = "{gpu}"
"""What stands for the devices of a run that has none yet."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class CommandError(OptionError):
    """A command line that cannot be meant. It is about no single option."""

    def __init__(self, problem: str) -> None:
        super().__init__("command", problem)

    def __reduce__(self) -> tuple[type[CommandError], tuple[str]]:
        return CommandError, (self.problem,)

    def __str__(self) -> str:
        return self.problem

    def written(self, spell: object) -> OptionError:
        """See `OptionError`."""
        return self


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stood between braces."""

    name: str


Word = tuple[str | Placeholder, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A command in which parameters are filled in."""

    words: tuple[Word, ...]
    shell: bool
    """Whether the words, joined by spaces, are text for a shell, and values are quoted for it."""

    @classmethod
    def parse(cls, words: Sequence[str], *, shell: bool = False) -> Template:
        """Raises CommandError if the braces make no sense, or there are none."""
        if not words:
            raise CommandError("there is no command: give it after the options, as in -- python evaluate.py {flags}")
        parsed = [" ".join(words)] if shell else words
        template = cls(tuple(tuple(_pieces(word)) for word in parsed), shell)
        if not template.names:
            raise CommandError(
                "the command has no placeholder, so that every run would be the same: write {json} for all parameters "
                "as one argument, {flags} for --name value, or {name} for the parameter of that name (quoted where the "
                "shell, as fish does, takes braces for its own)"
            )
        if shell:
            _refuse_quoted(template.words[0])
        for word in () if shell else template.words:
            if len(word) > 1 and Placeholder("flags") in word:
                raise CommandError("{flags} is several arguments, and has to be a word of its own")
        return template

    @property
    def names(self) -> frozenset[str]:
        """What stands between braces."""
        return frozenset(piece.name for word in self.words for piece in word if isinstance(piece, Placeholder))

    def problem(self, names: Collection[str]) -> str | None:
        """Why parameters of these names do not fit; a sentence about the command."""
        unknown = sorted(name for name in self.names if name not in OURS and name not in names)
        if unknown:
            wanted = ", ".join(f"{{{name}}}" for name in unknown)
            there = f"there are {', '.join(sorted(names))}" if names else "there are none"
            return f"{wanted} in the command names no parameter; {there} (for plain braces write {{{{ and }}}})"
        for name in sorted(self.names & set(OURS)):
            if name in names:
                return f"{{{name}}} could be the parameter {name} or what gpu-launcher calls so: rename the parameter"
        return None

    def misfit(self, params: Params) -> str | None:
        """Why these parameters cannot be filled in; a sentence about the command, or about them."""
        if problem := self.problem(params.keys()):
            return problem
        named = params.keys() if "flags" in self.names else self.names & params.keys()
        for name in named:
            if "\0" in name or "\0" in text(params[name]):
                return f"{name!r} has a null character, which no argument can have: pass it in {{json}}"
        return None

    def fill(self, params: Params, index: int, gpu: str) -> list[str]:
        """The arguments of one run: with `shell`, those of a shell. The parameters must fit."""
        if self.shell:
            return ["/bin/sh", "-c", self.line(params, index, gpu)]
        arguments: list[str] = []
        for word in self.words:
            if word == (Placeholder("flags"),):
                arguments += flags(params)
            else:
                arguments.append("".join(self._value(piece, params, index, gpu) for piece in word))
        return arguments

    def line(self, params: Params, index: int, gpu: str) -> str:
        """What a shell would be given for it."""
        if not self.shell:
            return " ".join(part if part == GPU == gpu else shlex.quote(part) for part in self.fill(params, index, gpu))
        return "".join(self._quoted(piece, params, index, gpu) for piece in self.words[0])

    def _quoted(self, piece: str | Placeholder, params: Params, index: int, gpu: str) -> str:
        if isinstance(piece, str):
            return piece
        if piece.name == "flags":
            return shlex.join(flags(params))
        value = self._value(piece, params, index, gpu)
        return value if value == GPU == gpu else shlex.quote(value)

    def _value(self, piece: str | Placeholder, params: Params, index: int, gpu: str) -> str:
        match piece:
            case Placeholder("json"):
                return to_json(params)
            case Placeholder("index"):
                return str(index)
            case Placeholder("gpu"):
                return gpu
            case Placeholder(name):
                return text(params[name])
            case _:
                return piece


def flags(params: Params) -> Iterable[str]:
    """`--name value` for each parameter.

    `--name` alone for true, nothing for false and null: that is how flags are written which are off by default. A value
    that begins with a dash is attached, or it would be taken for an option.
    """
    for name, value in params.items():
        if value is True:
            yield f"--{name}"
        elif value is not None and value is not False:
            written = text(value)
            yield from (f"--{name}={written}",) if written.startswith("-") else (f"--{name}", written)


def _pieces(word: str) -> Iterator[str | Placeholder]:
    literal, position = "", 0
    for match in _PIECE.finditer(word):
        literal += word[position : match.start()]
        position = match.end()
        if match[1] is not None:
            if literal:
                yield literal
            literal = ""
            yield Placeholder(match[1])
        elif match[0] in ("{{", "}}"):
            literal += match[0][0]
        else:
            raise CommandError(
                f"a {match[0]} stands alone in {word!r}: write {{{{ and }}}} for braces of the command's"
            )
    literal += word[position:]
    if literal or not word:
        yield literal


def _refuse_quoted(word: Word) -> None:
    """A value is quoted for the place where a word may stand. Between quotes of the user's it would not be."""
    quote, escaped = "", False
    for piece in word:
        if isinstance(piece, Placeholder):
            if quote or escaped:
                where = f"between quotes ({quote})" if quote else "behind a backslash"
                raise CommandError(
                    f"{{{piece.name}}} stands {where} in the text for the shell: leave them out, for its value gets "
                    "quotes of its own"
                )
            continue
        for character in piece:
            if escaped:
                escaped = False
            elif character == "\\" and quote != "'":
                escaped = True
            elif quote:
                quote = "" if character == quote else quote
            elif character in "'\"`":
                quote = character
