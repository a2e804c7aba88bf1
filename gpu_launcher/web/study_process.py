"""A process that reads studies for the pages, and is killed if it does not answer in time.

A study is data of its owner: it may be broken, huge or made to do harm. Not even opening it is safe in the server: the
owner may replace a file by a FIFO after it was looked at, and SQLite then waits for ever, and with it all who use
SQLite in the same process.

A request is a line of JSON on standard input. Its answer is a line of JSON on standard output, with the body behind it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gpu_launcher.processes.linux import dying_with_parent

ENDING_SECONDS = 2.0
MAX_ANSWER_BYTES = 2**28


class UnavailableError(Exception):
    """The process does not answer, or fails."""


class StudyProcess:
    """A process that is started when it is first asked, and answers one request after another."""

    def __init__(self, name: str, module: str, *arguments: str, seconds: float, pending: int) -> None:
        """`module` has the function `main`. `name` is for messages.

        It has `seconds` for an answer, and refuses more than `pending` requests at a time.
        """
        path = list(filter(None, sys.path))  # nothing is imported from the working directory
        main = f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"
        self._command = (sys.executable, "-c", main, *arguments)
        self._name = name
        self._seconds = seconds
        self._most = pending
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._pending = 0
        self._closed: str | None = None

    async def ask(self, request: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
        """Return an answer and its body. Raises UnavailableError."""
        if self._pending >= self._most:
            raise UnavailableError("the study is being read")
        self._pending += 1
        try:
            async with self._lock:
                return await asyncio.wait_for(self._exchange(request), self._seconds)
        except asyncio.TimeoutError:
            raise UnavailableError(f"{self._name} did not answer within {self._seconds:.0f} s") from None
        except asyncio.CancelledError:
            raise UnavailableError("the server is ending") from None
        except EOFError:
            why = "" if self._closed is None else f": {self._closed}"
            raise UnavailableError(f"{self._name} has ended{why}") from None
        except asyncio.LimitOverrunError:  # a study's name is in a header of an answer, for example
            raise UnavailableError(f"{self._name} gave an answer that is too long") from None
        except OSError as error:
            raise UnavailableError(f"{self._name} has ended: {error}") from None
        finally:
            self._pending -= 1

    async def _exchange(self, request: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
            head = json.loads(await process.stdout.readuntil(b"\n"))
            if head["length"] > MAX_ANSWER_BYTES:
                raise OSError("the answer is too large")
            return head, await process.stdout.readexactly(head["length"])
        except BaseException:  # the rest of this answer would be taken for the next one
            self._kill()
            raise

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *dying_with_parent(self._command, signal.SIGKILL),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        if self._closed is not None:
            process.kill()
        return process

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            # It kills the process, and closes its pipes: asyncio leaves them open if more is in them than it keeps.
            self._process._transport.close()  # type: ignore[attr-defined]
        self._process = None

    async def close(self, why: str = "the server is ending") -> None:
        """End the process, and do not start it again. Requests that have no answer say why."""
        self._closed, process = why, self._process
        self._kill()
        if process is not None:
            with suppress(asyncio.TimeoutError):  # the kernel ends it when what it waits for answers
                await asyncio.wait_for(process.wait(), ENDING_SECONDS)
