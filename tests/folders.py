"""A complete Llama in Hugging Face's format written byte by byte, so that a test can put any lie into any place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DIM, HEADS, HIDDEN, VOCAB = 8, 2, 12, 6

Header = dict[str, Any]


def safetensors(header: Header | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file; `length` may lie about the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tensors() -> dict[str, Any]:
    kv, layer = DIM // HEADS, "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        layer + "input_layernorm.weight": (DIM,),
        layer + "self_attn.q_proj.weight": (DIM, DIM),
        layer + "self_attn.k_proj.weight": (kv, DIM),
        layer + "self_attn.v_proj.weight": (kv, DIM),
        layer + "self_attn.o_proj.weight": (DIM, DIM),
        layer + "post_attention_layernorm.weight": (DIM,),
        layer + "mlp.gate_proj.weight": (HIDDEN, DIM),
        layer + "mlp.up_proj.weight": (HIDDEN, DIM),
        layer + "mlp.down_proj.weight": (DIM, HIDDEN),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (VOCAB, DIM),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype("<f4") for name, shape in shapes.items()}


def _tokenizer() -> dict[str, Any]:
    """A SentencePiece vocabulary as transformers 4 writes it."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "added_tokens": [{"id": i, "content": pieces[i], "special": True, **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["▁ a"],
        },
    }


@dataclass
class Folder:
    """The folder in parts. Unchanged, `write` gives a valid Llama in one file of tensors."""

    files: dict[str, bytes] = field(default_factory=dict)  # these, whatever else would be there
    config: dict[str, Any] = field(default_factory=_config)
    tensors: dict[str, Any] = field(default_factory=_tensors)
    tokenizer: dict[str, Any] = field(default_factory=_tokenizer)
    header: Header = field(default_factory=dict)  # what the header says instead

    def part(self, names: list[str]) -> bytes:
        """A file of some of the tensors."""
        header: Header = {"__metadata__": {"format": "pt"}}
        data = b""
        for name in names:
            array, start = self.tensors[name], len(data)
            data += array.tobytes()
            info = {"dtype": "F32", "shape": [*array.shape], "data_offsets": [start, len(data)]}
            header[name] = info | self.header.get(name, {})
        return safetensors(header | {k: v for k, v in self.header.items() if k not in names}, data)

    def shards(self, count: int = 2) -> dict[str, list[str]]:
        """Spread the tensors over several files with an index, and return which are where."""
        names = [*self.tensors]
        places = {f"model-{i + 1:05}-of-{count:05}.safetensors": names[i::count] for i in range(count)}
        self.files |= {file: self.part(part) for file, part in places.items()}
        self.files["model.safetensors.index.json"] = json.dumps(
            {"metadata": {}, "weight_map": {name: file for file, part in places.items() for name in part}}
        ).encode()
        return places

    def write(self, path: Path) -> Path:
        path.mkdir(exist_ok=True)
        files = {
            "config.json": json.dumps(self.config).encode(),
            "tokenizer.json": json.dumps(self.tokenizer).encode(),
        }
        if "model.safetensors.index.json" not in self.files:
            files["model.safetensors"] = self.part([*self.tensors])
        for name, content in (files | self.files).items():
            (path / name).write_bytes(content)
        return path
