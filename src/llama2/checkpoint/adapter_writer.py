"""A LoRA adapter in peft's format, a folder that `checkpoint/adapter.py` and peft read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llama2.checkpoint import adapter, hf_folder, safetensors
from llama2.checkpoint.lora import FINGERPRINT, Update
from llama2.config import ModelConfig
from llama2.files import create


def write(  # 8 parameters: what the folder says, of which no two belong together
    folder: Path,
    updates: Mapping[str, Update],
    *,
    config: ModelConfig,
    base: str,
    fingerprint: str,
    dropout: float,
    template: str | None = None,
) -> None:
    """Write updates of one rank and scale, by Meta's names of the matrices, whose rows are in Meta's order.

    `base` is the name of the model that they belong to, and `fingerprint` is Adapter's. A chat template that the
    model's own files do not have goes with them. Raises CheckpointError when the file system does not allow it.
    """
    names, tensors = hf_folder.tensor_names(config), []
    for name, update in updates.items():
        module, heads = names[name].removesuffix(".weight"), hf_folder.heads_of(name, config)
        left = hf_folder.in_halves(update.left, heads) if heads else update.left
        for part, tensor in (("A", update.right), ("B", left)):
            tensors.append(replace(tensor, name=f"base_model.model.{module}.lora_{part}.weight"))
    first = next(iter(updates.values()))
    rank = first.right.shape[0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _number(first.scale * rank),
        "lora_dropout": dropout,
        "target_modules": sorted({names[name].split(".")[-2] for name in updates}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    texts = {adapter.CONFIG: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    if template is not None:
        texts["chat_template.jinja"] = template
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(tensors, folder / "adapter_model.safetensors", {FINGERPRINT: fingerprint})
    for name, text in texts.items():
        with create(folder / name) as output:
            output.write(text.encode(errors="backslashreplace"))


def _number(value: float) -> float:
    """A whole number without a point, as peft writes alpha."""
    return round(value) if round(value) == value else value
