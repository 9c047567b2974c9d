"""The Runner in PyTorch: the network of model/transformer.py on any of torch's devices, over a paged cache.

N tokens of a step  G sequences that run as many tokens  T of each  S their keys
M wanted rows  D width  H query heads  K key/value heads  R = H / K that share one  E head size
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llama2.checkpoint import Checkpoint
from llama2.config import ModelConfig
from llama2.ending import EndsInSection, section
from llama2.engine.runner import BLOCK, Batch, cache_too_large
from llama2.errors import EngineError
from llama2.model import parallel
from llama2.model.transformer import Transformer, attention


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of a step that run as many tokens, and so are attended together."""

    tokens: Tensor  # (G, T) indices into the step's tokens
    places: Tensor  # (G, S) where keys and values of a sequence's positions are; past its end, the last again
    visible: Tensor  # (G, T * R, S) whether a token may read a key; R rows for each token


class PagedCache:
    """A batch as the network sees it: what was cached before it, and where its own keys and values go."""

    def __init__(self, runner: TorchRunner, batch: Batch) -> None:
        self.keys, self.values, self.device = runner.keys, runner.values, runner.device
        self.tokens = self._tensor(batch.tokens)  # (N,)
        self.positions = self._tensor(batch.positions)  # (N,)
        blocks = batch.blocks[batch.sequences, batch.positions // BLOCK]
        self.places = self._tensor(blocks * BLOCK + batch.positions % BLOCK)  # (N,)
        starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))  # the first token of each sequence
        counts = np.diff(starts, append=len(batch.tokens))
        self.groups = [self._group(runner, batch, starts[counts == n], n) for n in np.unique(counts)]

    def _group(self, runner: TorchRunner, batch: Batch, starts: NDArray[np.intp], count: int) -> Group:
        ends = batch.positions[starts + count - 1, None]  # (G, 1)
        # No place is read that its sequence has not written: what is left there may be NaN, which no mask hides.
        read = np.minimum(np.arange(ends.max() + 1, dtype=np.int32), ends)  # (G, S)
        places = batch.blocks[batch.sequences[starts, None], read // BLOCK] * BLOCK + read % BLOCK
        tokens = self._tensor(starts[:, None] + np.arange(count))  # (G, T)
        distance = self.positions[tokens, None] - torch.arange(read.shape[1], device=self.device)  # (G, T, S)
        visible = (distance >= 0) & (distance < (runner.config.sliding_window or read.shape[1]))
        sharing = runner.config.n_heads // runner.config.n_kv_heads
        return Group(tokens, self._tensor(places), visible.repeat_interleave(sharing, dim=1))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def advance(self, count: int) -> Tensor:
        """Positions of the step's tokens: (N,)."""
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cache k and v (1, N, K, E), and attend with q (1, N, H, E) to each token's own sequence."""
        keys, values, y = self.keys[layer], self.values[layer], torch.empty_like(q[0])
        keys[self.places], values[self.places] = k[0], v[0]
        for g in self.groups:
            # Query heads that share a key/value head become rows of one product, so that keys are not copied for each.
            shape = (*g.tokens.shape, keys.shape[1], -1, keys.shape[2])
            heads = q[0, g.tokens].view(shape).transpose(2, 3)  # (G, T, R, K, E)
            read = attention(heads.flatten(1, 2), keys[g.places], values[g.places], g.visible)  # (G, T * R, K, E)
            y[g.tokens] = read.view(heads.shape).transpose(2, 3).flatten(2, 3)  # (G, T, H, E)
        return y[None]


class TorchRunner(EndsInSection):
    """Runs a checkpoint on `device`, with weights and cache in `dtype`; by default on CUDA in bfloat16 if there is one.

    Weights that are quantized are expanded to `dtype`. With `compile`, torch.compile takes some time for the first
    steps in which all sequences run as many tokens, as in decode. Later ones are faster.

    With a `group`, of all processes, these share the model. Each makes a runner; process 0 calls `forward`, and the
    others `follow`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        n_blocks: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Raises EngineError when weights or cache do not fit into memory, or cannot be shared evenly."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        try:
            if group is None:
                model = Transformer.load(checkpoint, dtype=dtype, device=where)
            else:
                model = parallel.load(checkpoint, group.rank(), group.size(), dtype=dtype, device=where)
        except torch.OutOfMemoryError:
            raise EngineError(
                f"the weights do not fit into the memory of {where}; share them among more devices by torchrun"
            ) from None
        self._allocate(model, checkpoint.config, n_blocks, compile=compile, group=group)

    def _allocate(
        self,
        model: Transformer,
        config: ModelConfig,
        n_blocks: int,
        *,
        compile: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Make the cache, of the weights' device and number format. `config` is the whole network's."""
        self.model, self.config, self.n_blocks = model, config, n_blocks
        self.device, dtype = model.norm.weight.device, model.norm.weight.dtype
        self.arithmetic = f"torch, {str(dtype).removeprefix('torch.')} on {self.device.type}"
        self._process = os.getpid()
        c = model.config  # of the part that is here
        try:
            self.keys, self.values = (
                [
                    torch.empty(n_blocks * BLOCK, c.n_kv_heads, c.head_dim, dtype=dtype, device=self.device)
                    for _ in range(c.n_layers)
                ]
                for _ in range(2)
            )
        except (RuntimeError, TypeError):  # what torch says of memory that is not there, and of numbers above 2⁶³
            raise cache_too_large(n_blocks) from None
        self._compiled = (
            parallel.compiled(self.model.hidden_states, dynamic=True) if compile else self.model.hidden_states
        )
        self._group = group

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Write keys and values of every token into its block, and return the logits of `outputs`: (M, V)."""
        global _used_in  # noqa: PLW0603
        if self._process != os.getpid():
            raise _forked()
        _used_in = self._process
        if self._group is not None:
            _broadcast(batch, self._group)
        features = self._features(batch)
        if hidden is not None:
            hidden[:] = features.float().cpu().numpy()
        outputs = torch.from_numpy(batch.outputs).to(self.device)
        logits: NDArray[np.float32] = self.model.logits(features[outputs]).cpu().numpy()
        return logits

    @torch.inference_mode()
    def follow(self) -> None:
        """Run what process 0 runs, until it says that this is all."""
        while (batch := _broadcast(None, self._group)) is not None:
            self._features(batch)

    def _features(self, batch: Batch) -> Tensor:
        step = PagedCache(self, batch)
        features = self._compiled if len(step.groups) == 1 else self.model.hidden_states
        x: Tensor = features(step.tokens[None], step)  # (1, N, D)
        return x[0]


class LiveTorchRunner(TorchRunner):
    """Runs a network that somebody else changes in place between steps, on its own device and in its number format."""

    def __init__(self, model: Transformer, n_blocks: int, *, compile: bool = False) -> None:
        """Raises EngineError when the cache does not fit into memory."""
        self._allocate(model, model.config, n_blocks, compile=compile)

    def weights_changed(self) -> None:
        """The network's parameters are read in place."""


_used_in: int | None = None  # the process that ran a network


def _forked() -> EngineError:
    return EngineError(
        "PyTorch does not work in a process forked from one that used it; load the model in a process that was spawned"
    )


def start(checkpoint: Checkpoint, n_blocks: int, *, compile: bool = False) -> TorchRunner:
    """A runner on this machine's best device; in a program that torchrun started, one that its processes share.

    There, this returns in process 0 alone. The others follow it, and their program ends where this was called.
    """
    if _used_in not in (None, os.getpid()):
        raise _forked()
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        with section:
            return TorchRunner(checkpoint, n_blocks, compile=compile)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    # Batches are broadcast in a group of their own: nobody knows how long process 0 waits for the next request.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    runner = TorchRunner(checkpoint, n_blocks, device=device, compile=compile, group=group)
    if group.rank() > 0:
        runner.follow()
        _leave(group)
        raise SystemExit(0)
    weakref.finalize(runner, _end, group)
    return runner


def _end(group: dist.ProcessGroup) -> None:
    _broadcast(None, group)
    _leave(group)


def _leave(group: dist.ProcessGroup) -> None:
    """Nobody closes a connection that another one still listens to."""
    dist.barrier(group)
    dist.destroy_process_group()


def _broadcast(batch: Batch | None, group: dist.ProcessGroup | None) -> Batch | None:
    """Process 0's batch, in every process; None ends."""
    batches = [batch]
    dist.broadcast_object_list(batches, group_src=0, group=group)
    return batches[0]
