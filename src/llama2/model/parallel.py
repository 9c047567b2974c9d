"""The network on several devices.

For the engine, each has a shard of the heads and of the hidden units (Shoeybi et al. 2019). For training, tensor
parallelism divides the embeddings, the head and the tokens too, and FSDP2 all that lasts (Zhao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint as recompute

from llama2.checkpoint import Checkpoint
from llama2.errors import ConfigError, EngineError
from llama2.model.transformer import Block, Transformer

P = ParamSpec("P")
R = TypeVar("R")


def load(
    checkpoint: Checkpoint, rank: int, size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Shard `rank` of `size`: a network with fewer heads and hidden units, whose blocks add up the results of all.

    Attention and feed-forward cost one sum over the default process group each. Embeddings, norms and the output head
    are whole on every device: they are the small part, and their results need no exchange. One tensor at a time is
    read whole. Raises EngineError when key/value heads or hidden units cannot be divided evenly.
    """
    c = checkpoint.config
    for name in ("n_kv_heads", "hidden_dim"):
        if getattr(c, name) % size:
            raise EngineError(f"{name}={getattr(c, name)} cannot be divided by {size} processes; start a divisor of it")
    shard = replace(c, n_heads=c.n_heads // size, n_kv_heads=c.n_kv_heads // size, hidden_dim=c.hidden_dim // size)
    with torch.device("meta"):
        model = Transformer(shard)
    weights = ((name, split(name, t.dequantize(), rank, size)) for name, t in checkpoint.tensors.items())
    model.load_state_dict({name: torch.from_numpy(w).to(device, dtype) for name, w in weights}, assign=True)
    for name, module in model.named_modules():
        if name.endswith(("attention.wo", "feed_forward.w2")):
            module.register_forward_hook(_all_reduce)
    return model


def split(name: str, weight: NDArray[np.float32], rank: int, size: int) -> NDArray[np.float32]:
    """Rows of the matrices whose outputs are divided, columns of those that read such outputs, else all.

    Biases are divided like rows; one that all shards would add is added by the first.
    """
    matrix, _, kind = name.rpartition(".")
    if matrix.endswith(("wq", "wk", "wv", "w1", "w3")):
        return np.split(weight, size)[rank].copy()  # a view would keep the whole alive
    if matrix.endswith(("wo", "w2")) and kind == "bias":
        return weight if rank == 0 else np.zeros_like(weight)
    if matrix.endswith(("wo", "w2")):
        return np.split(weight, size, axis=1)[rank].copy()
    return weight


def _all_reduce(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output


def compiled(function: Callable[P, R], *, dynamic: bool | None = None) -> Callable[P, R]:
    """torch.compile, without its tests of a CPU's instruction sets.

    For each set it would compile and run a program, which takes longer than to compile a block.
    """
    result: Callable[P, R] = torch.compile(function, dynamic=dynamic, options={"cpp.vec_isa_ok": True})
    return result


# Training


def blocks(model: Transformer) -> list[Block]:
    """A model's blocks, and those of networks inside it."""
    return [module for module in model.modules() if isinstance(module, Block)]


def compile_blocks(model: Transformer) -> None:
    """Make each block one graph. All blocks share its code, so compilation takes the time of one."""
    for layer in blocks(model):
        layer.forward = compiled(layer.forward)  # type: ignore[method-assign]


def recompute_blocks(model: Transformer) -> None:
    """Let blocks keep their inputs alone, and recompute the rest in the backward pass (Chen et al. 2016)."""
    for layer in blocks(model):
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard every matrix over `mesh`, and between the matrices the tokens (Korthikanti et al. 2022).

    Rows and columns are divided as in `split`; the embeddings and the head by the vocabulary. The hidden states
    are then a DTensor of which each process has some tokens; `all_gather` returns all. Raises ConfigError when the
    model cannot be divided evenly.
    """
    c, size = model.config, mesh.size()
    for name in ("n_kv_heads", "hidden_dim", "vocab_size"):
        if getattr(c, name) % size:
            raise ConfigError(f"{name}={getattr(c, name)} cannot be divided by {size} processes; start a divisor of it")
    tokens, whole = Shard(1), Replicate()
    styles: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(tokens, None, None), desired_input_layouts=(whole, None, None)
        ),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,)),
        "norm": SequenceParallel(),
    }
    styles |= {f"layers.*.attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    styles |= {f"layers.*.feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    styles |= {
        f"layers.*.{name}": RowwiseParallel(output_layouts=tokens) for name in ("attention.wo", "feed_forward.w2")
    }
    if model.output is not None:
        styles["output"] = ColwiseParallel()
    parallelize_module(model, mesh, styles)


def all_gather(hidden_states: Tensor) -> Tensor:
    """All tokens' hidden states after `tensor_parallel`; their gradient is then each process's part of a sum."""
    if isinstance(hidden_states, DTensor):
        return hidden_states.full_tensor(grad_placements=[Partial()])
    return hidden_states


def fully_shard(root: nn.Module, model: Transformer, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Keep of each parameter, its gradient and the optimiser's state as many rows as every process of `mesh` (FSDP2).

    A block gathers its parameters, in `dtype`, before its passes; `root`, which holds the model, has the rest, and does
    so for its whole pass. Gradients are float32 sums over the processes, not means.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks(model), root):
        sharded = fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no average


def initialise(model: Transformer, generator: torch.Generator) -> None:
    """The weights that `model.initialise` draws, on any number of processes, without ever holding a whole network."""

    def drawn() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            weight = torch.empty(parameter.shape, device=generator.device)
            model.draw(name, weight, generator)
            yield name, weight

    fill(model, drawn())


def fill(model: Transformer, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give every parameter its shard of a whole weight. All processes get the same weights, one at a time."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    for name, weight in weights:
        set_model_state_dict(model, {name: weight}, options=options)
