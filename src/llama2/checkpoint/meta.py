"""Meta's folders ⇄ Checkpoint (spec 1.4a): `params.json`, `consolidated.00.pth` and so on, `tokenizer.model`.

A weight file is what one process of Meta's tensor parallelism holds: a part of every matrix, and every norm. A matrix
is split along the axis that suits its product. Names, shapes and order of rows are the Checkpoint's own. Mistral's
folders are the same with one `consolidated.safetensors`, and with widths in `params.json` that Meta computes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2 import files as model_files
from llama2.checkpoint import pth, safetensors
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.metadata import Metadata
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig, RopeScaling
from llama2.errors import CheckpointError, ConfigError
from llama2.files import create, damaged, first_bytes, quote
from llama2.formats import FLOATS
from llama2.text import files as tokenizer_files

Bytes = NDArray[np.uint8]

_PARAMS, _TOKENIZER = "params.json", "tokenizer.model"
_SHARD, _SHARDS = "consolidated.{:02}.pth", "consolidated.*.pth"
_MISTRAL = "consolidated.safetensors"
_EMBEDDINGS = "tok_embeddings.weight"
_ROPE_FREQS = "rope.freqs"  # θ^(−2i/E), which nobody needs

_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "max_seq_len", "max_batch_size", "use_scaled_rope", "head_dim", "hidden_dim", "sliding_window",
    "max_position_embeddings", "model_parallel_size",
}  # fmt: skip
#: What a key that is not known here must not speak of, because it would change the arithmetic.
_MATTERS = re.compile(
    r"moe|expert|vision|image|audio|cross|quant|lora|adapter|rope|yarn|norm|window|chunk|bias|soft|cap|temp|scal|alpha|"
    r"activation|multiplier|tie|attn|attention|nope|causal|head|mamba|residual",
    re.IGNORECASE,
)


def matches(path: Path) -> bool:
    """Whether `path` is a folder with weights of Meta's, or a file as they are."""
    if path.is_dir():
        return any(path.glob(_SHARDS)) or ((path / _MISTRAL).exists() and (path / _PARAMS).exists())
    return first_bytes(path, 4) == b"PK\3\4"


def read(path: Path) -> Checkpoint:
    """Open a folder of Meta's, cut for any number of processes. Nothing of a tensor is read before it is touched.

    Its tokenizer lies in the folder or the one above. Its files do not say for how long a context it was trained;
    that is concluded from what they say. Raises CheckpointError when a file is missing, damaged or hostile, and
    ConfigError when the hyperparameters contradict each other.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file of weights alone; give the folder that has its {_PARAMS}")
    paths, notes = files(path), list[str]()
    parts = [part(file) for file in paths]
    for shard in parts:
        shard.pop(_ROPE_FREQS, None)
    params = model_files.load_json(model_files.inside(path, _PARAMS))
    if _EMBEDDINGS not in parts[0]:
        raise damaged(paths[0], f"lacks tensor {quote(_EMBEDDINGS)}")
    config = _config(Metadata(path / _PARAMS, params), next(iter(parts[0][_EMBEDDINGS].shape), 0), notes)

    tensors = {}
    for name, shape in config.tensor_shapes().items():
        pieces = []
        for where, shard in zip(paths, parts, strict=True):
            if name not in shard:
                raise damaged(where, f"lacks tensor {quote(name)}")
            pieces.append(shard.pop(name))
        tensors[name] = _merged(paths, shape, pieces)
    for where, shard in zip(paths, parts, strict=True):
        if shard:
            raise CheckpointError(f"{where}: has tensor {quote(min(shard))}, which no Llama has; choose another model")
    return Checkpoint(
        path=path,
        format="meta",
        config=config,
        tensors=tensors,
        metadata=MappingProxyType(params),
        name=path.resolve().name,
        notes=tuple(notes),
        tokenizer_source=partial(tokenizer_files.read, tokenizer_file(path), config.vocab_size),
    )


def tokenizer_file(folder: Path) -> Path:
    """Where the tokenizer of a folder lies: in it, or in the one above; Mistral's name may end with its version."""
    names = [folder / _TOKENIZER, *sorted(folder.glob(f"{_TOKENIZER}.v*"), reverse=True), folder.parent / _TOKENIZER]
    return next((p for p in names if p.is_file()), folder / _TOKENIZER)


def files(folder: Path) -> list[Path]:
    """The files with weights, in order: numbered from 00, and all there; else Mistral's one."""
    found = set(folder.glob(_SHARDS))
    if not found:
        return [folder / _MISTRAL]
    paths = [folder / _SHARD.format(i) for i in range(len(found))]
    for path in paths:
        if path not in found:
            raise CheckpointError(f"{path}: no such file, and {max(found).name} is there; fetch the folder again")
    return paths


def part(path: Path) -> dict[str, Tensor]:
    """The tensors of one of `files`, in whichever format it has."""
    return safetensors.read(path) if path.name == _MISTRAL else pth.read(path)


def _config(params: Metadata, rows: int, notes: list[str]) -> ModelConfig:
    """The hyperparameters, with the defaults of Meta's and Mistral's code; `rows` of embeddings are the vocabulary's
    size. A key that is not known here is refused if its name speaks of arithmetic, and noted otherwise.
    """
    path = params.path
    for key in sorted(params.values.keys() - _KNOWN):
        if params.get(key) in (None, False, -1, {}, []):
            continue
        if _MATTERS.search(key):
            raise CheckpointError(f"{path}: sets {quote(key)}, which is not supported; choose another model")
        notes.append(f"{path.name} sets {quote(key)}, which is not known here and ignored")
    dim, heads = params.need("dim", int), params.need("n_heads", int)
    multiple, multiplier = params.find("multiple_of", int), params.find("ffn_dim_multiplier", float)
    kv_heads, vocab = params.find("n_kv_heads", int), params.find("vocab_size", int)
    head_dim, hidden, window = (params.find(key, int) for key in ("head_dim", "hidden_dim", "sliding_window"))
    eps, theta = params.find("norm_eps", float), params.find("rope_theta", float)
    eps = 1e-5 if eps is None else eps
    if theta is None:  # Mistral's code has another default for models without a window
        theta = 1e6 if hidden is not None and window is None else 10000.0
    scaled = params.find("use_scaled_rope", bool) is True
    context = _context(params, theta, eps, mistral=hidden is not None)
    try:
        return ModelConfig(
            dim=dim,
            n_layers=params.need("n_layers", int),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            hidden_dim=hidden_dim(dim, 256 if multiple is None else multiple, multiplier) if hidden is None else hidden,
            vocab_size=rows if vocab in (None, -1) else vocab,
            head_dim=_head_dim(dim, heads) if head_dim is None else head_dim,
            context_length=context,
            norm_eps=eps,
            rope_theta=theta,
            rope_scaling=_scaling(path, dim, notes) if scaled else None,
            sliding_window=None if window is None or window >= context else window,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _context(params: Metadata, theta: float, eps: float, *, mistral: bool) -> int:
    """For how long a text the model was trained: as the file says, or as published models of its kind have it."""
    for key in ("max_seq_len", "max_position_embeddings"):
        if (context := params.find(key, int)) is not None:
            return context
    if mistral:
        return 131072 if theta > 1e6 else 32768
    if theta == 500000:  # Llama 3, and 3.1 and later
        return 131072 if params.find("use_scaled_rope", bool) else 8192
    return 16384 if theta == 1e6 else 4096 if math.isclose(eps, 1e-5, rel_tol=1e-6) else 2048


def _scaling(path: Path, dim: int, notes: list[str]) -> RopeScaling:
    """Llama 3.1's rule. `use_scaled_rope` says that there is one, and nothing of its numbers.

    Llama 3.1 and 3.3, from 8B (dim 4096) on, were published with factor 8; the 1B and 3B of Llama 3.2 with 32.
    """
    factor = 8.0 if dim >= 4096 else 32.0
    notes.append(
        f"{path.name} does not state the factor of its rotary scaling; {factor:.0f} is assumed, as models of this "
        "width were published"
    )
    return RopeScaling("llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


def _head_dim(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise ConfigError(f"dim={dim} must be a multiple of n_heads={heads}")
    return dim // heads


def hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer by Meta's rule (spec 1.1); both truncations are part of it."""
    if multiple_of < 1 or not (multiplier is None or 0 < multiplier < 1 << 23):
        raise ConfigError(f"multiple_of={multiple_of} and ffn_dim_multiplier={multiplier} must be positive numbers")
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def _merged(paths: Sequence[Path], shape: tuple[int, ...], pieces: Sequence[Tensor]) -> Tensor:
    """The tensor of this shape that was cut into `pieces`, one from each path; they are joined when it is touched."""
    first, axis = pieces[0], _axis(pieces[0].name, shape)
    for path, piece in zip(paths, pieces, strict=True):
        if piece.format not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {quote(piece.name)} has format {quote(piece.format)}; supported are "
                f"{', '.join(FLOATS)}"
            )
        whole = tuple(size * len(pieces) if i == axis else size for i, size in enumerate(piece.shape))
        if whole != shape:
            raise damaged(
                path, f"tensor {quote(first.name)} makes {whole} of {len(pieces)} files, and {_PARAMS} says {shape}"
            )
        if piece.format != first.format:
            raise damaged(path, f"tensor {quote(first.name)} has {piece.format}, and {paths[0].name} {first.format}")
    if len(pieces) == 1:
        return first
    source = partial(_equal, paths, pieces) if axis is None else partial(_join, pieces, axis)
    return replace(first, shape=shape, source=source, mapped=tuple(file for piece in pieces for file in piece.mapped))


def _axis(name: str, shape: tuple[int, ...]) -> int | None:
    """Along which axis a tensor is cut; None for a norm, which is whole in every file."""
    if len(shape) == 1:
        return None
    return 1 if name.endswith((_EMBEDDINGS, "attention.wo.weight", "feed_forward.w2.weight")) else 0


def _join(pieces: Sequence[Tensor], axis: int) -> Bytes:
    return np.concatenate([_rows(piece) for piece in pieces], axis=axis).reshape(-1)


def _equal(paths: Sequence[Path], pieces: Sequence[Tensor]) -> Bytes:
    first = pieces[0].data
    for path, piece in zip(paths, pieces, strict=True):
        if not np.array_equal(piece.data, first):
            raise damaged(path, f"tensor {quote(piece.name)} is not that of {paths[0].name}")
    return first


def _rows(tensor: Tensor) -> Bytes:
    """A tensor's bytes as (rows, bytes of a row)."""
    return tensor.data.reshape(tensor.shape[0], -1)


def write(checkpoint: Checkpoint, folder: Path, *, shards: int = 1) -> None:
    """Write a model to `folder`, cut into so many files, with one tensor in memory at a time.

    Floats keep their format; quantized weights become F32. A tied output head is written as a tensor of its own, for
    Meta's code knows no other. The context is not written, for its files have no place for it. Raises CheckpointError
    for a model that cannot be expressed, or not be cut so.
    """
    checkpoint.refuse_extras("Meta's format")
    config = replace(checkpoint.config, tied_embeddings=False)
    params, model = to_params(checkpoint.path, config), checkpoint.tokenizer.model_file()
    if model is None:
        raise CheckpointError(
            f"{checkpoint.path}: has a byte-level vocabulary, which no {_TOKENIZER} can hold; choose gguf or hf"
        )
    sizes = {key: getattr(config, key) for key in ("n_kv_heads", "dim", "hidden_dim", "vocab_size")}
    if shards < 1 or any(size % shards for size in sizes.values()):
        sizes_ = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise CheckpointError(f"{checkpoint.path}: {shards} files must divide {sizes_}; choose another number")
    tensors = [
        replace(checkpoint.tensors.get(name) or checkpoint.tensors[_EMBEDDINGS], name=name)
        for name in config.tensor_shapes()
    ]
    cut = {}
    for tensor in tensors:
        axis = _axis(tensor.name, tensor.shape)
        shape = tuple(size // shards if i == axis else size for i, size in enumerate(tensor.shape))
        cut[tensor.name] = (tensor.format if tensor.format in FLOATS else "F32", shape)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [stack.enter_context(create(folder / _SHARD.format(i))) for i in range(shards)]
        adds = [stack.enter_context(pth.writing(file, cut)) for file in files]
        for tensor in tensors:
            for add, piece in zip(adds, _pieces(tensor, shards), strict=True):
                add(piece)
        for name, content in ((_PARAMS, json.dumps(params).encode()), (_TOKENIZER, model)):
            stack.enter_context(create(folder / name)).write(content)


def _pieces(tensor: Tensor, shards: int) -> Iterator[Bytes]:
    """What each file has of a tensor."""
    tensor = tensor if tensor.format in FLOATS else tensor.in_float32()
    axis = _axis(tensor.name, tensor.shape)
    if axis is None:
        yield from [tensor.data] * shards
    else:
        for part in np.split(_rows(tensor), shards, axis):
            yield np.ascontiguousarray(part).reshape(-1)


def to_params(path: Path, config: ModelConfig) -> dict[str, Any]:
    """`params.json` of a configuration, with the keys that Meta's own files have."""
    other = config.rope_scaling or config.biases or config.sliding_window
    if other or config.head_dim * config.n_heads != config.dim:
        raise CheckpointError(
            f"{path}: has rope scaling, biases, a sliding window or a head size that {_PARAMS} has no key for"
        )
    params = {
        "dim": config.dim,
        **multiples(config.dim, config.hidden_dim),
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "norm_eps": float(str(np.float32(config.norm_eps))),  # GGUF has it in float32: 1e-5 again, not 9.9999997e-6
        "vocab_size": config.vocab_size,
    }
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10000:
        params["rope_theta"] = config.rope_theta
    return params


def multiples(dim: int, hidden: int) -> dict[str, Any]:
    """`multiple_of` and, where need be, `ffn_dim_multiplier`, by which Meta's rule gives this width."""
    for multiple in (256 >> i for i in range(9)):
        if hidden_dim(dim, multiple, None) == hidden:
            return {"multiple_of": multiple}
    multiple = min(4096, hidden & -hidden)  # the largest power of two that divides it
    wanted = (hidden + 0.5) / hidden_dim(dim, 1, None)
    multipliers = (round(wanted, digits) for digits in range(1, 18))
    return {
        "multiple_of": multiple,
        "ffn_dim_multiplier": next(m for m in multipliers if m and hidden_dim(dim, multiple, m) == hidden),
    }
