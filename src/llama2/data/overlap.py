"""Runs of tokens that samples of benchmarks and documents share, by the paper's method (A.6, spec 9.9).

A sample's token is contaminated if it lies in a run of at least `length` tokens that sample and corpus share. A run
begins with ten equal tokens, may differ in up to `skips` places after them, and ends with an equal token. A sample of
which less than 20 % is contaminated is clean, and one of which at least 80 % is, dirty.

Runs are found by hashes of their first ten tokens, and are then extended token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2.data.words import grams, mix

Ids = NDArray[np.int64]

#: Tokens with which a run begins, all of them equal.
SEED = 10
#: Shares of a sample's tokens from which it is no longer clean, and from which it is dirty.
NOT_CLEAN, DIRTY = 0.2, 0.8

_BITS = 26  # of a hash, by which most places of a document are ruled out at once; a byte for each value


@dataclass(frozen=True)
class SharedRun:
    """Tokens that a sample and a document share, but for some of them."""

    sample: int
    in_sample: int
    in_document: int
    length: int


class Matcher:
    """Finds runs of samples, each an array of token ids, in documents. `length` and `skips` as in the module's text."""

    def __init__(self, samples: Sequence[Ids], *, length: int = 10, skips: int = 4) -> None:
        self.samples = samples
        self.length = length
        self.skips = skips
        self._seed = min(SEED, length)
        keys = [_keys(sample, self._seed) for sample in samples]
        numbers = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
        starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in keys)])
        flat = np.concatenate([np.zeros(0, np.uint64), *keys])
        order = np.argsort(flat, kind="stable")
        self._keys, self._numbers, self._starts = flat[order], numbers[order], starts[order]
        self._known = np.zeros(1 << _BITS, bool)
        self._known[_low(flat)] = True

    def runs(self, document: Ids) -> Iterator[SharedRun]:
        """The longest run that begins at each place of a sample and the document, but for ends of longer ones."""
        keys = _keys(document, self._seed)
        maybe = np.flatnonzero(self._known[_low(keys)])
        first, last = (np.searchsorted(self._keys, keys[maybe], side=side) for side in ("left", "right"))
        for i in np.flatnonzero(first < last).tolist():
            at = int(maybe[i])
            for place in range(int(first[i]), int(last[i])):
                number, start = int(self._numbers[place]), int(self._starts[place])
                sample = self.samples[number]
                if start and at and self._equal(sample, start - 1, document, at - 1):
                    continue  # the end of a run that begins one earlier
                length = self._extend(sample[start:], document[at:])
                if length >= self.length:
                    yield SharedRun(number, start, at, length)

    def _equal(self, sample: Ids, start: int, document: Ids, at: int) -> bool:
        return bool((sample[start : start + self._seed] == document[at : at + self._seed]).all())

    def _extend(self, sample: Ids, document: Ids) -> int:
        """Tokens of the run with which both begin; 0 where their seeds differ."""
        size = min(len(sample), len(document))
        wrong = np.flatnonzero(sample[:size] != document[:size])
        if len(wrong) and wrong[0] < self._seed:
            return 0
        end = int(wrong[self.skips]) if len(wrong) > self.skips else size
        while end and sample[end - 1] != document[end - 1]:
            end -= 1
        return end


def _low(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def _keys(ids: Ids, n: int) -> NDArray[np.uint64]:
    return grams(mix(ids.astype(np.uint64) + np.uint64(1)), n)


class Coverage:
    """Which tokens of samples are contaminated."""

    def __init__(self, samples: Sequence[Ids]) -> None:
        self.masks = [np.zeros(len(sample), bool) for sample in samples]

    def add(self, run: SharedRun) -> None:
        """Count a run's tokens. All of it counts, differing tokens too, as a run is what they lie in."""
        self.masks[run.sample][run.in_sample : run.in_sample + run.length] = True

    def shares(self) -> NDArray[np.float64]:
        """Contaminated share of each sample's tokens."""
        return np.array([np.count_nonzero(mask) / max(len(mask), 1) for mask in self.masks])

    def save(self, file: Path) -> None:
        """Write what was counted to a file."""
        np.save(file, np.packbits(np.concatenate([*self.masks, np.zeros(0, bool)])))

    def load(self, file: Path) -> None:
        """Add what `save` wrote, of the same samples."""
        bits = np.unpackbits(np.load(file)).astype(bool)
        ends = np.cumsum([len(mask) for mask in self.masks])
        for mask, end in zip(self.masks, ends.tolist(), strict=True):
            np.logical_or(mask, bits[end - len(mask) : end], out=mask)


def subsets(shares: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """The paper's four subsets of samples, which overlap."""
    return {
        "clean": shares < NOT_CLEAN,
        "not clean": shares >= NOT_CLEAN,
        "not dirty": shares < DIRTY,
        "dirty": shares >= DIRTY,
    }
