"""Programs that start while others are at work on the same pool."""

from __future__ import annotations

import subprocess
import sys

from gpu_launcher.leases import FileLedger, resolve_pool_directory

RESOLVE = """
import sys
from gpu_launcher.leases import resolve_pool_directory
for _ in range(300):
    resolve_pool_directory(sys.argv[1])
"""


def test_a_pool_directory_is_found_usable_while_others_look_at_the_pool(tmp_path):
    directory = resolve_pool_directory(str(tmp_path / "pool"))
    starting = [
        subprocess.Popen([sys.executable, "-c", RESOLVE, str(directory)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    with FileLedger(directory) as ledger:
        while any(process.poll() is None for process in starting):
            assert ledger.snapshot().leases == ()
    for process in starting:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.splitlines()[-1]
