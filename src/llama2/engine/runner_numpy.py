"""The transformer in NumPy float32 (spec 1.2): the oracle of every other runner, and a fallback.

N tokens of the step  n of one sequence  T its keys  M wanted rows  V vocabulary
D width  H query heads  K key/value heads  G = H / K that share one  E head size  F hidden width
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint
from llama2.engine.runner import BLOCK, Batch

Floats = NDArray[np.float32]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Scale each row to root mean square 1, then by `weight`."""
    y: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return y * weight


def silu(x: Floats) -> Floats:
    """`x * sigmoid(x)`, in a form that cannot overflow."""
    y: Floats = 0.5 * x * (1 + np.tanh(0.5 * x))
    return y


def softmax(x: Floats) -> Floats:
    """Over the last axis, where at least one value is finite."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    y: Floats = e / e.sum(axis=-1, keepdims=True)
    return y


def rotate(x: Floats, turns: NDArray[np.complex64]) -> Floats:
    """Rotary embedding in Meta's order, where (2i, 2i + 1) is a complex number.  x (n, heads, E), turns (n, E / 2)"""
    return (x.view(np.complex64) * turns[:, None]).view(np.float32)


def attend(q: Floats, k: Floats, v: Floats, positions: NDArray[np.int32], window: int | None = None) -> Floats:
    """Causal attention of one sequence, to the last `window` keys; query head j reads key/value head j // G.

    q (n, H, E), k and v (T, K, E)
    """
    n, heads, size = q.shape
    q = q.reshape(n, k.shape[1], -1, size).transpose(1, 2, 0, 3)  # (K, G, n, E)
    scores = q @ k.transpose(1, 2, 0)[:, None] / np.float32(np.sqrt(size))  # (K, G, n, T)
    distance = positions[:, None] - np.arange(len(k))  # (n, T)
    visible = (distance >= 0) & (distance < (window or len(k)))  # (n, T)
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    return (weights @ v.transpose(1, 0, 2)[:, None]).transpose(2, 0, 1, 3).reshape(n, heads, size)


class NumpyRunner:
    """A Runner over dequantized float32 weights: 4 bytes a parameter, and 8 * K * E a layer and position of cache."""

    arithmetic = "numpy, float32"

    def __init__(self, checkpoint: Checkpoint, n_blocks: int) -> None:
        c = self.config = checkpoint.config
        self.n_blocks = n_blocks
        self.frequencies = np.array(c.inverse_frequencies())  # (E / 2,) float64
        self.weights = {name.removesuffix(".weight"): t.dequantize() for name, t in checkpoint.tensors.items()}
        self.head = self.weights["tok_embeddings" if c.tied_embeddings else "output"]
        self.keys = np.zeros((c.n_layers, n_blocks * BLOCK, c.n_kv_heads, c.head_dim), np.float32)
        self.values = np.zeros_like(self.keys)

    @np.errstate(over="ignore", invalid="ignore")  # the engine refuses logits that are not numbers
    def forward(self, batch: Batch, hidden: Floats | None = None) -> Floats:
        """Write keys and values of every token into its block, and return the logits of `outputs`: (M, V)."""
        turns = self._turns(batch.positions)  # (N, E / 2)
        w, eps = self.weights, self.config.norm_eps
        x = w["tok_embeddings"][batch.tokens]  # (N, D)
        for i in range(self.config.n_layers):
            x = x + self._attention(i, rms_norm(x, w[f"layers.{i}.attention_norm"], eps), turns, batch)
            x = x + self._feed_forward(i, rms_norm(x, w[f"layers.{i}.ffn_norm"], eps))
        x = rms_norm(x, w["norm"], eps)
        if hidden is not None:
            hidden[:] = x
        return x[batch.outputs] @ self.head.T

    def _turns(self, positions: NDArray[np.int32]) -> NDArray[np.complex64]:
        """Each position's rotation of each pair of dimensions, in float64: position 4095 has no digits to spare."""
        angles = np.outer(positions, self.frequencies)
        if growth := self.config.dynamic_growth():
            factor, context = growth
            stretch = np.maximum(factor * (positions + 1) / context - (factor - 1), 1.0)
            exponents = np.arange(0, self.config.head_dim, 2) / (self.config.head_dim - 2)
            angles /= stretch[:, None] ** exponents
        return (self.config.attention_factor() * np.exp(1j * angles)).astype(np.complex64)

    def _product(self, name: str, x: Floats) -> Floats:
        y: Floats = x @ self.weights[name].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _attention(self, i: int, x: Floats, turns: NDArray[np.complex64], batch: Batch) -> Floats:
        size, window = self.config.head_dim, self.config.sliding_window
        q, k, v = (
            self._product(f"layers.{i}.attention.{name}", x).reshape(len(x), -1, size) for name in ("wq", "wk", "wv")
        )
        q, k = rotate(q, turns), rotate(k, turns)  # (N, H, E), (N, K, E)
        out = np.empty_like(q)
        for s in np.unique(batch.sequences):
            mine = batch.sequences == s
            positions = batch.positions[mine]
            slots = (batch.blocks[s][:, None] * BLOCK + np.arange(BLOCK)).ravel()  # where each position is cached
            self.keys[i, slots[positions]], self.values[i, slots[positions]] = k[mine], v[mine]
            past = slots[: positions[-1] + 1]
            out[mine] = attend(q[mine], self.keys[i, past], self.values[i, past], positions, window)
        return self._product(f"layers.{i}.attention.wo", out.reshape(len(x), -1))

    def _feed_forward(self, i: int, x: Floats) -> Floats:
        gate, up = (self._product(f"layers.{i}.feed_forward.{name}", x) for name in ("w1", "w3"))  # (N, F)
        return self._product(f"layers.{i}.feed_forward.w2", silu(gate) * up)
