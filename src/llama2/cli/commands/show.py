"""`llama2 show`: what a model is."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from llama2.cli.local_models import FileOptions, Name, local_path
from llama2.cli.options import Json, Template
from llama2.cli.output import one_line, size
from llama2.console import data, say

EXAMPLE = "Example: llama2 show smollm2-135m-instruct"


def command(
    name: Name,
    *,
    files: FileOptions,
    template: Template = None,
    as_json: Json = False,
) -> None:
    """Describe a model that is here: its architecture, number formats, tokenizer, template and licence."""
    from llama2 import checkpoint

    with checkpoint.open(local_path(name), template=template, **files.arguments()) as model:
        info = _describe(model)
    if as_json:
        data(json.dumps(info))
        return
    formats = ", ".join(f"{form} × {count}" for form, count in info["formats"].items())
    heads = f"{info['heads']} heads, {info['kv_heads']} key/value heads"
    rows = {
        "name": info["name"],
        "architecture": f"{info['architecture']}, {info['layers']} layers of width {info['dim']}, {heads}",
        "parameters": f"{info['parameters']:,}",
        "formats": formats,
        "context": f"{info['context']:,} tokens",
        "tokenizer": _vocabulary(info["tokenizer"]),
        "template": _template(info["chat"], "by --template" if template else "its own"),
        "ends": _ends(info["chat"]),
        "licence": info["licence"] or "not stated",
        "path": info["path"],
        "size": f"{size(info['size'])}, {info['format']}",
    }
    if info["adapters"]:
        rows["adapters"] = "; ".join(map(_adapter, info["adapters"]))
    for title, value in [*rows.items(), *(("note", note) for note in info["notes"])]:
        say(f"{title:13} {one_line(value)}")


def _adapter(info: dict[str, Any]) -> str:
    """One adapter in words."""
    ranks = ", ".join(map(str, info["ranks"]))
    words = [f"{info['name']} × {info['scale']:g}: {info['matrices']} matrices of rank {ranks}"]
    if info["replaced"]:
        words.append(f"replaces {', '.join(info['replaced'])}")
    if info["base"]:
        words.append(f"made for {info['base']}")
    return ", ".join(words)


def _describe(model: Any) -> dict[str, Any]:
    config, tokenizer = model.config, model.tokenizer
    files = [model.path] if model.path.is_file() else [p for p in model.path.iterdir() if p.is_file()]
    formats = Counter(tensor.format for tensor in model.tensors.values())
    return {
        "name": model.name,
        "architecture": "llama",
        "parameters": config.parameters(),
        "layers": config.n_layers,
        "dim": config.dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "formats": dict(formats.most_common()),
        "context": config.context_length,
        "tokenizer": {
            "kind": tokenizer.kind,
            "pre": tokenizer.pre,
            "mode": tokenizer.mode,
            "vocabulary": tokenizer.vocab_size,
        },
        "template": model.template,
        "chat": _chat(model),
        "licence": model.licence,
        "format": model.format,
        "path": str(model.path),
        "adapters": [adapter.summary() for adapter in model.adapters],
        "notes": [*model.notes, *tokenizer.notes],
        "size": sum(file.stat().st_size for file in files),
    }


def _chat(model: Any) -> dict[str, Any]:
    """How the model is talked with: the format, and what ends an answer, tokens by their texts."""
    from llama2.text import template as templates

    tokenizer, template = model.tokenizer, model.template
    format = "llama2" if not model.templates and tokenizer.kind == "sentencepiece" else None
    ends: frozenset[int] = tokenizer.stop_ids
    stops: tuple[str, ...] = ()
    if template is not None:
        format, stops = templates.recognise(template, tokenizer), templates.stops(template)
        ends = templates.ends(template, tokenizer)
    names = {token: text for text, token in tokenizer.control.items()}
    return {
        "format": format,
        "assumed": model.assumes_format is not None,
        "templates": list(model.templates),
        "end_tokens": sorted(names.get(token, str(token)) for token in ends),
        "stops": list(stops),
    }


def _vocabulary(info: dict[str, Any]) -> str:
    """A tokenizer in words; where it puts spaces in front is a question of SentencePiece alone."""
    mode = f", mode {info['mode']}" if info["mode"] and info["kind"] == "sentencepiece" else ""
    return " ".join(filter(None, [info["kind"], info["pre"], f"({info['vocabulary']:,} tokens){mode}"]))


def _template(chat: dict[str, Any], origin: str) -> str:
    """Whose format a chat has, in words."""
    if not chat["templates"]:
        if chat["format"] is None:
            return "none; chat needs --template"
        reason = "--template NAME chooses another" if chat["assumed"] else "as the model's name says"
        return f"none; chat uses Llama 2's format, {reason}"
    form = f", {chat['format']}" if chat["format"] else ""
    names = [name for name in chat["templates"] if name != "default"]
    return f"{origin}{form}" + (f"; by name also {', '.join(names)}" if names else "")


def _ends(chat: dict[str, Any]) -> str:
    """What ends an answer, in words."""
    before = f"; before {', '.join(chat['stops'])}" if chat["stops"] else ""
    return ("at " + ", ".join(chat["end_tokens"]) if chat["end_tokens"] else "at no token") + before
