"""What the server hears of a process that reads studies, whatever that does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.web.study_process import StudyProcess, UnavailableError

READER = """
import json, sys, time

def main():
    for line in sys.stdin.buffer:
        wanted = json.loads(line)["wanted"]
        if wanted == "end":
            return
        if wanted == "silence":
            time.sleep(600)
        said = wanted * 100_000 if wanted == "much" else wanted
        print(json.dumps({"length": 2, "said": said}), "ok", sep="\\n", end="", flush=True)
"""


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("much", "the reader gave an answer that is too long"),
        ("end", "the reader has ended"),
        ("silence", "the reader did not answer within 10 s"),
    ],
)
def test_a_reader_that_does_not_answer_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, problem: str
) -> None:
    (tmp_path / "read_for_test.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)

    async def ask() -> list[tuple[dict[str, Any], bytes]]:
        process = StudyProcess("the reader", "read_for_test", seconds=10.0, pending=1)
        answers = [await process.ask({"wanted": "this"})]
        with pytest.raises(UnavailableError, match=problem):
            await process.ask({"wanted": wanted})
        answers.append(await process.ask({"wanted": "that"}))
        await process.close()
        return answers

    answers = asyncio.run(asyncio.wait_for(ask(), 100))
    assert answers == [({"length": 2, "said": said}, b"ok") for said in ("this", "that")]
