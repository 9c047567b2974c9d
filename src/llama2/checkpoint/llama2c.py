"""llama2.c's `.bin` files, versions 0, 1 and 2 ⇄ Checkpoint (spec 1.4d; its export.py, run.c).

A model is a header of seven sizes and, without gaps, the tensors in an order that the version fixes. Versions 0 and 1
have float32; in version 2, groups of 8-bit integers of a matrix share a float32 scale. What the header does not say is
what run.c has built in: norm_eps 1e-5, rotary base 10000, <s> and </s> at 1 and 2. Rows of wq and wk are in Meta's
order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig
from llama2.errors import CheckpointError, ConfigError
from llama2.files import MappedFile, create, damaged, first_bytes
from llama2.text import files as tokenizer_files
from llama2.text import tokenizer_bin

Bytes = NDArray[np.uint8]

_MAGIC = 0x616B3432.to_bytes(4, "little")  # "ak42", backwards
_SIZES = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, context_length
_HEADER = struct.Struct("<4si7iBi")  # magic, version, sizes, whether the output head is tied, group
_HEADER_BYTES = 256
_GROUP, _CHUNK = 64, 1 << 12  # weights that share a scale; groups, or positions, that are computed at a time
_EPS, _THETA = 1e-5, 10000.0
_TOKENIZER = "tokenizer.bin"
_TABLES = "freqs"  # cosine and sine of each position's angles, in version 0; run.c, too, skips them

_ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_LEGACY_ORDER = ("tok_embeddings", "attention_norm", *_ATTENTION, "ffn_norm", *_FEED_FORWARD, "norm", _TABLES, "output")
_ORDER = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", *_ATTENTION, *_FEED_FORWARD, "output")


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a header says, and with it the place of every tensor."""

    version: int
    config: ModelConfig
    group: int = 0  # weights that share a scale; 0 for float32

    @classmethod
    def parse(cls, header: bytes) -> _Layout:
        """Raises ConfigError for sizes that no model has, struct.error for too few bytes."""
        version, group = 0, 0
        if header.startswith(_MAGIC):
            _, version, *sizes, tied, group = _HEADER.unpack_from(header)
        else:
            sizes = [*_SIZES.unpack_from(header)]
            tied, sizes[5] = int(sizes[5] > 0), abs(sizes[5])
        dim, hidden, layers, heads, kv_heads, vocab, context = sizes
        if version not in (0, 1, 2) or (version == 0) == header.startswith(_MAGIC):
            raise ConfigError(f"version {version} of llama2.c's files is not known; 0, 1 and 2 are")
        if tied > 1:
            raise ConfigError(f"a flag is {tied}, must be 0 or 1")
        if heads < 1 or dim % heads:
            raise ConfigError(f"dim={dim} must be a multiple of n_heads={heads}")
        config = ModelConfig(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            hidden_dim=hidden,
            vocab_size=vocab,
            head_dim=dim // heads,
            context_length=context,
            norm_eps=_EPS,
            rope_theta=_THETA,
            tied_embeddings=bool(tied),
        )
        if version == 2 and (group < 1 or dim % group or hidden % group):
            raise ConfigError(f"groups of {group} must divide dim={dim} and hidden_dim={hidden}")
        return cls(version, config, group if version == 2 else 0)

    def header(self) -> bytes:
        c = self.config
        sizes = [c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.context_length]
        if self.version == 0:
            sizes[5] *= 1 if c.tied_embeddings else -1
            return _SIZES.pack(*sizes)
        header = _HEADER.pack(_MAGIC, self.version, *sizes, c.tied_embeddings, self.group)
        return header.ljust(_HEADER_BYTES, b"\0")

    def parts(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and size in bytes of all that follows the header, in order."""
        c = self.config
        shapes = c.tensor_shapes()
        for kind in _ORDER if self.version else _LEGACY_ORDER:
            names = [f"layers.{i}.{kind}.weight" for i in range(c.n_layers)]
            if kind == _TABLES:
                yield _TABLES, (2, c.context_length, c.head_dim // 2), 4 * c.context_length * c.head_dim
            for name in names if names[0] in shapes else [f"{kind}.weight"]:
                if shape := shapes.get(name):
                    count = math.prod(shape)
                    whole = len(shape) == 1 or not self.group
                    yield name, shape, 4 * count if whole else count + 4 * (count // self.group)


def matches(path: Path) -> bool:
    """Whether a file begins with llama2.c's magic number, or with the sizes of a possible model."""
    header = first_bytes(path, _HEADER.size)
    try:
        return header.startswith(_MAGIC) or bool(_Layout.parse(header))
    except (ConfigError, struct.error):
        return False


def read(path: Path) -> Checkpoint:
    """Open a `.bin` of any version; the tokenizer is `tokenizer.bin` beside it.

    Weights in groups of integers are given as the float32 that they stand for, when they are touched. Raises
    CheckpointError unless the file has exactly the length that its header implies, and ConfigError when its sizes
    contradict each other.
    """
    file = MappedFile(path)
    try:
        layout = _Layout.parse(file.view(0, min(_HEADER.size, file.size), "the header").tobytes())
    except struct.error:
        raise damaged(path, "ends within its header") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config, at = layout.config, len(layout.header())
    parts = [*layout.parts()]
    total = at + sum(size for _, _, size in parts)
    if file.size != total:
        raise damaged(path, f"has {file.size} bytes, and its header makes {total}")
    tensors = {}
    for name, shape, size in parts:
        data = file.view(at, size, name)
        at += size
        if name == _TABLES:
            continue
        grouped = layout.group and len(shape) == 2
        source = partial(_from_groups, data, math.prod(shape), layout.group) if grouped else data
        tensors[name] = Tensor(name, "F32", shape, source, (file,))
    return Checkpoint(
        path=path,
        format="llama2c",
        config=config,
        tensors={name: tensors[name] for name in config.tensor_shapes()},
        metadata=MappingProxyType({"version": layout.version, "group_size": layout.group}),
        name=path.stem,
        tokenizer_source=partial(tokenizer_files.read, path.with_name(_TOKENIZER), config.vocab_size),
    )


def write(checkpoint: Checkpoint, path: Path, *, version: int = 1) -> None:
    """Write a model to `path`, and its `tokenizer.bin` beside it, with one tensor in memory at a time.

    Versions 0 and 1 hold float32, version 2 groups of 64 8-bit integers. Groups are halved until they divide a row.
    Raises CheckpointError for a model that such a file cannot express.
    """
    checkpoint.refuse_extras("llama2.c's format")
    c = checkpoint.config
    tokens = vocabulary(checkpoint)
    eps_differs = not math.isclose(c.norm_eps, _EPS, rel_tol=1e-6)  # GGUF has it in float32
    other = c.rope_scaling or c.biases or c.sliding_window
    if other or c.rope_theta != _THETA or eps_differs or c.head_dim * c.n_heads != c.dim:
        raise CheckpointError(
            f"{checkpoint.path}: llama2.c's files need norm_eps={_EPS}, rope_theta={_THETA:g} without scaling, "
            "n_heads * head_dim = dim, no biases and no sliding window"
        )
    if version not in (0, 1, 2):
        raise CheckpointError(f"version={version} of llama2.c's files is not known; choose 0, 1 or 2")
    layout = _Layout(version, c, math.gcd(_GROUP, c.dim, c.hidden_dim) if version == 2 else 0)
    refuse_other_tokenizer(path, tokens)
    with create(path) as file:
        file.write(layout.header())
        for name, shape, _ in layout.parts():
            if name == _TABLES:
                for table in (np.cos, np.sin):
                    for start in range(0, c.context_length, _CHUNK):
                        positions = np.arange(start, min(start + _CHUNK, c.context_length))
                        file.write(table(np.outer(positions, c.inverse_frequencies())).astype("<f4").data)
                continue
            values = checkpoint.tensors[name].dequantize()
            if layout.group and len(shape) == 2:
                for part in _to_groups(values, layout.group):
                    file.write(part.data)
            else:
                file.write(values.data)
    with create(path.with_name(_TOKENIZER)) as file:
        file.write(tokens)


def refuse_other_tokenizer(path: Path, tokens: bytes) -> None:
    """Raise CheckpointError when the `tokenizer.bin` beside `path` is not these `tokens`, which `vocabulary` makes."""
    beside = path.with_name(_TOKENIZER)
    if beside.is_file() and beside.read_bytes() != tokens:
        raise CheckpointError(f"{beside}: is another model's tokenizer; choose another folder")


def _from_groups(data: Bytes, count: int, group: int) -> Bytes:
    """float32 of `count` integers, each times the scale of its group; all scales follow all integers."""
    values = data[:count].view(np.int8).reshape(-1, group).astype(np.float32)
    values *= data[count:].view("<f4")[:, None]
    return values.reshape(-1).view(np.uint8)


def _to_groups(values: NDArray[np.float32], group: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers q and scales s, the largest of a group becoming ±127: x ≈ q · s, s = max|x| / 127."""
    x = values.reshape(-1, group)
    q, scales = np.zeros(x.shape, np.int8), np.empty((len(x), 1), np.float32)
    for start in range(0, len(x), _CHUNK):  # so that what is temporary stays small
        part = slice(start, start + _CHUNK)
        scales[part] = s = np.abs(x[part]).max(axis=1, keepdims=True) / np.float32(127)
        q[part] = np.rint(np.divide(x[part], s, out=np.zeros_like(x[part]), where=s != 0))
    return q, scales


def vocabulary(checkpoint: Checkpoint) -> bytes:
    """The `tokenizer.bin` of a checkpoint."""
    tokenizer = checkpoint.tokenizer
    with checkpoint.naming():
        v = tokenizer.vocabulary()
    if v.scores is None or (v.unk_id, tokenizer.bos_id, tokenizer.eos_id) != (0, 1, 2):
        raise CheckpointError(
            f"{checkpoint.path}: llama2.c needs a SentencePiece vocabulary with <unk>, <s> and </s> at 0, 1 and 2; "
            "choose gguf or hf"
        )
    return tokenizer_bin.pack(v)
