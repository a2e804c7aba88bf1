"""A map's command, in which parameters replace placeholders. Pure."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpu_launcher.cli.mapping.shell_text import Placeholder, Word, refuse_misplaced
from gpu_launcher.cli.mapping.values import Params, text, to_json
from gpu_launcher.errors import UsageError

OURS = ("json", "flags", "index", "gpu")
"""Placeholders that gpu-launcher defines itself; all others name parameters."""
GPU = "{gpu}"
"""The placeholder for the devices. A run that has none yet is shown with it."""

_SHELL = "/bin/sh"
_VARIABLE = "gpu_launcher_"
"""Prefix of the shell variables that hold values. A number follows."""
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A command with placeholders for parameters."""

    words: tuple[Word, ...]
    shell: bool
    """Whether the command is text for a shell, which gets the values as variables."""

    @classmethod
    def parse(cls, words: Sequence[str], *, shell: bool = False) -> Template:
        """Read a command. Raises UsageError if its placeholders are invalid, or if it has none."""
        if not words:
            raise UsageError("there is no command: give it after the options, as in -- python evaluate.py {flags}")
        parsed = [" ".join(words)] if shell else words
        template = cls(tuple(tuple(_pieces(word)) for word in parsed), shell)
        if not template.names:
            raise UsageError(
                "the command has no placeholder, so that every run would be the same: write {json} for all parameters "
                "as one argument, {flags} for --name value, or {name} for the parameter of that name (quoted where the "
                "shell, as fish does, takes braces for its own)"
            )
        if shell:
            refuse_misplaced(template.words[0])
        for word in () if shell else template.words:
            if len(word) > 1 and Placeholder("flags") in word:
                raise UsageError("{flags} is several arguments, and has to be a word of its own")
        return template

    @property
    def names(self) -> frozenset[str]:
        """The names of all placeholders."""
        return frozenset(piece.name for word in self.words for piece in word if isinstance(piece, Placeholder))

    def problem(self, names: Collection[str]) -> str | None:
        """Why parameters with these names do not fit, as a sentence about the command; None if they do."""
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
        """Why these parameters cannot be filled in, as a sentence; None if they can."""
        if problem := self.problem(params.keys()):
            return problem
        named = params.keys() if "flags" in self.names else self.names & params.keys()
        for name in named:
            if (has := _no_argument(name + text(params[name]))) is not None:
                return f"{name!r} has {has}, which no argument can have: pass it in {{json}}"
        return None

    def fill(self, params: Params, index: int, gpu: str) -> list[str]:
        """The command line of one run as a list. With `shell`, it starts a shell. The parameters must fit."""
        if self.shell:
            return self._script(params, index, gpu)
        arguments: list[str] = []
        for word in self.words:
            if word == (Placeholder("flags"),):
                arguments += flags(params)
            else:
                arguments.append("".join(self._value(piece, params, index, gpu) for piece in word))
        return arguments

    def _script(self, params: Params, index: int, gpu: str) -> list[str]:
        """The command line of a shell: its text, and the values as positional parameters, which no shell parses.

        The text begins by copying them to variables, because functions, `set` and `shift` change positional parameters.
        """
        values: list[str] = []

        def variables(piece: Placeholder) -> str:
            arguments = flags(params) if piece.name == "flags" else [self._value(piece, params, index, gpu)]
            before = len(values)
            values.extend(arguments)
            return " ".join(f'"${{{_VARIABLE}{number + 1}}}"' for number in range(before, len(values)))

        text = "".join(piece if isinstance(piece, str) else variables(piece) for piece in self.words[0])
        if values:
            taken = " ".join(f"{_VARIABLE}{number}=${{{number}}}" for number in range(1, len(values) + 1))
            text = f"{taken}; set --; {text}"
        return [_SHELL, "-c", text, _SHELL, *values]

    def by_hand(self, params: Params, index: int) -> list[str]:
        """The command line of one run for `gpu-launcher run`. Where it names devices, a shell fills them in."""
        if not self.shell and "gpu" not in self.names:
            return self.fill(params, index, "")
        # No argument can contain a null character, and shlex.quote puts what contains one between single quotes.
        return ["sh", "-c", self.line(params, index, "\0").replace("\0", "'\"$CUDA_VISIBLE_DEVICES\"'")]

    def line(self, params: Params, index: int, gpu: str) -> str:
        """The run's command line as users would type it in a shell."""
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


def _no_argument(written: str) -> str | None:
    """The part of a text that no argument can have; None if the text can be an argument."""
    if "\0" in written:
        return "a null character"
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return None


def flags(params: Params) -> Iterable[str]:
    """Yield `--name value` for each parameter.

    True becomes `--name` alone. False and null yield nothing, as for flags that are off by default. A value that
    begins with a dash is attached (`--name=-1`), because it would otherwise be read as an option.
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
            raise UsageError(f"{word!r} has a {match[0]} without its partner: write {{{{ and }}}} for literal braces")
    literal += word[position:]
    if literal or not word:
        yield literal
