"""Compare models on a set of records, with a copy of the model and of the metric in every worker.

    python benchmark.py                       every model, on all GPUs that are free
    python benchmark.py --models words --records 500
    python benchmark.py --gpus 0.5            two workers on each GPU
    python benchmark.py --gpus 0 --workers 16 no GPU: as for models behind an API

The models are toys that tell which language a sentence is in. What matters is the shape: a *producer* makes a model,
another one the metric, both in the worker, when it has its GPU; then records are dealt out to whichever worker is free.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean

import gpu_launcher

TEXTS = {
    "english": "the and of to in is that it was for on with as his they at be this from have",
    "german": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als",
    "french": "de la le et les des en un du une que est pour qui dans a par plus pas au",
}
WORDS = {language: text.split() for language, text in TEXTS.items()}

Model = Callable[[str], str]
Metric = Callable[[str, str], float]


def word_model() -> Model:
    """Knows words. Loading it takes a moment, which each worker spends once."""
    time.sleep(0.2)
    known = {language: set(words) for language, words in WORDS.items()}

    def guess(sentence: str) -> str:
        time.sleep(0.001)  # what a forward pass takes
        return max(known, key=lambda language: sum(word in known[language] for word in sentence.split()))

    return guess


def letter_model() -> Model:
    """Knows how often each language has each letter."""
    time.sleep(0.2)
    often = {lang: {char: text.count(char) / len(text) for char in set(text)} for lang, text in TEXTS.items()}

    def guess(sentence: str) -> str:
        time.sleep(0.001)
        return max(often, key=lambda lang: sum(often[lang].get(char, 0.0) for char in sentence))

    return guess


def accuracy() -> Metric:
    return lambda truth, guess: float(truth == guess)


MODELS: dict[str, Callable[[], Model]] = {"words": word_model, "letters": letter_model}


def sentences(count: int) -> Iterator[tuple[str, str]]:
    """A stream of records; it could be a dataset of any size."""
    dice = random.Random(0)
    for _ in range(count):
        language = dice.choice(list(WORDS))
        yield " ".join(dice.choices(WORDS[language], k=6)), language


def produce(make_model: Callable[[], Model], make_metric: Callable[[], Metric]) -> tuple[Model, Metric]:
    """Runs in each worker, once."""
    return make_model(), make_metric()


def evaluate(record: tuple[str, str], model: Model, metric: Metric) -> float:
    """Runs in a worker for each record."""
    sentence, truth = record
    return metric(truth, model(sentence))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--devices", default="auto", help="auto, 0,1, cpu:4 or simulated:4")
    parser.add_argument("--gpus", type=float, default=1)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    pool = gpu_launcher.Pool(options.devices)
    for name in options.models:
        scores = gpu_launcher.parallel_map(
            sentences(options.records),
            setup=partial(produce, MODELS[name], accuracy),
            function=evaluate,
            num_workers=options.workers,
            gpus=options.gpus,
            total=options.records,
            pool=pool,
        )
        print(f"{name}: accuracy {mean(list(scores)):.3f}")


if __name__ == "__main__":
    main()
