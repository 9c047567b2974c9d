"""Prompt lookup: drafts of the next tokens, copied from where the last ones stood before.

Saxena, "Prompt Lookup Decoding" (2023); Yang et al., "Inference with Reference: Lossless Acceleration of Large Language
Models" (2023, arXiv 2304.04487).
"""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

SIZES = (4, 3, 2)  # lengths of the n-grams that are looked up, in this order
_WEIGHT = 0.2  # of the newest token in the hit rate
# Chances of being right that make a first draft token worth its time, and a further one: about what it costs in steps.
_FIRST = 0.45
_FURTHER = 0.2


class Lookup:
    """Drafts for one growing history of tokens, of at most `most` tokens each.

    A draft is what followed the latest earlier place of the longest n-gram that ends the history. Where it reaches the
    end of the history it continues from its own beginning, so a loop is drafted as a loop.

    `rate` is a moving average of how often a proposed token was the one that came, also where the proposal was not
    handed out. Token k of a draft is right with a chance of about rate ** k. The draft ends where that falls below what
    a token costs. So proposals that fail soon cost nothing, and drafts come back when they would be right.
    """

    def __init__(self, most: int) -> None:
        self.rate = 0.5
        self._most = most
        self._length = 0  # of the history that was read
        self._followers: dict[bytes, int] = {}  # n-gram → position of the token after its latest place
        self._proposal: list[int] = []

    def draft(self, history: NDArray[np.int32], room: int) -> list[int]:
        """Up to `room` tokens that may follow `history` (T,), which begins with the history of the call before.

        Time goes with the number of new tokens, not with T.
        """
        self._judge(history[self._length : self._length + self._most].tolist())
        self._read(history)
        self._proposal = self._propose(history)
        count = 0
        if self.rate > _FIRST:
            while count < min(room, len(self._proposal)) and self.rate ** (count + 1) > _FURTHER:
                count += 1
        return self._proposal[:count]

    def _judge(self, came: list[int]) -> None:
        for proposed, token in zip(self._proposal, came, strict=False):
            self.rate += _WEIGHT * ((proposed == token) - self.rate)
            if proposed != token:
                return

    def _read(self, history: NDArray[np.int32]) -> None:
        """Enter the n-grams before each new token. The one that ends the history has no follower yet."""
        begin, size = max(0, self._length - SIZES[0]), history.itemsize
        data = history[begin:].tobytes()
        for at in range(self._length, len(history)):
            for n in SIZES:
                if n <= at:
                    self._followers[data[(at - n - begin) * size : (at - begin) * size]] = at
        self._length = len(history)

    def _propose(self, history: NDArray[np.int32]) -> list[int]:
        for n in SIZES:
            if at := self._followers.get(history[-n:].tobytes()):
                return list(islice(cycle(history[at : at + self._most].tolist()), self._most))
        return []
