"""Cross-entropy at the output head, a few tokens at a time, so that all logits are never held at once.

N tokens  D width  V vocabulary, or a process's shard of it  C tokens of a chunk
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama2.data.loader import IGNORED

#: `exponentials`, compiled or not.
Exponentials = Callable[[Tensor, Tensor, "dist.ProcessGroup | None"], tuple[Tensor, Tensor, Tensor]]


def exponentials(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax's exponentials, their sums, and the losses: (C, V), (C,) → (C, V), (C, 1), (C,).

    Row i's sum s is subtracted from the target's exponential, so that row / s is the gradient of the loss by the
    logits. In float32 this stays exact where a target is nearly certain. Targets out of range are other processes', or
    IGNORED. With a `group`, each process has its shard of the vocabulary.
    """
    top = logits.amax(-1, keepdim=True).float()  # (C, 1)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    e = torch.exp(logits.float() - top)  # (C, V)
    sums = e.sum(-1, keepdim=True)  # (C, 1)
    place = targets[:, None]  # (C, 1)
    local = (place >= 0) & (place < logits.shape[-1])
    place = torch.where(local, place, 0)
    chosen = torch.where(local, logits.gather(-1, place).float() - top, 0.0)  # (C, 1)
    if group is not None:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(chosen, group=group)
    e = e.scatter_add(-1, place, torch.where(local, -sums, 0.0))
    return e.to(logits.dtype), sums, (sums.log() - chosen).squeeze(-1)


class _HeadLoss(torch.autograd.Function):
    """The gradients are those of the forward pass, computed beside it: logits are there once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Tensor,
        targets: Tensor,
        chunk: int,
        group: dist.ProcessGroup | None,
        softmax: Exponentials,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        loss = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # not if it is frozen
        first = 0 if group is None else head.shape[0] * group.rank()  # of the vocabulary, in this process
        with torch.autocast(device, enabled=False):
            weight = head.to(dtype)
            for start in range(0, len(x), chunk):
                some = slice(start, start + chunk)
                piece = x[some].to(dtype)  # (C, D)
                counts = targets[some] != IGNORED  # (C,)
                places = torch.where(counts, targets[some] - first, IGNORED)
                e, sums, losses = softmax(piece @ weight.T, places, group)
                loss += torch.where(counts, losses, 0.0).sum()
                scale = torch.where(counts[:, None], 1 / sums, 0.0)  # (C, 1)
                if dx is not None:
                    dx[some] = (e @ weight) * scale
                if dhead is not None:
                    dhead += e.T @ (piece * scale).to(dtype)
        ctx.gradients = dx, None if dhead is None else dhead.to(head.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dhead = ctx.gradients
        del ctx.gradients
        by_both = (None if each is None else each.mul_(gradients[0]) for each in (dx, dhead))
        return *by_both, None, None, None, None


def head_loss(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    group: dist.ProcessGroup | None = None,
    softmax: Exponentials = exponentials,
) -> Tensor:
    """Sum of the losses -log p(target), in nats: x (N, D), head (V, D), targets (N,) → () float32.

    Targets that are IGNORED have none; with no other, the sum is 0. Products are done in autocast's type where it is
    on. `chunk` tokens' logits are held at a time, beside gradients of x and of head, the latter in float32. With a
    `group` for tensor parallelism, `head` is this process's shard of the rows. All processes have the same x, targets
    and loss, so the gradient of x is this process's part of a sum.
    """
    loss: Tensor = _HeadLoss.apply(x, head, targets, chunk, group, softmax)  # type: ignore[no-untyped-call]
    return loss
