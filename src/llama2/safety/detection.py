"""Whether a text has a watermark: an exact binomial test, without a trained detector.

Each token that follows a context has bits by the key. In text that was not marked they are random, so their sum is
binomial. In marked text more are set. A context is scored once: what repeats would count its bits again (Fernandez et
al. 2023, "Three bricks to consolidate watermarks").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2.engine.watermark import Kgw, SynthId, Watermark, bits_of
from llama2.text.tokenizer import Tokenizer

#: With fewer scored tokens, nothing is said.
LEAST = 25
#: A text is called marked where the p-value is at most this.
LEVEL = 0.01


@dataclass(frozen=True, slots=True)
class Detection:
    """What a text shows: how many tokens were scored, how many of their bits are set, how likely that is by chance."""

    verdict: Literal["marked", "not marked", "cannot say"]
    tokens: int
    scored: int
    set_bits: int
    bits: int
    expected: float  # share of set bits in unmarked text
    p_value: float | None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def detect(watermark: Watermark, tokens: NDArray[np.int32], vocabulary: int, *, level: float = LEVEL) -> Detection:
    """Test token ids (T,) of a text for a watermark."""
    fresh = _first_of_each(watermark, tokens)
    found = bits_of(watermark, tokens, vocabulary)[fresh]
    ones, trials = int(np.unpackbits(found.view(np.uint8)).sum()), len(found) * watermark.layers
    expected = chance(watermark, vocabulary)
    if len(found) < LEAST:
        return Detection("cannot say", len(tokens), len(found), ones, trials, expected, None)
    p = binomial_tail(ones, trials, expected)
    return Detection("marked" if p <= level else "not marked", len(tokens), len(found), ones, trials, expected, p)


def detect_text(watermark: Watermark, text: str, tokenizer: Tokenizer, *, level: float = LEVEL) -> Detection:
    """Test a text, tokenized anew: the tokens that were drawn are not known."""
    return detect(watermark, np.array(tokenizer.encode(text), np.int32), tokenizer.vocab_size, level=level)


def _first_of_each(watermark: Watermark, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which tokens with a context are scored: (T − context,).

    SynthID marks a context once, so its first token alone counts. A green list marks every token, and each pair counts
    once.
    """
    width = watermark.context + isinstance(watermark, Kgw)
    seen: set[bytes] = set()
    fresh = np.zeros(max(0, len(tokens) - watermark.context), bool)
    for i in range(len(fresh)):
        gram = tokens[i : i + width].tobytes()
        fresh[i] = gram not in seen
        seen.add(gram)
    return fresh


def chance(watermark: Watermark, vocabulary: int) -> float:
    """The share of set bits in text that was not marked: exactly, of the hash's table or the green list's size."""
    if isinstance(watermark, SynthId):
        return _SET_ROWS / (1 << 16)
    return int(vocabulary * watermark.share) / vocabulary


#: Set bits of the 2^16 rows of the tournament's table, which transformers draws with seed 0.
_SET_ROWS = 32_743


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(X ≥ successes) of a binomial X, summed from its terms."""
    if successes <= 0:
        return 1.0
    mean = trials * probability
    if successes <= mean:  # the lower tail has the smaller terms
        return max(0.0, 1.0 - _terms(trials - successes + 1, trials, 1 - probability))
    return min(1.0, _terms(successes, trials, probability))


def _terms(first: int, trials: int, probability: float) -> float:
    """The sum of the terms from `first` to `trials`, which fall from `first` on."""
    if first > trials:
        return 0.0
    log_term = (
        math.lgamma(trials + 1)
        - math.lgamma(first + 1)
        - math.lgamma(trials - first + 1)
        + first * math.log(probability)
        + (trials - first) * math.log1p(-probability)
    )
    total = term = 1.0
    odds = probability / (1 - probability)
    for k in range(first, trials):
        term *= odds * (trials - k) / (k + 1)
        total += term
        if term < total * 1e-17:
            break
    return math.exp(log_term) * total
