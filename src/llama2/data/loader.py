"""Batches from rows of tokens, such as the windows of a corpus, in an order that a seed fixes.

Every epoch deals all rows in another order, which is computed and not stored. What was dealt is one number, the same on
however many processes. So a run continues with the next token on any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama2.data.shards import Shards
from llama2.errors import DataError

#: A target of no token, as in train/loss.py: its position has no loss.
IGNORED = -100


class TrainBatch(Protocol):
    """What a process reads at once. A step's loss is the mean over all losses of its batches."""

    @property
    def count(self) -> int:
        """Losses of the batch, known before the network runs."""
        ...

    @property
    def source(self) -> str:
        """The source of the rows, in batches to evaluate on, if it is known."""
        ...


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens and the token that follows each: (rows, length) each.

    `documents` numbers a row's documents where tokens may not read another's; None: a row is one text.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]  # IGNORED where there is no loss
    documents: NDArray[np.int32] | None = None
    source: str = ""

    @property
    def count(self) -> int:
        """Targets that have a loss."""
        return int((self.targets != IGNORED).sum())


Batch = TypeVar("Batch", bound=TrainBatch)
Batch_co = TypeVar("Batch_co", bound=TrainBatch, covariant=True)


class RowSource(Protocol[Batch_co]):
    """Rows, by number."""

    @property
    def name(self) -> str:
        """Where they are, as a message begins."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a row; their mean where rows differ."""
        ...

    @property
    def sha256(self) -> str:
        """What they are, all together: what a resumed run must find again."""
        ...

    def __len__(self) -> int:
        """How many there are, at least one."""
        ...

    def batch(self, numbers: Sequence[int]) -> Batch_co:
        """Some of them."""
        ...


class Windows:
    """A corpus as rows: its stream of N tokens is cut into (N − 1) / T windows of T, each with targets one further.

    With `boundaries`, tokens read their own document alone, and the last one of a document has no target. Without, a
    window is one text, as Llama 2 was trained as far as is known.
    """

    def __init__(self, shards: Shards, *, length: int, boundaries: bool = False) -> None:
        self._shards, self._boundaries = shards, boundaries
        self._count = (shards.tokens - 1) // length
        self.name, self.length, self.sha256 = str(shards.folder), length, shards.sha256
        if self._count == 0:
            raise DataError(
                f"{shards.folder}: {shards.split} has {shards.tokens} tokens, too few for a row of {length}; "
                "choose a shorter length, or build the corpus with more documents"
            )

    def __len__(self) -> int:
        return self._count

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
        """Windows of the stream, by number."""
        length = self.length
        read = np.stack([self._shards.read(w * length, w * length + length + 1) for w in numbers])
        tokens, targets = read[:, :-1].copy(), read[:, 1:].copy()
        if not self._boundaries:
            return TokenBatch(tokens, targets)
        documents = np.zeros((len(numbers), length + 1), np.int32)
        for row, w in zip(documents, numbers, strict=True):
            row[self._shards.starts(w * length, w * length + length + 1) - w * length] = 1
        documents = np.cumsum(documents, axis=1, dtype=np.int32)
        targets[documents[:, 1:] != documents[:, :-1]] = IGNORED
        return TokenBatch(tokens, targets, documents[:, :-1].copy())

    def spread(self, rows: int, micro_size: int) -> list[TokenBatch]:
        """At most `rows` windows to evaluate on, `micro_size` of a source at a time: the same in every process.

        Each source of the corpus has as many as its share of the windows, but at least one. Within it they are spread
        by a fixed order. A window is of the source that its middle is of.
        """
        starts = self._shards.sources or [(0, "")]
        middles = np.arange(self._count) * self.length + self.length // 2
        which = np.searchsorted([start for start, _ in starts], middles, side="right") - 1
        numbers: dict[str, list[int]] = {}
        for number, place in enumerate(which.tolist()):
            numbers.setdefault(starts[max(place, 0)][1], []).append(number)
        found = []
        counts = shares([len(each) for each in numbers.values()], rows)
        for (source, each), count in zip(numbers.items(), counts, strict=True):
            chosen = sorted(each[shuffled(place, len(each), key=0)] for place in range(count))
            found += [replace(batch, source=source) for batch in batches(self, chosen, micro_size)]
        return found


def batches(source: RowSource[Batch], numbers: Sequence[int], micro_size: int) -> list[Batch]:
    """Some rows of a source, `micro_size` at a time."""
    return [source.batch(numbers[start : start + micro_size]) for start in range(0, len(numbers), micro_size)]


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` each of the sizes gets: by its share, but at least one, and none more than it has.

    They add up to `count`, or to all that there is. Where there are fewer than sizes, the largest get one.
    """
    total = sum(sizes)
    if count >= total:
        return list(sizes)
    if count <= len(sizes):
        largest = sorted(range(len(sizes)), key=lambda place: -sizes[place])[:count]
        return [int(place in largest) for place in range(len(sizes))]
    given = [max(1, size * count // total) for size in sizes]
    while (left := count - sum(given)) != 0:  # no more often than there are sizes
        missing = [size * count / total - have for size, have in zip(sizes, given, strict=True)]
        if left > 0:
            given[missing.index(max(missing))] += 1
        else:
            given[min((place for place, have in enumerate(given) if have > 1), key=missing.__getitem__)] -= 1
    return given


class State(TypedDict):
    """Where a loader is: rows that all processes have read together, and of what."""

    rows: int
    seed: int
    length: int
    corpus: str


class Loader(Generic[Batch]):
    """Deals rows of a source, `rows` at a time to each of `dp_size` processes, of which this is `dp_rank`."""

    def __init__(self, source: RowSource[Batch], *, rows: int, seed: int, dp_rank: int = 0, dp_size: int = 1) -> None:
        self._source = source
        self._rows, self._seed = rows, seed
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._dealt = 0

    @property
    def epoch(self) -> float:
        """How often all rows were read."""
        return self._dealt / len(self._source)

    def next(self) -> Batch:
        """This process's next rows. Processes that ask as often get different ones."""
        first = self._dealt + self._dp_rank * self._rows
        self._dealt += self._dp_size * self._rows
        return self._source.batch([self._number(n) for n in range(first, first + self._rows)])

    def first(self, rows: int) -> list[Batch]:
        """The source's first rows in its own order, the same ones for everybody, at most `rows`: for validation."""
        return batches(self._source, range(min(rows, len(self._source))), self._rows)

    def skip(self, rows: int) -> None:
        """Leave out the next `rows` rows of all processes together."""
        self._dealt += rows

    def state(self) -> State:
        """What `restore` continues from, with the next token."""
        return State(rows=self._dealt, seed=self._seed, length=self._source.length, corpus=self._source.sha256)

    def restore(self, state: State) -> None:
        """Continue from a state, perhaps of another number of processes.

        Raises DataError when it was of another corpus, seed or length.
        """
        now = self.state()
        for name in ("corpus", "seed", "length"):
            if state[name] != now[name]:
                raise DataError(
                    f"{self._source.name}: the run was begun with {name} {state[name]}, and this one is {now[name]}; "
                    "begin another run, or use what it was begun with"
                )
        self._dealt = state["rows"]

    def _number(self, n: int) -> int:
        """Which row comes n-th of all."""
        epoch, place = divmod(n, len(self._source))
        return shuffled(place, len(self._source), key=self._seed << 32 | epoch)


def shuffled(place: int, count: int, *, key: int) -> int:
    """What is at a place in an order of 0 … count − 1 that `key` chooses; takes no memory.

    A Feistel network permutes the numbers of as many bits as are needed. What falls outside is permuted again until
    it is inside (Black and Rogaway 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ _mixed(key << 70 | turn << 64 | right) & mask
        place = left << half | right
        if place < count:
            return place


def _mixed(x: int) -> int:
    """Sixty-four bits that depend on all of x, by the finaliser of SplitMix64, word by word."""
    mixed = 0
    while x:
        mixed = (mixed ^ x) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
        x >>= 64
    return mixed
