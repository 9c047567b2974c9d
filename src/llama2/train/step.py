"""One step of the optimizer: micro-batches in, parameters changed (paper 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llama2.data.loader import TrainBatch
from llama2.errors import RunError
from llama2.model import parallel
from llama2.model.transformer import Transformer, attention, attention_by_products
from llama2.train.loss import exponentials
from llama2.train.objective import Network, Objective, next_token
from llama2.train.settings import OptimizerSettings

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did. A skipped one changed nothing."""

    loss: float  # mean over all losses of the step, before it; of next_token in nats
    norm: float  # of the gradient, before clipping
    count: int  # losses
    skipped: bool  # because loss or norm was not finite


class Step:
    """A network and its AdamW, which decays matrices and not norms.

    `network` and `optimizer` are what a state saves. Parameters, gradients and the optimizer's moments are float32;
    `precision` "bf16" does products in bfloat16. `compile` is for speed. With `recompute` a block keeps its input
    alone and runs again in the backward pass.

    A `mesh` of processes has two dimensions. Along "dp", processes have batches of their own and shard all that lasts
    (FSDP2). Along "tp", they have the same batch and shard each matrix. Every process makes the same network and calls
    each method with as many batches as the others. Results are the same for all.

    Frozen parameters stay as they are, and the optimizer does not see them. Dropout's masks follow from `seed`, the
    step's number, the micro-batch's and the process's.

    With `device`, the network is on the meta device. It gets memory there once it is divided, and then needs weights:
    from parallel.initialise or parallel.fill.
    """

    def __init__(  # 9 parameters: a run's settings, which its recipe holds together
        self,
        network: Transformer,
        objective: Objective[Any] = next_token,
        *,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (it is frozen)
        precision: Literal["bf16", "fp32"] = "bf16",
        compile: bool = False,
        recompute: bool = False,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.seed = seed
        self.drops = any(getattr(module, "dropout", 0) for module in network.modules())
        self.clip = optimizer.clip
        self.precision = precision
        self._note: str | None = None
        self._compiles, self._recomputes = compile, recompute
        self.device = network.norm.weight.device if device is None else torch.device(device)
        data, tensor = (_dimension(mesh, name) for name in ("dp", "tp"))
        self._group = None if data is None else data.get_group()
        self.running = Network(network, objective, None if tensor is None else tensor.get_group())
        if tensor is not None:
            parallel.tensor_parallel(network, tensor)
        if compile:
            parallel.compile_blocks(network)
            self.running.softmax = parallel.compiled(exponentials)
            if self.device.type == "cpu":
                self.running.attention = attention_by_products
        if recompute:
            parallel.recompute_blocks(network)
        if data is not None:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            parallel.fully_shard(self.running, network, data, dtype)
        if device is not None:
            network.to_empty(device=device)
        parameters = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, fused=True)

    def step(self, batches: Sequence[TrainBatch], lr: float, number: int = 0) -> Progress:
        """Change the parameters by the gradient of the mean over all losses of the micro-batches.

        Without a loss, or where loss or norm is not finite, nothing changes. `number` is the step's.
        """
        return self._compiled(lambda: self._step(batches, lr, number))

    def _step(self, batches: Sequence[TrainBatch], lr: float, number: int) -> Progress:
        self.network.train()
        count = self._count(batches)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._random(number, i):
                part = self._loss(batch) / max(count, 1)
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        progress = Progress(self._sum(loss), norm.item(), count, skipped=False)
        if count and math.isfinite(progress.loss) and math.isfinite(progress.norm):
            clip_grads_with_norm_(self.network.parameters(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            progress = replace(progress, skipped=True)
        self.optimizer.zero_grad()
        return progress

    def evaluate(self, batches: Sequence[TrainBatch]) -> float:
        """The mean over all losses; not a number without any."""
        return self._compiled(lambda: self._evaluate(batches))

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[TrainBatch]) -> float:
        self.network.eval()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            loss += self._loss(batch)
        if isinstance(self.running, FSDPModule):
            self.running.reshard()  # which a backward pass does else
        count = self._count(batches)
        return self._sum(loss) / count if count else math.nan

    def take_note(self) -> str | None:
        """What the user should know since the last call."""
        note, self._note = self._note, None
        return note

    def _compiled(self, work: Callable[[], Result]) -> Result:
        """Do something; where its code cannot be compiled, do it and all that follows without, and note that."""
        if not self._compiles:
            return work()
        try:
            result = work()
        except Exception as error:  # compilers fail in many ways; an error of another kind comes again
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            if dist.is_initialized():  # others may be waiting in the middle of a step
                raise RunError(f"compile: failed ({reason}); install a C++ compiler, or set compile=false") from error
            for layer in parallel.blocks(self.network):
                vars(layer).pop("forward")
            if self._recomputes:
                parallel.recompute_blocks(self.network)
            self.running.softmax, self.running.attention = exponentials, attention
            self.optimizer.zero_grad()
            self._compiles = False
            result = work()
            self._note = f"continues without compile, which failed ({reason}); a C++ compiler such as g++ is faster"
        return result

    @contextmanager
    def _random(self, number: int, batch: int) -> Iterator[None]:
        """Let dropout draw masks of this step, micro-batch and process, whatever was drawn before."""
        if not self.drops:
            yield
            return
        rank = 0 if self._group is None else dist.get_rank(self._group)
        words = np.random.SeedSequence([self.seed, number, batch, rank]).generate_state(2, np.uint32).tolist()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(words[0] << 32 | words[1])
            yield

    def _loss(self, batch: TrainBatch) -> Tensor:
        with self.autocast():
            loss: Tensor = self.running(batch)
        return loss

    def autocast(self) -> torch.autocast:
        """The context of the step's products, for passes beside it whose numbers must be the same."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _count(self, batches: Sequence[TrainBatch]) -> int:
        count = sum(batch.count for batch in batches)
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
