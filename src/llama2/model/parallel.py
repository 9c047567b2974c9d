"""The network on several devices, each with its share of the heads and of the hidden units (Shoeybi et al. 2019)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama2.checkpoint import Checkpoint
from llama2.errors import EngineError
from llama2.model.transformer import Transformer


def load(
    checkpoint: Checkpoint, rank: int, size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Share `rank` of `size`: a network with fewer heads and hidden units, whose blocks add up what all shares give.

    Attention and feed-forward cost one sum over the default process group each. Embeddings, norms and the output head
    are whole on every device: they are the small part, and their results need no exchange. One tensor at a time is
    read whole. Raises EngineError when key/value heads or hidden units cannot be shared evenly.
    """
    c = checkpoint.config
    for name in ("n_kv_heads", "hidden_dim"):
        if getattr(c, name) % size:
            raise EngineError(f"{name}={getattr(c, name)} cannot be shared by {size} processes; start a divisor of it")
    share = replace(c, n_heads=c.n_heads // size, n_kv_heads=c.n_kv_heads // size, hidden_dim=c.hidden_dim // size)
    with torch.device("meta"):
        model = Transformer(share)
    weights = ((name, cut(name, t.dequantize(), rank, size)) for name, t in checkpoint.tensors.items())
    model.load_state_dict({name: torch.from_numpy(w).to(device, dtype) for name, w in weights}, assign=True)
    for name, module in model.named_modules():
        if name.endswith(("attention.wo", "feed_forward.w2")):
            module.register_forward_hook(_add_up)
    return model


def checkpoint_blocks(model: Transformer) -> None:
    """Let blocks keep their inputs alone, and compute the rest again in the backward pass (Chen et al. 2016)."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def cut(name: str, weight: NDArray[np.float32], rank: int, size: int) -> NDArray[np.float32]:
    """Rows of the matrices whose outputs are shared, columns of those that read what is shared, else all."""
    if name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight")):
        return np.split(weight, size)[rank].copy()  # a view would keep the whole alive
    if name.endswith(("wo.weight", "w2.weight")):
        return np.split(weight, size, axis=1)[rank].copy()
    return weight


def _add_up(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output
