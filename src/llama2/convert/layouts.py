"""Where each number of a model is in its files, by the definitions of the formats (spec 1.4) and nothing else.

A format's reader and writer share their tables of names, cuts and orders, so a mistake in a table undoes itself on the
way back. The receipt compares files through this module, which knows none of those tables: a second opinion.

R rows  C columns  E head size  S files
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint, Tensor, gguf, hf_folder, meta
from llama2.checkpoint.lora import Adapter, Update
from llama2.checkpoint.quantization import dequantize
from llama2.config import ModelConfig
from llama2.errors import ParityError
from llama2.files import MappedFile

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its files hold it, with rows in the order of Meta's rotary embedding.

    `rows` reads some of them, (n, bytes of a row), and nothing before. A norm is one row.
    """

    format: str
    shape: tuple[int, int]  # (R, C)
    rows: Callable[[slice], Bytes]
    group: int = 0  # llama2.c: F32 made of integers, so many of which share a scale
    sum: Callable[[slice], Floats] | None = None  # of a merged matrix, some rows of base and adapters, not yet rounded
    mapped: tuple[MappedFile, ...] = ()  # what rows are read from


#: Meta's names, and those of Hugging Face and GGUF; {} is the layer.
_NAMES = {
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "layers.{}.attention.wq": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "layers.{}.attention.wk": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "layers.{}.attention.wv": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "layers.{}.feed_forward.w1": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "layers.{}.feed_forward.w2": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    "layers.{}.feed_forward.w3": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output"),
}

#: Matrices whose columns Meta divides among its files; the rows of all others are divided.
_CUT_BY_COLUMNS = ("tok_embeddings", "wo", "w2")

#: The orders of llama2.c's versions: all layers of one kind are together.
_VERSION_0 = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm cosines sines output"
_VERSION_1 = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3 output"


def tensors(model: Checkpoint) -> dict[str, Stored]:
    """Every tensor of `model`'s files, by Meta's name. Where the output head is tied, the embeddings stand for it.

    Raises ParityError when the files do not hold what the format defines, CheckpointError when they are damaged.
    """
    if model.base is not None:
        return _merged(model, model.base)
    make = {"gguf": _gguf, "huggingface": _huggingface, "meta": _meta, "llama2c": _llama2c}[model.format]
    found = make(model)
    if model.config.tied_embeddings:
        found["output.weight"] = found["tok_embeddings.weight"]
    for name, shape in replace(model.config, tied_embeddings=False).tensor_shapes().items():
        if found[name].shape != (math.prod(shape[:-1]), shape[-1]):
            raise ParityError(f"{name} has shape {found[name].shape}, must be {shape}")
    for name, tensor in model.extras.items():
        found[name] = Stored(tensor.format, _shape(tensor), _table(tensor).__getitem__, mapped=tensor.mapped)
    return found


def _names(config: ModelConfig) -> Iterable[tuple[str, str, str]]:
    """Meta's, Hugging Face's and GGUF's name of each tensor."""
    for ours, theirs in _NAMES.items():
        for i in range(config.n_layers if "{}" in ours else 1):
            if ours != "output" or not config.tied_embeddings:
                for kind in ("weight", "bias")[: 2 if ours[10:] in config.biases else 1]:
                    metas, hugging, ggufs = (f"{name.format(i)}.{kind}" for name in (ours, *theirs))
                    yield metas, hugging, ggufs


def _find(held: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in held:
        raise ParityError(f"tensor {name!r} is missing")
    return held[name]


def _table(tensor: Tensor) -> Bytes:
    """A tensor's bytes, (R, bytes of a row)."""
    return tensor.data.reshape(math.prod(tensor.shape[:-1]), -1)


def _shape(tensor: Tensor) -> tuple[int, int]:
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _gguf(model: Checkpoint) -> dict[str, Stored]:
    held = gguf.stored(model.path)
    found = {ours: _find(held, name) for ours, _, name in _names(model.config)}
    return {ours: Stored(t.format, _shape(t), _table(t).__getitem__, mapped=t.mapped) for ours, t in found.items()}


def _huggingface(model: Checkpoint) -> dict[str, Stored]:
    """transformers turns number i of a head with number i + E/2, Meta number 2i with 2i + 1: pair i of a head."""
    held, half = hf_folder.stored(model.path), model.config.head_dim // 2
    found = {}
    for ours, name, _ in _names(model.config):
        tensor = _find(held, name)
        read: Callable[[slice], Bytes] = _table(tensor).__getitem__
        if ours.split(".")[-2] in ("wq", "wk"):
            head = sorted(range(2 * half), key=lambda number: (number % half, number))
            starts = np.arange(0, tensor.shape[0], 2 * half)
            order = (starts[:, None] + head).reshape(-1)
            if len(tensor.shape) == 1:  # a bias is one row
                read = tensor.data.reshape(len(order), -1)[order].reshape(1, -1).__getitem__
            else:
                read = partial(_gather, _table(tensor), order)
        found[ours] = Stored(tensor.format, _shape(tensor), read, mapped=tensor.mapped)
    return found


def _gather(table: Bytes, order: NDArray[np.int64], rows: slice) -> Bytes:
    return table[order[rows]]


def _meta(model: Checkpoint) -> dict[str, Stored]:
    files = [meta.part(path) for path in meta.files(model.path)]
    found = {}
    for ours, _, _ in _names(replace(model.config, tied_embeddings=False)):
        pieces = [_find(file, ours) for file in files]
        tables, (rows, columns) = [_table(piece) for piece in pieces], _shape(pieces[0])
        if len(pieces[0].shape) == 1:
            if any(not np.array_equal(table, tables[0]) for table in tables):
                raise ParityError(f"{ours} is not the same in all files")
            read: Callable[[slice], Bytes] = tables[0].__getitem__
        elif ours.split(".")[-2] in _CUT_BY_COLUMNS:
            read, columns = partial(_side_by_side, tables), columns * len(files)
        else:
            read, rows = partial(_one_below_the_other, tables), rows * len(files)
        mapped_files = tuple(file for piece in pieces for file in piece.mapped)
        found[ours] = Stored(pieces[0].format, (rows, columns), read, mapped=mapped_files)
    return found


def _side_by_side(tables: list[Bytes], rows: slice) -> Bytes:
    return np.concatenate([table[rows] for table in tables], axis=1)


def _one_below_the_other(tables: list[Bytes], rows: slice) -> Bytes:
    size = len(tables[0])
    starts = range(0, size * len(tables), size)
    parts = [t[max(rows.start - at, 0) : max(rows.stop - at, 0)] for at, t in zip(starts, tables, strict=True)]
    return np.concatenate(parts)


def _llama2c(model: Checkpoint) -> dict[str, Stored]:
    c, version, group = model.config, model.metadata["version"], model.metadata["group_size"]
    mapped = MappedFile(model.path)
    file, at = mapped.view(0, mapped.size, "it"), 256 if version else 28
    places = {ours.split(".")[-2]: [] for ours, _, _ in _names(c)}  # type: dict[str, list[str]]
    for ours, _, _ in _names(c):
        places[ours.split(".")[-2]].append(ours)
    shapes, found = c.tensor_shapes(), {}
    read: Callable[[slice], Bytes]
    for kind in (_VERSION_1 if version else _VERSION_0).split():
        if kind in ("cosines", "sines"):
            at += 4 * c.context_length * (c.head_dim // 2)
        for name in places.get(kind, ()):
            rows, columns = math.prod(shapes[name][:-1]), shapes[name][-1]
            count = rows * columns
            if version == 2 and len(shapes[name]) == 2:
                integers, at = file[at : at + count].view(np.int8), at + count
                scales, at = file[at : at + 4 * (count // group)].view("<f4"), at + 4 * (count // group)
                read = partial(_from_integers, integers.reshape(rows, -1), scales.reshape(rows, -1))
                found[name] = Stored("F32", (rows, columns), read, group, mapped=(mapped,))
            else:
                read = file[at : at + 4 * count].reshape(rows, -1).__getitem__
                found[name] = Stored("F32", (rows, columns), read, mapped=(mapped,))
                at += 4 * count
    return found


def _from_integers(integers: NDArray[np.int8], scales: NDArray[np.float32], rows: slice) -> Bytes:
    """Each integer times its group's scale."""
    q, s = integers[rows], scales[rows]
    values: NDArray[Any] = q.reshape(*s.shape, -1) * s[:, :, None]
    return values.astype("<f4").reshape(len(q), -1).view(np.uint8)


def _merged(model: Checkpoint, base: Checkpoint) -> dict[str, Stored]:
    """The base's tensors with those that adapters replaced, and what was computed of each matrix that they changed.

    Of the latter, `sum` computes every number once more, in float64. One matrix is in memory at a time.
    """
    found, latest = tensors(base), dict[str, Any]()
    names = {ours: (hugging, ggufs) for ours, hugging, ggufs in _names(replace(base.config, tied_embeddings=False))}
    for adapter in model.adapters:
        for name, tensor in adapter.replacements.items():
            order = _order(name, tensor.shape[0], adapter, model.config)
            if len(tensor.shape) == 1:  # a norm, or a bias, is one row
                numbers = tensor.data.reshape(len(order), -1)[order].reshape(1, -1)
                found[name] = Stored(tensor.format, (1, len(order)), numbers.__getitem__)
            else:
                read = partial(_gather, _table(tensor), order)
                found[name] = Stored(tensor.format, _shape(tensor), read, mapped=tensor.mapped)
    for name in {name for adapter in model.adapters for name in adapter.updates}:
        terms = []
        for adapter in model.adapters:
            if update := adapter.updates.get(name):
                hugging, ggufs = names[name]
                if (
                    f"{update.module}.weight" not in (hugging, hugging.removeprefix("model."))
                    and update.module != ggufs
                ):
                    raise ParityError(f"{adapter.path}: {update.module} was added to {name}")
                terms.append((update, _order(name, update.left.shape[0], adapter, model.config)))
        tensor = model.tensors[name]
        found[name] = Stored(
            tensor.format,
            found[name].shape,
            partial(_computed, latest, tensor),
            sum=partial(_sum, latest, name, found[name], terms),
            mapped=(*found[name].mapped, *tensor.mapped),
        )
    return found


def _order(name: str, rows: int, adapter: Adapter, config: ModelConfig) -> NDArray[np.int64]:
    """Where an adapter's file has each row that the model has; peft keeps transformers' order, llama.cpp Meta's."""
    order = np.arange(rows)
    if not adapter.halves or name.split(".")[-2] not in ("wq", "wk"):
        return order
    return order.reshape(-1, 2, config.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _computed(latest: dict[str, Any], tensor: Tensor, rows: slice) -> Bytes:
    if latest.get("computed", ("",))[0] != tensor.name:
        latest["computed"] = tensor.name, _table(tensor)
    table: Bytes = latest["computed"][1]
    return table[rows]


def _sum(
    latest: dict[str, Any], name: str, base: Stored, terms: list[tuple[Update, NDArray[np.int64]]], rows: slice
) -> Floats:
    """W + scale * B A, or with a magnitude m the same rows divided by their lengths and multiplied by m."""
    if latest.get("factors", ("",))[0] != name:
        tables = [(u.left, u.right, u.magnitude) for u, _ in terms]
        latest["factors"] = name, [[t and t.dequantize().astype(np.float64) for t in table] for table in tables]
    data = base.rows(rows)
    x: Floats = dequantize(data.reshape(-1), base.format, (len(data), base.shape[1])).astype(np.float64)
    for (update, order), (left, right, magnitude) in zip(terms, latest["factors"][1], strict=True):
        x = x + update.scale * np.einsum("ik,kj->ij", left[order[rows]], right, optimize=True)
        if magnitude is not None:
            x = magnitude[order[rows], None] * x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    return x
