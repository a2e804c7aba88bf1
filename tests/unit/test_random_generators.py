"""Which generators were seeded is told from their state; the others are renewed, in place and when unpickled."""

from __future__ import annotations

import copy
import gc
import importlib.util
import random
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.processes import pickling, random_generators
from gpu_launcher.processes.mersenne_twister import MAX_BLOCKS, mark, was_seeded
from gpu_launcher.processes.random_generators import Generators, SeedJudge, SeedVerdict, renew

np = pytest.importorskip("numpy")

SEEDED, UNSEEDED = SeedVerdict.SEEDED, SeedVerdict.UNSEEDED
USES = st.integers(0, 4000) | st.sampled_from([1, 2, 622, 623, 624, 625, 1247, 1248, 1249])
"""How many words of 32 bits were drawn."""
SEEDS = (
    st.integers(0, 2**32 - 1)
    | st.integers(-(2**70), 2**200)
    | st.floats(allow_nan=False)
    | st.text(max_size=200)
    | st.binary(max_size=2000)
)
FEW_BLOCKS = 10
SLOW_MACHINE = settings(deadline=None, max_examples=50)


def verdict(thing: Any) -> SeedVerdict:
    return SeedJudge().verdict(thing)


def words(generator: random.Random) -> Any:
    return generator.getstate()[1][:-1]


# Mersenne Twister


@SLOW_MACHINE
@given(seed=SEEDS, used=USES)
def test_seeded_python_generators_are_recognised_however_used(seed: Any, used: int) -> None:
    generator = random.Random(seed)
    generator.getrandbits(32 * used or 1)
    assert was_seeded(words(generator)) is True
    assert verdict(generator) is SEEDED


@SLOW_MACHINE
@given(used=USES)
def test_unseeded_python_generators_are_never_taken_for_seeded(used: int) -> None:
    generator = random.Random()
    generator.getrandbits(32 * used or 1)
    assert was_seeded(words(generator), blocks=FEW_BLOCKS) is None


def test_an_unused_python_generator_is_surely_unseeded() -> None:
    for _ in range(100):
        assert verdict(random.Random()) is UNSEEDED


def test_a_seed_is_found_until_the_bound_and_then_in_doubt() -> None:
    generator = random.Random(5)
    generator.getrandbits(32 * 624 * (MAX_BLOCKS - 1))
    assert was_seeded(words(generator)) is True
    generator.getrandbits(32 * 624)
    assert was_seeded(words(generator)) is None


def test_many_generators_in_doubt_are_not_all_searched_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_generators, "MAX_FRUITLESS_BLOCKS", MAX_BLOCKS)
    doubtful, used_little, used_much = random.Random(), random.Random(1), random.Random(2)
    for generator, words_drawn in ((doubtful, 1), (used_little, 1), (used_much, 2000)):
        generator.getrandbits(32 * words_drawn)
    judge = SeedJudge()
    assert judge.verdict(doubtful) is SeedVerdict.PERHAPS_UNSEEDED
    assert judge.verdict(used_little) is SEEDED
    assert judge.verdict(used_much) is SeedVerdict.PERHAPS_UNSEEDED


def test_a_generator_in_doubt_stays_so_and_is_recognised_once_seeded() -> None:
    generator = random.Random()
    generator.random()
    for _ in range(3):
        assert verdict(generator) is SeedVerdict.PERHAPS_UNSEEDED
        generator.getrandbits(32 * 1000)
    assert was_seeded(words(generator), known={mark(words(generator)): True}) is True
    generator.seed(3)
    generator.random()
    assert verdict(generator) is SEEDED
    generator.seed()
    assert verdict(generator) is UNSEEDED


@SLOW_MACHINE
@given(seed=st.integers(0, 2**32 - 1) | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), used=USES)
def test_legacy_numpy_seeds_are_recognised_however_used(seed: Any, used: int) -> None:
    legacy = np.random.RandomState()
    legacy.seed(seed)
    legacy.bytes(4 * used)
    assert verdict(legacy) is SEEDED


def test_legacy_numpy_generators_seeded_anew_without_a_seed_are_unseeded() -> None:
    unused, used = np.random.RandomState(5), np.random.RandomState(5)
    for legacy in (unused, used):
        legacy.seed()
    used.random()
    assert verdict(unused) is UNSEEDED
    assert verdict(used) is SeedVerdict.PERHAPS_SEEDED
    unused.random()
    assert verdict(unused) is UNSEEDED  # as is known from before


def test_a_state_that_was_set_counts_and_not_the_seed_before_it() -> None:
    legacy = np.random.RandomState()
    legacy.set_state(np.random.RandomState(7).get_state())
    assert verdict(legacy) is SEEDED
    generator = np.random.default_rng()
    generator.bit_generator.state = np.random.default_rng(7).bit_generator.state
    assert verdict(generator) is SeedVerdict.PERHAPS_SEEDED
    assert verdict(np.random.PCG64(5).jumped()) is SeedVerdict.PERHAPS_SEEDED


# NumPy

BITS = ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"]
WRAPPERS: list[Callable[[Any], Any]] = [lambda bits: bits, np.random.Generator, np.random.RandomState]


def draw(thing: Any) -> int:
    """A number of 63 bits, of any generator."""
    if isinstance(thing, random.Random):
        return thing.getrandbits(63)
    if isinstance(thing, np.random.SeedSequence):
        return int(thing.spawn(1)[0].generate_state(1, np.uint64)[0])
    if isinstance(thing, np.random.BitGenerator):
        return int(thing.random_raw())
    if isinstance(thing, np.random.RandomState):
        return int(thing.randint(2**62))
    return int(thing.integers(2**62))


@SLOW_MACHINE
@given(kind=st.sampled_from(BITS), wrap=st.sampled_from(WRAPPERS), used=USES, children=st.integers(0, 2))
def test_unseeded_numpy_generators_are_recognised_however_used(
    kind: str, wrap: Callable[[Any], Any], used: int, children: int
) -> None:
    seed = np.random.SeedSequence()
    for _ in range(children):
        seed = seed.spawn(2)[1]
    generator = wrap(getattr(np.random, kind)(seed))
    for _ in range(min(used, 100)):
        draw(generator)
    assert verdict(seed) is UNSEEDED
    assert verdict(generator) is UNSEEDED


@SLOW_MACHINE
@given(
    kind=st.sampled_from(BITS),
    wrap=st.sampled_from(WRAPPERS),
    seed=st.integers(0, 2**90) | st.lists(st.integers(0, 2**32 - 1), max_size=6) | st.integers(2**129, 2**200),
    used=st.integers(0, 50),
    child=st.booleans(),
)
def test_seeded_numpy_generators_are_recognised_however_used(
    kind: str, wrap: Callable[[Any], Any], seed: Any, used: int, child: bool
) -> None:
    sequence = np.random.SeedSequence(seed)
    generator = wrap(getattr(np.random, kind)(sequence.spawn(1)[0] if child else sequence))
    for _ in range(used):
        draw(generator)
    assert verdict(generator) is SEEDED


def test_a_long_random_seed_that_the_program_keeps_is_a_seed() -> None:
    kept = secrets.randbits(128) | 1 << 127
    generator = np.random.default_rng(kept)
    assert verdict(generator) is SEEDED
    assert verdict(generator.bit_generator._seed_seq.spawn(1)[0]) is SEEDED
    del kept
    gc.collect()
    assert verdict(generator) is UNSEEDED  # nothing tells it from one that had none


@pytest.mark.parametrize("spelled", ["{}", "0x{:x}", "0X{:X}", "{:_}", "0x{:_x}"])
def test_a_long_random_seed_in_the_source_is_a_seed(module: Callable[..., Any], spelled: str) -> None:
    seed = secrets.randbits(128) | 1 << 127
    made = module(f"import numpy as np\nRNG = np.random.default_rng({spelled.format(seed)})\nOTHER = np.random.PCG64()")
    del seed
    assert verdict(made.RNG) is SEEDED
    assert verdict(made.OTHER) is UNSEEDED


def test_a_long_random_seed_of_the_command_line_is_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = str(secrets.randbits(128) | 1 << 127)
    monkeypatch.setattr(sys, "argv", ["train.py", f"seed={seed}"])
    generator = np.random.default_rng(int(seed))
    assert verdict(generator) is SEEDED


# Renewal


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_generator_is_renewed_in_place_and_then_unseeded(kind: str, wrap: Callable[[Any], Any]) -> None:
    generator = wrap(getattr(np.random, kind)())
    twin = copy.deepcopy(generator)
    seed = getattr(generator, "_bit_generator", generator)._seed_seq
    for _ in range(2):
        renew(seed)
        renew(generator)
        assert draw(generator) != draw(twin)
        assert verdict(generator) is UNSEEDED


def test_a_stored_normal_number_is_dropped() -> None:
    legacy = np.random.RandomState()
    legacy.normal()
    twin = copy.deepcopy(legacy)
    renew(legacy)
    assert legacy.normal() != twin.normal()


def test_renewed_seeds_spawn_others_and_keep_their_relations() -> None:
    family = np.random.SeedSequence()
    child = family.spawn(3)[1]
    twin, twin_child = copy.deepcopy((family, child))
    renew(family)
    renew(child)
    assert family.entropy == child.entropy != twin.entropy
    assert (family.n_children_spawned, child.spawn_key) == (3, (1,))
    assert draw(family) != draw(twin)
    assert draw(child) != draw(twin_child)


# What is pickled


def reload(code: object) -> Any:
    """What a fresh interpreter makes of it."""
    random_generators._new_entropy.clear()
    return pickling.load(pickled(code))


def pickled(code: object) -> bytes:
    return pickling.dump(pickling.Afresh(code))


@SLOW_MACHINE
@given(st.sampled_from(BITS), st.sampled_from(WRAPPERS), st.booleans())
def test_pickled_code_gets_numbers_of_its_own_unless_seeded(kind: str, wrap: Callable[[Any], Any], many: bool) -> None:
    seed = np.random.SeedSequence()
    unseeded = [wrap(getattr(np.random, kind)(child)) for child in (seed.spawn(3) if many else [seed])]
    seeded = wrap(getattr(np.random, kind)(5))
    plain = random.Random(), random.Random(5)

    def code() -> list[int]:
        return [draw(thing) for thing in (*unseeded, plain[0], seeded, plain[1])]

    first, second = reload(code)(), reload(code)()
    assert not {*first[:-2]} & {*second[:-2]}
    assert len({*first}) == len(first)
    assert first[-2:] == second[-2:] == code()[-2:]


def test_other_values_in_a_pickle_are_copied() -> None:
    generator, argument = np.random.default_rng(), np.random.default_rng()
    made = pickling.dump((pickling.Afresh(lambda other: (draw(generator), draw(other))), argument))
    results = []
    for _ in range(2):
        random_generators._new_entropy.clear()
        function, other = pickling.load(made)
        results.append(function(other))
    assert results[0][0] != results[1][0]
    assert results[0][1] == results[1][1] == draw(argument)


class Counting(random.Random):
    """With a state of its own beside Python's."""

    def __init__(self, parent: object = None) -> None:
        self.parent = parent
        super().__init__()

    def __reduce__(self) -> Any:
        return type(self), (), {"parent": self, "state": self.getstate()}

    def __setstate__(self, state: Any) -> None:
        self.parent = state["parent"]
        self.setstate(state["state"])


def test_subclasses_keep_what_they_add_and_may_refer_to_themselves() -> None:
    thing = Counting()
    again = reload(thing)
    assert again.parent is again
    assert again.random() != thing.random()


# What is found in a program


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Import a source as a module of the user's."""
    names = []

    def module(source: str) -> Any:
        name = f"users_{len(names)}_{tmp_path.name}".replace("-", "_")
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        made = sys.modules[name] = importlib.util.module_from_spec(spec)
        names.append(name)
        spec.loader.exec_module(made)
        return made

    yield module
    for name in names:
        del sys.modules[name]


IN_DOUBT = """
import random, numpy as np
class Own(random.Random):
    def random(self): return 0.5
class Model:
    def __init__(self):
        self.layers = [random.Random()]
        self.layers[0].random()
USED = random.Random(); USED.random()
OWN = Own()
JUMPED = np.random.Generator(np.random.PCG64().jumped())
MODEL = Model()
def make(rng):
    return lambda: rng
CLOSURE = make(USED.__class__()); CLOSURE().random()
FINE = random.Random(), random.Random(5), np.random.default_rng(), np.random.RandomState(3), random.SystemRandom()
FINE[1].random(), FINE[2].random(), FINE[3].random()
"""


def test_notices_name_the_generators_in_doubt(module: Callable[..., Any]) -> None:
    name = module(IN_DOUBT).__name__
    notices = [text for text in Generators().notices("fork") if name in text]
    own, same = "each job gets random numbers of its own", "all jobs get the same random numbers"
    assert sorted((text.split()[3], own in text, same in text) for text in notices) == [
        (f"{name}.{which}", renewed, not renewed)
        for which, renewed in (("CLOSURE", True), ("JUMPED", False), ("MODEL", True), ("OWN", False), ("USED", True))
    ]
    assert [text for text in Generators().notices("spawn") if name in text] == []


def test_objects_of_the_program_are_not_asked_anything(module: Callable[..., Any]) -> None:
    made = module(
        "import random, numpy as np\n"
        "class Proxy:\n"
        "    def __getattribute__(self, name): raise RuntimeError(name)\n"
        "    __class__ = property(lambda self: 1 / 0)\n"
        "HELD = Proxy(), [Proxy()], np.random.Generator.__new__(np.random.Generator)\n"
        "USED = random.Random(); USED.random()\n"
    )
    assert any(f"{made.__name__}.USED" in text for text in Generators().notices("fork"))


def test_modules_of_gpu_launcher_are_not_searched() -> None:
    ours = {name for name in sys.modules if name.startswith("gpu_launcher.")}
    assert ours.isdisjoint(module.__name__ for module in random_generators._modules_of_program())


def test_generators_of_installed_packages_cause_no_notice() -> None:
    import tempfile

    tempfile.mktemp()  # it has a generator, which has been used
    assert not [text for text in Generators().notices("fork") if "tempfile" in text]


def test_generators_that_the_program_has_frozen_are_found(module: Callable[..., Any]) -> None:
    made = module("import numpy as np\nHELD = [{'rng': np.random.default_rng()}]")
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        found = random_generators._find()
    finally:
        gc.unfreeze()
    assert any(thing is made.HELD[0]["rng"].bit_generator for thing in found)


# torch


def test_torchs_default_generator_is_renewed_unless_it_was_seeded() -> None:
    torch = pytest.importorskip("torch")
    default = torch.default_generator
    before = default.get_state()
    try:
        default.seed()
        assert verdict(default) is UNSEEDED
        first = default.initial_seed()
        renew(default)
        assert default.initial_seed() != first
        torch.manual_seed(5)
        assert verdict(default) is SEEDED
        torch.manual_seed(first)
        assert verdict(default) is UNSEEDED
    finally:
        default.set_state(before)


def test_torch_generators_are_found_and_pickled(module: Callable[..., Any]) -> None:
    torch = pytest.importorskip("torch")
    made = module(
        "import torch\nRNG = torch.Generator(); RNG.seed()\nSAME = torch.Generator()\nHOLDS = [{1: RNG}, SAME]"
    )
    assert any(thing is made.RNG for thing in random_generators._find())
    assert verdict(made.RNG) is UNSEEDED
    assert verdict(made.SAME) is SEEDED
    rng, same = made.RNG, made.SAME

    def code() -> list[int]:
        return [int(torch.randint(2**60, (), generator=generator)) for generator in (rng, same)]

    first, second = reload(code)(), reload(code)()
    assert first[0] != second[0]
    assert first[1] == second[1]
