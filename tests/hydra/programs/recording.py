"""Makes the launcher save its returns in `returns.json`, for the test to read, in a program that imports this."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper

from hydra_plugins.gpu_pool_launcher import _launch

launch = _launch.launch


def recording_launch(*args: Any) -> Sequence[JobReturn]:
    returns = launch(*args)
    Path("returns.json").write_text(json.dumps([describe(job_return) for job_return in returns]))
    return returns


def describe(job_return: JobReturn) -> dict[str, Any]:
    value = job_return._return_value
    described = {
        "overrides": list(job_return.overrides or ()),
        "status": job_return.status.name,
        "type": type(value).__qualname__,
        "working_dir": job_return.working_dir,
    }
    if not isinstance(value, BaseException):
        described["value"] = repr(value)
        described["is_mains"] = getattr(sys.modules["__main__"], type(value).__qualname__, None) is type(value)
    else:
        described["text"] = "".join(traceback.format_exception(type(value), value, value.__traceback__))
    return described


_launch.launch = recording_launch
# Hydra's own sweeper composes all jobs in advance, and runs none if one fails. Other sweepers do not.
if "VALIDATE" not in os.environ:
    Sweeper.validate_batch_is_legal = lambda *args: None
