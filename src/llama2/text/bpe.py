"""Byte-level BPE: which neighbours of a word become one token. (How a text is split into words is tokenizer.py's.)

A vocabulary of a hundred thousand tokens and as many merges takes Python, and the libraries too, a tenth of a second to
take in. So it is put in order once, as arrays that a file can hold and that are searched where they lie.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from llama2.errors import TokenizerError

Bytes = NDArray[np.uint8]


def _byte_letters() -> list[str]:
    """The letter that represents each byte in byte-level pieces: itself if it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_in)) for byte in range(256)]


LETTERS = _byte_letters()
BYTES = {letter: bytes([byte]) for byte, letter in enumerate(LETTERS)}


def arrange(pieces: Sequence[str], words: Mapping[str, int], merges: Sequence[str]) -> dict[str, Bytes]:
    """The arrays of `Merges` for all `pieces` by id, those of them that text can become, and merges, the first first.

    Raises TokenizerError for a letter of ASCII that has no token, and a merge that does not make a token of two.
    """
    missing = [chr(byte) for byte in range(0x20, 0x7F) if LETTERS[byte] not in words]
    if missing:
        raise TokenizerError(f"the vocabulary has no token for {missing[0]!r}: its byte tokens are incomplete")
    ranks: dict[int, tuple[int, int]] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not (left and right and left in words and right in words and left + right in words):
            raise TokenizerError(f"the vocabulary's merges are damaged: {merge!r} does not make a token of two tokens")
        ranks.setdefault(words[left] << 32 | words[right], (rank, words[left + right]))  # of two alike, the first
    pairs = sorted(ranks)
    texts = [piece.encode() for piece in pieces]
    return {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "ends": _bytes(np.cumsum([len(text) for text in texts]), np.int64),
        "words": _bytes([words[word] for word in sorted(words)], np.int32),
        "letters": _bytes([words.get(letter, -1) for letter in LETTERS], np.int32),
        "pairs": _bytes(pairs, np.uint64),
        "ranks": _bytes([ranks[pair][0] for pair in pairs], np.int32),
        "merged": _bytes([ranks[pair][1] for pair in pairs], np.int32),
    }


def _bytes(values: ArrayLike, dtype: DTypeLike) -> Bytes:
    return np.array(values, dtype).view(np.uint8)


class Merges:
    """Words to tokens, by the arrays of `arrange`.

    `text` has all pieces in UTF-8, `ends` where each ends in it. `words` are the ids of those that text can become, in
    the order of their pieces; `letters` the id of each byte, or −1. `pairs` are neighbours that become one, as
    left << 32 | right in ascending order; `ranks` and `merged` say which comes first, and what it becomes.
    """

    def __init__(self, arrays: Mapping[str, Bytes]) -> None:
        self._text, self._ends = arrays["text"].data, arrays["ends"].data.cast("q")
        self._words, letters = arrays["words"].data.cast("i"), arrays["letters"].data.cast("i")
        self._pairs = arrays["pairs"].data.cast("Q")
        self._ranks, self._merged = arrays["ranks"].data.cast("i"), arrays["merged"].data.cast("i")
        self._letters = {letter: token for letter, token in zip(LETTERS, letters, strict=True) if token >= 0}

    def __len__(self) -> int:
        """Tokens of the vocabulary."""
        return len(self._ends)

    def piece(self, token: int) -> str:
        """A token's text, as the vocabulary writes it."""
        start = self._ends[token - 1] if token else 0
        return str(self._text[start : self._ends[token]], "utf-8")

    def texts(self) -> list[str]:
        """All merges, the first first, each as its two pieces with a space between."""
        order = sorted(range(len(self._pairs)), key=self._ranks.__getitem__)
        pairs = (self._pairs[at] for at in order)
        return [f"{self.piece(pair >> 32)} {self.piece(pair & 0xFFFFFFFF)}" for pair in pairs]

    def find(self, word: str) -> int | None:
        """The token that a whole word is, if it is one."""
        at = bisect_left(self._words, word, key=self.piece)
        return self._words[at] if at < len(self._words) and self.piece(self._words[at]) == word else None

    def merge(self, word: str) -> tuple[int, ...]:
        """Tokens of a word of byte letters: the pair of neighbours that ranks first becomes one, until none is left.

        Letters without a token are left out. Tokens are a linked list, and pairs a heap of which some are out of date:
        n log n for n letters.
        """
        tokens = [self._letters[letter] for letter in word if letter in self._letters]
        before, after = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
        heap: list[tuple[int, int, int]] = []  # rank of a pair, where its left token is, and which pair it is

        def offer(left: int) -> None:
            if left < 0 or after[left] >= len(tokens):
                return
            pair = tokens[left] << 32 | tokens[after[left]]
            at = bisect_left(self._pairs, pair)
            if at < len(self._pairs) and self._pairs[at] == pair:
                heappush(heap, (self._ranks[at], left, at))

        for left in range(len(tokens)):
            offer(left)
        while heap:
            _, left, at = heappop(heap)
            right = after[left]
            if right >= len(tokens) or tokens[left] << 32 | tokens[right] != self._pairs[at]:
                continue  # one of the two has become part of another token since
            tokens[left], tokens[right] = self._merged[at], -1
            after[left] = after[right]
            if after[left] < len(tokens):
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return tuple(token for token in tokens if token >= 0)
