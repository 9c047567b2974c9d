"""Steps of training on few tokens, in one process or several: what comes of them, and a program for several.

python steps.py PROCESSES OUT NAME...
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import forked
from llama2.data.loader import IGNORED, TokenBatch
from llama2.model import lora, parallel
from llama2.model.transformer import Transformer
from llama2.train.objective import next_token
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Progress, Step
from models import tiny_config

#: Of each way to train: processes for data and for a matrix, and the settings of the step.
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one process": (1, 1, {"precision": "fp32"}),
    "FSDP2": (2, 1, {"precision": "fp32", "recompute": True}),
    "tensor": (1, 2, {"precision": "fp32"}),
    "both": (2, 2, {"precision": "fp32"}),
    "both, tied, recomputed": (2, 2, {"precision": "fp32", "recompute": True}),
    "one process, tied": (1, 1, {"precision": "fp32"}),
    "FSDP2, bfloat16": (2, 1, {}),
    "both, bfloat16": (2, 2, {}),
    "one process, LoRA": (1, 1, {"precision": "fp32"}),
    "FSDP2, LoRA": (2, 1, {"precision": "fp32", "recompute": True}),
    "FSDP2, LoRA, bfloat16": (2, 1, {}),
}
STEPS = 20


def rows(count: int, length: int, seed: int, ignored: int = 0) -> TokenBatch:
    """Random tokens, of whose targets the first `ignored` of each row are no targets."""
    ids = np.random.default_rng(seed).integers(3, 320, (count, length + 1))
    targets = ids[:, 1:].copy()
    targets[:, :ignored] = IGNORED
    return TokenBatch(ids[:, :-1], targets)


def network(**changes: Any) -> Transformer:
    """The same weights in every process."""
    model = Transformer(tiny_config(**changes))
    model.initialise(seeded())
    return model


def adapted(half: bool) -> Transformer:
    """A frozen network with an adapter that changes it; `half` holds the matrices of its blocks in bfloat16."""
    model = network()
    lora.attach(model, lora.Lora(4, 8.0, 0.0, ("q_proj", "down_proj")), seeded())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=seeded(), std=0.1)
            elif half and name.endswith((".w1.weight", ".wo.weight", "base.weight")):
                parameter.data = parameter.bfloat16()
    return model


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gradients(step: Step, batches: list[TokenBatch], lr: float = 0.0) -> tuple[Progress, dict[str, torch.Tensor]]:
    """A step, and what its optimiser was given, clipped."""
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in step.network.named_parameters():
            grad = parameter.grad
            assert (grad is not None) == parameter.requires_grad
            if grad is None:
                continue
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()

    hook = step.optimizer.register_step_pre_hook(keep)
    progress = step.step(batches, lr)
    hook.remove()
    return progress, found


def whole(model: Transformer) -> dict[str, torch.Tensor]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).clone() for name, w in weights.items()}


def train(name: str) -> dict[str, Any]:
    """Of the steps of two micro-batches, whose rows have unlike many targets: losses, norms, gradients by name.

    The losses before the first, the second and the last step are evaluated, too.
    """
    data, tensor, settings = WAYS[name]
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("dp", "tp")) if data * tensor > 1 else None
    rank = 0 if mesh is None else mesh.get_local_rank("dp")
    config = tiny_config(tied_embeddings="tied" in name)
    model = adapted("bfloat16" in name) if "LoRA" in name else None
    if model is None:
        with torch.device("meta"):
            model = Transformer(config)
    new = model.norm.weight.is_meta
    settings = settings | {"optimizer": OptimizerSettings(clip=0.5), "device": "cpu" if new else None}
    step = Step(model, partial(next_token, chunk=10), mesh=mesh, **settings)
    if new:
        parallel.initialise(step.network, seeded())
    found: dict[str, Any] = {"weights": whole(step.network), "before": [], "losses": [], "norms": [], "gradients": []}
    for i in range(STEPS):
        both = [rows(4, 16, 2 * i, ignored=3), rows(2, 16, 2 * i + 1)]
        both[0].targets[0] = IGNORED  # a row of the first process
        batches = [TokenBatch(batch.tokens[rank::data], batch.targets[rank::data]) for batch in both]
        if i in (0, 1, STEPS - 1):
            found["before"].append(step.evaluate(batches))
        progress, weights = gradients(step, batches, lr=1e-3)
        found["losses"].append(progress.loss)
        found["norms"].append(progress.norm)
        found["gradients"].append(weights)
    return found


def write(folder: Path, names: list[str]) -> None:
    """What each process does; the first one writes what came of it."""
    dist.init_process_group("gloo")
    for name in names:
        result = train(name)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    forked.start(int(sys.argv[1]), write, Path(sys.argv[2]), sys.argv[3:])
