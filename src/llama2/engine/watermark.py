"""Watermarks of drawn tokens: which scheme, with which key. The arithmetic is native (native/watermark.h).

A watermark works on the candidates that are left after temperature, top-k, top-p and min-p. It is a function of its key
and of the tokens before, so marked answers are as reproducible as others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llama2 import native
from llama2.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Layers of a tournament at most, and the largest key of each.
MOST_KEYS, LARGEST_KEY = 32, (1 << 63) - 1
#: Contexts of an answer that are remembered: none of them marks a second time.
HISTORY = 1024


@dataclass(frozen=True, slots=True)
class SynthId:
    """SynthID-Text's tournament, non-distortionary: over random keys, tokens have the model's own probabilities.

    Each of `keys` is a layer. A mark depends on the last `ngram` tokens, the marked one among them. So the first
    `ngram` − 1 tokens of an answer are not marked, and neither is one whose context has come before in the answer.
    Bits and probabilities are those of transformers' processor with these keys.
    """

    keys: tuple[int, ...]
    ngram: int = 5

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= MOST_KEYS or not all(0 <= key <= LARGEST_KEY for key in self.keys):
            raise RequestError(f"watermark: needs 1 to {MOST_KEYS} keys from 0 to {LARGEST_KEY}")
        if not 2 <= self.ngram <= 64:
            raise RequestError(f"watermark: ngram={self.ngram} must be from 2 to 64")

    @property
    def context(self) -> int:
        """Tokens before a marked one on which its mark depends."""
        return self.ngram - 1

    @property
    def layers(self) -> int:
        """Bits of a token."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Kgw:
    """A green list by the token before (Kirchenbauer et al. 2023): `share` of the vocabulary gets `bias` more logit.

    It changes the distribution. Lists are those of transformers' processor with `lefthash`.
    """

    key: int
    share: float = 0.25
    bias: float = 2.0

    context = 1
    layers = 1

    def __post_init__(self) -> None:
        if not 1 <= self.key < 1 << 40:
            raise RequestError(f"watermark: key={self.key} must be from 1 to {(1 << 40) - 1}")
        if not 0 < self.share < 1 or not 0 < self.bias <= 100:
            raise RequestError("watermark: share must be between 0 and 1, and bias above 0 and at most 100")


Watermark = SynthId | Kgw


def native_of(watermark: Watermark) -> Any:
    """The native scheme, which is made once."""
    return _native(watermark, native.module().__name__)


@lru_cache(maxsize=32)
def _native(watermark: Watermark, module: str) -> Any:
    made = native.module()
    if isinstance(watermark, SynthId):
        return made.tournament([*watermark.keys], watermark.ngram)
    return made.green_list(watermark.key, watermark.share, watermark.bias)


class Marking:
    """Marks the tokens of one answer, which are drawn in order."""

    def __init__(self, watermark: Watermark, prompt_length: int) -> None:
        self._scheme = native_of(watermark)
        self._context = watermark.context
        self._whole = isinstance(watermark, SynthId)  # whether the context is of the answer, and marks once
        self._prompt_length = prompt_length
        self._seen: dict[bytes, int] = {}  # context → its last position

    def at(self, history: NDArray[np.int32]) -> Any:
        """The native scheme for the token that follows `history`; None for one that is not marked."""
        length = len(history)
        if not self._whole:
            return self._scheme if length >= self._context else None
        if length - self._prompt_length < self._context:
            return None
        context = history[length - self._context :].tobytes()
        last = self._seen.get(context)
        self._seen[context] = length
        return self._scheme if last is None or length - last > HISTORY else None


def bits_of(watermark: Watermark, tokens: NDArray[np.int32], vocabulary: int) -> NDArray[np.uint32]:
    """For each token that has a context before it, its bits, one a layer: (T − context,)."""
    import numpy as np  # a command that draws nothing must start without it

    out = np.empty(max(0, len(tokens) - watermark.context), np.uint32)
    if len(out):
        native_of(watermark).bits(np.ascontiguousarray(tokens, np.int32), vocabulary, out)
    return out
