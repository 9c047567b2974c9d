"""A folder as transformers keeps it ⇄ Checkpoint: `config.json`, safetensors, tokenizer files (spec 1.4b).

transformers rotates a head's first half against its second, so rows of wq and wk stand with all first numbers of
Meta's pairs before all second ones. They are put into Meta's order when a tensor is touched, and back when written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import safetensors
from llama2.checkpoint.checkpoint import Checkpoint, Tensor
from llama2.checkpoint.mapped import MappedFile, damaged, quote
from llama2.checkpoint.metadata import Metadata, parse
from llama2.checkpoint.output import create
from llama2.config import ModelConfig, RopeScaling
from llama2.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llama2.text.tokenizer import Tokenizer

Bytes = NDArray[np.uint8]

_MAX_TEXT = 1 << 20  # bytes of a JSON file or a template
_MAX_SHARDS = 1 << 10
_SHARD = 5 * 10**9  # bytes of tensors in one file, as transformers has it
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")

_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_NAMES |= {"output.weight": "lm_head.weight"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
#: Old files hold the rotary frequencies, which follow from the configuration.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

#: Keys of config.json that would change the arithmetic, or have code run, and the values with which they do not.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "auto_map": (),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def matches(path: Path) -> bool:
    """Whether this is the reader for a file or folder."""
    return (path / "config.json").exists()


def read(folder: Path) -> Checkpoint:
    """Open a Llama in a folder of Hugging Face's format.

    Reads JSON and headers alone; tensors and vocabulary stay in their files until they are asked for. Raises
    CheckpointError when a file is damaged, hostile or of another kind, and ConfigError when the hyperparameters
    contradict each other.
    """
    values = _object(folder, "config.json")
    metadata = Metadata(folder / "config.json", values)
    for key, allowed in _SUPPORTED.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{metadata.path}: {key}={_shown(value)} is not supported; choose another model")
    metadata.need("model_type", str)
    tensors = stored(folder)
    config = _config(metadata, tied=_NAMES["output.weight"] not in tensors)
    settings, generation = (_object(folder, f"{name}_config.json") for name in ("tokenizer", "generation"))
    return Checkpoint(
        path=folder,
        format="huggingface",
        config=config,
        tensors=_rename(folder, tensors, config),
        metadata=MappingProxyType(values | {"generation_config": generation}),
        template=_template(folder, settings),
        licence=_licence(folder),
        name=_name(folder),
        _build_tokenizer=_tokenizer(folder, config, metadata, Metadata(folder / "generation_config.json", generation)),
    )


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, which may be absent. Raises CheckpointError if its name or a link leads out of it.

    In the Hub's cache, files are links to the blobs of the same repository.
    """
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder}: {quote(name)} is not the name of a file in it; download it again")
    return refuse_links_out(folder / name)


def refuse_links_out(path: Path) -> Path:
    """The path itself. Raises CheckpointError if it is a link that leads out of its folder, or of the Hub's cache."""
    root, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    blobs = root.parent.with_name("blobs")
    if not (target.is_relative_to(root) or (root.parent.name == "snapshots" and target.parent == blobs)):
        raise CheckpointError(f"{path}: is a link that leads out of its folder; put the file itself there")
    return path


def _text(folder: Path, name: str) -> bytes | None:
    """The content of a short file; None where there is none."""
    path = inside(folder, name)
    if not path.exists():
        return None
    file = MappedFile(path)
    if file.size > _MAX_TEXT:
        raise damaged(path, f"has {file.size} bytes, and the limit is {_MAX_TEXT}")
    return file.view(0, file.size, "it").tobytes()


def _object(folder: Path, name: str) -> dict[str, Any]:
    text = _text(folder, name)
    return {} if text is None else parse(folder / name, text, "it")


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor under Hugging Face's name; of a sharded model, each in the file that the index says."""
    if inside(folder, _WHOLE).exists():
        return safetensors.read(folder / _WHOLE)
    index = folder / _INDEX
    places = _object(folder, _INDEX).get("weight_map")
    if places is None and not index.exists():
        raise CheckpointError(
            f"{folder}: has neither {_WHOLE} nor {_INDEX}; if its weights are in another format, save them again with "
            "transformers"
        )
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise damaged(index, "has no weight_map from tensors to files")
    expected: dict[str, set[str]] = {}  # tensors of each file
    for name, file in places.items():
        expected.setdefault(file, set()).add(name)
    if len(expected) > _MAX_SHARDS:
        raise damaged(index, f"names {len(expected)} files, and the limit is {_MAX_SHARDS}")
    tensors: dict[str, Tensor] = {}
    for path, names in [(inside(folder, file), expected[file]) for file in sorted(expected)]:
        part = safetensors.read(path)
        if wrong := sorted(part.keys() ^ names):
            verb = "has" if wrong[0] in part else "lacks"
            raise damaged(path, f"{verb} tensor {quote(wrong[0])}, against {_INDEX}")
        tensors |= part
    return tensors


def _config(metadata: Metadata, *, tied: bool) -> ModelConfig:
    """The hyperparameters, with transformers' defaults for those that older files leave out."""
    path = metadata.path
    dim, heads = metadata.need("hidden_size", int), metadata.need("num_attention_heads", int)
    kv_heads, head_dim = metadata.find("num_key_value_heads", int), metadata.find("head_dim", int)
    context, eps = metadata.find("max_position_embeddings", int), metadata.find("rms_norm_eps", float)
    if tied and not metadata.find("tie_word_embeddings", bool):
        raise damaged(path.parent, f"lacks tensor {quote(_NAMES['output.weight'])}")
    theta, scaling = _rope(metadata)
    try:
        return ModelConfig(
            dim=dim,
            n_layers=metadata.need("num_hidden_layers", int),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            hidden_dim=metadata.need("intermediate_size", int),
            vocab_size=metadata.need("vocab_size", int),
            head_dim=dim // max(heads, 1) if head_dim is None else head_dim,
            context_length=2048 if context is None else context,
            norm_eps=1e-6 if eps is None else eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=tied,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rope(metadata: Metadata) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, by `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`."""
    path, given = metadata.path, [key for key in ("rope_parameters", "rope_scaling") if metadata.values.get(key)]
    if len(given) > 1 and metadata.values[given[0]] != metadata.values[given[1]]:
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling contradict each other; remove one")
    rope = Metadata(path, metadata.need(given[0], dict) if given else {})
    theta = rope.find("rope_theta", float)
    theta = metadata.find("rope_theta", float) if theta is None else theta
    theta = 10000.0 if theta is None else theta
    kind = rope.find("rope_type", str) or rope.find("type", str)
    if kind is None:
        kind = "default" if rope.values.keys() <= {"rope_theta"} else rope.need("rope_type", str)
    if rope.find("partial_rotary_factor", float) not in (None, 1):
        raise CheckpointError(f"{path}: rotates a part of each head, which no Llama does; choose another model")
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling("linear", factor=rope.need("factor", float))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                factor=rope.need("factor", float),
                low_freq_factor=rope.need("low_freq_factor", float),
                high_freq_factor=rope.need("high_freq_factor", float),
                original_context=rope.need("original_max_position_embeddings", int),
            )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    raise CheckpointError(f"{path}: rope scaling {quote(kind)} is not supported; choose a model with linear or llama3")


def _names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each of Meta's."""
    names = {}
    for name in config.tensor_shapes():
        if layer := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
            names[name] = f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
        else:
            names[name] = _NAMES[name]
    return names


def _rename(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of `config.tensor_shapes()` under Meta's names and in Meta's order, and no others."""
    names, renamed = _names(config), {}
    for name, shape in config.tensor_shapes().items():
        tensor = tensors.get(names[name])
        if tensor is None:
            raise damaged(folder, f"lacks tensor {quote(names[name])}")
        if tensor.shape != shape:
            raise damaged(folder, f"tensor {quote(tensor.name)} has shape {tensor.shape}, not {shape}")
        heads = _heads(name, config)
        renamed[name] = replace(in_pairs(tensor, heads) if heads else tensor, name=name)
    if extra := sorted(name for name in tensors.keys() - names.values() if not _IGNORED.fullmatch(name)):
        raise CheckpointError(f"{folder}: has tensor {quote(extra[0])}, which no Llama has; choose another model")
    return renamed


def _heads(name: str, config: ModelConfig) -> int | None:
    """How many heads' rows a tensor has that rotary embedding turns; None for any other tensor."""
    if name.endswith("attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("attention.wk.weight") else None


def in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk in Meta's order: from each head's first half and second half, one row after the other."""
    return replace(tensor, source=partial(_transposed, tensor, heads, 2))


def in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk in Hugging Face's order: each head's even rows, then its odd ones. Undoes `in_pairs`."""
    return replace(tensor, source=partial(_transposed, tensor, heads, tensor.shape[0] // heads // 2))


def _transposed(tensor: Tensor, heads: int, count: int) -> Bytes:
    """The tensor's bytes with the rows of each head, seen as a table of `count` rows, column by column."""
    table = tensor.data.reshape(heads, count, -1, tensor.nbytes // tensor.shape[0])
    data = table.swapaxes(1, 2).reshape(-1)
    data.flags.writeable = False
    return data


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: of its own file, or of `tokenizer_config.json`, where several may have names."""
    path, text = folder / "chat_template.jinja", _text(folder, "chat_template.jinja")
    if text is not None:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise damaged(path, "is not UTF-8") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", named)
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(f"{folder / 'tokenizer_config.json'}: has no chat_template that is text, or is named default")


def _licence(folder: Path) -> str | None:
    """What the model card's first lines, between two of `---`, call the licence."""
    path = inside(folder, "README.md")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        card = file.read(_MAX_TEXT).decode(errors="replace")
    front = re.match(r"---\r?\n(.*?\n)---", card, re.DOTALL)
    licence = re.search(r"^license:[ \t]*(\S+)", front[1], re.MULTILINE) if front else None
    return licence[1].strip("'\"") if licence else None


def _name(folder: Path) -> str:
    """The folder's name; in the Hub's cache, the repository's."""
    path = Path(os.path.realpath(folder))
    return path.parent.parent.name.split("--")[-1] if path.parent.name == "snapshots" else path.name


def _tokenizer(folder: Path, config: ModelConfig, metadata: Metadata, generation: Metadata) -> Callable[[], Tokenizer]:
    """What builds the tokenizer; whatever ends an answer by one of the configurations, ends it."""
    for name in _TOKENIZER_FILES:
        inside(folder, name)
    begins, ends = _ids(metadata, "bos_token_id", config), _ids(metadata, "eos_token_id", config)
    stops = {*ends, *_ids(generation, "eos_token_id", config)}

    def build() -> Tokenizer:
        from llama2.text import huggingface

        ids = {"bos_id": next(iter(begins), None), "eos_id": next(iter(ends), None)}
        tokenizer = huggingface.read(folder, size=config.vocab_size, **ids)
        tokenizer.stop_ids |= stops
        return tokenizer

    return build


def _ids(metadata: Metadata, key: str, config: ModelConfig) -> list[int]:
    """One token, several, or none."""
    value = metadata.values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise damaged(metadata.path, f"{key} {_shown(token)} is not one of its {config.vocab_size} tokens")
    return ids


def _shown(value: Any) -> str:
    """A value of a JSON file as it may stand in a message: on one line, and short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


def write(checkpoint: Checkpoint, folder: Path, *, shard: int = _SHARD) -> None:
    """Write a model to `folder`, with one tensor in memory at a time. A file has at least one, and up to `shard` bytes.

    Floats keep their format; quantised weights become F32. Raises CheckpointError for rotary scaling that config.json
    cannot express, and when the file system does not allow it; TokenizerError as `text.huggingface.files` does.
    """
    from llama2.text import huggingface

    config = checkpoint.config
    with checkpoint.naming():
        texts = huggingface.files(checkpoint.tokenizer, checkpoint.template)
    texts |= {name: _json(value) for name, value in _configurations(checkpoint).items()}
    if checkpoint.licence is not None:
        texts["README.md"] = f"---\nlicense: {checkpoint.licence}\n---\n".encode()
    tensors = []
    for name, theirs in _names(config).items():
        tensor, heads = checkpoint.tensors[name], _heads(name, config)
        tensor = tensor if tensor.format in safetensors.DTYPES else tensor.in_float32()
        tensors.append(replace(in_halves(tensor, heads) if heads else tensor, name=theirs))
    files = [[tensor for _, tensor in part] for _, part in groupby(_numbered(tensors, shard), key=lambda pair: pair[0])]
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for i, part in enumerate(files, 1):
        file = _WHOLE if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        safetensors.write(part, folder / file)
        places |= {tensor.name: file for tensor in part}
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        texts[_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": places})
    for name, text in texts.items():
        with create(folder / name) as output:
            output.write(text)


def _numbered(tensors: list[Tensor], shard: int) -> Iterator[tuple[int, Tensor]]:
    """Each tensor with the number of its file."""
    number = size = 0
    for tensor in tensors:
        if size + tensor.nbytes > shard:
            number, size = number + 1, 0
        size += tensor.nbytes
        yield number, tensor


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _configurations(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """`config.json` and `generation_config.json`, in the keys that transformers 4 and 5 understand."""
    c, tokenizer = checkpoint.config, checkpoint.tokenizer
    formats = {tensor.format for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}
    dtype = _DTYPES.get(min(formats), "float32") if len(formats) == 1 else "float32"
    stops = sorted(tokenizer.stop_ids, key=lambda token: (token != tokenizer.eos_id, token))
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": _shortest(c.norm_eps),
        "rope_theta": _shortest(c.rope_theta),
        "rope_scaling": _rope_scaling(checkpoint),
        "tie_word_embeddings": c.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "use_cache": True,
        **ends,
    }
    generation = ends | dict(checkpoint.metadata.get("generation_config", {}))
    return {"config.json": config, "generation_config.json": generation}


def _shortest(value: float) -> float:
    """GGUF has numbers in float32: 1e-5 again, not 9.9999997e-6."""
    return float(str(np.float32(value))) if np.float32(value) == value else value


def _rope_scaling(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The scaling by its rule. Divisors, as GGUF has them, are Llama 3.1's of some factor, or cannot be written."""
    scaling = checkpoint.config.rope_scaling
    if scaling is None:
        return None
    if scaling.divisors is not None:
        scaling = _rule(checkpoint, scaling.divisors)
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _rule(checkpoint: Checkpoint, divisors: Sequence[float]) -> RopeScaling:
    """Llama 3.1's scaling with these divisors, which GGUF keeps in float32. Raises CheckpointError without one."""
    for context in (1 << k for k in range(5, 21)):
        rule = RopeScaling("llama3", factor=max(divisors), original_context=context)
        if np.allclose(divisors, replace(checkpoint.config, rope_scaling=rule).rope_divisors(), rtol=1e-6, atol=0):
            return rule
    raise CheckpointError(f"{checkpoint.path}: has rotary divisors that are not Llama 3.1's; config.json has no others")
