"""Tells from the state of a Mersenne Twister (MT19937) whether it was seeded.

Neither Python nor NumPy records whether a generator was seeded. But the generator can be run backwards, and so can its
initialisation. A seeded generator was initialised from one word, or from a key of a few words that is repeated until
624 words are filled. An unseeded generator was initialised from 624 random words.

The algorithm is mt19937ar.c by Makoto Matsumoto and Takuji Nishimura (2002); comments below name its functions. Many
words are computed at once, as lanes of one large integer. This takes microseconds where a loop takes a millisecond.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

MAX_BLOCKS = 1000
"""Maximum number of blocks, of 624 words each, that are searched backwards for a seed. This takes about 30 ms."""

N, M = 624, 397
WORD, UPPER, LOWER = 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF
MATRIX = 0x9908B0DF

SEARCHED_WORDS = 160
"""Number of words searched for a seed in each block. Finds keys of up to half as many words: texts of 250 letters."""
MAX_KEY = 600
"""Maximum length in words of a key that is recognised before any number has been drawn."""


def was_seeded(
    words: Sequence[int], *, blocks: int = MAX_BLOCKS, known: Mapping[int, bool | None] = MappingProxyType({})
) -> bool | None:
    """Return whether a generator with this state was seeded; None if it has been used and no seed was found.

    `known` maps the `mark` of earlier states to their answers.
    """
    if words[0] == UPPER:  # init_by_array leaves this value; nothing has been drawn yet
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
    """Return a number that identifies a state.

    It contains only one bit of the first word, because only that bit can be computed from later states.
    """
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
"""Mask of the words of a block that depend on the previous block's later words. The other words depend on these."""


def _previous(state: int) -> int:
    """Return the state before genrand_int32 generated this block. Each word is a lane of 32 bits."""
    # The lower bits of a block's first word do not affect later blocks, so they may be unknown here. The block's own
    # last word was computed from them, so they are recovered from that.
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
    """Whether init_genrand filled the state, computing each word from the one before.

    The first word may be unknown, so it is not checked.
    """
    return all(
        words[number] == (1812433253 * (words[number - 1] ^ words[number - 1] >> 30) + number) & WORD
        for number in range(2, 10)
    )


def _has_repeated_key(words: Sequence[int], longest: int) -> bool:
    """Whether init_by_array filled the state from a key that it had to repeat.

    `words` are the first words of the state, and `longest` is the maximum length of the key.
    """
    count = len(words)
    one, number, initial = _wide(count)
    every = one * WORD

    def mixed(lanes: int, factor: int) -> int:
        """The term that init_by_array mixes into each word from the word before it."""
        before = lanes << 64
        return (before ^ (before >> 30 & one * 3)) * factor & every

    state = int.from_bytes(struct.pack(f"<{count}Q", *words), "little")
    half_way = (state + number & every) ^ mixed(state, 1566083941)
    keys = (half_way + (one << 32) - (initial ^ mixed(half_way, 1664525))) & every
    # Each element is a word of the key plus its index in the key. The first four are mixed with unknown words.
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
    """Three vectors: ones, lane numbers, and the state of init_genrand(19650218), with which init_by_array begins.

    The lanes have 64 bits, which leaves room for products.
    """
    words = [19650218]
    for number in range(1, count):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + number) & WORD)
    numbers = range(count)
    one, number, initial = (
        sum(word << 64 * lane for lane, word in enumerate(lanes)) for lanes in ([1] * count, numbers, words)
    )
    return one, number, initial
