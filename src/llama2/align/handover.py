"""How a network that learns gets into the engine that draws from it: in memory, after each change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama2.engine.engine import Engine
from llama2.engine.runner import BLOCK
from llama2.engine.runner_native import LiveNativeRunner
from llama2.engine.runner_torch import LiveTorchRunner
from llama2.engine.scheduler import MAX_SEQUENCES, blocks_for
from llama2.model import lora as low_rank
from llama2.model.transformer import Transformer
from llama2.text.tokenizer import Tokenizer


class Handover:
    """New weights for the engine, without a file: of an adapter's matrices a merged copy, else the network's own.

    On a GPU the engine runs a copy of the network in bfloat16.
    """

    def __init__(self, network: Transformer, longest: int, tokenizer: Tokenizer, threads: int | None) -> None:
        """`longest`: tokens of a prompt with its answer."""
        blocks = MAX_SEQUENCES * blocks_for(longest)
        self._network = network
        self._weights = low_rank.merged(network)  # what the engine reads where it lies
        self._copy: Transformer | None = None
        if network.norm.weight.is_cuda:
            self._copy = _copy_of(network)
            runner: Any = LiveTorchRunner(self._copy, blocks)
        else:
            runner = LiveNativeRunner(network.config, lambda: self._weights, blocks, threads=threads)
        self.engine = Engine(runner, tokenizer, context=min(blocks * BLOCK, network.config.context_length))

    def __call__(self) -> None:
        """Let the engine run the weights as they are, and forget every key and value of those before."""
        self._weights = low_rank.merged(self._network)
        if self._copy is not None:
            _fill(self._copy, self._weights)
        self.engine.weights_changed()


def _copy_of(network: Transformer) -> Transformer:
    """A network of the same shape in bfloat16, for a GPU's engine."""
    copy = Transformer(network.config).to(network.norm.weight.device, torch.bfloat16)
    _fill(copy, low_rank.merged(network))
    return copy


@torch.no_grad()
def _fill(copy: Transformer, weights: Mapping[str, Any]) -> None:
    for name, parameter in copy.named_parameters():
        parameter.copy_(torch.from_numpy(weights[name].dequantize()))
