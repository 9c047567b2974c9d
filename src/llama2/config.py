"""A model's hyperparameters (paper 2.2, table 1). Pure arithmetic: no NumPy, no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from llama2.errors import ConfigError

_EXTREME = 1e15  # beyond any model's base frequency or factor, and far from where their powers overflow
#: The longest context that a file may claim.
MAX_CONTEXT = 1 << 30


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model stretches its rotary embedding beyond the context it was trained on.

    `linear` divides every position by `factor`. `llama3` divides low frequencies by `factor`, leaves high ones alone
    and blends in between (Llama 3.1's rule). A checkpoint that stores the resulting divisors itself (GGUF's
    `rope_freqs.weight`) gives them in `divisors`, one for each pair of dimensions, and they win.

    `yarn` (Peng et al. 2023) blends likewise, from pairs that turn `beta_fast` times within the original context to
    those of `beta_slow` times. `truncate` rounds both ends to whole pairs. `attention_factor` multiplies cosine
    and sine. `dynamic` raises the base for positions beyond the original context (decision 11).
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"rope scaling {name}={value} must be a positive number")
            if not 1 / _EXTREME <= value <= _EXTREME:
                raise ConfigError(f"rope scaling {name}={value} must be between {1 / _EXTREME} and {_EXTREME}")
        if self.kind == "llama3" and self.divisors is None and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("rope scaling high_freq_factor must be larger than low_freq_factor")
        if not 1 <= self.original_context <= MAX_CONTEXT:
            raise ConfigError(f"rope scaling original_context={self.original_context} must be 1 to {MAX_CONTEXT}")
        if self.kind == "dynamic" and self.factor < 1:
            raise ConfigError(f"rope scaling factor={self.factor} must be at least 1 where it is dynamic")
        if self.divisors is not None and not all(math.isfinite(d) and d > 0 for d in self.divisors):
            raise ConfigError("rope scaling divisors must be positive numbers")

    def context(self, stated: int) -> int:
        """Positions of a model whose file states so many; yarn and dynamic may reach further (decision 11)."""
        reached = min(self.original_context * self.factor, MAX_CONTEXT) if self.kind in ("yarn", "dynamic") else 0
        return max(stated, int(reached))


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What YaRN multiplies cosine and sine by, unless the model says it itself (transformers' rule)."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    if mscale and mscale_all_dim:
        return (mscale * growth + 1) / (mscale_all_dim * growth + 1)
    return growth + 1


#: Matrices of a layer that may have a bias, in their order.
BIASED = (*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{i}" for i in "123"))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the network's shape and arithmetic.

    Names follow Meta's `params.json` where it has one. Raises ConfigError when the values contradict each other.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    head_dim: int
    context_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    biases: tuple[str, ...] = ()  # the matrices of BIASED whose products have a bias, in every layer
    sliding_window: int | None = None  # how many keys a token reads at most, its own among them

    def __post_init__(self) -> None:
        limits = {
            "dim": 1 << 20,
            "n_layers": 1 << 12,
            "n_heads": 1 << 14,
            "n_kv_heads": 1 << 14,
            "hidden_dim": 1 << 22,
            "vocab_size": 1 << 26,
            "head_dim": 1 << 12,
            "context_length": MAX_CONTEXT,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ConfigError(f"{name}={value} must be between 1 and {limit}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even, because rotary embedding turns pairs")
        if not (math.isfinite(self.norm_eps) and self.norm_eps > 0):
            raise ConfigError(f"norm_eps={self.norm_eps} must be a positive number")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ConfigError(f"rope_theta={self.rope_theta} must be a positive number")
        if not 1 / _EXTREME <= self.rope_theta <= _EXTREME:
            raise ConfigError(f"rope_theta={self.rope_theta} must be between {1 / _EXTREME} and {_EXTREME}")
        if self.biases != tuple(name for name in BIASED if name in self.biases):
            raise ConfigError(f"biases={self.biases} must be some of {', '.join(BIASED)}, in this order")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1")
        kind = self.rope_scaling.kind if self.rope_scaling else None
        if kind == "yarn" and self.rope_theta <= 1:
            raise ConfigError(f"rope_theta={self.rope_theta} must be larger than 1 for yarn")
        if kind == "dynamic" and self.head_dim == 2:
            raise ConfigError("head_dim=2 has no pair that dynamic rope scaling could stretch")
        divisors = self.rope_scaling.divisors if self.rope_scaling else None
        if divisors is not None and len(divisors) != self.head_dim // 2:
            raise ConfigError(f"rope scaling has {len(divisors)} divisors, head_dim={self.head_dim} needs half as many")

    def parameters(self) -> int:
        """Number of parameters; a tied output head counts once (spec 1.1)."""
        d, kv = self.dim, self.n_kv_heads * self.head_dim
        layer = 2 * d * self.n_heads * self.head_dim + 2 * d * kv + 3 * d * self.hidden_dim + 2 * d
        layer += sum(self._rows()[name] for name in self.biases)
        embeddings = self.vocab_size * d * (1 if self.tied_embeddings else 2)
        return embeddings + d + self.n_layers * layer

    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but norms, biases and the table of embeddings."""
        read = 0 if self.tied_embeddings else self.vocab_size * self.dim
        return replace(self, biases=()).parameters() - read - (2 * self.n_layers + 1) * self.dim

    def matrix_flops(self) -> int:
        """Floating-point operations of a token's forward pass, attention apart: 2 a parameter (spec 12.1)."""
        return 2 * self.matrix_parameters()

    def attention_flops(self, keys: int) -> int:
        """Floating-point operations of a token's scores with `keys` tokens and of the mixture of their values."""
        return 4 * self.n_layers * self.n_heads * self.head_dim * keys

    def causal_attention_flops(self, length: int) -> int:
        """`attention_flops` of a token on average over a sequence, where token t reads t keys: 1 to `length`."""
        return self.attention_flops(length + 1) // 2  # exact, because that is a multiple of 4

    def training_flops(self, tokens: int) -> int:
        """Floating-point operations of training on `tokens`: 6 a parameter and token, by convention (spec 12.1)."""
        return 6 * self.parameters() * tokens

    def cache_bytes(self, tokens: int = 1, *, number: int = 2) -> int:
        """Bytes of the keys and values of `tokens` tokens in all layers, of `number` bytes each (spec 12.1)."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * number * tokens

    def inverse_frequencies(self) -> list[float]:
        """Radians a position turns pair i by, `theta ** (-2i / head_dim)` after scaling; head_dim / 2 values.

        With dynamic scaling these are for positions within the original context; see `dynamic_growth`.
        """
        frequencies = [self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.divisors is not None:
            return [f / d for f, d in zip(frequencies, scaling.divisors, strict=True)]
        if scaling.kind == "linear":
            return [f / scaling.factor for f in frequencies]
        if scaling.kind == "dynamic":
            return frequencies
        if scaling.kind == "yarn":
            low, high = _yarn_range(self, scaling)
            blends = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(frequencies))]
            return [f * (1 - b) + f / scaling.factor * b for f, b in zip(frequencies, blends, strict=True)]
        return [_llama3(f, scaling) for f in frequencies]

    def dynamic_growth(self) -> tuple[float, int] | None:
        """(factor, context) of dynamic scaling, by which a later position p turns pair i less: its frequency is divided
        by `(factor * (p + 1) / context - (factor - 1)) ** (2i / (head_dim - 2))`.
        """
        scaling = self.rope_scaling
        return (scaling.factor, scaling.original_context) if scaling and scaling.kind == "dynamic" else None

    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by, to the seven digits that every format can say."""
        return float(f"{self.rope_scaling.attention_factor:.7g}") if self.rope_scaling else 1.0

    def rope_divisors(self) -> list[float]:
        """What scaling divides each of the frequencies by; head_dim / 2 values."""
        plain = replace(self, rope_scaling=None).inverse_frequencies()
        return [f / scaled for f, scaled in zip(plain, self.inverse_frequencies(), strict=True)]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Meta's tensor names and their (out, in) shapes: what a complete checkpoint holds (spec 1.4a)."""
        d, rows = self.dim, self._rows()
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, d)}
        columns = {"attention.wo": rows["attention.wq"], "feed_forward.w2": self.hidden_dim}
        for i in range(self.n_layers):
            for part, matrices in (("attention", BIASED[:4]), ("ffn", BIASED[4:])):
                shapes[f"layers.{i}.{part}_norm.weight"] = (d,)
                for name in matrices:
                    shapes[f"layers.{i}.{name}.weight"] = (rows[name], columns.get(name, d))
                    if name in self.biases:
                        shapes[f"layers.{i}.{name}.bias"] = (rows[name],)
        shapes["norm.weight"] = (d,)
        if not self.tied_embeddings:
            shapes["output.weight"] = (self.vocab_size, d)
        return shapes

    def _rows(self) -> dict[str, int]:
        """How many numbers each product of a layer gives."""
        d, q, kv, hidden = self.dim, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.hidden_dim
        return dict(zip(BIASED, (q, kv, kv, d, hidden, d, hidden), strict=True))


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_context * frequency / (2 * math.pi)  # full turns within the original context
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn_range(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs between which YaRN blends: the last that turns `beta_fast` times, the first that does `beta_slow`."""

    def pair(turns: float) -> float:
        """Which pair turns so many times within the original context."""
        ratio = scaling.original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, config.head_dim - 1.0)
    return low, high if high != low else low + 0.001


def _published(
    dim: int, layers: int, heads: int, kv_heads: int, hidden: int, context: int, eps: float = 1e-5
) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        hidden_dim=hidden,
        vocab_size=32000,
        head_dim=128,
        context_length=context,
        norm_eps=eps,
    )


#: Llama 2's sizes. 34B was never released; its shape is Code Llama 34B's, which was initialised from it (spec 1.1).
SIZES: dict[str, ModelConfig] = {
    "7B": _published(4096, 32, 32, 32, 11008, 4096),
    "13B": _published(5120, 40, 40, 40, 13824, 4096),
    "34B": _published(8192, 48, 64, 8, 22016, 4096),
    "70B": _published(8192, 80, 64, 8, 28672, 4096),
}

#: Llama 1's sizes, for comparison (spec 1.1): half the context, every query head with keys of its own.
LLAMA_1_SIZES: dict[str, ModelConfig] = {
    "7B": _published(4096, 32, 32, 32, 11008, 2048, eps=1e-6),
    "13B": _published(5120, 40, 40, 40, 13824, 2048, eps=1e-6),
    "33B": _published(6656, 60, 52, 52, 17920, 2048, eps=1e-6),
    "65B": _published(8192, 80, 64, 64, 22016, 2048, eps=1e-6),
}
