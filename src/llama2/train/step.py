"""One step of the optimiser: micro-batches in, parameters changed (paper 2.2).

B rows  T tokens of a row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llama2.model import parallel
from llama2.model.transformer import Transformer
from llama2.train.loss import IGNORED, exponentials, head_loss

#: Tokens whose logits are held at once.
CHUNK = 512


class Batch(Protocol):
    """A micro-batch: (B, T) int64 tokens and targets, the latter IGNORED where there is no loss.

    documents (B, T) numbers the documents of a row: tokens then read no other document than their own, in which
    positions begin at 0. None: a row is one text.
    """

    @property
    def tokens(self) -> NDArray[np.int64]: ...
    @property
    def targets(self) -> NDArray[np.int64]: ...
    @property
    def documents(self) -> NDArray[np.int32] | None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did. A skipped one changed nothing."""

    loss: float  # mean over all targets of the step, in nats, before it
    norm: float  # of the gradient, before clipping
    tokens: int  # that were targets
    skipped: bool  # because loss or norm was not finite


class Objective(nn.Module):
    """The network and its loss in one module: (B, T) tokens and targets → the sum of the losses."""

    def __init__(self, network: Transformer, chunk: int) -> None:
        super().__init__()
        self.network = network
        self.chunk = chunk
        self.softmax = exponentials

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        x = self.network.features(tokens, documents=documents)  # (B, T, D)
        return head_loss(x.flatten(0, 1), self.network.head, targets.flatten(), chunk=self.chunk, softmax=self.softmax)


class Step:
    """A network and its AdamW, which decays matrices and no norms.

    `network` and `optimizer` are what a checkpoint saves. Parameters, gradients and the optimiser's state are float32;
    `precision` "bf16" does products in bfloat16. The largest norm of the gradient is `clip`. With `checkpointing` a
    block keeps its input alone and runs again in the backward pass.
    """

    def __init__(
        self,
        network: Transformer,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-5,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        precision: Literal["bf16", "fp32"] = "bf16",
        compile: bool = False,
        checkpointing: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.network = network
        self.objective = Objective(network, chunk)
        if checkpointing:
            parallel.checkpoint_blocks(network)
        if compile:  # block by block: all are one code, compiled once, in a fraction of the time that the whole takes
            for layer in network.layers:
                layer.compile()
            self.objective.softmax = torch.compile(exponentials)
        self.clip = clip
        self.precision = precision
        self.device = network.norm.weight.device
        parameters = list(network.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, batches: Sequence[Batch], rate: float) -> Progress:
        """Change the parameters by the gradient of the mean loss over all targets of the micro-batches.

        `rate` is the learning rate. Without a target, or where loss or norm is not finite, nothing changes.
        """
        self.network.train()
        count = _targets(batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self._loss(batch) / max(count, 1)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        progress = Progress(loss.item(), norm.item(), count, skipped=not (count and torch.isfinite(loss + norm)))
        if not progress.skipped:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return progress

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over all targets, in nats; not a number without any."""
        self.network.eval()
        total = sum(self._loss(batch).item() for batch in batches)
        count = _targets(batches)
        return total / count if count else math.nan

    def _loss(self, batch: Batch) -> Tensor:
        documents = None if batch.documents is None else torch.from_numpy(batch.documents).to(self.device)
        tokens, targets = (torch.from_numpy(a).to(self.device) for a in (batch.tokens, batch.targets))
        with self._autocast():
            loss: Tensor = self.objective(tokens, targets, documents)
        return loss

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _targets(batches: Sequence[Batch]) -> int:
    return sum(int((batch.targets != IGNORED).sum()) for batch in batches)
