"""How fast a training run could be: operations of a token, and of a device in a second."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from llama2 import plan
from llama2.config import ModelConfig
from llama2.train.settings import LoopSettings


def flops_per_token(config: ModelConfig, length: int, trained: int | None = None) -> float:
    """Of forward and backward pass, 3 times the forward's: matrices, and causal attention over a row of `length`.

    With `trained` parameters beside a frozen network, its matrices have twice the forward's, and those 6 each.
    """
    if trained is None:
        return 3 * (config.matrix_flops() + config.causal_attention_flops(length))
    return 2 * config.matrix_flops() + 3 * config.causal_attention_flops(length) + 6 * trained


def estimate(  # 8 parameters: what the run's parts know
    config: ModelConfig,
    recipe: LoopSettings,
    device: torch.device,
    *,
    length: int,
    devices: int,
    trained: int | None,
    frozen: int,
    peak: float,
) -> str:
    """What a run with rows of `length` takes, in a line: tokens, steps, time and memory, as `plan` computes them.

    `trained` and `frozen` are TrainingRun's, and `peak` the operations of a device in a second.
    """
    tokens = recipe.steps * recipe.batch.size * length
    cpu = device.type == "cpu"
    run = plan.TrainingRun(
        context=length,
        tokens=tokens,
        batch_tokens=recipe.batch.size * length,
        sequences=recipe.batch.micro_size,
        recompute=recipe.recompute,
        products=cpu and recipe.compile,
        trained=trained,
        frozen=frozen,
    )
    overhead = plan.TRAINER if cpu else 1 << 30
    planned = plan.training(config, plan.Machine(device.type, peak, peak, overhead=overhead), run, gpus=devices)
    parts = planned.memory if recipe.precision == "bf16" else planned.memory | _wide(planned.memory)
    seconds = tokens * flops_per_token(config, length, trained) / (peak * devices * plan.MFU)
    hours = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"
    return (
        f"estimate: {tokens:,} tokens in {recipe.steps:,} steps take about {hours}, if {plan.MFU:.0%} of the peak is "
        f"reached, and {sum(parts.values()) / 1e9:.1f} GB of memory"
        + (f" on each of {devices} devices" if devices > 1 else "")
    )


def _wide(parts: Mapping[str, int]) -> dict[str, int]:
    """Activations of products in float32: twice those in bfloat16; no copy of the parameters is needed."""
    return {"activations": 2 * parts["activations"], "gathered layers": 0}


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second: what the maker states of a GPU that `plan` knows, else those of a product of up to 2048²."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu in plan.GPUS.values():
            if gpu.name.partition("-")[0] in name:
                return gpu.operations
    first = torch.ones(256, 256, dtype=dtype, device=device)
    (first @ first)[0, 0].item()  # which prepares the library, for a second or more
    rate, end = 0.0, time.perf_counter() + 1
    for size in (256, *[2048] * 20):
        if rate and 2 * size**3 / rate > end - time.perf_counter():  # bfloat16 takes seconds where no unit is for it
            break
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        begun = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        rate = max(rate, 2 * size**3 / (time.perf_counter() - begun))
    return rate
