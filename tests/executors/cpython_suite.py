"""CPython's own tests of executors, with PoolExecutor in the place of its own; run by test_cpython_suite.py.

    python cpython_suite.py {fork|spawn|nodes} GPUS POOL_DIRECTORY CLASS

runs one class of tests. With `nodes`, calls are forked on two nodes. Where the `test` package is missing, as in many
distributions, it exits with 77.
"""

from __future__ import annotations

import sys
import unittest
from importlib import import_module
from types import ModuleType
from typing import Any

from gpu_launcher.errors import JobError
from gpu_launcher.executors import pool_executor
from gpu_launcher.jobs.where import Where
from gpu_launcher.processes.exceptions import RemoteTraceback

METHOD, GPUS, POOL, NAME = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

try:
    suite = import_module("test.test_concurrent_futures")
except ModuleNotFoundError:
    sys.exit(77)


def part(name: str) -> ModuleType:
    """A module of the suite, which was only one before Python 3.12."""
    return import_module(f"{suite.__name__}.{name}") if hasattr(suite, "__path__") else suite


class PoolExecutor(pool_executor.PoolExecutor):
    """Constructed as the tests construct theirs."""

    def __init__(self, max_workers: int | None = None, mp_context: object = None) -> None:
        pool, nodes = Where("simulated:5", POOL), None
        if METHOD == "nodes":
            pool, nodes = Where("simulated:5"), [f"command:env GPU_LAUNCHER_POOL_DIR={POOL}-{name}" for name in "ab"]
        method = "auto" if METHOD == "nodes" else METHOD
        super().__init__(gpus=GPUS, max_workers=max_workers, pool=pool, start_method=method, nodes=nodes)


class PoolMixin(part("util").ExecutorMixin):
    executor_type = PoolExecutor
    ctx = "fork"  # that of the locks and managers which the tests make


def excluded(reason: str) -> Any:
    """A test that cannot hold for PoolExecutor."""
    return unittest.skip(reason)(lambda self: None)


PRIVATE = "it looks into private attributes of ProcessPoolExecutor"
NO_REUSE = "each call has a process of its own, which is never used again"


class ExecutorTest(part("executor").ExecutorTest, PoolMixin, part("util").BaseTestCase):
    pass


class WaitTest(part("test_wait").WaitTests, PoolMixin, part("util").BaseTestCase):
    pass


class AsCompletedTest(part("test_as_completed").AsCompletedTests, PoolMixin, part("util").BaseTestCase):
    pass


class ProcessPoolTest(part("test_process_pool").ProcessPoolExecutorTest, PoolMixin, part("util").BaseTestCase):
    """The tests that ProcessPoolExecutor has beside those of all executors, which come along with them."""

    def test_traceback(self) -> None:
        # It asks for the very class of the cause, which is private to ProcessPoolExecutor. Ours is another one.
        from concurrent.futures import process

        theirs, process._RemoteTraceback = process._RemoteTraceback, RemoteTraceback
        try:
            super().test_traceback()
        finally:
            process._RemoteTraceback = theirs

    if METHOD != "fork":
        test_ressources_gced_in_workers = excluded(
            "it passes a proxy of a multiprocessing.Manager, whose key only multiprocessing gives to its own processes"
        )
    test_killed_child = excluded(f"{PRIVATE}, and a dead process does not break our executor: it fails one call")
    test_saturation = excluded(PRIVATE)
    test_idle_process_reuse_one = excluded(NO_REUSE)
    test_idle_process_reuse_multiple = excluded(NO_REUSE)
    test_max_tasks_per_child = excluded(NO_REUSE)
    test_max_tasks_per_child_defaults_to_spawn_context = excluded(NO_REUSE)
    test_max_tasks_early_shutdown = excluded(NO_REUSE)
    test_python_finalization_error = excluded("it breaks the start of a second thread, and there is one only")


class ShutdownTest(part("test_shutdown").ExecutorShutdownTest, PoolMixin, part("util").BaseTestCase):
    """The tests that start programs import the executor from concurrent.futures. Ours do all the same with it."""

    def program(self, code: str) -> tuple[int, bytes, bytes]:
        from test.support.script_helper import assert_python_ok

        start = f"""if 1:
            import sys; sys.path[:] = {sys.path!r}; sys.argv[1:] = {sys.argv[1:]!r}
            import atexit
            from time import sleep
            from cpython_suite import PoolExecutor
            from {part("test_shutdown").__name__} import sleep_and_print
        """
        status, out, err = assert_python_ok("-c", f"{start}{code}")
        if METHOD == "nodes" and err.strip() == b"apple":  # what calls print on nodes appears on standard error
            out, err = err, out
        return status, out, err

    def test_interpreter_shutdown(self) -> None:
        _, out, err = self.program("""
            if __name__ == "__main__":
                t = PoolExecutor(5)
                t.submit(sleep_and_print, 1.0, "apple")
            """)
        assert err == b""
        assert out.strip() == b"apple"

    def test_submit_after_interpreter_shutdown(self) -> None:
        _, out, err = self.program("""
            @atexit.register
            def run_last():
                try:
                    t.submit(id, None)
                except RuntimeError:
                    print("runtime-error")
                    raise
            if __name__ == "__main__":
                t = PoolExecutor(5)
                t.submit(id, 42).result()
            """)
        assert b"RuntimeError: cannot schedule new futures" in err
        assert out.strip() == b"runtime-error"

    def test_hang_gh83386(self) -> None:
        # At which ProcessPoolExecutor hangs.
        _, out, err = self.program("""
            if __name__ == "__main__":
                t = PoolExecutor(max_workers=3)
                t.submit(sleep_and_print, 1.0, "apple")
                t.shutdown(wait=False)
            """)
        assert err == b""
        assert out.strip() == b"apple"

    def test_cancel_futures_wait_false(self) -> None:
        # As for ThreadPoolExecutor, since ProcessPoolExecutor often hangs here.
        _, out, err = self.program("""
            if __name__ == "__main__":
                t = PoolExecutor()
                t.submit(sleep_and_print, .1, "apple")
                t.shutdown(wait=False, cancel_futures=True)
            """)
        assert err == b""
        assert out.strip() in [b"apple", b""]


class DeadlockTest(part("test_deadlock").ExecutorDeadlockTest, PoolMixin, part("util").BaseTestCase):
    """Where ProcessPoolExecutor breaks as a whole, our executor fails one call, with JobError."""

    def setUp(self) -> None:
        super().setUp()
        module = part("test_deadlock")
        self.addCleanup(setattr, module, "BrokenProcessPool", module.BrokenProcessPool)
        module.BrokenProcessPool = JobError

    test_shutdown_deadlock_pickle = excluded(PRIVATE)
    test_gh105829_should_not_deadlock_if_wakeup_pipe_full = excluded(PRIVATE)


# Not taken: the tests of `initializer`, which PoolExecutor has not, since no process makes two calls; of Future, which
# is CPython's own; of ThreadPoolExecutor's threads and ProcessPoolExecutor's processes (ProcessPoolShutdownTest), which
# are private: test_pool_executor.py tests the same.

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], NAME], verbosity=2)
