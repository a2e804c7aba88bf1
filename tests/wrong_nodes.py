"""Nodes that are set up wrongly in ways that users meet, behind a double of `ssh`, and what is said about each."""

from __future__ import annotations

import sys
from pathlib import Path

SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
host=$2 line=$3
case $host in
unknown) echo 'ssh: Could not resolve hostname unknown: Name or service not known' >&2; exit 255 ;;
refused) echo 'ssh: connect to host refused port 22: Connection refused' >&2; exit 255 ;;
locked) echo 'anna@locked: Permission denied (publickey,password).' >&2; exit 255 ;;
stranger) printf 'No ED25519 host key is known\\r\\nHost key verification failed.\\r\\n' >&2; exit 255 ;;
no-python) exec sh -c "/elsewhere$line" ;;
no-package) eval "set -- $line"; shift; exec PYTHON -S -I "$@" ;;
older) exec PYTHON -S -c "OLDER" ;;
motd) echo 'Welcome to gpu2'; echo 'Quota: 93 %' >&2; exec sh -c "$line" ;;
silent) exec sleep 600 ;;
*) exec sh -c "$line" ;;
esac
"""

# Greets as an agent of another version does, and waits for the end of its input.
OLDER = r"""
import os, pickle, struct
hello = pickle.dumps({'versions': {'Python': '2.7'}, 'host': 'older', 'pid': 1, 'python': 'python'})
os.write(1, b'\n\0gpu-launcher agent\0\n' + struct.pack('>Q', len(hello)) + hello)
while os.read(0, 65536):
    pass
"""

WRONG = {
    "ssh:unknown": (
        "did not start (exit status 255): ssh: Could not resolve hostname unknown: Name or service not known",
        "correct the host's name, or add it to ~/.ssh/config",
    ),
    "ssh:refused": (
        "did not start (exit status 255): ssh: connect to host refused port 22: Connection refused",
        "`ssh refused true` must succeed without a question",
    ),
    "ssh:locked": (
        "did not start (exit status 255): anna@locked: Permission denied (publickey,password)",
        "set up a key (`ssh-copy-id`) or ssh-agent, until `ssh locked true` asks for nothing",
    ),
    "ssh:stranger": (
        "did not start (exit status 255): No ED25519 host key is known Host key verification failed",
        "run `ssh stranger true` once, and check the host's key",
    ),
    "ssh:no-python": (
        f"/elsewhere{sys.executable}: not found",
        "install the same environment there, at the same path, or put it on a file system that both share",
    ),
    "ssh:no-package": (
        "did not start (exit status 1): ModuleNotFoundError: No module named 'gpu_launcher'",
        "install gpu-launcher ",
    ),
    "ssh:older": (
        "has Python 2.7, gpu-launcher None, ",
        "install the same versions there",
    ),
    "command:true": (
        "did not start (exit status 0)",
        "the command must run its last arguments as a command line; try `true true`",
    ),
    "command:sh -c 'exec yes'": (
        "did not start, but prints all the time: y y ",
        "the command must run its last arguments as a command line; try `sh -c 'exec yes' true`",
    ),
}
"""What is said about each node: a part of the problem's text, and the start of the remedy."""


def write_ssh(directory: Path) -> None:
    """Write the double of `ssh`."""
    ssh = directory / "ssh"
    directory.mkdir(exist_ok=True)
    older = OLDER.strip().replace("\\", "\\\\")
    ssh.write_text(SSH.replace("PYTHON", sys.executable).replace("OLDER", older))
    ssh.chmod(0o755)
