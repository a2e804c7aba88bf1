"""Hides secrets in text that is shown to other users or written to log files.

Command lines and overrides are shown to all users who wait for the same devices. Text in them that looks like a
password or a key is replaced by `***`. This is only a safety net: a secret in an unexpected form is not recognised, and
every user of a machine can read command lines in /proc.
"""

from __future__ import annotations

import re

HIDDEN = "***"

_SECRETS = frozenset(
    {
        "apikey",
        "authorization",
        "credential",
        "credentials",
        "dsn",
        "passcode",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
    }
)
"""Last words of names whose values are secret."""
_KEYS = frozenset(["access", "account", "api", "auth", "encryption", "private", "secret", "signing"])
"""Words before `key` in such names, as in `api_key`."""
_HARMLESS = re.compile(r"(?i:true|false|null|none|~)|\d{1,3}")
"""Values that are not secret under any name, as in `use_password=true`."""
_LONG = 16
"""Minimum number of characters of a secret `token`. Shorter ones are words of a model's vocabulary."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Repetitions are bounded, so that the time is linear in the length of any text.
_QUOTED = r""""(?:[^"\\]|\\.){0,500}"|'(?:[^'\\]|\\.){0,500}'"""
_ASSIGNMENT = re.compile(
    r"(?P<before>(?<![\w.])(?P<name>[A-Za-z_][\w.@/-]{0,100})"
    r"""(?P<sign>["']?\s{0,3}[=:]\s{0,3}(?:(?:Bearer|Basic|Token)\s+)?|(?<=\w)\s{1,3}))"""
    rf"""(?P<value>{_QUOTED}|[^\s"',&;)}}\]]{{1,500}})"""
)
_SCHEME = re.compile(r"(?P<before>\b(?:Bearer|Basic)\s{1,3})(?P<value>[\w.~+/=-]{8,500})")
# user:password@host; a password may contain slashes and at-signs.
_USERINFO = re.compile(r"(?P<before>\b[a-zA-Z][\w+.-]{0,40}://[^\s:/@?#]{0,100}:)(?P<value>[^\s]{0,200})(?=@)")
# Keys that services issue. They have prefixes so that scanners recognise them.
_ISSUED = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abeprs]-|AKIA|ASIA|AIza|npm_|pypi-)[A-Za-z0-9_-]{12,200}"
    r"|\beyJ[\w-]{8,200}\.[\w-]{8,500}\.[\w-]{0,500}"
)

# The other patterns match only text that contains one of these. Most text does not, and the others are 50 times slower.
_HINT = re.compile(
    r"(?i:pass|pwd|secret|credential|key|token|auth|dsn|bearer|basic|://)"
    r"|hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abeprs]-|AKIA|ASIA|AIza|npm_|pypi-|eyJ"
)


def redact(text: str) -> str:
    """Replace all parts of a text that look like secrets by `***`. Idempotent."""
    if _HINT.search(text) is None:
        return text
    text = _USERINFO.sub(rf"\g<before>{HIDDEN}", text)
    text = _SCHEME.sub(rf"\g<before>{HIDDEN}", text)
    text = _assignments(text)
    return _ISSUED.sub(HIDDEN, text)


def _assignments(text: str) -> str:
    parts, position = [], 0
    while match := _ASSIGNMENT.search(text, position):
        # A value may be the next name, as in `--verbose --password x`.
        end = match.end("before")
        option = match.start() > 0 and text[match.start() - 1] == "-"
        if _is_secret(match["name"], match["sign"], match["value"], option=option):
            parts += [text[position:end], HIDDEN]
            position = match.end()
        else:
            end = max(match.end("name"), match.start() + 1)
            parts.append(text[position:end])
            position = end
    return "".join(parts) + text[position:]


def _is_secret(name: str, sign: str, value: str, *, option: bool) -> bool:
    """Whether a value is secret, as in `db.password=x`, `--api-key x`, `"token": "..."`; not in `max_tokens=5`."""
    if not sign.strip() and not option:
        return False  # two consecutive words of a sentence
    words = [word.lower() for word in _WORD.findall(name)]
    bare = value.strip("\"'")
    if not words or _HARMLESS.fullmatch(bare):
        return False
    last = words[-1]
    if last == "token":
        return name.isupper() or (len(bare) >= _LONG and re.fullmatch(r"[\w.~+/=-]+", bare) is not None)
    if last in _SECRETS or last.endswith(("password", "passwd")):  # one word, as in PGPASSWORD
        return True
    return (last == "key" and len(words) > 1 and words[-2] in _KEYS) or words == ["pass"]
