"""`llama2 pull`, `list`, `show`, `rm`: the models of this machine."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2.cli.output import one_line

app = typer.Typer(rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="smollm2-135m-instruct, a path, org/name, org/name:Q4_K_M, each @revision.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(epilog="Example: llama2 pull TheBloke/Llama-2-7B-Chat-GGUF:Q4_K_M")
def pull(name: Name, as_json: Json = False) -> None:
    """Fetch a model, or bring it up to date, and verify it. An interrupted download goes on where it stopped."""
    from llama2 import hub

    path = str(hub.pull(name))
    print(json.dumps({"name": name, "path": path}) if as_json else path)


@app.command("list", epilog="Example: llama2 list --json")
def list_(as_json: Json = False) -> None:
    """List the models that are here: fetched ones, and those in the Hugging Face cache."""
    from llama2 import hub

    models = list(hub.local())
    if as_json:
        rows = [asdict(m) | {"path": str(m.path), "modified": _time(m.modified)} for m in models]
        print(json.dumps({"models": rows}))
    elif not models:
        print(f"No models yet; `llama2 pull {hub.DEFAULT}` fetches one.")
    else:
        width = max(len(m.name) for m in models)
        print(f"{'NAME':{width}}  {'SIZE':>9}  {'FORMAT':11}  MODIFIED")
        for m in models:
            print(f"{m.name:{width}}  {size(m.size):>9}  {m.format:11}  {_time(m.modified)}")


@app.command(epilog="Example: llama2 show smollm2-135m-instruct")
def show(
    name: Name,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="tokenizer.model or tokenizer.bin, instead of its own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe a model that is here: its architecture, number formats, tokenizer, template and licence."""
    from llama2 import checkpoint

    with checkpoint.open(here(name), tokenizer=tokenizer) as model:
        facts = _describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    formats = ", ".join(f"{form} × {count}" for form, count in facts["formats"].items())
    vocabulary, heads = facts["tokenizer"], f"{facts['heads']} heads, {facts['kv_heads']} key/value heads"
    rows = {
        "name": facts["name"],
        "architecture": f"{facts['architecture']}, {facts['layers']} layers of width {facts['dim']}, {heads}",
        "parameters": f"{facts['parameters']:,}",
        "formats": formats,
        "context": f"{facts['context']:,} tokens",
        "tokenizer": " ".join(
            filter(None, [vocabulary["kind"], vocabulary["pre"], f"({vocabulary['vocabulary']:,} tokens)"])
        ),
        "template": "its own" if facts["template"] else "none",
        "licence": facts["licence"] or "not stated",
        "path": facts["path"],
        "size": f"{size(facts['size'])}, {facts['format']}",
    }
    for title, value in rows.items():
        print(f"{title:13} {one_line(value)}")


@app.command(epilog="Example: llama2 rm smollm2-135m-instruct --yes")
def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a model that was fetched, and its repacked weights. Files of your own are never touched."""
    from llama2 import hub

    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to be asked; --yes deletes without asking")
    if not yes and not typer.confirm(f"Delete {name}?", err=True):
        raise typer.Exit(1)
    freed = hub.remove(name)
    print(json.dumps({"name": name, "freed": freed}) if as_json else f"{name}: deleted, {size(freed)} freed")


def here(name: str) -> Path:
    """The model's file or folder. Raises HubError when it would have to be fetched."""
    from llama2 import hub
    from llama2.errors import HubError

    path = hub.find(name)
    if path is None:
        raise HubError(f"{name}: not here; `llama2 pull {name}` fetches it")
    return path


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
        "tokenizer": {"kind": tokenizer.kind, "pre": tokenizer.pre, "vocabulary": tokenizer.vocab_size},
        "template": model.template,
        "licence": model.licence,
        "format": model.format,
        "path": str(model.path),
        "size": sum(file.stat().st_size for file in files),
    }


def size(count: int) -> str:
    """Bytes in words."""
    from rich.filesize import decimal

    return decimal(count)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")
