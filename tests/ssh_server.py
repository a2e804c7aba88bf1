"""A real `sshd` on this machine, for tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.waiting import until

HOSTS = ("node1", "node2")
NEEDS_SSH = pytest.mark.skipif(
    shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None
    or any(shutil.which(tool) is None for tool in ("ssh", "ssh-keygen")),
    reason="needs sshd and ssh",
)


def key(file: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True, timeout=60)
    return file


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def start_server(directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start sshd with the configuration in a directory on some free port."""
    program = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert program is not None
    for _ in range(5):  # another process may take the port
        port = free_port()
        with (directory / "sshd.log").open("wb") as log:
            server = subprocess.Popen(
                [program, "-D", "-e", "-f", directory / "sshd_config", "-p", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda server=server, port=port: server.poll() is not None or answers(port))  # type: ignore[misc]
        if server.poll() is None:
            return server, port
    pytest.skip(f"sshd does not start here: {(directory / 'sshd.log').read_text(errors='replace').strip()[-300:]}")


@dataclass
class Ssh:
    """A running sshd, and what a client needs."""

    directory: Path
    port: int

    def environment(self, home: Path) -> dict[str, str]:
        """An environment whose `ssh` knows `node1` and `node2`. Both are this machine, with pools in `home`."""
        common = (
            f"User {getpass.getuser()}\nHostName 127.0.0.1\nPort {self.port}\nIdentityFile {self.directory}/user_key\n"
            f"IdentitiesOnly yes\nUserKnownHostsFile {self.directory}/known_hosts\nStrictHostKeyChecking yes\n"
        )
        hosts = [f"Host {name}\n{common}SetEnv GPU_LAUNCHER_POOL_DIR={home}/pool-{name}\n" for name in HOSTS]
        (home / "ssh_config").write_text("".join(hosts))
        ssh = home / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shlex.quote(str(shutil.which("ssh")))} -F {home}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        return {"PATH": f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"}


@contextlib.contextmanager
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """Run an sshd that lets this user in."""
    directory = tmp_path_factory.mktemp("sshd")
    host, user = key(directory / "host_key"), key(directory / "user_key")
    (directory / "authorized_keys").write_text(user.with_suffix(".pub").read_text())
    (directory / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {directory}/authorized_keys\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nAcceptEnv GPU_LAUNCHER_POOL_DIR\n"
    )
    if os.geteuid() == 0:  # sshd's directory for privilege separation, which its service makes
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    process, port = start_server(directory)
    try:
        known = " ".join(host.with_suffix(".pub").read_text().split()[:2])
        (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {known}\n")
        ssh = Ssh(directory, port)
        client = tmp_path_factory.mktemp("client")
        path = ssh.environment(client)["PATH"]
        tried = subprocess.run(
            [client / "bin" / "ssh", "-o", "BatchMode=yes", "node1", "true"],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if tried.returncode:
            log = (directory / "sshd.log").read_text(errors="replace")
            pytest.skip(f"this sshd refuses this user: {tried.stderr.strip()[-200:]} {log.strip()[-200:]}")
        yield ssh
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
