"""The bridge to a node of Ray: a program whose standard input and output are those of an agent that Ray starts.

    python -c "... main()" OPTIONS [COMMAND ...] AGENT ...

Theory of operation. The head starts one bridge for each node, just as it starts one `ssh`. The bridge connects to the
cluster, has a placement group reserve the node's GPUs, and starts an actor there. The actor runs the agent as a
subprocess with pipes. One call of the actor at a time passes on what came from the head, and another waits for what the
agent writes, so that everything stays in order, and neither side runs ahead of the other.

Ray removes the actor and the placement group when the bridge ends, however it ends. The agent then sees the end of its
input. In an orderly end it is the other way round: the bridge passes on the end of its input, and ends after the agent,
so that no job runs any more when Ray gives the GPUs to others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpu_launcher.nodes.ray_options import (
    ADDRESS_VARIABLE,
    AGENT_END_SECONDS,
    BUSY,
    NEVER,
    NEW_CLUSTER,
    NO_CLUSTER,
    NOT_INSTALLED,
    OTHER_VERSION,
    RUNNING_CLUSTER,
    RayOptions,
    bundle_of,
    can_provide,
    in_words,
    most_of_each,
    read_ray_options,
)

CHUNK = 64 * 1024
"""Maximum number of bytes of one message. Ray puts larger ones into its object store."""
MAX_PORT = 65535
CONNECT_SECONDS = 10.0
"""Maximum seconds to reach the address of a cluster."""
BUSY_SECONDS = 3.0
"""Seconds to wait for resources before saying so."""
MAX_DETAIL = 200
"""Maximum number of characters of a message of Ray. The head keeps 300 of all that the bridge prints."""


def main() -> None:
    """Run an agent on a node of Ray, with the head at standard input and output."""
    output = os.dup(1)
    os.dup2(2, 1)  # what Ray prints must not get into the messages
    bridge = _Bridge(read_ray_options(sys.argv[1:]), output)
    threading.Thread(target=bridge.pass_on_input, daemon=True).start()
    sys.exit(bridge.run())


class _Bridge:
    def __init__(self, options: RayOptions, output: int) -> None:
        self._options = options
        self._output = output
        self._ray: Any = None
        self._actor: Any = None
        self._started = threading.Event()
        """Set when the agent has started."""

    def run(self) -> int | str:
        """Run the agent, and return its exit status, or what is wrong."""
        try:
            import ray
        except ImportError:
            return NOT_INSTALLED
        self._ray = ray
        try:
            self._connect()
            problem = self._start()
            if problem is not None:
                return problem
            self._started.set()
            return self._pass_on_output()
        except ray.exceptions.RayError as error:
            return f"lost the actor that runs the agent: {type(error).__name__}: {_first_line(error)}"
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        address = self._options.address or os.environ.get(ADDRESS_VARIABLE) or RUNNING_CLUSTER
        quietly: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address == NEW_CLUSTER:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report it over the network
            quietly["include_dashboard"] = False
        host, _, port = address.rpartition(":")
        try:
            if host and port.isdecimal():  # Ray itself tries for more than a minute
                if int(port) > MAX_PORT:  # the C library takes it modulo 65536
                    raise ValueError(f"the port must be at most {MAX_PORT}")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            self._ray.init(address=address, **quietly)
        except (OSError, RuntimeError, ValueError) as error:
            what = OTHER_VERSION if "version mismatch" in str(error).lower() else NO_CLUSTER
            sys.exit(f"{what} at {address}: {' '.join(str(error).split())[:MAX_DETAIL]}")

    def _start(self) -> str | None:
        """Reserve resources, and start the agent. Return what is wrong, if anything is."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        machines = [machine["Resources"] for machine in self._ray.nodes() if machine["Alive"]]
        bundle = bundle_of(self._options, machines)
        if not self._options.wait and not can_provide(machines, bundle):
            return f"the Ray cluster {NEVER} {in_words(bundle)}: {most_of_each(machines, bundle)}"
        group = placement_group([bundle], strategy="STRICT_PACK", name="gpu-launcher")
        if not group.wait(BUSY_SECONDS):
            print(f"{BUSY} {in_words(bundle)} free on one machine", file=sys.stderr, flush=True)
            while not group.wait(BUSY_SECONDS):
                pass
        self._ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's Python may lack our package
        resources = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU", "memory")}
        self._actor = (
            self._ray.remote(AgentProcess)
            .options(
                num_gpus=bundle.get("GPU", 0),
                num_cpus=bundle["CPU"],
                memory=bundle.get("memory"),
                resources=resources or None,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote()
        )
        problem: str | None = self._ray.get(self._actor.start.remote(self._options.command, str(Path.cwd())))
        return problem

    def _pass_on_output(self) -> int:
        """Pass on what the agent writes until it has ended, and return its exit status."""
        while True:
            output, errors, status = self._ray.get(self._actor.read.remote())
            for descriptor, data in ((self._output, output), (2, errors)):
                with contextlib.suppress(BrokenPipeError):  # the head is gone, and the agent will see that
                    while data:
                        data = data[os.write(descriptor, data) :]
            if status is not None:
                return int(status)

    def pass_on_input(self) -> None:
        """Pass on what comes from the head until that ends. Then the agent must end, and the bridge with it."""
        while data := os.read(0, CHUNK):
            self._started.wait()
            if not self._tell(self._actor.write.remote(data)):
                return
        if self._started.is_set():
            self._tell(self._actor.end_input.remote())
            time.sleep(AGENT_END_SECONDS)
        os._exit(1)

    def _tell(self, call: Any) -> bool:
        """Wait for a call of the actor. Return whether it succeeded; if not, `run` says why."""
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayError:
            return False
        return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


class AgentProcess:
    """The actor: runs an agent as a subprocess. Ray calls one `read`, and one of the other methods, at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: tuple[str, ...], directory: str) -> str | None:
        """Start the agent, if possible in `directory`. Return what is wrong, if anything is."""
        environment = dict(os.environ)
        with open("/proc/self/environ", "rb") as file:
            if b"OMP_NUM_THREADS=" not in file.read():
                environment.pop("OMP_NUM_THREADS", None)  # Ray sets it for this process, by the number of its CPUs
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=directory if os.path.isdir(directory) else None,  # noqa: PTH112
                env=environment,
            )
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        return None

    def write(self, data: bytes) -> None:
        """Pass on what comes from the head."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # the agent has ended, which `read` says
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]

    def end_input(self) -> None:
        """Close the agent's standard input."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()

    def read(self) -> tuple[bytes, bytes, int | None]:
        """Wait for the agent. Return its output and standard error since the last call, and its exit status, if any."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        assert process.stderr is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not process.stderr.closed:
            poll.register(process.stderr, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        output = errors = b""
        if not process.stderr.closed and process.stderr.fileno() in ready:
            errors = os.read(process.stderr.fileno(), CHUNK)
            if not errors:
                process.stderr.close()
        if process.stdout.fileno() not in ready:
            return b"", errors, None
        output = os.read(process.stdout.fileno(), CHUNK)
        if output:
            return output, errors, None
        with process:  # closes the pipes, and waits
            process.wait()
            if not process.stderr.closed:
                os.set_blocking(process.stderr.fileno(), False)
                with contextlib.suppress(BlockingIOError):  # jobs that survive have it open
                    errors += os.read(process.stderr.fileno(), CHUNK)
        return b"", errors, process.returncode
