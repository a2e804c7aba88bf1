"""Names of users."""

from __future__ import annotations


def user_name(uid: int) -> str:
    """What people call the user with this id; `uid 1234` for one without an entry in the user database."""
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
