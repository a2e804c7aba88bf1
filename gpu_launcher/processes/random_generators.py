"""Gives each job the random numbers of a fresh run: its own from unseeded generators, the same from seeded ones.

A forked job has a copy of every generator that the program made. A job in a fresh interpreter has copies of the
generators that were pickled. In the job, unseeded generators are reinitialised in place; seeded ones continue where
the program left off. This package is imported too late to see how generators are made, so it infers from a generator's
state whether it was seeded:

- NumPy's generators keep a SeedSequence. Without a seed, its entropy is a random integer as long as its pool. NumPy
  also recommends such integers as seeds; a seed is recognised because other objects refer to the integer, or because
  it appears in the program's text.
- `mersenne_twister` judges Mersenne Twisters without a SeedSequence, such as `random.Random`.
- torch's generators report their seed. The default generator's has 53 random bits if the program did not set it;
  `seed()` sets 64.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import linecache
import os
import pickle
import random
import sys
import sysconfig
from collections.abc import Iterator
from enum import Enum, auto
from itertools import compress
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_launcher.processes.mersenne_twister import MAX_BLOCKS, mark, was_seeded

MAX_DEPTH = 4
"""Maximum number of references between a global variable of the program and a generator that a notice can name."""
MAX_REFERENTS = 10_000
"""Maximum number of objects searched for generators at each depth."""
MAX_LEGACY_BLOCKS = 10_000
"""Maximum number of blocks searched for `numpy.random`. Programs often seed it and then generate data with it."""
MAX_FRUITLESS_BLOCKS = 50_000
"""Maximum number of blocks searched without finding a seed, over all generators. Later searches use MIN_BLOCKS."""
MIN_BLOCKS = 2
"""Minimum number of blocks searched per generator: the block that it draws from, and the one that the seed made.

This is enough for a generator that has hardly been used.
"""
TORCH_DEFAULT_SEED = 67280421310721
"""Seed of a new `torch.Generator()`, the same in every run."""

_inherited: list[Any] | None = None
"""Unseeded generators of the program that this job was forked from. `gc.freeze` hides them from the collector."""
_new_entropy: dict[int, str] = {}
"""New entropy in this job for each entropy in the program, so that related seed sequences stay related.

The new entropy is stored as text, because a reference to the integer would make it look like a seed.
"""
_answers: dict[int, tuple[int, bool | None]] = {}
"""For the id of each Mersenne Twister: the mark of its state when it was last judged, and whether it was seeded."""
_seeded_in_program = b""
"""Pickled calls for `restore_globals`, in a fresh interpreter."""


class SeedVerdict(Enum):
    """Says whether a generator was seeded."""

    SEEDED = auto()
    UNSEEDED = auto()
    PERHAPS_UNSEEDED = auto()
    """Unknown: each job gets numbers of its own, and the user gets a notice."""
    PERHAPS_SEEDED = auto()
    """Unknown: all jobs get the same numbers, and the user gets a notice."""


class Kind(Enum):
    """Kinds of generators."""

    PYTHON = auto()
    """A random.Random."""
    SEED = auto()
    """NumPy's SeedSequence."""
    BITS = auto()
    """NumPy's BitGenerator."""
    NUMPY = auto()
    """NumPy's Generator or RandomState, which wraps a BitGenerator."""
    TORCH = auto()


class Generators:
    """The random number generators of a program."""

    def __init__(self) -> None:
        """Find and judge all generators. Call this in the program itself: each fork reseeds the `random` module."""
        judge = SeedJudge()
        verdicts = [(thing, judge.verdict(thing)) for thing in _find()]
        self._unseeded = [thing for thing, verdict in verdicts if _is_renewed(verdict)]
        self._seeded_globals = _seeded_globals(judge)
        self._notices = _notices(verdicts)

    def notices(self, method: str) -> list[str]:
        """Notices for the user. With spawn they omit imported modules, which make their generators anew in each job."""
        return [text for text, of_module in self._notices if method == "fork" or not of_module]

    def renew(self) -> None:
        """Reinitialise the unseeded generators. Call this in a forked job."""
        global _inherited
        _new_entropy.clear()
        _inherited = self._unseeded
        for thing in self._unseeded:
            renew(thing)
        for module, function, argument in self._seeded_globals:
            if module == "random":  # Python reseeds it after each fork
                _call(module, function, argument)

    def pickled_globals(self) -> bytes:
        """Seeded state of the global generators, pickled for `expect_globals`."""
        return pickle.dumps(self._seeded_globals, pickle.HIGHEST_PROTOCOL)


def expect_globals(pickled: bytes) -> None:
    """Keep the state of seeded global generators for `restore_globals`. Call this in a fresh interpreter."""
    global _seeded_in_program
    _seeded_in_program = pickled


def restore_globals() -> None:
    """Restore the global generators that the program had seeded, in a fresh interpreter that has the user's modules."""
    if _seeded_in_program:
        for module, function, argument in pickle.loads(_seeded_in_program):
            _call(module, function, argument)


class Reducer:
    """Pickles unseeded generators so that each process that unpickles them gets numbers of its own."""

    def __init__(self) -> None:
        self._judge = SeedJudge()

    def reduce(self, thing: Any) -> Any:
        """Return a value for `__reduce_ex__`, or None for an object that is pickled as usual."""
        if _kind(type(thing)) is None or not _is_renewed(self._judge.verdict(thing)):
            return None
        usual = list(thing.__reduce_ex__(pickle.HIGHEST_PROTOCOL))
        function, arguments, state, items, pairs, setter = usual + [None] * (6 - len(usual))
        return function, arguments, (state, setter), items, pairs, _set_state_and_renew


def _set_state_and_renew(thing: Any, how: tuple[Any, Any]) -> None:
    state, setter = how
    if setter is not None:
        setter(thing, state)
    elif state is not None:
        thing.__setstate__(state)
    renew(thing)


def renew(thing: Any) -> None:
    """Reinitialise a generator as if it had just been made without a seed. References to it remain valid."""
    numpy = _numpy()
    match _kind(type(thing)):
        case Kind.PYTHON:
            random.Random.seed(thing)
        case Kind.TORCH:
            thing.seed()
        case Kind.SEED:
            entropy = int(
                _new_entropy.setdefault(thing.entropy, str(numpy.SeedSequence(None, pool_size=thing.pool_size).entropy))
            )
            names = ("spawn_key", "pool_size", "n_children_spawned")
            thing.__init__(entropy, **{name: getattr(thing, name) for name in names})
        case Kind.BITS:
            seed = thing._seed_seq
            thing.state = (type(thing)() if seed is None else type(thing)(seed)).state
        case Kind.NUMPY:
            renew(thing._bit_generator)
            if isinstance(thing, numpy.RandomState):  # it makes normal numbers in pairs and may hold the second one
                thing.set_state({**thing.get_state(legacy=False), "has_gauss": 0, "gauss": 0.0})


class SeedJudge:
    """Judges whether generators were seeded."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._random: dict[int, bool] = {}
        """For the id of each entropy, whether it is random. Judged once, because pickling adds references to it."""
        self._blocks_left = MAX_FRUITLESS_BLOCKS
        """Blocks that may still be searched. A program may have thousands of generators, and each search that finds
        nothing takes about 30 ms."""

    def verdict(self, thing: Any) -> SeedVerdict:
        """Judge from its state whether a generator was seeded."""
        match _kind(type(thing)):
            case Kind.PYTHON:
                return self._of_python(thing)
            case Kind.TORCH:
                return self._of_torch(thing)
            case Kind.SEED:
                return SeedVerdict.UNSEEDED if self._is_random(thing) else SeedVerdict.SEEDED
            case Kind.BITS:
                return self._of_bits(thing)
            case Kind.NUMPY if thing._bit_generator is not None:
                return self.verdict(thing._bit_generator)
            case _:
                return SeedVerdict.SEEDED  # not initialised yet

    def _of_bits(self, thing: Any) -> SeedVerdict:
        seed, twister = thing._seed_seq, isinstance(thing, _numpy().MT19937)
        if seed is None and twister:  # RandomState(5), numpy.random.seed(5), or either of them without a seed
            verdict = self._of_twister(thing, _words(thing), most=MAX_LEGACY_BLOCKS)
            return SeedVerdict.PERHAPS_SEEDED if verdict is SeedVerdict.PERHAPS_UNSEEDED else verdict
        if _kind(type(seed)) is not Kind.SEED or not self._is_random(seed):
            return SeedVerdict.SEEDED
        if not type(thing).__module__.startswith("numpy."):
            return SeedVerdict.PERHAPS_SEEDED  # its class is unknown
        origin = type(thing)(seed)
        if twister:
            return self._of_twister(thing, _words(thing), origin=_words(origin))
        # Drawing numbers does not change `inc` or `key`. If one differs, the state was set or comes from `jumped()`.
        now, first = thing.state["state"], origin.state["state"]
        same = all(str(now[name]) == str(first[name]) for name in ("inc", "key") if name in first)
        return SeedVerdict.UNSEEDED if same else SeedVerdict.PERHAPS_SEEDED

    def _of_python(self, thing: random.Random) -> SeedVerdict:
        if isinstance(thing, random.SystemRandom):
            return SeedVerdict.SEEDED  # it has no state
        kind = type(thing)
        if any(
            getattr(kind, name) is not getattr(random.Random, name) for name in ("random", "getrandbits", "getstate")
        ):
            return SeedVerdict.PERHAPS_SEEDED  # its state is elsewhere
        return self._of_twister(thing, thing.getstate()[1][:-1])

    def _of_twister(self, thing: Any, words: Any, *, origin: Any = None, most: int = MAX_BLOCKS) -> SeedVerdict:
        """Judge a Mersenne Twister by its words. `origin` is its initial state, unless that was set."""
        known = dict([_answers[id(thing)]] if id(thing) in _answers else [])
        if origin is not None:
            known[mark(origin)] = False
        blocks = max(MIN_BLOCKS, min(most, self._blocks_left))
        answer = was_seeded(words, blocks=blocks, known=known)
        if answer is None:
            self._blocks_left -= blocks
        _answers[id(thing)] = (mark(words), answer)
        return {True: SeedVerdict.SEEDED, False: SeedVerdict.UNSEEDED, None: SeedVerdict.PERHAPS_UNSEEDED}[answer]

    def _of_torch(self, thing: Any) -> SeedVerdict:
        seed = thing.initial_seed()
        seeded = thing.device.type != "cpu" or seed < 2**32 or seed == TORCH_DEFAULT_SEED or self._is_in_text(seed)
        return SeedVerdict.SEEDED if seeded else SeedVerdict.UNSEEDED

    def _is_random(self, seed: Any) -> bool:
        """Whether the entropy of a SeedSequence came from the operating system."""
        key, bits = id(seed.entropy), 32 * seed.pool_size
        if key not in self._random:
            self._random[key] = (
                isinstance(seed.entropy, int)
                and bits - 32 < seed.entropy.bit_length() <= bits
                and not _has_other_references(seed)
                and not self._is_in_text(seed.entropy)
            )
        return self._random[key]

    def _is_in_text(self, number: int) -> bool:
        if self._text is None:
            self._text = _text()
        return str(number) in self._text or f"{number:x}" in self._text


def _is_renewed(verdict: SeedVerdict) -> bool:
    return verdict in (SeedVerdict.UNSEEDED, SeedVerdict.PERHAPS_UNSEEDED)


def _words(twister: Any) -> list[int]:
    words: list[int] = twister.state["state"]["key"].tolist()
    return words


def _has_other_references(seed: Any) -> bool:
    """Whether objects other than seed sequences refer to this entropy.

    Seed sequences that were spawned from each other share it.
    """
    others = _references(seed) - _references(type(seed)())
    return others > 0 and others >= sum(
        1 for thing in _objects() if type(thing) is type(seed) and thing.entropy is seed.entropy
    )


def _references(seed: Any) -> int:
    return sys.getrefcount(seed.entropy)


def _find() -> list[Any]:
    """All generators of this process. Seed sequences come first, because they must be renewed first."""
    objects, numpy = _objects(), _numpy()
    bases = [random.Random]
    if numpy is not None:
        bases += [numpy.SeedSequence, numpy.BitGenerator, numpy.RandomState]
    kinds = {id(kind) for base in bases for kind in _with_subclasses(base)}
    found = [*compress(objects, map(kinds.__contains__, map(id, map(type, objects)))), *_torch_generators()]
    return sorted(found, key=lambda thing: _kind(type(thing)) is not Kind.SEED)


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _objects() -> list[Any]:
    """All objects that the garbage collector tracks."""
    objects = gc.get_objects()
    if _inherited is not None:
        return objects + _inherited
    if gc.get_freeze_count():  # the program called `gc.freeze`, and the collector does not list frozen objects
        seen = set(map(id, objects))
        found: list[Any] = [sys.modules, *objects]
        while found:
            referents = {id(thing): thing for thing in gc.get_referents(*found) if gc.is_tracked(thing)}
            found = [referents[number] for number in referents.keys() - seen]
            seen |= referents.keys()
            objects += found
    return objects


def _kind(of: type) -> Kind | None:
    if issubclass(of, random.Random):
        return Kind.PYTHON
    numpy, torch = _numpy(), _torch()
    if numpy is not None:
        if of is numpy.SeedSequence:
            return Kind.SEED
        if issubclass(of, numpy.BitGenerator):
            return Kind.BITS
        if issubclass(of, (numpy.RandomState, numpy.Generator)):
            return Kind.NUMPY
    return Kind.TORCH if torch is not None and of is torch.Generator else None


def _numpy() -> Any:
    """numpy.random, if it is imported."""
    module = sys.modules.get("numpy.random")
    return module if hasattr(module, "RandomState") else None


def _torch() -> Any:
    module = sys.modules.get("torch")
    return module if hasattr(module, "default_generator") else None


def _torch_generators() -> list[Any]:
    """torch's default generator and those that the program refers to. The garbage collector does not track them."""
    if (torch := _torch()) is None:
        return []
    found = {id(thing): thing for _, _, thing in _of_program() if type(thing) is torch.Generator}
    found[id(torch.default_generator)] = torch.default_generator
    return list(found.values())


def _seeded_globals(judge: SeedJudge) -> list[tuple[str, str, Any]]:
    """Calls that restore the state of the seeded global generators: module, function and argument of each."""
    calls: list[tuple[str, str, Any]] = []
    if judge.verdict(_python()) is SeedVerdict.SEEDED:
        calls.append(("random", "setstate", random.getstate()))
    if (numpy := _numpy()) is not None and not _is_renewed(judge.verdict(numpy.mtrand._rand)):
        calls.append(("numpy.random", "set_state", numpy.get_state(legacy=False)))
    if (torch := _torch()) is not None and not _is_renewed(judge.verdict(torch.default_generator)):
        # `manual_seed` also seeds the generators of GPUs, once they are used.
        calls.append(("torch", "manual_seed", torch.initial_seed()))
        calls.append(("torch", "set_rng_state", torch.get_rng_state()))
    return calls


def _python() -> random.Random:
    """The generator of the `random` module."""
    return random._inst


def _call(module: str, function: str, argument: Any) -> None:
    getattr(importlib.import_module(module), function)(argument)


def _notices(verdicts: list[tuple[Any, SeedVerdict]]) -> list[tuple[str, bool]]:
    """Notices about the program's doubtful generators, and whether each generator belongs to an imported module."""
    doubtful = {
        id(thing): verdict
        for thing, verdict in verdicts
        if verdict in (SeedVerdict.PERHAPS_SEEDED, SeedVerdict.PERHAPS_UNSEEDED) and thing is not _python()
    }
    texts: dict[str, bool] = {}
    if (numpy := _numpy()) is not None:
        legacy = numpy.mtrand._rand
        doubtful.pop(id(legacy._bit_generator), None)
        if doubtful.pop(id(legacy), None) is SeedVerdict.PERHAPS_SEEDED:
            texts[_notice("numpy.random", SeedVerdict.PERHAPS_SEEDED)] = False
    if doubtful:
        for module, name, thing in _of_program():
            if (verdict := doubtful.get(id(thing))) is not None:
                whole = name if module == "__main__" else f"{module}.{name}"
                texts[_notice(whole, verdict)] = module != "__main__"
    return list(texts.items())


def _notice(name: str, verdict: SeedVerdict) -> str:
    if verdict is SeedVerdict.PERHAPS_SEEDED:
        return (
            f"cannot tell whether {name} was seeded: all jobs get the same random numbers from it. "
            "For others, seed it in the job"
        )
    return (
        f"cannot tell whether {name} was seeded, as it has been used since: each job gets random numbers of its own "
        "from it. To repeat them, seed it in the job"
    )


def _of_program() -> Iterator[tuple[str, str, Any]]:
    """Every object that global variables of the user's modules refer to, with the variable's module and name."""
    modules = _modules_of_program()
    names = {id(vars(module)) for module in list(sys.modules.values()) if type(module) is ModuleType}
    seen: set[int] = set()
    for module in modules:
        for name, value in list(vars(module).items()):
            found = [value]
            for _ in range(MAX_DEPTH):
                new = [
                    thing
                    for thing in found[:MAX_REFERENTS]
                    if id(thing) not in seen
                    and id(thing) not in names
                    # isinstance would ask the object itself, and a proxy may raise.
                    and not issubclass(type(thing), ModuleType)
                    and not (issubclass(type(thing), type) and vars(thing).get("__module__") != module.__name__)
                ]
                for thing in new:
                    yield module.__name__, name, thing
                seen.update(map(id, new))
                found = gc.get_referents(*new)


def _modules_of_program() -> list[ModuleType]:
    """Modules of the user: the main module, its package, and those outside Python and site-packages."""
    main = sys.modules["__main__"]
    package = str(getattr(main, "__package__", None) or "__main__").partition(".")[0]
    python = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
    found = []
    for name, module in list(sys.modules.items()):
        if type(module) is not ModuleType:  # a lazy module loads its content when an attribute is read
            continue
        file = vars(module).get("__file__")
        top = name.partition(".")[0]
        # gpu-launcher may be installed editable, as in its own development, and takes 30 ms to search.
        installed = not isinstance(file, str) or file.startswith(python) or "-packages" in file or top == "gpu_launcher"
        if module is main or top == package or not installed:
            found.append(module)
    return found


def _text() -> str:
    """Text that may contain a seed: source files, command line, environment."""
    parts = [*sys.argv, *os.environ.values()]
    parts += ["".join(entry[2]) for entry in list(linecache.cache.values()) if len(entry) > 2]  # cells of a notebook
    for module in _modules_of_program():
        file = str(vars(module).get("__file__"))
        if file.endswith(".py"):
            with contextlib.suppress(OSError):  # the file was deleted after the import
                parts.append(Path(file).read_text("utf-8", "replace"))
    return "\n".join(parts).replace("_", "").lower()
