"""Llama 2's network (paper 2.2), whole: what happens between a token's id and the logits of the next one.

B batch  T time  S keys  D width  H query heads  K key/value heads  E head size  F hidden width  V vocabulary

Modules are named so that parameters have Meta's names (`layers.0.attention.wq.weight`); pairs of dimensions that rotary
embedding rotates are adjacent, as in Meta's checkpoints. Biases are where the configuration has them; there is no
dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.checkpoint import Checkpoint
from llama2.checkpoint import Tensor as Stored
from llama2.config import ModelConfig
from llama2.errors import ContextError

#: Queries (B, T, H, E), keys and values (B, T, K, E) of T tokens → what they read (B, T, H, E).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Queries that attention_by_products takes at once.
QUERIES = 512

_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class RMSNorm(nn.Module):
    """Scales each vector to root mean square 1, then by a trained weight (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()  # squares of halves overflow
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rope_cos_sin(
    positions: Tensor,
    frequencies: tuple[float, ...],
    growth: tuple[float, int] | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """Cosine and sine of the angles by which positions rotate pairs of dimensions: (…, T) → (…, T, E / 2, 2) float32.

    The other arguments are results of ModelConfig's methods of these names.
    """
    # In float64, because a float32 angle at position 4095 is wrong in the fourth digit (spec 12.2).
    inverse_frequencies = torch.tensor(frequencies, dtype=torch.float64, device=positions.device)  # (E / 2,)
    angles = positions[..., None] * inverse_frequencies  # (…, T, E / 2)
    if growth is not None:
        factor, context = growth
        stretch = (factor * (positions + 1).double() / context - (factor - 1)).clamp(min=1)  # (…, T)
        exponents = torch.arange(len(frequencies), dtype=torch.float64, device=positions.device)  # (E / 2,)
        angles = angles / stretch[..., None] ** (exponents / (len(frequencies) - 1))
    return (torch.stack((angles.cos(), angles.sin()), dim=-1) * attention_factor).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021): rotates pairs (2i, 2i + 1) of x (B, T, heads, E) by rope (…, T, E / 2, 2)."""
    a, b = x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)  # (B, T, heads, E / 2)
    cos, sin = rope.unsqueeze(-3).unbind(-1)  # (…, T, 1, E / 2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023): query head j reads key/value head j // (H / K).

    q (B, T, H, E), k and v (B, S, K, E) → (B, T, H, E). `visible`, which broadcasts to (B, T, S), says which keys a
    token may read. Without it, S = T and a token reads those up to its own.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T or S, E)
    mask = None if visible is None else visible[..., None, :, :]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def window_mask(start: int, end: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys 0 to `end` each token from `start` on may read: (T, S), the last `window` up to its own."""
    visible = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)
    return visible if window is None else visible.triu(start - window + 1)


def document_mask(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows that hold several documents: positions (B, T) in them, and which tokens (B, T, T) each token may read.

    documents (B, T) are their numbers, which change where another begins.
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # (B, T)
    changes = documents.diff(prepend=documents[:, :1]) != 0
    starts = torch.where(changes, places, 0).cummax(-1).values  # of the document that each token is in
    return places - starts, (starts[:, :, None] == starts[:, None, :]).tril()


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """What `attention` gives for S = T, by plain products, some queries at a time.

    Compiled for a CPU it is faster than the fused kernel where T is small. It keeps T² / 2 weights a head, or up to T²
    where T is not many times QUERIES.
    """
    count, size = q.shape[1], q.shape[3]
    if visible is None:
        visible = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()  # (T, T)
    hidden = ~visible[..., None, None, :, :]  # ([B,] 1, 1, T, T)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, E)
    q = q.view(*q.shape[:2], k.shape[1], -1, size).permute(0, 2, 3, 1, 4)  # (B, K, H / K, T, E)
    parts = []
    for start in range(0, count, QUERIES):
        end = min(start + QUERIES, count)
        some = q[..., start:end, :]  # (B, K, H / K, queries, E)
        scores = some.flatten(2, 3) @ k[:, :, :end].transpose(-1, -2)  # (B, K, H / K * queries, keys)
        scores = scores.float().view(*some.shape[:-1], end) * size**-0.5
        weights = scores.masked_fill(hidden[..., start:end, :end], -torch.inf).softmax(-1).type_as(v)
        parts.append((weights.flatten(2, 3) @ v[:, :, :end]).view_as(some))
    return torch.cat(parts, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, E)


class Attention(nn.Module):
    """Projects to queries, keys and values, rotates the first two by their positions, and mixes what is read."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias="attention.wq" in c.biases)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias="attention.wk" in c.biases)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias="attention.wv" in c.biases)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias="attention.wo" in c.biases)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = attention) -> Tensor:
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, E)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, E)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, K, E)
        y = attend(apply_rope(q, rope), apply_rope(k, rope), v)  # (B, T, H, E)
        out: Tensor = self.wo(y.flatten(-2))  # (B, T, D)
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): a hidden layer whose units are gated by others."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias="feed_forward.w1" in c.biases)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias="feed_forward.w2" in c.biases)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias="feed_forward.w3" in c.biases)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, F) inside
        return out


class Block(nn.Module):
    """Pre-normalised residual block."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, rope: Tensor, attend: Attend = attention) -> Tensor:
        h: Tensor = x + self.attention(self.attention_norm(x), rope, attend)  # (B, T, D)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))  # (B, T, D)
        return out


class KVCache(Protocol):
    """What tokens may read beside one another: keys and values of those before them."""

    def advance(self, count: int) -> Tensor:
        """Positions of the `count` tokens that run next: (T,)."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep their keys and values, and let each read what comes up to it: an Attend of `layer`."""
        ...


class Transformer(nn.Module):
    """The language model, with random weights. Fits torch.compile, and torch's meta device at any size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = tuple(config.inverse_frequencies()), config.dynamic_growth(), config.attention_factor()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.initialise()

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each one, having read those before: (B, T) ids → (B, T, V) float32.

        With `cache`, such as a ContiguousCache, the tokens continue what is in it.
        """
        return self.logits(self.hidden_states(tokens, cache))

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        attention: Callable[..., Tensor] = attention,
    ) -> Tensor:
        """What the output head reads: (B, T) ids → (B, T, D).

        With `documents` (B, T) instead of `cache`, a row holds several documents, which do not read each other.
        Without `cache`, `attention` may be another function of the same results.
        """
        count, attend, window = tokens.shape[1], attention, self.config.sliding_window
        visible = None
        if cache is None and window is not None and window < count:
            visible = window_mask(0, count, window, tokens.device)  # (T, T)
        if documents is not None:
            positions, own = document_mask(documents)  # (B, T), (B, T, T)
            visible = own if visible is None else own & visible
        else:
            positions = torch.arange(count, device=tokens.device) if cache is None else cache.advance(count)  # (T,)
        if visible is not None:
            attend = partial(attention, visible=visible)
        rope = rope_cos_sin(positions, *self.rope)  # ([B,] T, E / 2, 2)
        x: Tensor = self.tok_embeddings(tokens)  # (B, T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, attend if cache is None else partial(cache.attend, i))  # (B, T, D)
        x = self.norm(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The output head, which may be the embeddings again: (…, D) → (…, V) float32."""
        return F.linear(x, self.head).float()

    @property
    def head(self) -> Tensor:
        """The output head's matrix (V, D), which may be the embeddings again."""
        return (self.tok_embeddings if self.output is None else self.output).weight

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw random weights, also for a model that was built on the meta device and then given memory.

        Meta published no initialisation. Normal with deviation 0.02 is `initializer_range` of the released models'
        configuration at Hugging Face. Where a block adds to the residual, it is divided by √(2L): GPT-2's rule (Radford
        et al. 2019), which keeps the sum of 2L additions from growing with depth.
        """
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, generator)

    def draw(self, name: str, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `weight` as `initialise` fills the parameter of that name."""
        if name.endswith(".bias"):
            nn.init.zeros_(weight)
        elif weight.ndim == 1:
            nn.init.ones_(weight)
        else:
            adds = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            deviation = 0.02 / (2 * self.config.n_layers) ** 0.5 if adds else 0.02
            nn.init.normal_(weight, std=deviation, generator=generator)

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Transformer:
        """The checkpoint's network, its weights converted one tensor at a time."""
        with torch.device("meta"):
            model = cls(checkpoint.config)
        weights = ((name, torch.from_numpy(tensor.dequantize())) for name, tensor in checkpoint.tensors.items())
        model.load_state_dict({name: weight.to(device, dtype) for name, weight in weights}, assign=True)
        return model

    def tensors(self) -> dict[str, Stored]:
        """The weights as a checkpoint holds them, by Meta's names; on the CPU they share their memory.

        Raises KeyError for a number format that checkpoints do not have.
        """
        return {name: stored(name, weight) for name, weight in self.state_dict().items()}


def stored(name: str, weight: Tensor) -> Stored:
    """A weight as a checkpoint holds it; on the CPU it shares the memory of one that is contiguous.

    Raises KeyError for a number format that checkpoints do not have.
    """
    data = weight.detach().cpu().contiguous()
    return Stored(name, _FORMATS[data.dtype], tuple(data.shape), data.view(torch.uint8).flatten().numpy())


class ContiguousCache:
    """Keys and values of B sequences that grow together, so that decoding computes each token once.

    `model(prompt, cache)`, then `model(next, cache)` with one or more tokens, all without gradients; there is room for
    `length` tokens of each sequence.
    """

    def __init__(self, model: Transformer, batch: int, length: int) -> None:
        c, shape = model.config, (batch, length, model.config.n_kv_heads, model.config.head_dim)
        self.keys = [model.norm.weight.new_empty(shape) for _ in range(c.n_layers)]  # (B, length, K, E)
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length, self.window = 0, c.sliding_window

    def advance(self, count: int) -> Tensor:
        """Positions of the next `count` tokens: (T,). Raises ContextError when there is no room for them."""
        start, end, room = self.length, self.length + count, self.keys[0].shape[1]
        if end > room:
            raise ContextError(f"a cache of {room} tokens has no room for {end}; make a longer one")
        self.length = end
        return torch.arange(start, end, device=self.keys[0].device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v (B, T, K, E), and attend with q (B, T, H, E) to all up to each token."""
        start, end = self.length - q.shape[1], self.length
        keys, values = self.keys[layer], self.values[layer]
        keys[:, start:end], values[:, start:end] = k, v
        visible = window_mask(start, end, self.window, q.device)  # (T, S)
        return attention(q, keys[:, :end], values[:, :end], visible)
