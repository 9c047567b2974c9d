"""LoRA adapters, merged into their base when it is opened: W' = W + alpha / r * B A (Hu et al. 2021, 4.1).

A folder as peft saves it holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), a file as llama.cpp
converts it is GGUF of `general.type` adapter. Whatever of an adapter changes numbers is merged, or refused by name.
Nothing of a matrix is computed before it is touched.

R rows  C columns  r rank  V vocabulary  D width
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2 import files, records
from llama2.checkpoint import gguf, hf_folder, pth, quantization, safetensors
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.lora import FINGERPRINT, Adapter, Update, fingerprint
from llama2.checkpoint.metadata import Metadata
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig
from llama2.errors import CheckpointError, RequestError
from llama2.files import damaged, quote
from llama2.formats import nbytes
from llama2.native import default_threads

if TYPE_CHECKING:
    from llama2.text.tokenizer import Tokenizer

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_CONFIG = 1 << 20  # bytes
_MAX_NUMBER = 1e9  # rank or alpha
_CHUNK = 1 << 20  # numbers that a thread merges at a time
_EMBEDDINGS, _HEAD = "tok_embeddings.weight", "output.weight"
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")

#: Names of what peft saves: a module, and the part of its adapter.
_PART = re.compile(
    r"(.+?)(?:\.base_layer)?\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?"
)
#: What may be in the name of a tensor that replaces the base's.
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
#: A key of rank_pattern or alpha_pattern that is a module's name or its end. Others are regular expressions.
_LITERAL = re.compile(r"\^?(?:\w|\\?\.)+\$?", re.ASCII)

#: Keys of adapter_config.json that change the arithmetic when they are set.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
#: Values of init_lora_weights that leave the base as it is. The others take from the base what they begin with.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")

#: What matrices of each base become. What was quantized becomes Q8_0, which loses far less than the base has lost.
_MERGED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_MERGED_QUANTIZED = "Q8_0"


def split(word: str | PathLike[str]) -> tuple[str, float]:
    """A name and the scale behind its last colon, as in `DIR:0.5`; 1 without one, and where the whole is a path.

    Raises RequestError for a scale that is infinite or no number.
    """
    word = fspath(word)
    name, colon, text = word.rpartition(":")
    if not (colon and name and re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+|nan|inf)(?:e[-+]?\d+)?", text, re.IGNORECASE)):
        return word, 1.0
    try:
        if Path(word).exists():
            return word, 1.0
    except (OSError, ValueError):
        return word, 1.0
    scale = float(text)
    if not math.isfinite(scale):
        raise RequestError(f"adapter {quote(word)}: the scale must be a finite number")
    return name, scale


def beside(path: Path) -> tuple[str, ...]:
    """What to say of an adapter that lies in a model's folder. Raises CheckpointError where it lies there alone.

    The folder does not say which of both is meant, so the adapter is merged only on request.
    """
    if path.name in (CONFIG, *_WEIGHTS) and path.with_name(CONFIG).is_file():
        raise refused(path.parent)
    if not (path / CONFIG).exists():
        return ()
    if not _has_model(path):
        raise refused(path)
    return (f"{path}: holds a LoRA adapter too, which is not merged; --adapter {path} merges it",)


def _has_model(folder: Path) -> bool:
    """Whether a folder has weights of a model."""
    model = re.compile(r"(?:model|pytorch_model|consolidated)[\w.-]*\.(?:safetensors|bin|pth|index\.json)", re.ASCII)
    return any(model.fullmatch(path.name) for path in folder.iterdir())


def refused(path: Path) -> CheckpointError:
    """The error for an adapter in the place of a model."""
    base = None
    if path.is_dir():
        base = _made_for(_settings(path))
    what = f"is an adapter{f' of {_shown(base)}' if base else ''}, not a model"
    if base and _can_be_named(base):
        return CheckpointError(f"{path}: {what}; give both: -m {base} --adapter {path}")
    return gguf.adapter_alone(path, what)


def _can_be_named(base: str) -> bool:
    """Whether `-m` would understand it."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base, re.ASCII):
        return True
    return len(base) <= 200 and base.isprintable() and " " not in base and Path(base).exists()


def _shown(text: str) -> str:
    """A name from a file as a message may show it, without quotation marks."""
    return quote(text)[1:-1]


def merge(base: Checkpoint, given: Sequence[tuple[Path, float]]) -> Checkpoint:
    """The base with adapters merged in, each with its factor, in this order.

    Merged matrices keep the base's number format if that is F32, F16 or BF16, and become Q8_0 where it is quantized.
    Where an adapter's folder has a tokenizer or a chat template, they count instead of the base's, as it was trained
    with them. Raises CheckpointError when an adapter is damaged, is of another base, or does what is not supported.
    """
    adapters = tuple(read(path, base, scale) for path, scale in given)
    config, tensors = base.config, dict(base.tensors)
    touched = {name for adapter in adapters for name in (*adapter.updates, *adapter.replacements)}
    if config.tied_embeddings and touched & {_EMBEDDINGS, _HEAD}:
        config = replace(config, tied_embeddings=False)
        tensors[_HEAD] = replace(tensors[_EMBEDDINGS], name=_HEAD)
    origin: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, tensor in adapter.replacements.items():
            if name in origin:
                raise CheckpointError(f"{adapter.path}: replaces {name}, as {origin[name].path} does; give one of them")
            origin[name] = adapter
            _check_shape(adapter, tensor.name, tensor.shape, tensors[name], base, grows=name in (_EMBEDDINGS, _HEAD))
            heads = hf_folder.heads_of(name, config) if adapter.halves else None
            tensors[name] = replace(hf_folder.in_pairs(tensor, heads) if heads else tensor, name=name)
    if (rows := tensors[_EMBEDDINGS].shape[0]) != config.vocab_size:
        config = replace(config, vocab_size=rows)
    if not config.tied_embeddings and tensors[_HEAD].shape[0] != rows:
        other = origin.get(_EMBEDDINGS) or origin[_HEAD]
        raise CheckpointError(
            f"{other.path}: leaves {rows} rows of embeddings and {tensors[_HEAD].shape[0]} of the output head; "
            "save it again with both (peft: save_embedding_layers=True)"
        )
    for name in touched:
        if found := [(adapter, adapter.updates[name]) for adapter in adapters if name in adapter.updates]:
            tensors[name] = _updated(tensors[name], found, base, config)
    merged = replace(
        base,
        config=config,
        tensors={name: tensors[name] for name in (*config.tensor_shapes(), *tensors) if name in tensors},
        name=" + ".join([base.name, *(adapter.name for adapter in adapters)]),
        base=base,
        adapters=adapters,
        notes=(*base.notes, *(note for adapter in adapters if (note := of_another_base(adapter, base)))),
    )
    for adapter in adapters:
        _take_texts(merged, adapter, base)
    if config.vocab_size != base.config.vocab_size and merged.tokenizer_source is base.tokenizer_source:
        raise CheckpointError(
            f"{(origin.get(_EMBEDDINGS) or origin[_HEAD]).path}: has embeddings of {config.vocab_size} tokens and no "
            f"tokenizer, and the base has {base.config.vocab_size} tokens; put its tokenizer files there"
        )
    return merged


def _updated(tensor: Tensor, found: Sequence[tuple[Adapter, Update]], base: Checkpoint, config: ModelConfig) -> Tensor:
    """A matrix with what adapters add to it, which is computed when it is touched."""
    for adapter, update in found:
        _check_shape(adapter, update.module, (update.left.shape[0], update.right.shape[1]), tensor, base)
    format = _MERGED.get(tensor.format, _MERGED_QUANTIZED)
    heads = hf_folder.heads_of(tensor.name, config)
    ordered = [in_pairs(update, heads, adapter.halves) for adapter, update in found]
    read = (tensor, *(part for update in ordered for part in (update.left, update.right)))
    mapped = tuple({file for each in read for file in each.mapped})
    return replace(tensor, format=format, source=partial(_merged, tensor, ordered, format), mapped=mapped)


def _check_shape(
    adapter: Adapter, module: str, shape: tuple[int, ...], tensor: Tensor, base: Checkpoint, *, grows: bool = False
) -> None:
    """Raise CheckpointError unless `shape` is the tensor's; with `grows`, the number of rows may differ."""
    if shape == tensor.shape or (grows and shape[1:] == tensor.shape[1:]):
        return
    raise CheckpointError(
        f"{adapter.path}: changes {quote(module)} of shape {shape}, and {base.path} has {tensor.shape}; "
        f"give the base that it was trained on{f', {_shown(adapter.base)}' if adapter.base else ''}"
    )


def in_pairs(update: Update, heads: int | None, halves: bool) -> Update:
    """The update with rows in Meta's order."""
    if heads is None or not halves:
        return update
    magnitude = update.magnitude and hf_folder.in_pairs(update.magnitude, heads)
    return replace(update, left=hf_folder.in_pairs(update.left, heads), magnitude=magnitude)


def _merged(base: Tensor, updates: Sequence[Update], format: str) -> Bytes:
    """The bytes of a matrix with its updates added, in `format`. The arithmetic is float32."""
    from concurrent.futures import ThreadPoolExecutor

    rows, columns = base.shape
    factors = [_factors(update) for update in updates]
    table, out = base.data.reshape(rows, -1), np.empty((rows, nbytes(format, (1, columns))), np.uint8)
    step = max(1, _CHUNK // columns)

    def merge_rows(start: int) -> None:
        part = slice(start, start + step)
        x = quantization.dequantize(table[part].reshape(-1), base.format, (len(table[part]), columns))
        for left, right, magnitude in factors:
            x += left[part] @ right
            if magnitude is not None:
                x *= (magnitude[part] / np.linalg.norm(x, axis=1))[:, None]
        data = x.view(np.uint8)
        if format != "F32":
            data, _ = quantization.requantize(data.reshape(-1), "F32", x.shape, format, threads=1)
        out[part] = data.reshape(len(x), -1)

    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(merge_rows, range(0, rows, step)))
    return out.reshape(-1)


def _factors(update: Update) -> tuple[Floats, Floats, Floats | None]:
    right = update.right.dequantize() * np.float32(update.scale)
    return update.left.dequantize(), right, None if update.magnitude is None else update.magnitude.dequantize()


def _take_texts(merged: Checkpoint, adapter: Adapter, base: Checkpoint) -> None:
    """Let the tokenizer and the chat templates of an adapter's folder count, where it has them."""
    folder = adapter.path
    if not folder.is_dir():
        return
    if templates := hf_folder.chat_templates(folder, hf_folder.read_object(folder, "tokenizer_config.json")):
        merged.template, merged.templates = templates.get("default"), templates
    if any(files.inside(folder, name).exists() for name in _TOKENIZERS):
        merged.tokenizer_source = partial(_tokenizer, folder, merged.config.vocab_size, base)


def _tokenizer(folder: Path, size: int, base: Checkpoint) -> Tokenizer:
    """The tokenizer in an adapter's folder; what ends the base's answers ends these too.

    One that has a token of padding alone beyond the `size` rows of embeddings gives its ends, and the base's does the
    rest. Raises TokenizerError, or CheckpointError for other tokens beyond them.
    """
    from llama2.text import tokenizer_folder

    own = base.tokenizer
    tokenizer = tokenizer_folder.read(folder, bos_id=own.bos_id, eos_id=own.eos_id)
    if tokenizer.vocab_size <= size:
        if tokenizer.vocab_size < size:
            tokenizer = tokenizer_folder.read(folder, size=size, bos_id=own.bos_id, eos_id=own.eos_id)
        tokenizer.stop_ids |= own.stop_ids
        return tokenizer
    pad = hf_folder.read_object(folder, "tokenizer_config.json").get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    named = {token: text for text, token in tokenizer.control.items()}
    for token in range(size, tokenizer.vocab_size):
        text = named.get(token) or tokenizer.token_bytes(token).decode(errors="replace")
        if text != pad:
            raise CheckpointError(
                f"{folder}: its tokenizer has token {quote(text)} beyond the {size} that have embeddings; save the "
                "adapter with those (peft: save_embedding_layers=True), or give the base's with --tokenizer"
            )
    own.stop_ids |= {token for token in tokenizer.stop_ids if token < size}
    own.notes += (f"the tokenizer of {folder.name} has padding without embeddings, so the base's is used",)
    return own


def of_another_base(adapter: Adapter, base: Checkpoint) -> str | None:
    """What to say of an adapter that was trained on other weights than the base's, as far as its file knows."""
    if adapter.fingerprint in (None, fingerprint(base.tensors)):
        return None
    named = f", {_shown(adapter.base)}" if adapter.base else ""
    return f"{adapter.path}: was trained on another model than {base.path}; give its own base{named}"


def read(path: Path, base: Checkpoint, scale: float = 1.0) -> Adapter:
    """The adapter in a folder or file, or the last one of a run, for a base. Raises CheckpointError as `merge` does."""
    path = records.newest(path, records.ADAPTER)
    if path.is_dir():
        if not (path / CONFIG).exists():
            kind = (
                "a model, not an adapter; give it with -m"
                if _has_model(path)
                else f"not an adapter: it has no {CONFIG}"
            )
            raise CheckpointError(f"{path}: is {kind}")
        return _peft(path, scale, base)
    if path.name in (*_WEIGHTS, CONFIG):
        raise CheckpointError(f"{path}: is a file of an adapter; give its folder, {path.parent}")
    if gguf.matches(path):
        return _llamacpp(path, scale, base)
    raise CheckpointError(
        f"{path}: is not an adapter; give a folder with {CONFIG}, or a GGUF file of llama.cpp's converter"
    )


def _settings(folder: Path) -> dict[str, Any]:
    return files.load_json(files.inside(folder, CONFIG), limit=_MAX_CONFIG)


def _made_for(settings: Mapping[str, Any]) -> str | None:
    """What the adapter was trained on, as it says. It may say anything, since nothing depends on it."""
    name = settings.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (path := files.inside(folder, name)).exists():
            return path
    raise CheckpointError(f"{folder}: has {CONFIG} and neither {' nor '.join(_WEIGHTS)}; fetch the whole folder again")


def _unsupported(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what} is not supported; merge it with peft (merge_and_unload), and open the result"
    )


def _peft(folder: Path, scale: float, base: Checkpoint) -> Adapter:
    """An adapter as peft saves it."""
    settings = Metadata(folder / CONFIG, _settings(folder))
    scaling = _scaling(settings)
    made_for = _made_for(settings.values)
    weights = _weights(folder)
    files.open_file(weights).close()  # or it is a pointer of Git LFS
    held = safetensors.read(weights) if weights.suffix == ".safetensors" else pth.read(weights)

    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in held.items():
        plain = name.removeprefix("base_model.model.")
        match = _PART.fullmatch(plain)
        place = parts.setdefault(match[1], {}) if match else whole
        key = match[2] if match else _WRAPPER.sub("", plain)
        if key in place:
            raise damaged(weights, f"has tensor {quote(name)} twice, under two names")
        place[key] = tensor

    known = {
        theirs: ours for ours, theirs in hf_folder.tensor_names(replace(base.config, tied_embeddings=False)).items()
    }

    def target(name: str) -> str:
        found = known.get(name) or known.get(f"model.{name}")
        if found is None:
            trained = f"; it was trained on {_shown(made_for)}" if made_for else ""
            raise CheckpointError(
                f"{weights}: changes {quote(name)}, which {base.path} (Llama, {base.config.n_layers} layers) does not "
                f"have{trained}"
            )
        return found

    updates = {
        target(f"{module}.weight"): _update(weights, module, found, scaling, scale) for module, found in parts.items()
    }
    replacements = {target(name): tensor for name, tensor in whole.items()}
    if not updates and not replacements:
        raise damaged(weights, "has no tensors")
    tied = base.config.tied_embeddings and {_EMBEDDINGS, _HEAD} & {*updates, *replacements}
    if tied and settings.values.get("ensure_weight_tying"):
        raise _unsupported(settings.path, "ensure_weight_tying=true")
    _check_layers(settings, weights, updates, base)
    notes = safetensors.notes(weights) if weights.suffix == ".safetensors" else {}
    return Adapter(
        *(folder, (folder / CONFIG, weights), scale, made_for, True, updates, replacements),
        fingerprint=notes.get(FINGERPRINT),
    )


def _scaling(settings: Metadata) -> Callable[[str], tuple[int, float]]:
    """Rank and scale of each module, by its name. Raises CheckpointError for a setting that is not supported."""
    path, values = settings.path, settings.values
    kind = settings.find("peft_type", str)
    if kind is None:
        raise CheckpointError(f"{path}: lacks peft_type, so it is not peft's; convert the adapter to peft's format")
    if kind != "LORA":
        raise _unsupported(path, f"peft_type={_shown(kind)}")
    for key in _UNSUPPORTED:
        if values.get(key):
            raise _unsupported(path, key)
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*_PLAIN_STARTS, "true", "false"):
        raise CheckpointError(
            f"{path}: init_lora_weights={quote(start)} changed the base before training; save the adapter again with "
            "peft's path_initial_model_for_weight_conversion"
        )
    rank, alpha = (_number(settings, key, values.get(key)) for key in ("r", "lora_alpha"))
    ranks, alphas = _pattern(settings, "rank_pattern"), _pattern(settings, "alpha_pattern")
    rooted = settings.find("use_rslora", bool)

    def scaling(module: str) -> tuple[int, float]:
        r, a = int(_by_pattern(ranks, module, rank)), _by_pattern(alphas, module, alpha)
        if r < 1:
            raise CheckpointError(f"{path}: r={r} of {quote(module)} gives no scale; save the adapter again")
        return r, a / (math.sqrt(r) if rooted else r)

    return scaling


def _pattern(settings: Metadata, key: str) -> dict[str, float]:
    found = settings.find(key, dict) or {}
    for pattern, value in found.items():
        _number(settings, f"{key} of {quote(pattern)}", value)
        if not _LITERAL.fullmatch(pattern):
            raise _unsupported(settings.path, f"the regular expression {quote(pattern)} in {key}")
    return found


def _number(settings: Metadata, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _MAX_NUMBER:
        raise CheckpointError(f"{settings.path}: {key} is missing, or no number of an adapter; save the adapter again")
    return value  # type: ignore[no-any-return]


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the module's name or its end."""
    for key, value in pattern.items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _update(
    path: Path, module: str, parts: Mapping[str, Tensor], scaling: Callable[[str], tuple[int, float]], factor: float
) -> Update:
    rank, scale = scaling(module)
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    a, b = (parts.get(name) for name in names)
    if a is None or b is None:
        raise damaged(path, f"lacks lora_{names[0] if a is None else names[1]} of {quote(module)}")
    if len(a.shape) != 2 or len(b.shape) != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{path}: lora_A and lora_B of {quote(module)} have shapes {a.shape} and {b.shape}, and {CONFIG} says rank "
            f"{rank}; save the adapter again"
        )
    magnitude = parts.get("magnitude_vector")
    if extra := sorted(parts.keys() - {*names, "magnitude_vector"}):
        raise damaged(path, f"has lora_{extra[0]} of {quote(module)} beside lora_{names[0]}")
    if embedding and magnitude is not None:
        raise _unsupported(path, "DoRA of embeddings")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise damaged(path, f"lora_magnitude_vector of {quote(module)} has shape {magnitude.shape}, not {b.shape[:1]}")
    left, right = (_transposed(a), _transposed(b)) if embedding else (b, a)  # (V, r) and (r, D), or (R, r) and (r, C)
    return Update(module, left, right, factor * scale, magnitude)


def _transposed(tensor: Tensor) -> Tensor:
    """The tensor in F32 with rows and columns exchanged."""

    def source() -> Bytes:
        return np.ascontiguousarray(tensor.dequantize().T).view(np.uint8).reshape(-1)

    return replace(tensor, format="F32", shape=tensor.shape[::-1], source=source)


def _check_layers(settings: Metadata, weights: Path, updates: Mapping[str, Update], base: Checkpoint) -> None:
    """Raise CheckpointError when layers of the base are left out, and no setting says so: it is another base's."""
    values, targets = settings.values, settings.values.get("target_modules")
    chosen = any(values.get(key) is not None for key in ("layers_to_transform", "layers_pattern"))
    if chosen or values.get("exclude_modules") or not isinstance(targets, list):
        return
    if any(not isinstance(name, str) or re.search(r"\d", name) for name in targets):
        return
    layers = {int(match[1]) for name in updates if (match := re.match(r"layers\.(\d+)\.", name))}
    if layers and len(layers) < base.config.n_layers:
        made_for = _made_for(values)
        raise CheckpointError(
            f"{weights}: changes {len(layers)} layers, and {base.path} has {base.config.n_layers}; "
            f"give the base that it was trained on{f', {_shown(made_for)}' if made_for else ''}"
        )


def _llamacpp(path: Path, scale: float, base: Checkpoint) -> Adapter:
    """An adapter as llama.cpp's convert_lora_to_gguf.py writes it; rows of wq and wk are in Meta's order."""
    metadata = Metadata(path, gguf.header(path))
    if metadata.find("general.type", str) != "adapter":
        raise CheckpointError(f"{path}: is a model, not an adapter; give it with -m")
    architecture, kind = metadata.need("general.architecture", str), metadata.need("adapter.type", str)
    if (architecture, kind) != ("llama", "lora"):
        raise CheckpointError(
            f"{path}: is a {_shown(kind)} adapter of {_shown(architecture)}, and only lora of llama is supported"
        )
    if "adapter.alora.invocation_tokens" in metadata.values:
        raise _unsupported(path, "adapter.alora.invocation_tokens")
    alpha = metadata.need("adapter.lora.alpha", float)
    if not abs(alpha) <= _MAX_NUMBER:
        raise damaged(path, "adapter.lora.alpha is not a number")
    known = {theirs: ours for ours, theirs in gguf.names(replace(base.config, tied_embeddings=False)).items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in gguf.stored(path).items():
        module, _, part = name.rpartition(".lora_")
        if module not in known or part not in ("a", "b"):
            raise CheckpointError(f"{path}: has tensor {quote(name)}, which is not a part of an adapter of {base.path}")
        parts.setdefault(known[module], {})[part] = tensor
    return Adapter(path, (path,), scale, None, False, dict(_pairs(path, parts, alpha, scale)))


def _pairs(
    path: Path, parts: Mapping[str, Mapping[str, Tensor]], alpha: float, factor: float
) -> Iterator[tuple[str, Update]]:
    for name, found in parts.items():
        a, b = found.get("a"), found.get("b")
        if a is None or b is None:
            raise damaged(path, f"lacks lora_{'a' if a is None else 'b'} of {name}")
        rank = b.shape[-1]
        embedding = name == _EMBEDDINGS  # whose lora_a has a row for each token
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1 if embedding else 0] != rank:
            raise damaged(path, f"lora_a and lora_b of {name} have shapes {a.shape} and {b.shape}")
        left, right = (a, _transposed(b)) if embedding else (b, a)
        yield name, Update(name, left, right, factor * (alpha / rank if alpha else 1.0))
