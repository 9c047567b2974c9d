"""What a run with an adapter saves: the whole model, the adapter merged into the weights that it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama2.checkpoint import SCORE_HEAD, Checkpoint, Tensor, hf_folder
from llama2.model import lora as low_rank
from llama2.model.transformer import stored
from llama2.records import MODEL
from llama2.train.settings import LoraSettings
from llama2.train.states import AdapterWriter


def merging(start: Checkpoint, lora: LoraSettings, template: str | None, precision: str) -> AdapterWriter:
    """What writes the whole model of a state, W + alpha / rank · B A, so that the engine opens it.

    Sums are in float32, and written in the precision of products. A scalar head goes with it. Adapters of a value
    network, whose names begin with `value.`, do not.
    """
    format, dtype = ("BF16", torch.bfloat16) if precision == "bf16" else ("F32", torch.float32)

    def write(folder: Path, weights: Any) -> None:
        updates = low_rank.updates(weights)

        def merged(name: str) -> Tensor:
            tensor = start.tensors[name]
            if lora.quantize and name.startswith("layers.") and len(tensor.shape) == 2:
                tensor = low_rank.in_format(tensor, lora.quantize)  # what the adapter was trained on
            if name.removesuffix(".weight") not in updates:
                return tensor.in_float32().in_format(format)
            b, a = (each.detach().cpu().float() for each in updates[name.removesuffix(".weight")])

            def data() -> Any:
                whole = torch.from_numpy(tensor.dequantize()) + lora.alpha / lora.rank * (b @ a)
                return stored(name, whole.to(dtype)).data

            return Tensor(name, format, tensor.shape, data)

        extras = {SCORE_HEAD: stored(SCORE_HEAD, weights[SCORE_HEAD].float())} if SCORE_HEAD in weights else {}
        config = replace(start.config, tied_embeddings=True) if extras else start.config
        like = Checkpoint(folder, "huggingface", config, {}, {}, template, tokenizer_source=start.tokenizer)
        tensors = {name: merged(name) for name in config.tensor_shapes()}
        hf_folder.write(replace(like, tensors=tensors, extras=extras), folder.with_name(MODEL))

    return write
