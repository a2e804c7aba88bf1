"""A job for each way to use worker processes in Python: `+how=...`."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


class Point:
    """A class of `__main__`, pickled on the way to and from the children."""

    def __init__(self, x: int) -> None:
        self.x = x


def negate(point: Point) -> tuple[Point, int, str]:
    return Point(-point.x), os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def tell(queue: Any, point: Point) -> None:
    queue.put(negate(point))


def pool(method: str, points: list[Point]) -> list[Any]:
    with multiprocessing.get_context(method).Pool(2) as workers:
        return workers.map(negate, points)


def executor(method: str, points: list[Point]) -> list[Any]:
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as workers:
        return list(workers.map(negate, points))


def process(method: str, points: list[Point]) -> list[Any]:
    context = multiprocessing.get_context(method)
    answers = []
    for point in points:
        queue = context.Queue()
        child = context.Process(target=tell, args=(queue, point))
        child.start()
        answers.append(queue.get(timeout=60))
        child.join()
        assert child.exitcode == 0
    return answers


def joblib(method: str, points: list[Point]) -> list[Any]:
    from joblib import Parallel, delayed

    return list(Parallel(2, backend=method)(delayed(negate)(point) for point in points))


class Points:
    """A data set whose items name the process that loaded them."""

    def __init__(self, points: list[Point]) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, number: int) -> Any:
        return negate(self.points[number])


def loader(method: str, points: list[Point]) -> list[Any]:
    from torch.utils.data import DataLoader

    items = Points(points)
    return list(DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context=method))  # type: ignore


WAYS = {"pool": pool, "executor": executor, "process": process, "joblib": joblib, "loader": loader}


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> None:
    way, method = cfg.how.split("-")
    found = WAYS[way](method, [Point(1), Point(2), Point(3)])
    answers = {
        "numbers": [point.x for point, _, _ in found],
        "others": [pid != os.getpid() for _, pid, _ in found],
        "masks": [mask == os.environ["CUDA_VISIBLE_DEVICES"] for _, _, mask in found],
    }
    Path(HydraConfig.get().runtime.output_dir, "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
