"""Servers of pages, clients for them, and sweeps for them to show."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.model import Device, DeviceKind
from gpu_launcher.web.catalogue import id_of

REPOSITORY = Path(__file__).parents[2]
CLI = (sys.executable, "-m", "gpu_launcher.cli")
SCRIPT = "<script>alert(1)</script>"
GPU = Device("GPU-1", 1, "a GPU", DeviceKind.GPU)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class WebServer:
    """A running `gpu-launcher web`, and a browser's part of the conversation with it."""

    def __init__(self, directory: Path, *arguments: str, log: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_LAUNCHER", "CUDA"))}
        environ = {**kept, "PYTHONPATH": str(REPOSITORY), "GPU_LAUNCHER_POOL_DIR": str(log.parent / "pool")}
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*CLI, "web", str(directory), "--devices", "simulated:2", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environ,
                text=True,
            )
        self.environ = environ
        self.said: list[str] = []
        assert self.process.stdout is not None
        while not (self.said and "token=" in self.said[-1]):
            line = self.process.stdout.readline()
            assert line, f"the server ended: {log.read_text()}"
            self.said.append(line.strip())
        self.link = self.said[-1]
        url = urlsplit(self.link)
        self.host, self.token = url.netloc, url.query.removeprefix("token=")
        self.address = (url.hostname, url.port)
        self.cookie = ""

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(str(self.address[0]), self.address[1], timeout=200)

    def __call__(
        self,
        path: str,
        method: str = "GET",
        body: str | None = None,
        *,
        cookie: str | None = None,
        origin: str | None = None,
        **headers: str,
    ) -> Reply:
        """Ask as a browser that has followed the link. A header that is empty is not sent."""
        sent = {"Cookie": self.signed_in if cookie is None else cookie, "Origin": origin or ""}
        if method == "POST" and origin is None:
            sent["Origin"] = f"http://{self.host}"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = self.connect()
        try:
            connection.request(method, path, body, {name: value for name, value in sent.items() if value})
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()

    @property
    def signed_in(self) -> str:
        """The cookie that the link gives."""
        if not self.cookie:
            reply = self(f"/?token={self.token}", cookie="none=none")
            assert reply.status == 200, reply
            self.cookie = reply.headers["set-cookie"].partition(";")[0]
        return self.cookie

    def start_map(self, directory: Path, script: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a map whose runs are a shell script, with the parameter `x` as `$0`."""
        command = [*CLI, "map", "--dir", str(directory), *options, "--", "sh", "-c", script, "{x}"]
        with directory.with_suffix(".out").open("wb") as out:
            return subprocess.Popen(command, env=self.environ, stdout=out, stderr=out, cwd=directory.parent)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(100)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@dataclass(frozen=True)
class WrittenSweep:
    directory: Path

    @property
    def url(self) -> str:
        return f"/sweeps/{id_of(self.directory)}"


def write_sweep(directory: Path) -> WrittenSweep:
    """A sweep with six jobs: completed with a log, completed, failed twice alike, and one that was never started."""
    specs = [[f"lr={10.0**-number}", f"name='{SCRIPT}'", "seed=1"] for number in range(5)]
    jobs = [Job(number, "", spec) for number, spec in enumerate(specs)]
    clock = iter(range(1000, 10_000))
    recorder = Recorder(
        directory,
        jobs,
        "train.py",
        how_to_resume="python train.py -m",
        directions=["minimize"],
        wall_clock=lambda: next(clock),
    )
    for number in range(4):
        log = directory / str(number) / "train.log"
        (log.parent / ".hydra").mkdir(parents=True)
        log.write_text(f"\x1b[31mepoch 1\x1b[0m {SCRIPT}\r\nneedle {number}\n")
        (log.parent / ".hydra" / "overrides.yaml").write_text(f"- lr={number}\n- db.password=hunter2\n")
        recorder.handle(JobStarted(0.0, number, "", (GPU,), str(log)))
        failed = number in (2, 3)
        recorder.handle(
            JobEnded(
                0.0,
                number,
                "",
                (GPU,),
                Outcome.FAILED if failed else Outcome.COMPLETED,
                2.0,
                f"raised ValueError: {SCRIPT}" if failed else None,
                str(log),
                figures=Figures({} if failed else {"loss": 0.5 + number}, 2**30, 2**30),
            )
        )
    recorder.close()
    return WrittenSweep(directory)


def write_large_sweep(directory: Path, jobs: int) -> WrittenSweep:
    """A sweep with many jobs, all completed."""
    manifest = directory / DIRECTORY / MANIFEST
    manifest.parent.mkdir(parents=True)

    def line(**event: object) -> str:
        return json.dumps({"format": 1, "launch": "a" * 12, "time": 1e9, **event})

    with manifest.open("w") as file:
        print(line(resume="python train.py -m", directory=str(directory.parent)), file=file)
        for first in range(0, jobs, 256):
            some = range(first, min(first + 256, jobs))
            print(line(planned=[[number, "", [f"lr={number}", "seed=1"], 0] for number in some]), file=file)
        for number in range(jobs):
            log = str(directory / str(number) / "train.log")
            print(line(started=number, attempts=1, devices=["GPU 0"], log=log), file=file)
            print(line(ended=number, outcome="completed", message=None, values={"loss": number}), file=file)
    return WrittenSweep(directory)


def ask_on_socket(path: Path, request: bytes) -> bytes:
    """Send a request to a Unix socket, and return the whole answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(200)
        client.connect(str(path))
        client.sendall(request)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def title_of(reply: Reply) -> str:
    found = re.search(r"<h1>(.*?)</h1>", reply.text, re.DOTALL)
    return found[1] if found else ""
