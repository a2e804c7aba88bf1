"""The launches of a sweep, which its directory names, and the files of that directory.

    <sweep directory>/.gpu_launcher/
        lock                  locked by all processes of the launch that runs jobs here (`jobs.directory`)
        manifest.jsonl        the record of the jobs (`jobs.manifest`)
        launch-<id>.json      names the program that runs jobs here; removed at the end
        launch-<id>.sock      that program's control socket (`jobs.control_socket`); removed at the end
        <number>.<id>.report  the report of a job of that launch (`jobs.reports`)

The module imports little, because commands that only look for sweeps are to start quickly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.safe_files import open_regular
from gpu_launcher.text import one_line

DIRECTORY = ".gpu_launcher"
MANIFEST = "manifest.jsonl"
MAX_LAUNCH_BYTES = 2**20
"""Maximum number of bytes read from a file that names a launch's program."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that has not recorded its end."""

    id: str
    file: Path
    pid: int
    host: str
    command: str
    is_alive: bool | None
    """Whether its program is alive. None if that cannot be known from here."""


def launches_in(directory: Path) -> list[Launch]:
    """Return the launches in `directory` that have not recorded their end."""
    found = []
    for file in sorted((directory / DIRECTORY).glob("launch-*.json")):
        try:
            with open(open_regular(file), "rb") as opened:
                owner = os.fstat(opened.fileno()).st_uid
                content = load_object(opened.read(MAX_LAUNCH_BYTES))
            identity = ProcessIdentity.from_json(content)
            command = one_line(Fields(content).text("command"))
        except (OSError, ValueError):
            continue  # not written by a launch
        id = file.stem.removeprefix("launch-")
        found.append(Launch(id, file, identity.pid, identity.host, command, identity.is_alive(owner)))
    return found


def socket_of(launch: Path) -> Path:
    """Return the path of a launch's control socket. `launch` is the file that names the launch's program."""
    return launch.with_suffix(".sock")


def refuse_if_running(directory: Path, remedy: str) -> None:
    """Raise ManifestError if another program runs jobs in this directory, or may do so. `remedy` says what to do."""
    for launch in launches_in(directory):
        who = f"process {launch.pid} ({launch.command})"
        if launch.is_alive:
            raise ManifestError(f"{directory} is being run by {who}: {remedy}")
        if launch.is_alive is None:
            raise ManifestError(
                f"{directory} may still be run by {who} of {launch.host}, which cannot be seen from here: "
                f"if it has ended, remove {launch.file}"
            )
