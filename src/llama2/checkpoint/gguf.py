"""GGUF (versions 2 and 3, little-endian) → Checkpoint (spec 1.4c; ggml's docs/gguf.md).

A file is: magic, version, counts, metadata, tensor descriptions, padding, tensors. Nothing is believed: counts have
limits, every length is compared with the file's own before it is used, and text is bounded. The rows of wq and wk
already are in Meta's interleaved rotary order.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import artifacts
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.metadata import Metadata
from llama2.checkpoint.tensor import Tensor
from llama2.config import BIASED, ModelConfig, RopeScaling, yarn_attention_factor
from llama2.errors import CheckpointError, ConfigError, TokenizerError
from llama2.files import MappedFile, damaged, first_bytes, quote, refuse_overlaps
from llama2.formats import FORMATS, nbytes
from llama2.text.splits import BEGINS, PRE_TOKENIZERS
from llama2.text.tokenizer import PrependScheme

if TYPE_CHECKING:
    from llama2.text.tokenizer import Arrays, Tokenizer

_TEMPLATE = "tokenizer.chat_template"
_MAX_KEYS = 1 << 12
_MAX_TENSORS = 1 << 14
_MAX_STRINGS = 1 << 20  # in all arrays together
_MAX_TEXT = 1 << 23  # bytes of all names and single strings together
_MAX_STRING = 1 << 13  # bytes of a token, or of a merge of two; the longest known token has 512
_MAX_ARRAY = 1 << 23  # bytes of all tokens, or of all merges; Llama 3's merges have 2^22

# Raised whenever the cached artifacts of a vocabulary change.
_LAYOUT = 2

#: Our own key, for a tokenizer that puts a space before the beginning of a text alone: llama.cpp has none for that.
PREPEND_SCHEME = "llama2.tokenizer.prepend_scheme"

#: What llama.cpp takes for the ids that a SentencePiece vocabulary does not name, and the types of such tokens.
_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}
_SPECIAL = (2, 3)  # unknown and control

# GGUF's value types; a scalar's code serves struct and NumPy alike.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_STRUCTS = {code: struct.Struct("<" + code) for code in _SCALARS.values()}

_FORMAT_NAMES = {format.ggml_type: name for name, format in FORMATS.items()}
# Formats that are refused, for a message that names them.
_REFUSED_FORMATS = {
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
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
_BIASED = {name: ours for ours in BIASED for name, theirs in _LAYER_NAMES.items() if theirs == ours}
#: The tensor of divisors by which Llama 3.1 scales its rotary frequencies.
ROPE_FREQS = "rope_freqs.weight"

#: Architectures whose arithmetic is Llama's; each begins its keys with its own name.
ARCHITECTURES = ("llama", "mistral3")

# Numbers of related architectures that would change the arithmetic, and the value with which they do not; zero neither.
_UNSUPPORTED = {
    "expert_count": 0.0,
    "attention.scale": 0.0,
    "attention.temperature_scale": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
}


def matches(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    return first_bytes(path, 4) == b"GGUF"


def read(path: Path, vocabulary: Path | None = None) -> Checkpoint:
    """Open a Llama in GGUF; of a split model, the first part.

    Reads the header alone; tensors and vocabulary stay in the file until they are needed. From the second time on, a
    file `vocabulary` saves walking over the vocabulary and putting it in order. Raises CheckpointError when the file is
    damaged, hostile or of another kind, and ConfigError when its hyperparameters contradict each other.
    """
    facts = {"vocabulary": _LAYOUT}
    known = artifacts.read(vocabulary, path, facts) if vocabulary else None
    starts, sizes = known["spans"].view(np.int64).reshape(2, -1).tolist() if known else ([], [])
    parts = _parts(path, dict(zip(starts, sizes, strict=True)))
    metadata = Metadata(path, parts[0].metadata)
    if metadata.find("general.type", str) == "adapter":
        raise adapter_alone(path)
    _check_architecture(metadata)
    tensors = _tensors(path, parts)

    def keep(make: Callable[[], Arrays]) -> Arrays:
        if known:
            return known
        arrays = make()
        if vocabulary:
            spans = np.array([[*parts[0].spans], [*parts[0].spans.values()]], np.int64).ravel().view(np.uint8)
            with suppress(OSError):  # as with packed weights, which warn
                artifacts.write(vocabulary, path, facts, {**arrays, "spans": spans})
        return arrays

    build_tokenizer = _tokenizer(metadata, tensors, keep)
    config = _config(metadata, tensors)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=_rename(path, tensors, config),
        metadata=MappingProxyType(parts[0].metadata),
        template=metadata.find(_TEMPLATE, str),
        templates=_templates(metadata),
        licence=metadata.find("general.license", str),
        name=metadata.find("general.name", str) or path.stem,
        tokenizer_source=build_tokenizer,
    )


def adapter_alone(path: Path, what: str = "is an adapter, not a model") -> CheckpointError:
    """The error for an adapter in the place of a model."""
    return CheckpointError(f"{path}: {what}; give its base with -m, and this with --adapter")


def header(path: Path) -> Mapping[str, Any]:
    """The metadata of a file; of a split model, those of its first. Raises CheckpointError."""
    return MappingProxyType(_parts(path, {})[0].metadata)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Llama's file, which needs no tensors. Raises CheckpointError, and TokenizerError."""
    metadata = Metadata(path, header(path))
    _check_architecture(metadata)
    try:
        return _tokenizer(metadata, {}, lambda make: make())()
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor under GGUF's name; of a split model, those of all parts. Raises CheckpointError."""
    return _tensors(path, _parts(path, {}))


def _check_architecture(metadata: Metadata) -> None:
    architecture = metadata.need("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path}: has architecture {quote(architecture)}, and only {' and '.join(ARCHITECTURES)} are "
            "supported; choose a Llama model"
        )


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


class _Info(NamedTuple):
    """A tensor's description: shape in PyTorch's order, offset from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class _Part(NamedTuple):
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
            if info.shape[-1] % FORMATS[format].block:
                raise damaged(
                    path, f"{what} has rows of {info.shape[-1]} weights, which are not whole blocks of {format}"
                )
            size = nbytes(format, info.shape)
            spans.append((info.offset, info.offset + size, info.name))
            yield Tensor(info.name, format, info.shape, self.file.view(start + info.offset, size, what), (self.file,))
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
    """An array of strings of known length, decoded when one is first needed."""

    def __init__(self, path: Path, data: NDArray[np.uint8], count: int, what: str) -> None:
        self._path, self._data, self._count, self._what = path, data, count, what

    @cached_property
    def _items(self) -> list[str]:
        if self._data.size - 8 * self._count > _MAX_ARRAY:
            raise CheckpointError(
                f"{self._path}: {self._what} has {self._data.size} bytes, more than any Llama; choose another model"
            )
        items, at, data, length_at = [], 0, self._data.tobytes(), _STRUCTS["Q"].unpack_from
        try:
            for _ in repeat(None, self._count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at - start > _MAX_STRING:
                    what = f"{self._what} has a string of {at - start} bytes"
                    raise CheckpointError(f"{self._path}: {what}, and the limit is {_MAX_STRING}; choose another model")
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
    path, arch = metadata.path, metadata.values["general.architecture"]
    for key, neutral in _UNSUPPORTED.items():
        if metadata.find(f"{arch}.{key}", float) not in (None, 0, neutral):
            raise CheckpointError(f"{path}: sets {arch}.{key}, which no Llama does; choose another model")
    if metadata.find(f"{arch}.attention.causal", bool) is False:
        raise CheckpointError(f"{path}: reads in both directions, which no Llama does; choose another model")
    dim = metadata.need(f"{arch}.embedding_length", int)
    heads = metadata.need(f"{arch}.attention.head_count", int)
    kv_heads = metadata.find(f"{arch}.attention.head_count_kv", int)
    rotated = metadata.find(f"{arch}.rope.dimension_count", int)
    head_dim = metadata.find(f"{arch}.attention.key_length", int)
    if head_dim is None:
        head_dim = dim // max(heads, 1) if rotated is None else rotated
    value_dim = metadata.find(f"{arch}.attention.value_length", int)
    theta = metadata.find(f"{arch}.rope.freq_base", float)
    for key, size in (("rope.dimension_count", rotated), ("attention.value_length", value_dim)):
        if size not in (None, head_dim):
            raise CheckpointError(f"{path}: {arch}.{key}={size} must be the head size {head_dim}; choose another model")
    try:
        stated = metadata.need(f"{arch}.context_length", int)
        scaling = _rope_scaling(metadata, tensors.get(ROPE_FREQS), head_dim, stated)
        context = scaling.context(stated) if scaling else stated
        window = metadata.find(f"{arch}.attention.sliding_window", int)
        return ModelConfig(
            dim=dim,
            n_layers=metadata.need(f"{arch}.block_count", int),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            hidden_dim=metadata.need(f"{arch}.feed_forward_length", int),
            vocab_size=len(metadata.need("tokenizer.ggml.tokens", _Strings)),
            head_dim=head_dim,
            context_length=context,
            norm_eps=metadata.need(f"{arch}.attention.layer_norm_rms_epsilon", float),
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=scaling,
            tied_embeddings="output.weight" not in tensors,
            biases=tuple(ours for name, ours in _BIASED.items() if f"blk.0.{name}.bias" in tensors),
            sliding_window=window if window and window < context else None,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rope_scaling(metadata: Metadata, divisors: Tensor | None, head_dim: int, context: int) -> RopeScaling | None:
    """Linear scaling by its present or its former key; YaRN; Llama 3.1's by the divisors that its converter stored."""
    rope = f"{metadata.values['general.architecture']}.rope"
    kind = metadata.find(f"{rope}.scaling.type", str)
    factor = metadata.find(f"{rope}.scaling.factor", float)
    if factor is None:
        factor = metadata.find(f"{rope}.scale_linear", float)
    if kind not in (None, "none", "linear", "yarn"):
        raise CheckpointError(
            f"{metadata.path}: rope scaling {quote(kind)} is not supported; choose a model with linear, llama3 or yarn"
        )
    if factor is None or kind == "none":
        factor = 1.0
    if divisors is None:
        if kind == "yarn":
            return _yarn(metadata, f"{rope}.scaling", factor, context)
        return RopeScaling("linear", factor=factor) if factor != 1 else None
    if factor != 1 or kind == "yarn":
        raise CheckpointError(
            f"{metadata.path}: has both {kind or 'linear'} and llama3 rope scaling; convert the model again with one"
        )
    if divisors.shape != (head_dim // 2,):
        raise damaged(metadata.path, f"{ROPE_FREQS} has shape {divisors.shape}, not ({head_dim // 2},)")
    return RopeScaling("llama3", divisors=tuple(divisors.dequantize().tolist()))


def _yarn(metadata: Metadata, scaling: str, factor: float, context: int) -> RopeScaling:
    """YaRN as transformers has it, from the keys that llama.cpp's converter writes (decision 11)."""
    names = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier", "yarn_beta_fast")
    relative, attention, extrapolation, log_multiplier, fast = (
        metadata.find(f"{scaling}.{name}", float) for name in names
    )
    slow = metadata.find(f"{scaling}.yarn_beta_slow", float)
    original = metadata.find(f"{scaling}.original_context_length", int)
    if extrapolation not in (None, 1):
        raise CheckpointError(f"{metadata.path}: sets {scaling}.yarn_ext_factor={extrapolation}, which must be 1")
    if attention is None:
        attention = yarn_attention_factor(factor, 1.0, log_multiplier)
    if relative not in (None, 1):
        attention = float(f"{attention * relative:.7g}")  # what float32 holds
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context=original or context,
        beta_fast=fast or 32.0,
        beta_slow=slow or 1.0,
        attention_factor=attention,
    )


def names(config: ModelConfig) -> dict[str, str]:
    """GGUF's name of each tensor of `config.tensor_shapes()`."""
    theirs = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for i in range(config.n_layers):
        for name, metas in _LAYER_NAMES.items():
            theirs |= {f"layers.{i}.{metas}.{kind}": f"blk.{i}.{name}.{kind}" for kind in ("weight", "bias")}
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


def _templates(metadata: Metadata) -> dict[str, str]:
    """The chat templates that have names beside the default one."""
    names = [key.removeprefix(f"{_TEMPLATE}.") for key in metadata.values if key.startswith(f"{_TEMPLATE}.")]
    return {name: metadata.need(f"{_TEMPLATE}.{name}", str) for name in names}


def _tokenizer(
    metadata: Metadata, tensors: Mapping[str, Tensor], keep: Callable[[Callable[[], Arrays]], Arrays]
) -> Callable[[], Tokenizer]:
    """Check the vocabulary's outline, and return what builds the tokenizer."""
    path = metadata.path
    model = metadata.need("tokenizer.ggml.model", str)
    if model not in ("llama", "gpt2"):
        raise CheckpointError(f"{path}: has tokenizer {quote(model)}; only llama and gpt2 are supported")
    bpe = model == "gpt2"
    notes: list[str] = []
    pre = _pre_tokenizer(metadata, notes) if bpe else None
    pieces = metadata.need("tokenizer.ggml.tokens", _Strings)
    merges = metadata.need("tokenizer.ggml.merges", _Strings) if bpe else None
    size = len(pieces)
    types = _column(metadata, "token_type", size, ["int32"])
    scores = None if bpe else _column(metadata, "scores", size, ["float32", "int32"])
    embeddings = tensors.get("token_embd.weight")
    if embeddings and embeddings.shape[0] != size:
        raise CheckpointError(
            f"{path}: has {size} tokens and {embeddings.shape[0]} rows of embeddings; convert the model again"
        )
    if not bpe and scores is None:
        scores = np.zeros(size, "<f4")
    if types is None:
        notes.append("has no token types: control tokens are those that it names by id or that mark roles")
    if scores is not None and size and (scores == scores[0]).all():
        notes.append("has the same score for every token: its ids are llama.cpp's, and may not be the model's own")
    add_bos = _flag(metadata, "add_bos_token", not bpe or pre in BEGINS)
    ids = _special_ids(metadata, size, types, bpe=bpe, add_bos=add_bos)
    scheme = metadata.find(PREPEND_SCHEME, str)
    if scheme not in (None, *get_args(PrependScheme)):
        raise CheckpointError(
            f"{path}: {PREPEND_SCHEME} {quote(str(scheme))} is not supported; convert the model again"
        )

    def build() -> Tokenizer:
        from llama2.text import tokenizer

        kinds = _types(pieces, types, {*ids.values()}, bpe)
        ends = tokenizer.Ends(ids["bos"], ids["eos"], add_bos, _flag(metadata, "add_eos_token", False), ids["eot"])
        if merges is not None:
            made = tokenizer.from_merges(pieces, kinds, merges, str(pre), ends, memoise=keep)
        else:
            own = cast(PrependScheme | None, scheme) or (
                "always" if _flag(metadata, "add_space_prefix", True) else "never"
            )
            values = [] if scores is None else scores.tolist()
            made = tokenizer.from_scores(
                pieces, values, kinds, ends, unk_id=ids["unknown"], prepend_scheme=own, memoise=keep
            )
        if ids["eom"] is not None:
            made.stop_ids |= {ids["eom"]}
        made.notes += tuple(notes)
        return made

    return build


def _pre_tokenizer(metadata: Metadata, notes: list[str]) -> str:
    """How a byte-level vocabulary splits text. Raises CheckpointError for a rule that is not known here."""
    named = metadata.find("tokenizer.ggml.pre", str) or "default"
    if named not in PRE_TOKENIZERS:
        known = ", ".join(dict.fromkeys(PRE_TOKENIZERS.values()))
        raise CheckpointError(
            f"{metadata.path}: has pre-tokenizer {quote(named)}, which is not supported; these are: {known}"
        )
    if named == "default":
        notes.append("names no pre-tokenizer: text is split by llama.cpp's default rule, perhaps not the model's own")
    return PRE_TOKENIZERS[named]


def _flag(metadata: Metadata, name: str, default: bool) -> bool:
    value = metadata.find(f"tokenizer.ggml.{name}", bool)
    return default if value is None else value


def _special_ids(
    metadata: Metadata, size: int, types: NDArray[Any] | None, *, bpe: bool, add_bos: bool
) -> dict[str, int | None]:
    """The ids of the tokens with a meaning, of which a SentencePiece vocabulary need not name some."""
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos", "eot", "eom", *(() if bpe else ("unknown",))):
        token = metadata.find(f"tokenizer.ggml.{name}_token_id", int)
        default = _DEFAULT_IDS.get(name, size)
        if token is None and not bpe and default < size and (types is None or types[default] in _SPECIAL):
            token = default
        if token is not None and not 0 <= token < size:
            if name != "bos" or add_bos:
                raise CheckpointError(
                    f"{metadata.path}: {name} token {token} is not one of its {size} tokens; convert the model again"
                )
            token = None
        ids[name] = token
    return ids


def _column(metadata: Metadata, name: str, size: int, dtypes: Sequence[str]) -> NDArray[Any] | None:
    """A number for each of `size` tokens, None where the file has none. llama.cpp does not mind numbers behind them."""
    key = f"tokenizer.ggml.{name}"
    values = metadata.find(key, np.ndarray)
    if values is None:
        return None
    if values.dtype not in dtypes:
        raise CheckpointError(
            f"{metadata.path}: {key} holds {values.dtype}, must hold {dtypes[0]}; convert the model again"
        )
    if len(values) < size:
        raise damaged(metadata.path, f"has {size} tokens and {len(values)} values of {key}")
    return values[:size]


def _types(pieces: Sequence[str], stored: NDArray[Any] | None, named: Set[int | None], bpe: bool) -> list[int]:
    """The types of tokens, as llama.cpp takes them.

    One that it does not know, and an unknown token of byte-level BPE, gives no text. Bytes of a SentencePiece
    vocabulary are found by their texts where no token has that type. Where the file has no types, control tokens are
    those that it names by id or that mark roles.
    """
    from llama2.text.tokenizer import BYTE, CONTROL, NORMAL, TYPES, UNKNOWN, UNUSED, marks_role

    if stored is None:
        control = (token in named or marks_role(piece) for token, piece in enumerate(pieces))
        types = [CONTROL if is_control else NORMAL for is_control in control]
    else:
        used = TYPES - {UNKNOWN} if bpe else TYPES
        types = np.where(np.isin(stored, [*used]), stored, UNUSED).tolist()
    if not bpe and BYTE not in types:
        values = {f"<0x{value:02X}>" for value in range(256)}
        tokens = [token for token, piece in enumerate(pieces) if piece in values]
        if len(tokens) == len(values):
            for token in tokens:
                types[token] = BYTE
    return types
