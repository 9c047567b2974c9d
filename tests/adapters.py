"""LoRA adapters as peft and llama.cpp write them, made by hand, and what merging gives, in NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Arrays = dict[str, NDArray[Any]]

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def modules(base: Arrays, parts: Iterable[str]) -> list[str]:
    """Names of the matrices in `base`, a folder's tensors, that end with one of `parts`, without `.weight`."""
    return [name.removesuffix(".weight") for name in base if name.removesuffix(".weight").endswith(tuple(parts))]


def random_parts(base: Arrays, parts: Iterable[str] = LINEAR, *, rank: int = 2, seed: int = 1) -> Arrays:
    """lora_A and lora_B of these matrices, by peft's names."""
    rng = np.random.default_rng(seed)
    found = {}
    for module in modules(base, parts):
        rows, columns = base[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(0, 0.3, (rank, columns)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(0, 0.3, (rows, rank)).astype(np.float32)
    return found


def write_adapter(path: Path, tensors: Arrays, **settings: Any) -> Path:
    """A folder as peft saves it; `settings` replace those of rank 2 and alpha 4."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(values | settings))
    return path


def merged(base: Arrays, tensors: Arrays, scale: float = 2.0) -> Arrays:
    """The base's tensors with scale * B A added to each matrix that has both; the scale is alpha / rank."""
    found = dict(base)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = (found[f"{module}.weight"] + scale * (b @ a)).astype(np.float32)
    return found


def folder_tensors(folder: Path) -> Arrays:
    """The tensors of a folder of one file, in float32."""
    return {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}


def write_merged(source: Path, target: Path, tensors: Arrays) -> Path:
    """A copy of the folder `source` with other tensors."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_gguf_adapter(path: Path, tensors: Arrays, *, alpha: float = 4.0, **changes: str) -> Path:
    """llama.cpp's file of `tensors`, by GGUF's names with `.lora_a` and `.lora_b`; `changes` are of its keys."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_type(changes.get("type", "adapter"))
    writer.add_string("adapter.type", changes.get("adapter", "lora"))
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
