"""What a job of `sbatch` runs on its node: connects to the bridge, starts the agent, and passes on what either says.

    python -c "... main()" KEY_FILE AGENT ...

It is the main process of the job, so the job ends with it, and Slurm kills all other processes. See `sbatch_bridge`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_launcher.nodes.authenticated_socket import AuthenticatedSocket, FrameKind, connect
from gpu_launcher.nodes.authentication import MAX_CONTENT
from gpu_launcher.nodes.rendezvous import RendezvousDirectory, read_contact

LAST_WORDS_SECONDS = 60.0
"""Maximum seconds to pass on what an agent has said that has ended.

If the bridge's machine is off, the kernel would try that for 15 min, and the job would keep its node."""


def main() -> None:
    """Run the agent with the bridge at its standard input and output."""
    # With --signal=B:TERM, Slurm signals the main process alone. `scancel` also signals the agent; it counts once.
    early: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: early.append(signum))
    key_file, *command = sys.argv[1:]
    try:
        contact = read_contact(Path(key_file))
    except (OSError, ValueError) as error:
        sys.exit(f"the program that asked for this node has ended, or its directory is not shared: {error}")
    try:
        connection = connect(contact.addresses, contact.port, contact.key)
    except ConnectionError as error:
        # Either that program is dead, and this is the last one to see its files, or it tells from this what is wrong.
        RendezvousDirectory(Path(key_file).parent).remove()
        sys.exit(f"cannot connect to the program that asked for this node: {error}")
    with connection:
        status = _run(connection, command, early)
        with contextlib.suppress(OSError):  # the bridge is gone
            connection.send(FrameKind.END, str(status).encode())


def _run(connection: AuthenticatedSocket, command: Sequence[str], early: Sequence[int]) -> int:
    """Run the agent, and return its exit status. It gets the signals that arrive, and the `early` ones before it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as agent:
        assert agent.stdin is not None
        assert agent.stdout is not None
        assert agent.stderr is not None
        signal.signal(signal.SIGTERM, lambda signum, frame: agent.send_signal(signum))
        for signum in early:
            agent.send_signal(signum)
        input_of_agent = os.dup(agent.stdin.fileno())
        agent.stdin.close()
        threading.Thread(target=_pass_on_input, args=(connection, input_of_agent), daemon=True).start()
        threading.Thread(target=_end_after, args=(agent,), daemon=True).start()
        kinds = {agent.stdout.fileno(): FrameKind.DATA, agent.stderr.fileno(): FrameKind.ERRORS}
        poll = select.poll()
        for descriptor in kinds:
            poll.register(descriptor, select.POLLIN)
        with contextlib.suppress(OSError):  # without a connection, the agent sees the end of its input
            while agent.stdout.fileno() in kinds:
                for descriptor, _ in poll.poll():
                    data = os.read(descriptor, MAX_CONTENT - 1)
                    if data:
                        connection.send(kinds[descriptor], data)
                    else:
                        del kinds[descriptor]
                        poll.unregister(descriptor)
        agent.wait()
        os.set_blocking(agent.stderr.fileno(), False)  # jobs that survive have it open
        with contextlib.suppress(OSError):
            while data := os.read(agent.stderr.fileno(), MAX_CONTENT - 1):
                connection.send(FrameKind.ERRORS, data)
        return agent.returncode if agent.returncode >= 0 else 128 - agent.returncode


def _end_after(agent: subprocess.Popen[bytes]) -> None:
    """End this process soon after the agent, even if the bridge takes nothing. A living agent waits for a busy head."""
    agent.wait()
    time.sleep(LAST_WORDS_SECONDS)
    os._exit(1)


def _pass_on_input(connection: AuthenticatedSocket, input_of_agent: int) -> None:
    """Pass on what comes from the bridge until that ends, which ends the input of the agent."""
    with contextlib.suppress(OSError), open(input_of_agent, "wb", buffering=0) as file:
        while True:
            for frame in connection.receive():
                if frame.kind is FrameKind.END:
                    return
                data = frame.data
                while data:
                    data = data[file.write(data) :]
