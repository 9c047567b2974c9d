"""A folder as transformers keeps it ⇄ Checkpoint: `config.json`, weights, tokenizer files (spec 1.4b).

Weights are safetensors, or PyTorch's pickles where there are none. What is used is checked, and the rest is not judged.

transformers rotates a head's first half against its second. So rows of wq and wk have all first numbers of Meta's pairs
before all second ones. They are put into Meta's order when a tensor is touched, and back when written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.checkpoint import pth, safetensors
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.metadata import Metadata
from llama2.checkpoint.tensor import Tensor
from llama2.config import BIASED, ModelConfig, RopeScaling, yarn_attention_factor
from llama2.errors import CheckpointError, ConfigError
from llama2.files import create, damaged, inside, quote
from llama2.formats import FLOATS

if TYPE_CHECKING:
    from llama2.text.tokenizer import Tokenizer

Bytes = NDArray[np.uint8]

_MAX_TEXT = 1 << 20  # bytes of a template or a model card
_MAX_SHARDS = 1 << 10
_MAX_TEMPLATES = 1 << 6  # beside the default one
_SHARD = 5 * 10**9  # bytes of tensors in one file, as transformers has it
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
#: Where weights are: in one file, or several and their index. The first that a folder has counts, as in transformers.
_STORES: tuple[tuple[str, str, Callable[[Path], dict[str, Tensor]]], ...] = (
    (_WHOLE, _INDEX, safetensors.read),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", pth.read),
)
#: Our own key of config.json, for tensors beside those of a Llama.
_EXTRAS = "extra_tensors"
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
#: What old files hold beside the weights: rotary frequencies, which follow from the configuration, positions, masks.
_IGNORED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.\w+|inv_freq|masked_bias|position_ids|(?:causal|attention)_mask|attn\.bias)"
)
#: What quantized weights leave beside, or in place of, a matrix: names of GPTQ, AWQ, bitsandbytes and their like.
_QUANTIZED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|SCB|CB|absmax|quant_map|weight_(?:scale|zero_point|packed|shape|format)\w*|"
    r"weight\.(?:absmax|quant_map|nested\w*|quant_state\.\w+)|codebooks?|input_scale)"
)
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ"}

_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")

#: Keys of config.json that would change the arithmetic, or have code run, and the values with which they do not.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def matches(path: Path) -> bool:
    """Whether this is the reader for a file or folder. Weights in Meta's or Mistral's own format are not its."""
    from llama2.checkpoint import meta

    return files.exists(path / "config.json") and (_store(path) is not None or not meta.matches(path))


def read(folder: Path) -> Checkpoint:
    """Open a Llama in a folder of Hugging Face's format.

    Reads JSON and headers alone; tensors and vocabulary stay in their files until they are needed. Raises
    CheckpointError when a file is damaged, hostile or of another kind, and ConfigError when the hyperparameters
    contradict each other.
    """
    values, notes = read_object(folder, "config.json"), list[str]()
    metadata = Metadata(folder / "config.json", values)
    _check_architecture(metadata, notes)
    for key, allowed in _SUPPORTED.items():
        value = metadata.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{metadata.path}: {key}={_shown(value)} is not supported; choose another model")
    metadata.need("model_type", str)
    if _store(folder) is None:
        raise _no_weights(metadata)
    tensors = stored(folder, notes)
    extras = _extras(metadata, tensors)
    _check_quantization(metadata, tensors, notes)
    if _NAMES["output.weight"] not in tensors and metadata.get("tie_word_embeddings") is None:
        values["tie_word_embeddings"] = True
        notes.append("its output head is taken to be its embeddings, because it has none and config.json does not say")
    config = _config(metadata, tensors)
    settings, generation = (read_object(folder, f"{name}_config.json") for name in ("tokenizer", "generation"))
    templates = chat_templates(folder, settings)
    generation = _drop_ends(metadata, generation, config, notes)
    values.update({key: None for key in ("bos_token_id", "eos_token_id") if values.get(key) == -1})
    return Checkpoint(
        path=folder,
        format="huggingface",
        config=config,
        tensors=_rename(folder, tensors, config),
        metadata=MappingProxyType(values | {"generation_config": generation}),
        templates=templates,
        template=templates.get("default"),
        licence=_licence(folder),
        name=_name(folder),
        notes=tuple(notes),
        extras=extras,
        tokenizer_source=_tokenizer(folder, config, metadata, Metadata(folder / "generation_config.json", generation)),
    )


def _check_architecture(metadata: Metadata, notes: list[str]) -> None:
    """Raise CheckpointError, with its name, for a model that computes in another way than Llama."""
    given = metadata.get("architectures")
    kinds = given if isinstance(given, list) else [] if given is None else [given]
    for kind in kinds:
        if kind in _ARCHITECTURES:
            continue
        if not isinstance(kind, str) or not re.fullmatch(r"\w{1,80}", kind, re.ASCII):
            raise CheckpointError(
                f"{metadata.path}: architectures={_shown(given)} is not supported; choose a model of LlamaForCausalLM"
            )
        family = re.sub(r"(?:LMHead)?(?:For[A-Z]\w*|Model)$", "", kind) or kind
        article = "an" if family[0] in "AEIOUaeiou" else "a"
        if family in ("Llama", "LLaMA", "Mistral"):
            raise CheckpointError(
                f"{metadata.path}: is {article} {family} without the head of a language model ({kind}); choose a model "
                f"of {family}ForCausalLM"
            )
        raise CheckpointError(
            f"{metadata.path}: is {article} {family} ({kind}), whose arithmetic is not Llama's; choose a model of "
            "LlamaForCausalLM or MistralForCausalLM"
        )
    if metadata.get("auto_map") is not None:
        notes.append("auto_map of config.json names Python code, which is not run: the model is computed as a Llama")


def _extras(metadata: Metadata, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors that config.json lists under `extra_tensors` out of all the tensors.

    The key is ours: transformers ignores it, and such tensors with a warning. Raises CheckpointError when a listed one
    is missing, or not of floats.
    """
    listed, folder = metadata.get(_EXTRAS), metadata.path.parent
    names = [] if listed is None else listed
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise damaged(metadata.path, f"{_EXTRAS} is not a list of different names")
    for name in names:
        if name not in tensors:
            raise damaged(folder, f"lacks tensor {quote(name)}, which {_EXTRAS} of config.json lists")
        if tensors[name].format not in FLOATS:
            raise CheckpointError(
                f"{folder}: tensor {quote(name)} has format {quote(tensors[name].format)}; supported are "
                f"{', '.join(FLOATS)}"
            )
    return {name: tensors.pop(name) for name in names}


def _check_quantization(metadata: Metadata, tensors: Mapping[str, Tensor], notes: list[str]) -> None:
    """Raise CheckpointError for weights that are quantized. A configuration beside whole weights is of no use here."""
    wrong = [
        name
        for name, tensor in tensors.items()
        if _QUANTIZED.fullmatch(name) or (name.endswith("_proj.weight") and tensor.format not in FLOATS)
    ]
    method = _quantization(metadata)
    if wrong:
        raise CheckpointError(
            f"{metadata.path.parent}: holds {method or 'quantized weights'} ({quote(wrong[0])}), which are not "
            "supported; choose the unquantized model or a GGUF"
        )
    if method is not None:
        notes.append(f"its configuration speaks of {method}; it has none, and that is ignored")


def _quantization(metadata: Metadata) -> str | None:
    """What a model's configuration says of its weights, method and bits; None where they are not quantized."""
    folder, settings, method = metadata.path.parent, metadata.get("quantization_config"), None
    for name, usual in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if settings is None and files.exists(folder / name):
            settings, method = read_object(folder, name), usual
    if settings is None:
        return None
    values = _table(settings)
    method = values.get("quant_method", method)
    if not isinstance(method, str) or not re.fullmatch(r"[\w.-]{1,40}", method, re.ASCII):
        method = "quantized"
    weights = [_table(_table(group).get("weights")) for group in _table(values.get("config_groups")).values()]
    claimed = [values.get("bits"), values.get("w_bit"), *(group.get("num_bits") for group in weights)]
    claimed += [bits for bits in (4, 8) if values.get(f"load_in_{bits}bit") is True or method == f"fp{bits}"]
    bits = next((bits for bits in claimed if type(bits) is int and 0 < bits < 64), None)
    method = _METHODS.get(method.lower(), method)
    return f"{method} weights" if bits is None else f"{method} weights of {bits} bits"


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _drop_ends(metadata: Metadata, generation: dict[str, Any], config: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """generation_config.json without the end tokens that the vocabulary lacks, as it may be a base model's."""
    value = Metadata(metadata.path.with_name("generation_config.json"), generation).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = [token for token in ids if type(token) is int and 0 <= token < config.vocab_size]
    if len(known) == len(ids):
        return generation
    strange = _shown([token for token in ids if token not in known])
    notes.append(f"generation_config.json has end tokens that the vocabulary lacks, which are ignored: {strange}")
    return {**generation, "eos_token_id": known}


def _text(folder: Path, name: str) -> bytes | None:
    """The content of a short file; None where there is none."""
    path = inside(folder, name)
    return files.read(path, limit=_MAX_TEXT) if files.exists(path) else None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, name)
    return files.load_json(path) if files.exists(path) else {}


def _store(folder: Path) -> tuple[str, str, Callable[[Path], dict[str, Tensor]]] | None:
    """The first of _STORES that has weights in a folder, or at least an index; None without any."""
    whole = (store for store in _STORES if files.exists(folder / store[0]) or _shards(folder, store[1]))
    return next(whole, None) or next((store for store in _STORES if files.exists(folder / store[1])), None)


def _shards(folder: Path, index: str) -> bool:
    """Whether a folder has an index, and any file that may be one of those which it names."""
    stem, suffix, *_ = index.split(".")
    return files.exists(folder / index) and any(folder.glob(f"{stem}-*.{suffix}"))


def _no_weights(metadata: Metadata) -> CheckpointError:
    """Why a folder with a configuration has no weights that can be read, and what to do."""
    folder, method = metadata.path.parent, _quantization(metadata)
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{folder}: has no weights but GGUF files; give one, such as {quote(found[0])} in it")
    if method is not None:
        return CheckpointError(
            f"{folder}: holds {method}, which are not supported; choose the unquantized model or a GGUF"
        )
    if found := [name for name in names if re.fullmatch(r"\w+-\d+-of-\d+\.(?:safetensors|bin)", name)]:
        return CheckpointError(f"{folder}: has {found[0]}, and no index of such files; download it too, *.index.json")
    if found := [name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".tflite", ".pt"))]:
        return CheckpointError(
            f"{folder}: has its weights as {quote(found[0])} alone, a format that is not supported; save them again "
            "with transformers"
        )
    return CheckpointError(f"{folder}: has config.json, and no weights ({_WHOLE} or pytorch_model.bin); download them")


def stored(folder: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """Every tensor under Hugging Face's name, from the files that an index names, or from one.

    Where two files have a tensor, the index decides. Raises CheckpointError without weights.
    """
    store = _store(folder)
    if store is None:
        raise _no_weights(Metadata(folder / "config.json", {}))
    whole, index, read_part = store
    if files.exists(inside(folder, whole)):
        return _named(read_part(folder / whole), notes)
    found = Metadata(folder / index, read_object(folder, index)).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise damaged(folder / index, "has no weight_map from tensors to files")
    twice = found.twice if isinstance(found, files.Repeated) else frozenset()
    places = {name: file for name, file in found.items() if not _IGNORED.fullmatch(name)}
    if wrong := sorted(twice & places.keys()):
        raise damaged(folder / index, f"has {quote(wrong[0])} twice")
    names = sorted(set(places.values()))
    if len(names) > _MAX_SHARDS:
        raise damaged(folder / index, f"names {len(names)} files, and the limit is {_MAX_SHARDS}")
    tensors: dict[str, Tensor] = {}
    for file, path in [(name, inside(folder, name)) for name in names]:
        for name, tensor in read_part(path).items():
            if name in tensors and not _IGNORED.fullmatch(name):
                if name not in places:
                    raise damaged(path, f"has tensor {quote(name)}, which another file has, and {index} does not know")
                if places[name] != file:
                    continue
            tensors[name] = tensor
    if notes is not None and (missing := sorted(places.keys() - tensors.keys())):
        notes.append(f"{index} lists tensors that no file has, {len(missing)} in all, such as {quote(missing[0])}")
    return _named(tensors, notes)


def _named(tensors: dict[str, Tensor], notes: list[str] | None) -> dict[str, Tensor]:
    """The tensors with the names that LlamaForCausalLM has, where each begins with something else or lacks a part."""
    theirs = _NAMES["tok_embeddings.weight"].removeprefix("model.")
    found = [name.removesuffix(theirs) for name in tensors if name.endswith(theirs)]
    if len(found) != 1 or found[0] == "model.":
        return tensors
    prefix, outer = found[0], found[0].removesuffix("model.")
    if notes is not None:
        notes.append(f"its tensors' names begin with {quote(prefix)}" if prefix else "its tensors' names lack `model.`")
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head = name.removeprefix(outer) == "lm_head.weight"
        ours = "lm_head.weight" if head else "model." + name[len(prefix) :] if name.startswith(prefix) else name
        renamed[ours] = tensor
    return renamed


def _config(metadata: Metadata, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The hyperparameters, with transformers' defaults for those that older files leave out."""
    path, mistral = metadata.path, metadata.values.get("model_type") == "mistral"
    dim, heads = metadata.need("hidden_size", int), metadata.need("num_attention_heads", int)
    kv_heads, head_dim = metadata.find("num_key_value_heads", int), metadata.find("head_dim", int)
    if mistral and "num_key_value_heads" not in metadata.values:
        kv_heads = 8
    stated, eps = metadata.find("max_position_embeddings", int), metadata.find("rms_norm_eps", float)
    if stated is None:
        stated = 131072 if mistral else 2048
    tied = _NAMES["output.weight"] not in tensors
    if tied and not metadata.find("tie_word_embeddings", bool):
        raise damaged(path.parent, f"lacks tensor {quote(_NAMES['output.weight'])}")
    theta, scaling = _rope(metadata, stated)
    context = scaling.context(stated) if scaling else stated
    try:
        return ModelConfig(
            dim=dim,
            n_layers=metadata.need("num_hidden_layers", int),
            n_heads=heads,
            n_kv_heads=heads if kv_heads is None else kv_heads,
            hidden_dim=metadata.need("intermediate_size", int),
            vocab_size=metadata.need("vocab_size", int),
            head_dim=dim // max(heads, 1) if head_dim is None else head_dim,
            context_length=context,
            norm_eps=1e-6 if eps is None else eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=tied,
            biases=_biases(metadata, tensors),
            sliding_window=_sliding_window(metadata, context),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _biases(metadata: Metadata, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The matrices with a bias: config.json says of which part, and the tensors that are there of which matrices.

    Where it says so and a matrix has none, transformers takes zeros, which is none. Raises CheckpointError where the
    two contradict each other; transformers would leave such biases out.
    """
    held = {name: bias for name in BIASED if (bias := f"model.layers.0.{_LAYER_NAMES[name]}.bias") in tensors}
    for key, part in (("attention_bias", "attention."), ("mlp_bias", "feed_forward.")):
        said = bool(metadata.find(key, bool)) and metadata.values["model_type"] == "llama"
        there = [bias for name, bias in held.items() if name.startswith(part)]
        if there and not said:
            raise CheckpointError(
                f"{metadata.path}: {key} is not true, and there is a tensor {quote(there[0])}; make it true if the "
                "model was trained with biases"
            )
        if said and not there:
            raise CheckpointError(
                f"{metadata.path}: {key} is true, and no tensor has such a bias; make it false if the model was "
                "trained without"
            )
    return tuple(held)


def _sliding_window(metadata: Metadata, context: int) -> int | None:
    """How many keys a token reads, if these are fewer than the context. Of Llama alone transformers ignores the key."""
    path, mistral = metadata.path, metadata.values["model_type"] == "mistral"
    window = metadata.find("sliding_window", int)
    if mistral and "sliding_window" not in metadata.values:
        window = 4096
    if window is None or window >= context or (not mistral and metadata.values.get("use_sliding_window") is False):
        return None
    if not mistral:
        raise CheckpointError(
            f"{path}: sliding_window={window} is what no model_type llama has; make it null, or the model_type mistral"
        )
    if set(metadata.values.get("layer_types") or ()) - {"sliding_attention"}:
        raise CheckpointError(f"{path}: has a sliding window in some layers alone; choose another model")
    return window


def _rope(metadata: Metadata, context: int) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, by `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`."""
    path, given = metadata.path, [key for key in ("rope_parameters", "rope_scaling") if metadata.values.get(key)]
    found = [_one_rope(metadata, Metadata(path, metadata.need(key, dict)), context) for key in given]
    if len(found) > 1 and found[0] != found[1]:
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling contradict each other; remove one")
    return found[0] if found else _one_rope(metadata, Metadata(path, {}), context)


def _one_rope(metadata: Metadata, rope: Metadata, context: int) -> tuple[float, RopeScaling | None]:
    """What one table of rotary parameters says; what its rule does not use is not looked at."""
    path, theta = metadata.path, rope.find("rope_theta", float)
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
        if kind == "yarn":
            return theta, _yarn(metadata, rope, context)
        if kind == "dynamic":  # transformers takes max_position_embeddings for the original, whatever else is said
            return theta, RopeScaling("dynamic", factor=rope.need("factor", float), original_context=context)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    raise CheckpointError(
        f"{path}: rope scaling {quote(kind)} is not supported; choose a model with linear, llama3, yarn or dynamic"
    )


def _yarn(metadata: Metadata, rope: Metadata, context: int) -> RopeScaling:
    """As transformers' `_compute_yarn_parameters` has it: 0 is as if not said, a null factor the contexts' ratio."""
    key = "original_max_position_embeddings"
    inner, outer = rope.find(key, int), metadata.find(key, int)
    if inner and outer and inner != outer:
        raise CheckpointError(f"{metadata.path}: {key} is {outer}, and {inner} in its rope scaling; remove one")
    original = inner or outer or context
    factor = rope.need("factor", float) if rope.values.get("factor", 0) is not None else context / original
    attention, fast, slow = (rope.find(name, float) for name in ("attention_factor", "beta_fast", "beta_slow"))
    if attention is None:
        scales = (rope.find(name, float) for name in ("mscale", "mscale_all_dim"))
        attention = yarn_attention_factor(factor, *scales)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=fast or 32.0,
        beta_slow=slow or 1.0,
        truncate=rope.find("truncate", bool) is not False,
        attention_factor=attention,
    )


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each of Meta's."""
    names = {}
    for name in config.tensor_shapes():
        if layer := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
            names[name] = f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
        else:
            names[name] = _NAMES[name]
    return names


def _rename(folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of `config.tensor_shapes()` under Meta's names and in Meta's order, and no others."""
    names, renamed = tensor_names(config), {}
    for name, shape in config.tensor_shapes().items():
        tensor = tensors.get(names[name])
        if tensor is None:
            raise damaged(folder, f"lacks tensor {quote(names[name])}")
        if tensor.format not in FLOATS:
            raise CheckpointError(
                f"{folder}: tensor {quote(tensor.name)} has format {quote(tensor.format)}; supported are "
                f"{', '.join(FLOATS)}"
            )
        if tensor.shape != shape:
            raise damaged(folder, f"tensor {quote(tensor.name)} has shape {tensor.shape}, not {shape}")
        heads = heads_of(name, config)
        renamed[name] = replace(in_pairs(tensor, heads) if heads else tensor, name=name)
    if extra := sorted(name for name in tensors.keys() - names.values() if not _IGNORED.fullmatch(name)):
        raise CheckpointError(f"{folder}: has tensor {quote(extra[0])}, which no Llama has; choose another model")
    return renamed


def heads_of(name: str, config: ModelConfig) -> int | None:
    """How many heads' rows a tensor has that rotary embedding turns; None for any other tensor."""
    if name.endswith(("attention.wq.weight", "attention.wq.bias")):
        return config.n_heads
    return config.n_kv_heads if name.endswith(("attention.wk.weight", "attention.wk.bias")) else None


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


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: of files of their own, else of `tokenizer_config.json`, one or several with names."""
    texts = {"default": _text(folder, "chat_template.jinja")}
    if (more := folder / "additional_chat_templates").is_dir():
        paths = sorted(islice(more.glob("*.jinja"), _MAX_TEMPLATES))
        texts |= {path.stem: _text(more, path.name) for path in paths}
    if texts := {name: text for name, text in texts.items() if text is not None}:
        try:
            return {name: text.decode() for name, text in texts.items() if text is not None}
        except UnicodeDecodeError:
            raise damaged(folder, "has a chat template that is not UTF-8") from None
    value = settings.get("chat_template")
    named = {"default": value} if isinstance(value, str) else {} if value is None else value
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be text, or several with names; correct it"
        )
    return named


def _licence(folder: Path) -> str | None:
    """What the model card's first lines, between two of `---`, call the licence."""
    try:
        path = inside(folder, "README.md")
    except CheckpointError:
        return None
    card = files.first_bytes(path, _MAX_TEXT).decode(errors="replace")
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
        from llama2.text import tokenizer_folder

        ids = {"bos_id": next(iter(begins), None), "eos_id": next(iter(ends), None)}
        tokenizer = tokenizer_folder.read(folder, size=config.vocab_size, **ids)
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
    """A value of a JSON file as a message may show it: on one line, and short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


def write(checkpoint: Checkpoint, folder: Path, *, shard: int = _SHARD) -> None:
    """Write a model to `folder`, with one tensor in memory at a time. A file has at least one, and up to `shard` bytes.

    Floats keep their format; quantized weights become F32. Raises CheckpointError for rotary scaling that config.json
    cannot express, and when the file system does not allow it; TokenizerError as `text.tokenizer_folder.written` does.
    """
    from llama2.text import tokenizer_folder

    config = checkpoint.config
    with checkpoint.naming():
        texts = tokenizer_folder.written(checkpoint.tokenizer, checkpoint.templates)
    texts |= {name: _json(value) for name, value in _configurations(checkpoint).items()}
    if checkpoint.licence is not None:
        texts["README.md"] = f"---\nlicense: {checkpoint.licence}\n---\n".encode()
    tensors = []
    for name, theirs in tensor_names(config).items():
        tensor, heads = checkpoint.tensors[name], heads_of(name, config)
        tensor = tensor if tensor.format in FLOATS else tensor.in_float32()
        tensors.append(replace(in_halves(tensor, heads) if heads else tensor, name=theirs))
    for name, tensor in checkpoint.extras.items():
        if name in {each.name for each in tensors}:
            raise CheckpointError(f"{checkpoint.path}: extra tensor {quote(name)} has a name of Llama's; rename it")
        tensors.append(replace(tensor if tensor.format in FLOATS else tensor.in_float32(), name=name))
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
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # a lone surrogate becomes its escape in JSON


def _configurations(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """`config.json` and `generation_config.json`, in the keys that transformers 4 and 5 understand."""
    c, tokenizer, scaling = checkpoint.config, checkpoint.tokenizer, checkpoint.config.rope_scaling
    dynamic = scaling is not None and scaling.kind == "dynamic"
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
        "max_position_embeddings": scaling.original_context if dynamic and scaling else c.context_length,
        "rms_norm_eps": _shortest(c.norm_eps),
        "rope_theta": _shortest(c.rope_theta),
        "rope_scaling": _rope_scaling(checkpoint),
        "tie_word_embeddings": c.tied_embeddings,
        "attention_bias": any(name.startswith("attention.") for name in c.biases),
        "mlp_bias": any(name.startswith("feed_forward.") for name in c.biases),
        "torch_dtype": dtype,
        "use_cache": True,
        **ends,
    }
    if checkpoint.extras:
        config[_EXTRAS] = list(checkpoint.extras)
    if c.sliding_window is not None:
        if c.biases:
            raise CheckpointError(
                f"{checkpoint.path}: has both biases and a sliding window, which no config.json can say; choose gguf"
            )
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": c.sliding_window}
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
    if scaling.kind in ("linear", "dynamic"):
        return {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.truncate,
        }
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
