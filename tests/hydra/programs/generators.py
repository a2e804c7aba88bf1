"""A program that creates random generators of all kinds at import. Each job draws from them."""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import generators_module
import hydra
import numpy as np

if "SEED" in os.environ:
    random.seed(int(os.environ["SEED"]))
    np.random.seed(int(os.environ["SEED"]))
    random.random(), np.random.rand()


@dataclass
class Model:
    rng: np.random.Generator = field(default_factory=np.random.default_rng)


class Holder:
    legacy = np.random.RandomState()


def closure():
    inner = random.Random()
    return lambda: inner.getrandbits(40)


SEQUENCE = np.random.SeedSequence()
CHILDREN = SEQUENCE.spawn(2)
USED = np.random.default_rng()
USED.integers(100, size=10)
MODEL = Model()
FROM_CLOSURE = closure()
ALIAS = USED.bit_generator
PLAIN = random.Random()
ONES = [np.random.Generator(kind()) for kind in (np.random.MT19937, np.random.Philox, np.random.SFC64)]

SEEDED = np.random.default_rng(5)
SEEDED_LIST = {"a": random.Random("a text"), "b": random.Random(7)}
SEEDED_LEGACY = np.random.RandomState(3)
PASTED = np.random.default_rng(0x9E3779B97F4A7C15F39CC0605CEDC834)
SEEDED_LIST["b"].shuffle(list(range(100)))
SEEDED.random(10)


if "DOUBT" in os.environ:
    IN_DOUBT = random.Random()
    IN_DOUBT.random()


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    big = 2**60
    found = {
        "unseeded": [
            int(np.random.default_rng(SEQUENCE.spawn(1)[0]).integers(big)),
            *[int(np.random.default_rng(child).integers(big)) for child in CHILDREN],
            int(USED.integers(big)),
            ALIAS.random_raw(),
            int(MODEL.rng.integers(big)),
            int(Holder.legacy.randint(big)),
            FROM_CLOSURE(),
            PLAIN.getrandbits(60),
            *[int(generator.integers(big)) for generator in ONES],
            int(generators_module.UNSEEDED.integers(big)),
        ],
        "in doubt": [IN_DOUBT.getrandbits(60)] if "DOUBT" in os.environ else [],
        "global": [random.getrandbits(60), int(np.random.randint(big))],
        "seeded": [
            int(SEEDED.integers(big)),
            SEEDED_LIST["a"].getrandbits(60),
            SEEDED_LIST["b"].getrandbits(60),
            int(SEEDED_LEGACY.randint(big)),
            int(PASTED.integers(big)),
            int(generators_module.SEEDED.integers(big)),
        ],
    }
    Path("found.json").write_text(json.dumps(found))
    if cfg.get("again") and os.environ.get("GPU_LAUNCHER_ATTEMPT") == "1":
        Path("first.json").write_text(json.dumps(found))
        os._exit(3)


if __name__ == "__main__":
    main()
