"""The process that reads the reports of searches. It is started and asked by `study_curves.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu_launcher.errors import StorageError
from gpu_launcher.studies.report_curves import read_curves
from gpu_launcher.text import one_line


def main() -> None:
    """Answer requests until standard input is closed. Each names the directory of a search."""
    for line in sys.stdin.buffer:
        body, problem = b"", None
        try:
            curves, has_more = read_curves(Path(json.loads(line)["directory"]))
            body = json.dumps([[[curve.number, curve.points] for curve in curves], has_more]).encode()
        except StorageError as error:
            problem = one_line(error.problem)  # which may be as long as a name in the database
        head = json.dumps({"length": len(body), "problem": problem})
        sys.stdout.buffer.write(head.encode() + b"\n" + body)
        sys.stdout.buffer.flush()
