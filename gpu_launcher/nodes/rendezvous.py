"""The directory by which a node finds the program that waits for it: addresses, and a key that only this user reads."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.nodes.authentication import KEY_BYTES
from gpu_launcher.safe_files import open_regular, read_all

PREFIX = ".gpu-launcher-sbatch-"
MAX_FILE = 64 * 1024
_SCRIPT = '#!/bin/sh\nexec "$@"\n'
"""What Slurm runs if the user names no script."""


@dataclass(frozen=True, slots=True)
class Contact:
    """Where to connect to, and the key that both ends must have."""

    addresses: tuple[str, ...]
    port: int
    key: bytes


class RendezvousDirectory:
    """A directory of mode 0700 in one that this machine and the node share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_file = path / "key"
        self.script = path / "script"
        self.output = path / "output"
        """What the job prints before its agent is connected."""

    @classmethod
    def create(cls, parent: Path, contact: Contact) -> RendezvousDirectory:
        """Make it. Raises OSError."""
        made = cls(Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))
        content = {"addresses": contact.addresses, "port": contact.port, "key": contact.key.hex()}
        try:
            _write_new(made.key_file, json.dumps(content), 0o600)
            _write_new(made.script, _SCRIPT, 0o700)
        except BaseException:
            made.remove()
            raise
        return made

    @property
    def has_key(self) -> bool:
        """Whether the key is still there. A node that could not connect has removed it."""
        try:
            os.close(open_regular(self.key_file))  # NFS looks again only when a file is opened
        except OSError:
            return False
        return True

    def printed(self, most: int) -> str:
        """Return the end of what the job has printed."""
        with contextlib.suppress(OSError), open(open_regular(self.output), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.read(most).decode(errors="replace")
        return ""

    def remove(self) -> None:
        """Remove the files, and then the directory if nothing else is in it. Idempotent."""
        for file in (self.key_file, self.script, self.output):
            with contextlib.suppress(OSError):
                file.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()


def read_contact(key_file: Path) -> Contact:
    """Read a key file, which must belong to this user alone. Raises OSError and ValueError."""
    with open(open_regular(key_file), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077 or status.st_nlink != 1:
            raise ValueError(f"{key_file} must be a file of this user with mode 0600 and no other name")
        content = read_all(file.fileno(), MAX_FILE)
    try:
        found = json.loads(content)
        contact = Contact(tuple(map(str, found["addresses"])), int(found["port"]), bytes.fromhex(found["key"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key_file} cannot be read: {type(error).__name__}") from None
    if len(contact.key) != KEY_BYTES or not 0 < contact.port < 2**16:
        raise ValueError(f"{key_file} has no key, or no port")
    return contact


def _write_new(path: Path, text: str, mode: int) -> None:
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
