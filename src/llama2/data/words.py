"""The words of a text as arrays: hashes, lengths, and what they are made of.

A word is a run of ASCII letters and digits, without their case, and of every character beyond ASCII. A Chinese,
Japanese or Korean character is a word of its own. All of it is computed from the text's UTF-8 bytes at once.
A Python loop over words would be slower than everything else together (docs/decisions/0010-words-in-numpy.md).

Legend: B bytes, W words.
"""

from __future__ import annotations

from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_RANDOM = np.random.default_rng(20230718)
_ODD = np.uint64(0x9E3779B97F4A7C15)
#: A factor that is odd, so that it has an inverse modulo 2^64.
_BASE = 0xD6E8FEB86659FD93
_INVERSE = pow(_BASE, -1, 1 << 64)
#: A random number for each byte that words are made of, the same for both cases of a letter; 0 for all other bytes.
_VALUES = np.zeros(256, np.uint64)
for _byte in [*b"abcdefghijklmnopqrstuvwxyz0123456789", *range(0x80, 0x100)]:
    _VALUES[_byte] = _RANDOM.integers(1, 1 << 64, dtype=np.uint64)
_VALUES[ord("A") : ord("Z") + 1] = _VALUES[ord("a") : ord("z") + 1]
#: Powers of a base for n-grams of words.
_GRAM = np.uint64(0xA0761D6478BD642F)


class Words:
    """Words of a text. A hash is of 64 bits; equal words have equal hashes wherever they are."""

    def __init__(self, text: str) -> None:
        self.data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)  # (B,)
        values = _VALUES[self.data]  # (B,)
        inside = values != 0
        before = np.concatenate([[False], inside[:-1]])
        starts = inside & (~before | (self.data >= 0xE3))
        after = np.concatenate([starts[1:] | ~inside[1:], [True]])[: len(inside)]
        self.starts = np.flatnonzero(starts)  # (W,) bytes
        self.ends = np.flatnonzero(inside & after) + 1  # (W,) bytes
        # A word's hash is the sum of value × base^(place in the word), as a difference of sums over the text.
        powers, inverses = _powers(_size(len(values)))
        sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * powers[: len(values)], out=sums[1:])
        self.hashes: Hashes = mix((sums[self.ends] - sums[self.starts]) * inverses[self.starts])  # (W,)

    def __len__(self) -> int:
        return len(self.hashes)

    def sums(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many bytes of each word `which` is true for; (B,) → (W,)."""
        total = np.concatenate([[0], np.cumsum(which)])
        return np.asarray(total[self.ends] - total[self.starts], np.int64)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word, (W,)."""
        return self.sums((self.data & 0xC0) != 0x80)

    @cached_property
    def alphabetic(self) -> NDArray[np.bool_]:
        """Whether a word has anything but digits, (W,)."""
        return self.sums((self.data < ord("0")) | (self.data > ord("9"))) > 0

    def grams(self, n: int) -> Hashes:
        """Hashes of each `n` words that follow each other, (max(W - n + 1, 0),)."""
        return grams(self.hashes, n)


def grams(items: Hashes, n: int) -> Hashes:
    """Hashes of each `n` items that follow each other, (L,) → (max(L - n + 1, 0),)."""
    count = max(len(items) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for k in range(n):
        total *= _GRAM
        total += items[k : k + count]
    return mix(total)


def mix(values: Hashes) -> Hashes:
    """Numbers whose every bit depends on all bits of a value, in place."""
    values ^= values >> np.uint64(32)
    values *= _ODD
    values ^= values >> np.uint64(29)
    return values


def _size(length: int) -> int:
    return 1 << (max(length, 1 << 13) - 1).bit_length()


@cache
def _powers(size: int) -> tuple[Hashes, Hashes]:
    return _geometric(_BASE, size), _geometric(_INVERSE, size)


def _geometric(base: int, size: int) -> Hashes:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
