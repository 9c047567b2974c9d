"""Low-rank adaptation (LoRA, Hu et al. 2021) of a network whose own weights are frozen, perhaps in 4 bits (QLoRA).

B batch  T time  R rows  C columns  r rank  G groups of 32 weights
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.checkpoint import Checkpoint, hf_folder
from llama2.checkpoint import Tensor as Stored
from llama2.config import ModelConfig
from llama2.formats import FORMATS
from llama2.model.transformer import Transformer, stored

#: Number formats that a frozen matrix may have.
QUANTIZED = ("Q4_1", "Q4_0")


@dataclass(frozen=True, slots=True)
class Lora:
    """What is added to a network: rank r, scale alpha / r, dropout of the inputs, matrices by peft's names."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # "q_proj", …, "down_proj"


class LoraLinear(nn.Module):
    """A frozen product and a trained one of low rank: W x + alpha / r * B A dropout(x) (Hu et al. 2021, 4.1)."""

    def __init__(self, base: nn.Module, lora_a: Tensor, lora_b: Tensor, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(lora_a)  # (r, C)
        self.lora_b = nn.Parameter(lora_b)  # (R, r)
        self.scale, self.dropout = scale, dropout
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            out: Tensor = self.base(x)
            return out
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # (B, T, r)
        y: Tensor = self.base(x)  # (B, T, R)
        return y + F.linear(narrow * self.scale, self.lora_b)


class QuantizedLinear(nn.Module):
    """A product with a frozen matrix in Q4_1 or Q4_0, of whose floats no copy lasts longer than a product (QLoRA).

    The backward pass dequantizes the matrix again (Dettmers et al. 2023, 3).
    """

    codes: Tensor  # (R, G, 16) uint8: of each group, weights 0 to 15 in the low bits, 16 to 31 in the high bits
    scales: Tensor  # (R, G) float16
    bias: nn.Parameter | None
    minima: Tensor | None  # (R, G) float16; None: -8 scales, as in Q4_0

    def __init__(self, stored: Stored, bias: Tensor | None, device: torch.device | str) -> None:
        super().__init__()
        rows, columns = stored.shape
        blocks = stored.data.view(FORMATS[stored.format].layout).reshape(rows, columns // 32)

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(blocks[name])).to(device)

        self.register_buffer("codes", tensor("q"), persistent=False)
        self.register_buffer("scales", tensor("d"), persistent=False)
        self.register_buffer("minima", tensor("m") if stored.format == "Q4_1" else None, persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def dequantize(self) -> Tensor:
        """The matrix: (R, C) float32."""
        return _dequantize(self.codes, self.scales, self.minima)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _QuantizedProduct.apply(x, self.codes, self.scales, self.minima)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _dequantize(codes: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
    """scale * code + minimum in each group: (R, C) float32, bit for bit what checkpoint/quantization.py gives."""
    q = torch.cat((codes & 15, codes >> 4), -1).float()  # (R, G, 32)
    scales = scales.float()
    low = scales * -8 if minima is None else minima.float()  # (R, G)
    return torch.addcmul(low[..., None], q, scales[..., None]).flatten(1)


class _QuantizedProduct(torch.autograd.Function):
    """W x, and its gradient by x alone. What is kept for the backward pass is the quantized matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales, minima)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _dequantize(codes, scales, minima).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ _dequantize(*ctx.saved_tensors).to(gradient.dtype), None, None, None


def load_frozen(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The checkpoint's network without gradients.

    Matrices of the blocks and an untied head are in `dtype`, the type of products. Embeddings and norms are float32.
    With `quantize`, one of QUANTIZED, the blocks' matrices are in that format. Those that the file has in it keep their
    bytes; of others, scales and minima of the least squared error are searched. One tensor at a time is read whole.
    Raises CheckpointError for rows that are not whole groups.
    """
    with torch.device("meta"):
        network = Transformer(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        path, _, kind = name.rpartition(".")
        module = network.get_submodule(path)
        product = isinstance(module, nn.Linear) and kind == "weight"
        if quantize and isinstance(module, nn.Linear) and kind == "weight" and path != "output":
            _replace(network, path, QuantizedLinear(in_format(tensor, quantize), module.bias, device))
        else:
            weight = torch.from_numpy(tensor.dequantize()).to(device, dtype if product else torch.float32)
            setattr(module, kind, nn.Parameter(weight))
    return network.requires_grad_(False)


def in_format(tensor: Stored, format: str) -> Stored:
    """A matrix in one of QUANTIZED, as `load_frozen` holds it."""
    from llama2.checkpoint import quantization

    if tensor.format == format:
        return tensor
    importance = np.ones(tensor.shape[-1], np.float32)
    return replace(tensor, format=format, source=quantization.quantize(tensor.dequantize(), format, importance))


def attach(network: Transformer, lora: Lora, generator: torch.Generator) -> None:
    """Add low-rank products to the targets of a network, which alone are trained afterwards.

    B is 0, so the network computes the same as before. A is uniform within ± 1 / √C, as in the authors' code; it is
    drawn on the CPU, so that every process has the same.
    """
    network.requires_grad_(False)
    device = network.norm.weight.device
    for name, shape in targets(network.config, lora.targets).items():
        rows, columns = shape
        lora_a = torch.empty(lora.rank, columns)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        base = network.get_submodule(name)
        layer = LoraLinear(
            base,
            lora_a.to(device),
            torch.zeros(rows, lora.rank, device=device),
            scale=lora.alpha / lora.rank,
            dropout=lora.dropout,
        )
        _replace(network, name, layer)


def targets(config: ModelConfig, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The matrices that peft calls so, by Meta's names of their modules, and their shapes."""
    theirs = hf_folder.tensor_names(config)
    return {
        name.removesuffix(".weight"): shape
        for name, shape in config.tensor_shapes().items()
        if theirs[name].endswith(tuple(f".{target}.weight" for target in names))
    }


def fill(network: Transformer, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Let low-rank products continue from others: B (R, r) and A (r, C) of each matrix, by the module's name."""
    with torch.no_grad():
        for name, (lora_b, lora_a) in updates.items():
            network.get_parameter(f"{name}.lora_b").copy_(lora_b)
            network.get_parameter(f"{name}.lora_a").copy_(lora_a)


def updates(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """B (R, r) and A (r, C) of each matrix by its module's name, from a state's parameters."""
    return {
        name.removesuffix(".lora_a"): (weights[f"{name.removesuffix('.lora_a')}.lora_b"], lora_a)
        for name, lora_a in weights.items()
        if name.endswith(".lora_a")
    }


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """In this context the network computes what it did before `attach`: it is its own reference model."""
    layers = [module for module in network.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def merged(network: Transformer) -> dict[str, Stored]:
    """The weights as a checkpoint holds them, with the adapters merged into float32 copies of their matrices.

    Other weights share the network's memory. Names are those of `config.tensor_shapes`; other tensors are left out.
    """
    found = {}
    for name in network.config.tensor_shapes():
        path, _, kind = name.rpartition(".")
        module = network.get_submodule(path)
        base = module.base if isinstance(module, LoraLinear) else module
        weight = base.dequantize() if isinstance(base, QuantizedLinear) and kind == "weight" else getattr(base, kind)
        if isinstance(module, LoraLinear) and kind == "weight":
            weight = weight.float() + module.scale * (module.lora_b.float() @ module.lora_a.float())
        found[name] = stored(name, weight)
    return found


def _replace(network: Transformer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
