"""`llama2 list`: the models of this machine."""

from __future__ import annotations

import json
from datetime import datetime

from llama2.cli.options import Json
from llama2.cli.output import one_line, size
from llama2.console import data, say

EXAMPLE = "Example: llama2 list --json"


def command(as_json: Json = False) -> None:
    """List the models that are here: fetched ones, and those in the Hugging Face cache."""
    from llama2 import hub

    models = list(hub.local())
    if as_json:
        rows = [m._asdict() | {"path": str(m.path), "modified": _time(m.modified)} for m in models]
        data(json.dumps({"models": rows}))
    elif not models:
        say(f"No models yet; `llama2 pull {hub.DEFAULT}` fetches one.")
    else:
        names = [one_line(m.name) for m in models]
        width = max(map(len, names))
        say(f"{'NAME':{width}}  {'SIZE':>9}  {'FORMAT':11}  MODIFIED")
        for name, m in zip(names, models, strict=True):
            say(f"{name:{width}}  {size(m.size):>9}  {m.format:11}  {_time(m.modified)}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")
