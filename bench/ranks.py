"""70B on 64 to 2,048 GPUs, traced on one machine: what each holds, what they send, and how fast that can be.

The process group is torch's fake one and tensors have no memory. For each number of ranks, the network is divided as
for training, by FSDP2 and tensor parallelism; every parameter's share is compared with the plan; then one micro-batch
goes forward and backward, in which operations and the bytes of collectives are counted. The time of a step follows
from an A100-80GB and its links as the paper has them, under the assumptions below. The table goes to stderr, JSON to
stdout.

    python bench/ranks.py > ranks.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from provenance import provenance
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llama2 import plan
from llama2.config import SIZES, ModelConfig
from llama2.data.loader import TokenBatch
from llama2.model import parallel
from llama2.model.transformer import Transformer
from llama2.records import installed
from llama2.train.objective import Network, next_token

GPU = plan.GPUS["A100-80GB"]
#: Bytes a second that a GPU sends: NVLink 3 in a machine of eight, and the 200 Gb/s of the paper's clusters between.
NVLINK, NETWORK = 300e9, 25e9
#: Share of its peak that a GPU reaches in products of matrices while nothing is waited for: an assumption.
EFFICIENCY = 0.65
TENSOR = 8

#: Collectives by what a rank sends, in multiples of (n - 1) / n and of the larger of what goes in and comes out.
SENT = {"allgather": 1, "all_gather": 1, "reduce_scatter": 1, "allreduce": 2, "all_reduce": 2}


class Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """This rank's FLOPs in products of matrices, its collectives, and bytes that it sends, by the group's name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        self.sent: dict[str, float] = {}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # which asks again, with what it does to shares
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        name = func.__name__
        kind = next((factor for start, factor in SENT.items() if name.strip("_").startswith(start)), None)
        if func.namespace in ("c10d", "_c10d_functional") and kind is not None:
            group = _group(args)
            name, n = group.group_name, group.size()
            largest = max(t.numel() * t.element_size() for t in _tensors((args, out)))
            self.calls[name] = self.calls.get(name, 0) + 1
            self.sent[name] = self.sent.get(name, 0) + kind * largest * (n - 1) / n
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _group(args: Any) -> dist.ProcessGroup:
    for leaf in torch.utils._pytree.tree_leaves(args):
        if isinstance(leaf, dist.ProcessGroup):
            return leaf
        if isinstance(leaf, torch.ScriptObject):
            return dist.ProcessGroup.unbox(leaf)
        if isinstance(leaf, str) and leaf not in ("sum", "avg", "max"):
            return torch._C._distributed_c10d._resolve_process_group(leaf)  # type: ignore[arg-type]
    raise AssertionError(args)


@dataclass(frozen=True)
class Row:
    """A number of ranks."""

    ranks: int
    data: int
    tensor: int
    sequences: int  # of a micro-batch
    micro_batches: int  # of a step, on each rank
    parameters: int  # of this rank's share
    state_gib: float  # parameters, gradients and AdamW's state of a rank
    planned_gib: float  # the same by plan.py
    peak_gib: float  # planned, with activations
    product_flops: float  # of a rank in a step, as traced, with those that are done again in the backward pass
    attention_flops: float  # the same of attention, by arithmetic
    tensor_gib: float  # that a rank sends in a step to those that share its matrices
    data_gib: float  # to those that share its parameters
    collectives: int  # in a step
    seconds: float  # of a step, predicted
    mfu: float  # of which 6 N a token and attention, recomputation not counted


def trace(config: ModelConfig, ranks: int, sequences: int) -> Row:
    """One micro-batch on rank 0 of `ranks`. Raises SystemExit when a parameter is not divided as planned."""
    data = ranks // TENSOR
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (data, TENSOR), mesh_dim_names=("dp", "tp"))
        with torch.device("meta"):
            network = Transformer(config)
        running = Network(network, next_token, mesh["tp"].get_group())
        parallel.tensor_parallel(network, mesh["tp"])
        parallel.recompute_blocks(network)
        parallel.fully_shard(running, network, mesh["dp"], torch.bfloat16)
        share = check(network, data)
        with FakeTensorMode(allow_non_fake_inputs=True):
            running.to_empty(device="cpu")
            tokens, targets = (torch.zeros(sequences, config.context_length, dtype=torch.long) for _ in range(2))
            traced = Traced()
            with traced, torch.autocast("cpu", torch.bfloat16):
                running(TokenBatch(tokens, targets)).backward()  # type: ignore[arg-type]  # tensors without memory
        names = [mesh[name].get_group().group_name for name in ("tp", "dp")]
    finally:
        dist.destroy_process_group()
    rows = plan.BATCH_TOKENS // config.context_length
    micro = rows // (data * sequences)
    products = float(micro * traced.flops)
    causal = plan.BATCH_TOKENS * config.causal_attention_flops(config.context_length)
    attention = 4 * causal / ranks  # forward, again, and two products for each in the backward pass
    tensor, shares = (micro * traced.sent[name] for name in names)
    computing = (products + attention) / (GPU.operations * EFFICIENCY) + tensor / NVLINK
    seconds = max(computing, shares / NETWORK)
    useful = config.training_flops(plan.BATCH_TOKENS) + 3 * causal
    run = plan.TrainingRun(context=config.context_length, sequences=sequences, recompute=True)
    planned = plan.training(config, GPU, run, gpus=ranks).memory
    return Row(
        ranks=ranks,
        data=data,
        tensor=TENSOR,
        sequences=sequences,
        micro_batches=micro,
        parameters=share,
        state_gib=16 * share / 2**30,
        planned_gib=sum(planned[part] for part in ("parameters", "gradients", "AdamW")) / 2**30,
        peak_gib=sum(planned.values()) / 2**30,
        product_flops=products,
        attention_flops=attention,
        tensor_gib=tensor / 2**30,
        data_gib=shares / 2**30,
        collectives=micro * sum(traced.calls.values()),
        seconds=seconds,
        mfu=useful / (ranks * GPU.operations * seconds),
    )


def check(network: Transformer, data: int) -> int:
    """Parameters of this rank's share, each of which must be what the plan says."""
    total = 0
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor), name
        matrix = parameter.ndim > 1
        rows, columns = parameter.shape[0], parameter[:1].numel() if matrix else 1
        by_columns = name.endswith(("wo.weight", "w2.weight"))
        rows, columns = (rows, columns // TENSOR) if by_columns else (rows // TENSOR if matrix else rows, columns)
        planned = math.ceil(rows / data) * columns
        found = parameter.to_local().numel()
        divided = [not isinstance(placement, Replicate) for placement in parameter.placements]
        if found != planned or divided != [True, matrix]:
            raise SystemExit(f"{name}: this rank has {found} of it, {parameter.placements}; planned were {planned}")
        total += found
    return total


def main() -> None:
    """Parse the command line, trace, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="70B")
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--sequences", type=int, nargs="*", default=[2, 4], help="of a micro-batch")
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        for sequences in options.sequences:
            rows.append(row := trace(SIZES[options.size], ranks, sequences))
            print(*(f"{k} {v:.4g} " for k, v in asdict(row).items()), file=sys.stderr, flush=True)
    origin = {**provenance(), "torch": installed("torch"), "size": options.size}
    assumed = {"gpu": GPU.name, "efficiency": EFFICIENCY, "NVLink B/s": NVLINK, "network B/s": NETWORK}
    json.dump({**origin, "assumed": assumed, "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
