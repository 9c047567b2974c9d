"""Objectives: what a step minimises, as sums of losses over batches.

B rows  T tokens of a row  D width
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recompute

from llama2 import plan
from llama2.data.loader import TokenBatch, TrainBatch
from llama2.model import parallel
from llama2.model.transformer import Transformer, attention
from llama2.train.loss import exponentials, head_loss

Batch_contra = TypeVar("Batch_contra", bound=TrainBatch, contravariant=True)


class Objective(Protocol[Batch_contra]):
    """The losses of a batch. A step minimises their mean over all of its batches, on all processes."""

    def __call__(self, network: Network, batch: Batch_contra, /) -> Tensor:
        """The sum of the batch's `count` losses: () float32."""
        ...


class Network(nn.Module):
    """A transformer as a step runs it, perhaps divided and compiled: what objectives compute with.

    The whole pass of `objective` is this module's forward, so that FSDP2 gathers the head for it. With `group` for
    tensor parallelism, each of its processes has the same batch and a shard of the matrices.
    """

    def __init__(self, transformer: Transformer, objective: Objective[Any], group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.objective = objective
        self.group = group
        self.softmax = exponentials
        self.attention = attention

    def forward(self, batch: TrainBatch) -> Tensor:
        """The sum of the batch's losses: () float32."""
        return self.objective(self, batch)

    def tensor(self, array: NDArray[Any] | Tensor) -> Tensor:
        """An array on the network's device."""
        return torch.as_tensor(array, device=self.transformer.norm.weight.device)

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the output head reads: (B, T) ids → (B, T, D); `documents` as in Transformer.hidden_states."""
        return parallel.all_gather(self.transformer.hidden_states(tokens, None, documents, self.attention))

    def cross_entropy(self, hidden_states: Tensor, targets: Tensor, *, chunk: int = plan.CHUNK) -> Tensor:
        """The sum of -log p(target) over all targets: (B, T, D), (B, T) → () float32.

        Logits of `chunk` tokens are held at a time.
        """
        head = self.transformer.head
        return head_loss(
            hidden_states.flatten(0, 1),
            head.to_local() if isinstance(head, DTensor) else head,
            targets.flatten(),
            chunk=chunk,
            group=self.group,
            softmax=self.softmax,
        )

    def log_probabilities(self, hidden_states: Tensor, targets: Tensor, *, chunk: int = plan.CHUNK) -> Tensor:
        """log p(target) of N tokens, in nats: (N, D), (N,) → (N,) float32.

        Logits of `chunk` tokens are held at a time, and computed again in the backward pass.
        """
        parts = zip(torch.split(hidden_states, chunk), torch.split(targets, chunk), strict=True)
        return torch.cat([recompute(self._log_probabilities, *part, use_reentrant=False) for part in parts])

    def _log_probabilities(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(self.transformer.logits(hidden_states), targets, reduction="none")

    @torch.no_grad()
    def entropies(self, hidden_states: Tensor, *, chunk: int = plan.CHUNK) -> Tensor:
        """Entropy of the next token's distribution, in nats: (N, D) → (N,) float32."""
        logs = (F.log_softmax(self.transformer.logits(part), -1) for part in torch.split(hidden_states, chunk))
        return torch.cat([-(each.exp() * each).sum(-1) for each in logs])


def next_token(network: Network, batch: TokenBatch, *, chunk: int = plan.CHUNK) -> Tensor:
    """Cross-entropy of every target (paper 2.2); with a loss mask, that of answers alone (3.1)."""
    documents = None if batch.documents is None else network.tensor(batch.documents)
    hidden_states = network.hidden_states(network.tensor(batch.tokens), documents)
    return network.cross_entropy(hidden_states, network.tensor(batch.targets), chunk=chunk)
