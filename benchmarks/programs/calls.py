"""Calls functions with one executor, by name, and prints what that took as JSON.

python calls.py EXECUTOR WORKERS {empty|sleep} CALLS [SECONDS]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Map = Callable[[Callable[[Any], Any], list[Any]], list[Any]]
"""Calls a function with each of the values; all calls are there from the beginning."""


def empty(number: int) -> int:
    return os.getpid()


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@contextmanager
def gpu_launcher(workers: int, gpus: int = 1, method: str = "fork") -> Iterator[Map]:
    from gpu_launcher import Pool, PoolExecutor

    with tempfile.TemporaryDirectory() as directory:
        pool = Pool(f"simulated:{workers}", directory)
        with PoolExecutor(gpus=gpus, max_workers=workers, pool=pool, start_method=method) as executor:
            yield lambda function, values: list(executor.map(function, values))


@contextmanager
def process_pool(workers: int, method: str, tasks: int | None = None) -> Iterator[Map]:
    more = {} if tasks is None else {"max_tasks_per_child": tasks}
    with ProcessPoolExecutor(workers, mp_context=get_context(method), **more) as executor:
        yield lambda function, values: list(executor.map(function, values))


@contextmanager
def joblib(workers: int) -> Iterator[Map]:
    from joblib import Parallel, delayed

    with Parallel(workers, backend="loky", batch_size=1) as parallel:
        yield lambda function, values: parallel(delayed(function)(value) for value in values)


@contextmanager
def ray(workers: int, calls: int = 0) -> Iterator[Map]:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def run(function: Callable[[Any], Any], values: list[Any]) -> list[Any]:
        remote = ray.remote(num_cpus=1, max_calls=calls)(function)
        return list(ray.get([remote.remote(value) for value in values]))

    yield run
    ray.shutdown()


EXECUTORS: dict[str, Callable[[int], Any]] = {
    "PoolExecutor": gpu_launcher,
    "PoolExecutor, no devices": lambda workers: gpu_launcher(workers, gpus=0),
    "PoolExecutor, spawn": lambda workers: gpu_launcher(workers, method="spawn"),
    "ProcessPoolExecutor, forkserver, a process per call": lambda workers: process_pool(workers, "forkserver", 1),
    "ProcessPoolExecutor, spawn, a process per call": lambda workers: process_pool(workers, "spawn", 1),
    "ProcessPoolExecutor, fork": lambda workers: process_pool(workers, "fork"),
    "joblib": joblib,
    "ray, a process per call": lambda workers: ray(workers, 1),
    "ray": ray,
}


def main() -> None:
    name, workers, what, calls, *rest = sys.argv[1:]
    function, values = (empty, list(range(int(calls)))) if what == "empty" else (sleep, [float(rest[0])] * int(calls))
    began = time.perf_counter()
    with EXECUTORS[name](int(workers)) as run:
        run(empty, [0])
        ready = time.perf_counter()
        pids = run(function, values)
        done = time.perf_counter()
    closed = time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "first": ready - began,
                "wall": done - ready,
                "close": closed - done,
                "cpu": sum(usage.ru_utime + usage.ru_stime for usage in used),
                "processes": len(set(pids)),
            }
        )
    )


if __name__ == "__main__":
    main()
