"""How fast a training run could be: operations of a token, and of a device in a second."""

from __future__ import annotations

import time

import torch

from llama2 import plan
from llama2.config import ModelConfig


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Of forward and backward pass, 3 times the forward's: matrices, and causal attention over a row of `length`."""
    return 3 * (config.matrix_flops() + config.causal_attention_flops(length))


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
