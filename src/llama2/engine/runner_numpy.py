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


def attend(q: Floats, k: Floats, v: Floats, positions: NDArray[np.int32]) -> Floats:
    """Causal attention of one sequence; query head j reads key/value head j // G.  q (n, H, E), k and v (T, K, E)"""
    n, heads, size = q.shape
    q = q.reshape(n, k.shape[1], -1, size).transpose(1, 2, 0, 3)  # (K, G, n, E)
    scores = q @ k.transpose(1, 2, 0)[:, None] / np.float32(np.sqrt(size))  # (K, G, n, T)
    visible = np.arange(len(k)) <= positions[:, None]  # (n, T)
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    return (weights @ v.transpose(1, 0, 2)[:, None]).transpose(2, 0, 1, 3).reshape(n, heads, size)


class NumpyRunner:
    """A Runner over dequantised float32 weights: 4 bytes a parameter, and 8 * K * E a layer and position of cache."""

    def __init__(self, checkpoint: Checkpoint, n_blocks: int) -> None:
        c = self.config = checkpoint.config
        self.n_blocks = n_blocks
        self.frequencies = np.array(c.inverse_frequencies())  # (E / 2,) float64
        self.weights = {name.removesuffix(".weight"): t.dequantize() for name, t in checkpoint.tensors.items()}
        self.head = self.weights["tok_embeddings" if c.tied_embeddings else "output"]
        self.keys = np.zeros((c.n_layers, n_blocks * BLOCK, c.n_kv_heads, c.head_dim), np.float32)
        self.values = np.zeros_like(self.keys)

    @np.errstate(over="ignore", invalid="ignore")  # the engine refuses logits that are not numbers
    def forward(self, batch: Batch) -> Floats:
        """Write keys and values of every token into its block, and return the logits of `outputs`: (M, V)."""
        angles = np.outer(batch.positions, self.frequencies)  # float64: position 4095 has no digits to spare
        turns = np.exp(1j * angles).astype(np.complex64)  # (N, E / 2)
        w, eps = self.weights, self.config.norm_eps
        x = w["tok_embeddings"][batch.tokens]  # (N, D)
        for i in range(self.config.n_layers):
            x = x + self._attention(i, rms_norm(x, w[f"layers.{i}.attention_norm"], eps), turns, batch)
            x = x + self._feed_forward(i, rms_norm(x, w[f"layers.{i}.ffn_norm"], eps))
        return rms_norm(x[batch.outputs], w["norm"], eps) @ self.head.T

    def _attention(self, i: int, x: Floats, turns: NDArray[np.complex64], batch: Batch) -> Floats:
        wq, wk, wv, wo = (self.weights[f"layers.{i}.attention.{name}"] for name in ("wq", "wk", "wv", "wo"))
        size = self.config.head_dim
        q = rotate((x @ wq.T).reshape(len(x), -1, size), turns)  # (N, H, E)
        k = rotate((x @ wk.T).reshape(len(x), -1, size), turns)  # (N, K, E)
        v = (x @ wv.T).reshape(len(x), -1, size)
        out = np.empty_like(q)
        for s in np.unique(batch.sequences):
            mine = batch.sequences == s
            positions = batch.positions[mine]
            slots = (batch.blocks[s][:, None] * BLOCK + np.arange(BLOCK)).ravel()  # where each position is cached
            self.keys[i, slots[positions]], self.values[i, slots[positions]] = k[mine], v[mine]
            past = slots[: positions[-1] + 1]
            out[mine] = attend(q[mine], self.keys[i, past], self.values[i, past], positions)
        return out.reshape(len(x), -1) @ wo.T

    def _feed_forward(self, i: int, x: Floats) -> Floats:
        w1, w2, w3 = (self.weights[f"layers.{i}.feed_forward.{name}"] for name in ("w1", "w2", "w3"))
        return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T  # (N, F) within
