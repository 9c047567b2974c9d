"""GGUF (versions 2 and 3, little-endian) → Checkpoint (spec 1.4c; ggml's docs/gguf.md).

A file is: magic, version, counts, metadata, tensor descriptions, padding, tensors. Nothing is believed: counts have
limits, every length is compared with the file's own before it is used, and text is bounded. The rows of wq and wk
already stand in Meta's interleaved rotary order.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import kept
from llama2.checkpoint.checkpoint import Checkpoint, Tensor
from llama2.checkpoint.mapped import MappedFile, damaged, quote, refuse_overlaps, start_of
from llama2.checkpoint.metadata import Metadata
from llama2.checkpoint.quantize import FORMATS, nbytes
from llama2.config import ModelConfig, RopeScaling
from llama2.errors import CheckpointError, ConfigError
from llama2.text.tokenizer import PRE_TOKENIZERS

if TYPE_CHECKING:
    from llama2.text.tokenizer import Arrays, Tokenizer

_MAX_KEYS = 1 << 12
_MAX_TENSORS = 1 << 14
_MAX_STRINGS = 1 << 20  # in all arrays together
_MAX_TEXT = 1 << 23  # bytes of all names and single strings together

# Raised whenever what is kept of a vocabulary changes.
_LAYOUT = 1

# GGUF's value types; a scalar's code serves struct and NumPy alike.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_STRUCTS = {code: struct.Struct("<" + code) for code in _SCALARS.values()}

_FORMAT_NAMES = {format.ggml_type: name for name, format in FORMATS.items()}
# Formats that are refused, for a message that names them.
_REFUSED_FORMATS = {
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_LAYER_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}
#: The tensor of divisors by which Llama 3.1 scales its rotary frequencies.
ROPE_FREQS = "rope_freqs.weight"

# Numbers of related architectures that would change the arithmetic unless they are zero.
_UNSUPPORTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)


def matches(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    return start_of(path, 4) == b"GGUF"


def read(path: Path, vocabulary: Path | None = None) -> Checkpoint:
    """Open a Llama in GGUF; of a split model, the first part.

    Reads the header alone; tensors and vocabulary stay in the file until they are asked for. From the second time on, a
    file `vocabulary` saves walking over the vocabulary and putting it in order. Raises CheckpointError when the file is
    damaged, hostile or of another kind, and ConfigError when its hyperparameters contradict each other.
    """
    facts = {"vocabulary": _LAYOUT}
    known = kept.read(vocabulary, path, facts) if vocabulary else None
    starts, sizes = known["spans"].view(np.int64).reshape(2, -1).tolist() if known else ([], [])
    parts = _parts(path, dict(zip(starts, sizes, strict=True)))
    metadata = Metadata(path, parts[0].metadata)
    architecture = metadata.need("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: has architecture {quote(architecture)}, and only llama is supported; choose a Llama model"
        )
    tensors = _tensors(path, parts)

    def keep(make: Callable[[], Arrays]) -> Arrays:
        if known:
            return known
        arrays = make()
        if vocabulary:
            spans = np.array([[*parts[0].spans], [*parts[0].spans.values()]], np.int64).ravel().view(np.uint8)
            with suppress(OSError):  # as with packed weights, whose warning tells of it
                kept.write(vocabulary, path, facts, {**arrays, "spans": spans})
        return arrays

    build_tokenizer = _tokenizer(metadata, tensors, keep)
    config = _config(metadata, tensors)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=_rename(path, tensors, config),
        metadata=MappingProxyType(parts[0].metadata),
        template=metadata.find("tokenizer.chat_template", str),
        licence=metadata.find("general.license", str),
        name=metadata.find("general.name", str) or path.stem,
        _build_tokenizer=build_tokenizer,
    )


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor under GGUF's name; of a split model, those of all parts. Raises CheckpointError."""
    return _tensors(path, _parts(path, {}))


def _tensors(path: Path, parts: Sequence[_Part]) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for part in parts for tensor in part.tensors()}
    if len(tensors) < sum(len(part.infos) for part in parts):
        raise damaged(path, "has a tensor that another part has too")
    return tensors


def _parts(path: Path, spans: Mapping[int, int]) -> list[_Part]:
    """The file, or every file of a split model: `NAME-00001-of-00003.gguf` and its neighbours."""
    first = _Part.parse(path, spans)
    count = Metadata(path, first.metadata).find("split.count", int) or 1
    if count == 1:
        return [first]
    name = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", path.name)
    if not name or int(name[2]) != count or first.metadata.get("split.no") != 0:
        raise CheckpointError(f"{path}: is one of {count} parts; open the first, named …-00001-of-{count:05}.gguf")
    parts = [first]
    for i in range(1, count):
        part = _Part.parse(path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf"), {})
        if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
            raise damaged(part.file.path, f"is not part {i + 1} of {count}")
        parts.append(part)
    return parts


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor's description: shape in PyTorch's order, offset from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Part:
    """One file's header."""

    file: MappedFile
    metadata: dict[str, Any]
    infos: list[_Info]
    end: int  # of the header
    spans: dict[int, int]  # bytes of each array of strings, by where it starts

    @classmethod
    def parse(cls, path: Path, spans: Mapping[int, int]) -> _Part:
        file = MappedFile(path)
        magic = file.view(0, min(4, file.size), "the magic").tobytes()
        if magic != b"GGUF":
            raise CheckpointError(
                f"{path}: is not a GGUF file, for it begins with {magic!r}; check the path, or download it again"
            )
        cursor = _Cursor(file, 4, dict(spans))
        version = cursor.number("I")
        if version in (2 << 24, 3 << 24):
            raise CheckpointError(f"{path}: is big-endian; convert it on a little-endian machine")
        if version not in (2, 3):
            raise CheckpointError(f"{path}: has GGUF version {version}, and 2 and 3 are supported; convert it again")
        n_tensors = cursor.count(_MAX_TENSORS, "tensors")
        n_keys = cursor.count(_MAX_KEYS, "metadata keys")

        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = cursor.name(65535, "metadata key")
            if key in metadata:
                raise damaged(path, f"has metadata key {quote(key)} twice")
            metadata[key] = cursor.value(key)
        infos: dict[str, _Info] = {}
        for _ in range(n_tensors):
            info = cursor.tensor_info()
            if info.name in infos:
                raise damaged(path, f"has tensor {quote(info.name)} twice")
            infos[info.name] = info
        return cls(file, metadata, list(infos.values()), cursor.at, cursor.spans)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor under GGUF's name: known format, aligned, inside the file, apart from all others."""
        path = self.file.path
        alignment = Metadata(path, self.metadata).find("general.alignment", int)
        alignment = 32 if alignment is None else alignment
        if not (8 <= alignment <= 1 << 16 and alignment.bit_count() == 1):
            raise CheckpointError(f"{path}: general.alignment={alignment} must be a power of two from 8 to 65536")
        start = -(-self.end // alignment) * alignment
        spans = []
        for info in self.infos:
            what = f"tensor {quote(info.name)}"
            format = _FORMAT_NAMES.get(info.ggml_type)
            if format is None:
                other = _REFUSED_FORMATS.get(info.ggml_type, f"number {info.ggml_type}")
                raise CheckpointError(f"{path}: {what} has format {other}; supported are {', '.join(FORMATS)}")
            if info.offset % alignment:
                raise damaged(path, f"{what} is not aligned to {alignment} bytes")
            try:
                size = nbytes(format, info.shape)
            except CheckpointError as error:
                raise damaged(path, f"{what}: {error}") from None
            spans.append((info.offset, info.offset + size, info.name))
            yield Tensor(info.name, format, info.shape, self.file.view(start + info.offset, size, what))
        refuse_overlaps(path, spans)


class _Cursor:
    """Reads a header front to back. Whatever would leave the file raises CheckpointError."""

    def __init__(self, file: MappedFile, at: int, spans: dict[int, int]) -> None:
        self.file = file
        self.at = at
        self.spans = spans  # bytes of each array of strings, by where it starts; what is known saves a walk
        self.strings = self.text = 0  # seen so far, against the limits

    def number(self, code: str) -> Any:
        scalar = _STRUCTS[code]
        self.file.check(self.at, scalar.size, "the header")
        (value,) = scalar.unpack_from(self.file.buffer, self.at)
        self.at += scalar.size
        return value

    def count(self, limit: int, what: str) -> int:
        count: int = self.number("Q")
        if count > limit:
            raise damaged(self.file.path, f"claims {count} {what}, and the limit is {limit}")
        return count

    def bytes(self, size: int, what: str) -> NDArray[np.uint8]:
        data = self.file.view(self.at, size, what)
        self.at += size
        return data

    def string(self, limit: int, what: str) -> str:
        size = self.count(min(limit, _MAX_TEXT - self.text), f"bytes in {what}")
        self.text += size
        return _decode(self.file.path, self.bytes(size, what).data, what)

    def name(self, limit: int, what: str) -> str:
        name = self.string(limit, f"the name of a {what}")
        if not name or not name.isprintable():
            raise damaged(self.file.path, f"{quote(name)} cannot name a {what}")
        return name

    def value(self, key: str) -> Any:
        """A scalar or string as Python's own, an array of numbers as a view, an array of strings as `_Strings`."""
        kind = self.number("I")
        what = f"metadata {quote(key)}"
        if kind == _STRING:
            return self.string(_MAX_TEXT, what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise damaged(self.file.path, f"{what} has unknown type {kind}")
        return self.numbers(kind, 1, what).item()

    def array(self, what: str) -> NDArray[Any] | _Strings:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self.skip_strings(count, what)
        if kind not in _SCALARS:
            reason = "is an array of arrays" if kind == _ARRAY else f"is an array of unknown type {kind}"
            raise damaged(self.file.path, f"{what} {reason}, which no Llama has")
        return self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        code = _SCALARS[kind]
        data = self.bytes(count * _STRUCTS[code].size, what)
        if kind == _BOOL and data.max(initial=0) > 1:
            raise damaged(self.file.path, f"{what} is neither true nor false")
        return data.view("<" + code)

    def skip_strings(self, count: int, what: str) -> _Strings:
        self.strings += count
        if self.strings > _MAX_STRINGS:
            raise damaged(self.file.path, f"{what} has {count} strings, more than any Llama")
        if self.at not in self.spans:
            at, buffer, length_at = self.at, self.file.buffer, _STRUCTS["Q"].unpack_from
            try:
                for _ in repeat(None, count):
                    at += 8 + length_at(buffer, at)[0]
            except (struct.error, OverflowError):
                at = max(at, self.file.size) + 8
            self.spans[self.at] = at - self.at
        return _Strings(self.file.path, self.bytes(self.spans[self.at], what), count, what)

    def tensor_info(self) -> _Info:
        name = self.name(64, "tensor")
        n_dims = self.number("I")
        if not 1 <= n_dims <= 4:
            raise damaged(self.file.path, f"tensor {quote(name)} has {n_dims} dimensions, must have 1 to 4")
        shape = tuple([self.number("Q") for _ in range(n_dims)][::-1])
        if 0 in shape:
            raise damaged(self.file.path, f"tensor {quote(name)} has a dimension of size 0")
        return _Info(name, shape, self.number("I"), self.number("Q"))


class _Strings(Sequence[str]):
    """An array of strings of known length, decoded when one is first asked for."""

    def __init__(self, path: Path, data: NDArray[np.uint8], count: int, what: str) -> None:
        self._path, self._data, self._count, self._what = path, data, count, what

    @cached_property
    def _items(self) -> list[str]:
        items, at, data, length_at = [], 0, self._data.tobytes(), _STRUCTS["Q"].unpack_from
        try:
            for _ in repeat(None, self._count):
                start = at + 8
                at = start + length_at(data, at)[0]
                items.append(data[start:at].decode())
        except UnicodeDecodeError:
            raise damaged(self._path, f"{self._what} is not UTF-8") from None
        return items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._items[index]


def _decode(path: Path, data: memoryview, what: str) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise damaged(path, f"{what} is not UTF-8") from None


def _config(metadata: Metadata, tensors: Mapping[str, Tensor]) -> ModelConfig:
    path = metadata.path
    for key in _UNSUPPORTED:
        if metadata.find(f"llama.{key}", float):
            raise CheckpointError(f"{path}: sets llama.{key}, which no Llama does; choose another model")
    dim = metadata.need("llama.embedding_length", int)
    heads = metadata.need("llama.attention.head_count", int)
    kv_heads = metadata.find("llama.attention.head_count_kv", int)
    rotated = metadata.find("llama.rope.dimension_count", int)
    head_dim = metadata.find("llama.attention.key_length", int)
    if head_dim is None:
        head_dim = dim // max(heads, 1) if rotated is None else rotated
    value_dim = metadata.find("llama.attention.value_length", int)
    theta = metadata.find("llama.rope.freq_base", float)
    for key, size in (("rope.dimension_count", rotated), ("attention.value_length", value_dim)):
        if size not in (None, head_dim):
            raise CheckpointError(f"{path}: llama.{key}={size} must be the head size {head_dim}; choose another model")
    try:
        return ModelConfig(
            dim=dim,
            n_layers=metadata.need("llama.block_count", int),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            hidden_dim=metadata.need("llama.feed_forward_length", int),
            vocab_size=len(metadata.need("tokenizer.ggml.tokens", _Strings)),
            head_dim=head_dim,
            context_length=metadata.need("llama.context_length", int),
            norm_eps=metadata.need("llama.attention.layer_norm_rms_epsilon", float),
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=_rope_scaling(metadata, tensors.get(ROPE_FREQS), head_dim),
            tied_embeddings="output.weight" not in tensors,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rope_scaling(metadata: Metadata, divisors: Tensor | None, head_dim: int) -> RopeScaling | None:
    """Linear scaling by its present or its former key; Llama 3.1's by the divisors that its converter stored."""
    kind = metadata.find("llama.rope.scaling.type", str)
    factor = metadata.find("llama.rope.scaling.factor", float)
    if factor is None:
        factor = metadata.find("llama.rope.scale_linear", float)
    if kind not in (None, "none", "linear"):
        raise CheckpointError(
            f"{metadata.path}: rope scaling {quote(kind)} is not supported; choose a model with linear or llama3"
        )
    if factor is None or kind == "none":
        factor = 1.0
    if divisors is None:
        return RopeScaling("linear", factor=factor) if factor != 1 else None
    if factor != 1:
        raise CheckpointError(
            f"{metadata.path}: has both linear and llama3 rope scaling; convert the model again with one"
        )
    if divisors.shape != (head_dim // 2,):
        raise damaged(metadata.path, f"{ROPE_FREQS} has shape {divisors.shape}, not ({head_dim // 2},)")
    return RopeScaling("llama3", divisors=tuple(divisors.dequantize().tolist()))


def names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of each tensor of `config.tensor_shapes()`."""
    theirs = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for i in range(config.n_layers):
        theirs |= {f"layers.{i}.{metas}.weight": f"blk.{i}.{name}.weight" for name, metas in _LAYER_NAMES.items()}
    return {name: theirs.get(name, name) for name in config.tensor_shapes()}


def _rename(path: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of `config.tensor_shapes()` under Meta's names: all of them, with their shapes, and no others."""
    theirs, renamed = names(config), {}
    for name, shape in config.tensor_shapes().items():
        source = theirs[name]
        tensor = tensors.get(source)
        if tensor is None:
            raise damaged(path, f"lacks tensor {quote(source)}")
        if tensor.shape != shape:
            raise damaged(path, f"tensor {quote(source)} has shape {tensor.shape}, not {shape}")
        renamed[name] = replace(tensor, name=name)
    if extra := sorted(tensors.keys() - theirs.values() - {ROPE_FREQS}):
        raise CheckpointError(f"{path}: has tensor {quote(extra[0])}, which no Llama has; choose another model")
    return renamed


def _tokenizer(
    metadata: Metadata, tensors: Mapping[str, Tensor], keep: Callable[[Callable[[], Arrays]], Arrays]
) -> Callable[[], Tokenizer]:
    """Check the vocabulary's outline, and return what builds the tokenizer."""
    path = metadata.path
    model = metadata.need("tokenizer.ggml.model", str)
    if model not in ("llama", "gpt2"):
        raise CheckpointError(f"{path}: has tokenizer {quote(model)}; only llama and gpt2 are supported")
    bpe = model == "gpt2"
    pre = None
    if bpe:
        named = metadata.find("tokenizer.ggml.pre", str)
        if named in (None, "default"):
            raise CheckpointError(f"{path}: lacks tokenizer.ggml.pre, how its tokenizer splits text; convert it again")
        pre = PRE_TOKENIZERS.get(str(named))
        if pre is None:
            known = ", ".join(PRE_TOKENIZERS)
            raise CheckpointError(
                f"{path}: has pre-tokenizer {quote(str(named))}, which is not supported; these are: {known}"
            )

    pieces = metadata.need("tokenizer.ggml.tokens", _Strings)
    merges = metadata.need("tokenizer.ggml.merges", _Strings) if bpe else None
    types = metadata.numbers("tokenizer.ggml.token_type", "int32")
    scores = None if bpe else metadata.numbers("tokenizer.ggml.scores", "float32")
    size = len(pieces)
    embeddings = tensors.get("token_embd.weight")
    counts = {
        "token types": len(types),
        "scores": size if scores is None else len(scores),
        "rows of embeddings": embeddings.shape[0] if embeddings else size,
        "tokens by llama.vocab_size": size if (n := metadata.find("llama.vocab_size", int)) is None else n,
    }
    for what, count in counts.items():
        if count != size:
            raise damaged(path, f"has {size} tokens and {count} {what}")
    ids = {name: metadata.find(f"tokenizer.ggml.{name}_token_id", int) for name in ("bos", "eos", "unknown", "eot")}
    for name, token in ids.items():
        if token is not None and not 0 <= token < size:
            raise damaged(path, f"{name} token {token} is not one of its {size} tokens")

    def flag(name: str, default: bool) -> bool:
        value = metadata.find(f"tokenizer.ggml.{name}", bool)
        return default if value is None else value

    def build() -> Tokenizer:
        from llama2.text import tokenizer

        return tokenizer.from_vocabulary(
            "bpe" if bpe else "sentencepiece",
            pieces,
            scores=None if scores is None else scores.tolist(),
            types=types.tolist(),
            merges=merges,
            pre=pre,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            unk_id=ids["unknown"],
            add_bos=flag("add_bos_token", not bpe or pre == "llama-bpe"),
            add_eos=flag("add_eos_token", False),
            add_space_prefix=flag("add_space_prefix", not bpe),
            eot_id=ids["eot"],
            keep=keep,
        )

    return build
