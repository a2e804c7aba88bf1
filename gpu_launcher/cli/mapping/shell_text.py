"""Checks that each placeholder in shell text is a word or part of a word. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.errors import UsageError


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A placeholder: the name between a pair of braces."""

    name: str


Word = tuple[str | Placeholder, ...]


# The possible contexts of a character. The first three are commands; parentheses in arithmetic count as arithmetic.
_TOP, _SUBSHELL, _SUBSTITUTION = "", "(", "$("
_SINGLE, _DOUBLE, _BACKQUOTES, _COMMENT, _ARITHMETIC = "'", '"', "`", "#", "(("

_REFUSED = {
    _SINGLE: "between quotes ('): leave them out, for its value is one word as it is",
    _DOUBLE: 'between quotes ("): leave them out, for its value is one word as it is',
    _BACKQUOTES: "between backquotes (`): write $(...)",
    _COMMENT: "in a comment: leave it out",
    _ARITHMETIC: "in arithmetic, which would evaluate its value: compute with a program such as expr or awk",
}
_BEGINS_WORD = frozenset(("", " ", "\t", "\n", ";", "&", "|", "(", ")", "<", ">"))
"""Characters after which `#` begins a comment."""
_ORDINARY = "x"


class _Reader:
    """Follows text as a shell reads it, enough to know where a word is allowed."""

    def __init__(self) -> None:
        self._within = [_TOP]
        self._before = ""
        """The previous character; `_ORDINARY` if that has no effect on the next one."""
        self._escaped = False
        self._lost: str | None = None
        """The construct that it cannot follow, if it has met one."""

    def refusal(self) -> str | None:
        """Why a placeholder is not allowed here, as the rest of a sentence; None if it is allowed."""
        if self._lost is not None:
            return f"behind {self._lost}: put it before that"
        if self._escaped:
            return "behind a backslash: leave that out, for its value is one word as it is"
        if (refused := _REFUSED.get(self._within[-1])) is not None:
            return refused
        if self._before == "$":
            return "behind a $: write ${{NAME}} for a variable of the shell's own, or leave the $ out"
        return None

    def pass_placeholder(self) -> None:
        """Continue after a placeholder that is allowed."""
        self._before = _ORDINARY

    def read(self, character: str) -> None:
        """Continue with the next character."""
        within = self._within[-1]
        if self._escaped:
            self._escaped = False
            if character != "\n":
                self._before = _ORDINARY
            return
        before, self._before = self._before, character
        if character == "\\" and within not in (_SINGLE, _COMMENT):
            self._escaped, self._before = True, before
        elif within == _COMMENT:
            if character == "\n":
                self._within.pop()
        elif within in (_SINGLE, _BACKQUOTES):
            if character == within:
                self._leave()
        elif within == _DOUBLE:
            self._read_double_quoted(character, before)
        elif within == _ARITHMETIC:
            if character == "(":
                self._within.append(_ARITHMETIC)
            elif character == ")":
                self._leave()
        else:
            self._read_text(character, before)

    def _read_double_quoted(self, character: str, before: str) -> None:
        if character == _DOUBLE:
            self._leave()
        elif character == _BACKQUOTES:
            self._within.append(_BACKQUOTES)
        elif character == "(" and before == "$":
            self._within.append(_SUBSTITUTION)

    def _read_text(self, character: str, before: str) -> None:
        if character in (_SINGLE, _DOUBLE, _BACKQUOTES):
            if character == _SINGLE and before == "$":
                self._lost = "$'...', which shells read in different ways"
            self._within.append(character)
        elif character == "#" and before in _BEGINS_WORD:
            self._within.append(_COMMENT)
        elif character == "(":
            if before == "(" and self._within[-1] in (_SUBSHELL, _SUBSTITUTION):
                self._within[-1:] = [_ARITHMETIC, _ARITHMETIC]
            else:
                self._within.append(_SUBSTITUTION if before == "$" else _SUBSHELL)
        elif character == ")" and len(self._within) > 1:
            self._leave()
        elif character == before == "<":
            self._lost = "<<, after which text follows that is not a command"

    def _leave(self) -> None:
        if self._within.pop() != _SUBSHELL:
            self._before = _ORDINARY


def refuse_misplaced(text: Word) -> None:
    """Raise UsageError for a placeholder that the shell would not expand to exactly its value."""
    reader = _Reader()
    for piece in text:
        if isinstance(piece, Placeholder):
            if (refusal := reader.refusal()) is not None:
                raise UsageError(f"{{{piece.name}}} stands {refusal}")
            reader.pass_placeholder()
        else:
            for character in piece:
                reader.read(character)
