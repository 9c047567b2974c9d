"""One step of the optimiser: micro-batches in, parameters changed (paper 2.2).

B rows  T tokens of a row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llama2 import plan
from llama2.data.loader import IGNORED, Batch
from llama2.errors import RunError
from llama2.model import parallel
from llama2.model.transformer import Transformer, attention, attention_by_products
from llama2.train.loss import exponentials, head_loss

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did. A skipped one changed nothing."""

    loss: float  # mean over all targets of the step, in nats, before it
    norm: float  # of the gradient, before clipping
    tokens: int  # that were targets
    skipped: bool  # because loss or norm was not finite


class Objective(nn.Module):
    """The network and its loss in one module: (B, T) tokens and targets → the sum of the losses.

    With `group` for tensor parallelism, each of its processes has the same batch and a share of the matrices.
    """

    def __init__(self, network: Transformer, chunk: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.network = network
        self.chunk = chunk
        self.group = group
        self.softmax = exponentials
        self.attention = attention

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        x = parallel.gathered(self.network.features(tokens, None, documents, self.attention))  # (B, T, D)
        head = self.network.head
        return head_loss(
            x.flatten(0, 1),
            head.to_local() if isinstance(head, DTensor) else head,
            targets.flatten(),
            chunk=self.chunk,
            group=self.group,
            softmax=self.softmax,
        )


class Step:
    """A network and its AdamW, which decays matrices and no norms.

    `network` and `optimizer` are what a checkpoint saves. Parameters, gradients and the optimiser's state are float32;
    `precision` "bf16" does products in bfloat16. The largest norm of the gradient is `clip`. `compile` is for speed;
    with `checkpointing` a block keeps its input alone and runs again in the backward pass. `chunk` tokens' logits are
    held at a time.

    A `mesh` of processes has dimensions "dp", whose processes have batches of their own and share all that lasts
    (FSDP2), and "tp", whose processes have the same batch and share each matrix. Every process makes the same network
    and calls each method with as many batches as the others; what they return is the same for all. With `device`, the
    network is one on the meta device that gets memory there once it is divided, and then waits for weights, from
    parallel.initialise or parallel.fill.
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
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        chunk: int = plan.CHUNK,
    ) -> None:
        self.network = network
        self.clip = clip
        self.precision = precision
        self.note: str | None = None  # what the user should know; whoever tells it removes it
        self._compiles, self._checkpoints = compile, checkpointing
        self.device = network.norm.weight.device if device is None else torch.device(device)
        shares, divides = (_dimension(mesh, name) for name in ("dp", "tp"))
        self._group = None if shares is None else shares.get_group()
        self.objective = Objective(network, chunk, None if divides is None else divides.get_group())
        if divides is not None:
            parallel.tensor_parallel(network, divides)
        if compile:
            parallel.compile_blocks(network)
            self.objective.softmax = parallel.compiled(exponentials)
            if self.device.type == "cpu":
                self.objective.attention = attention_by_products
        if checkpointing:
            parallel.checkpoint_blocks(network)
        if shares is not None:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            parallel.fully_shard(self.objective, network, shares, dtype)
        if device is not None:
            network.to_empty(device=device)
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
        return self._compiled(lambda: self._step(batches, rate))

    def _step(self, batches: Sequence[Batch], rate: float) -> Progress:
        self.network.train()
        count = self._targets(batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = self._loss(batch) / max(count, 1)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        progress = Progress(self._sum(loss), norm.item(), count, skipped=False)
        if count and math.isfinite(progress.loss) and math.isfinite(progress.norm):
            clip_grads_with_norm_(self.network.parameters(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        else:
            progress = replace(progress, skipped=True)
        self.optimizer.zero_grad()
        return progress

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over all targets, in nats; not a number without any."""
        return self._compiled(lambda: self._evaluate(batches))

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch]) -> float:
        self.network.eval()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            loss += self._loss(batch)
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()  # which a backward pass does else
        count = self._targets(batches)
        return self._sum(loss) / count if count else math.nan

    def _compiled(self, work: Callable[[], Answer]) -> Answer:
        """Do something; where its code cannot be compiled, do it and all that follows without, and note that."""
        if not self._compiles:
            return work()
        try:
            answer = work()
        except Exception as error:  # compilers fail in many ways; what is no fault of theirs comes again
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            if dist.is_initialized():  # others may be waiting in the middle of a step
                raise RunError(f"compile: failed ({reason}); install a C++ compiler, or say compile=false") from error
            for layer in self.network.layers:
                vars(layer).pop("forward")
            if self._checkpoints:
                parallel.checkpoint_blocks(self.network)
            self.objective.softmax, self.objective.attention = exponentials, attention
            self.optimizer.zero_grad()
            self._compiles = False
            answer = work()
            self.note = f"goes on without compile, which failed ({reason}); a C++ compiler such as g++ makes it faster"
        return answer

    def _loss(self, batch: Batch) -> Tensor:
        documents = None if batch.documents is None else torch.from_numpy(batch.documents).to(self.device)
        tokens, targets = (torch.from_numpy(a).to(self.device) for a in (batch.tokens, batch.targets))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss: Tensor = self.objective(tokens, targets, documents)
        return loss

    def _targets(self, batches: Sequence[Batch]) -> int:
        count = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        return int(self._sum(torch.tensor(count, device=self.device)))

    def _sum(self, value: Tensor) -> float:
        """Over the processes that have batches of their own."""
        if self._group is not None:
            dist.all_reduce(value, group=self._group)
        return value.item()


def _dimension(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """That of a mesh, if it has it and more than one process lies along it."""
    if mesh is None or name not in (mesh.mesh_dim_names or ()) or mesh[name].size() == 1:
        return None
    return mesh[name]
