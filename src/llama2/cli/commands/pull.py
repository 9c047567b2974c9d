"""`llama2 pull`: fetch a model."""

from __future__ import annotations

import json

from llama2.cli.local_models import Name
from llama2.cli.options import Json
from llama2.console import data

EXAMPLE = "Example: llama2 pull TheBloke/Llama-2-7B-Chat-GGUF:Q4_K_M"


def command(name: Name, as_json: Json = False) -> None:
    """Fetch a model, or bring it up to date, and verify it. An interrupted download continues where it stopped."""
    from llama2 import hub

    path = str(hub.pull(name))
    data(json.dumps({"name": name, "path": path}) if as_json else path)
