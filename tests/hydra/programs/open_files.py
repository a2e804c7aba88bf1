"""A program that opens files of many kinds before the sweep. Each job reads them in its own order and checks them."""

import bz2
import gzip
import os
import random
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import hydra
import numpy as np

CONTENT = random.Random(0).randbytes(100_000)
HERE = Path.cwd()

(HERE / "data.bin").write_bytes(CONTENT)
(HERE / "deleted.bin").write_bytes(CONTENT)
(HERE / "data.gz").write_bytes(gzip.compress(CONTENT))
(HERE / "data.bz2").write_bytes(bz2.compress(CONTENT))
with zipfile.ZipFile(HERE / "data.zip", "w") as archive:
    archive.write(HERE / "data.bin", "data.bin")
with tarfile.open(HERE / "data.tar", "w") as archive:
    archive.add(HERE / "data.bin", "data.bin")
np.save(HERE / "data.npy", np.frombuffer(CONTENT, np.uint8))

FILES = {
    "unbuffered": open(HERE / "data.bin", "rb", buffering=0),
    "buffered": open(HERE / "data.bin", "rb"),
    "deleted": open(HERE / "deleted.bin", "rb", buffering=0),
    "gzip": gzip.open(HERE / "data.gz"),
    "bzip2": bz2.open(HERE / "data.bz2"),
    "zip": zipfile.ZipFile(HERE / "data.zip").open("data.bin"),
    "tar": tarfile.open(HERE / "data.tar").extractfile("data.bin"),
}
(HERE / "deleted.bin").unlink()
ARRAY = np.load(HERE / "data.npy", mmap_mode="r")
for file in FILES.values():
    file.read(10)

DATABASE = sqlite3.connect(HERE / "runs.db")
DATABASE.execute("CREATE TABLE IF NOT EXISTS runs (x)")
CACHE = open(HERE / "cache.bin", "w+b")
LOG = open(HERE / "log.txt", "w")
LOG.write("begun\n")


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    for name, file in FILES.items():
        assert file.read(10) == CONTENT[10:20], name
    chance = random.Random(cfg.i)
    for _ in range(cfg.reads):
        name, file = chance.choice(list(FILES.items()))
        start = chance.randrange(len(CONTENT))
        file.seek(start)
        assert file.read(100) == CONTENT[start : start + 100], name
        assert ARRAY[start] == CONTENT[start]
    LOG.write(f"job {cfg.i}, attempt {os.environ['GPU_LAUNCHER_ATTEMPT']}\n")
    if cfg.i == 2 and os.environ["GPU_LAUNCHER_ATTEMPT"] == "1":
        raise RuntimeError("once more")


if __name__ == "__main__":
    main()
