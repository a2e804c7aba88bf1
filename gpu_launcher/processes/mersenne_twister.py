"""Tells from the state of a Mersenne Twister (MT19937) whether it was seeded.

Neither Python nor NumPy keeps a record of that. But the generator can be run backwards, and so can its initialization.
A seeded generator was initialized from one word, or from a key of a few words that is repeated until 624 are filled; an
unseeded one from 624 random words.

Source: mt19937ar.c by Makoto Matsumoto and Takuji Nishimura (2002), whose functions are named below. Many words are
computed at once, as lanes of one large integer: that takes microseconds where a loop takes a millisecond.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

MAX_BLOCKS = 1000
"""Blocks of 624 words that the generator is run backwards, in which a seed is looked for. Takes about 30 ms."""

N, M = 624, 397
WORD, UPPER, LOWER = 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF
MATRIX = 0x9908B0DF

SEARCHED_WORDS = 160
"""Words of each block in which a seed is looked for. Keys of up to half as many are found: of texts of 250 letters."""
MAX_KEY = 600
"""Words of a key that are recognised as long as nothing has been drawn."""


def was_seeded(
    words: Sequence[int], *, blocks: int = MAX_BLOCKS, known: Mapping[int, bool | None] = MappingProxyType({})
) -> bool | None:
    """Tell whether a generator with this state was seeded. None: it has been used, and no seed was found.

    `known` are answers for earlier states, by their `mark`.
    """
    if words[0] == UPPER:  # as init_by_array leaves it, and nothing has been drawn yet
        return _has_repeated_key(words, MAX_KEY)
    state = _packed(words)
    for _ in range(blocks):
        if state >> 31 in known:
            return known[state >> 31]
        few = struct.unpack(f"<{SEARCHED_WORDS}I", (state & _SEARCHED).to_bytes(4 * SEARCHED_WORDS, "little"))
        if _is_from_one_word(few) or (few[0] & UPPER and _has_repeated_key(few, SEARCHED_WORDS // 2)):
            return True
        state = _previous(state)
    return None


def mark(words: Sequence[int]) -> int:
    """Names a state. Of the first word, only one bit can be computed from later states."""
    return _packed(words) >> 31


def _packed(words: Sequence[int]) -> int:
    return int.from_bytes(struct.pack(f"<{N}I", *words), "little")


def _lanes(word: int, bits: int = 32, count: int = N) -> int:
    return sum(word << bits * lane for lane in range(count))


_ODD = _lanes(1)
_UPPER = _lanes(UPPER)
_LOWER = _lanes(LOWER)
_TWICE = _lanes(WORD - 1)
_ALL = _lanes(WORD)
_SEARCHED = _lanes(WORD, count=SEARCHED_WORDS)
_START = _lanes(WORD, count=N - M)
"""The words of a block which depend on others of the block before; the rest depends on these."""


def _previous(state: int) -> int:
    """Undo genrand_int32's generation of a block of words, which are lanes of 32 bits."""
    # The lower bits of the first word of a block have no effect on later ones. Their place is in the block before.
    last = _undo_multiplication((state >> 32 * (N - 1) ^ state >> 32 * (M - 1)) & WORD)
    state = state >> 31 << 31 | last & LOWER
    end = _undo_multiplication((state ^ state << 32 * (N - M)) & _ALL)
    old = end & _UPPER | (end & _LOWER) << 32
    start = _undo_multiplication((state ^ old >> 32 * M) & _START)
    both = start | end & ~_START
    return (both & _UPPER | (both & _LOWER) << 32) & _ALL


def _undo_multiplication(product: int) -> int:
    odd = product >> 31 & _ODD
    return (product ^ odd * MATRIX) << 1 & _TWICE | odd


def _is_from_one_word(words: Sequence[int]) -> bool:
    """Whether init_genrand filled the state: each word follows from the one before. The first may not be known."""
    return all(
        words[number] == (1812433253 * (words[number - 1] ^ words[number - 1] >> 30) + number) & WORD
        for number in range(2, 10)
    )


def _has_repeated_key(words: Sequence[int], longest: int) -> bool:
    """Whether init_by_array filled the state, of which these are the first words, from a key that it had to repeat."""
    count = len(words)
    one, number, initial = _wide(count)
    every = one * WORD

    def mixed(lanes: int, factor: int) -> int:
        """What is added to each word for the one before."""
        before = lanes << 64
        return (before ^ (before >> 30 & one * 3)) * factor & every

    state = int.from_bytes(struct.pack(f"<{count}Q", *words), "little")
    half_way = (state + number & every) ^ mixed(state, 1566083941)
    keys = (half_way + (one << 32) - (initial ^ mixed(half_way, 1664525))) & every
    # Each is a word of the key plus its number in that. The first four are mixed with others that are not known.
    backwards = struct.unpack(f"<{count}Q", keys.to_bytes(8 * count, "little"))[:3:-1]
    length = 0
    while True:
        try:
            length = backwards.index(backwards[0], length + 1, longest + 1)
        except ValueError:
            return False
        if backwards[length:] == backwards[:-length]:
            return True


@cache
def _wide(count: int) -> tuple[int, int, int]:
    """In lanes of 64 bits, which have room for products: ones, their numbers, and the state of init_genrand(19650218).

    With that state init_by_array begins.
    """
    words = [19650218]
    for number in range(1, count):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + number) & WORD)
    numbers = range(count)
    one, number, initial = (
        sum(word << 64 * lane for lane, word in enumerate(lanes)) for lanes in ([1] * count, numbers, words)
    )
    return one, number, initial
