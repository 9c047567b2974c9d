"""Models that are on this machine, by the names that commands take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2.cli.options import Adapter, Tokenizer, TokenizerMode

Name = Annotated[str, typer.Argument(help="smollm2-135m-instruct, a path, org/name, org/name:Q4_K_M, each @revision.")]


def local_path(name: str) -> Path:
    """The model's file or folder. Raises HubError when it would have to be fetched."""
    from llama2 import hub
    from llama2.errors import HubError

    path = hub.find(name)
    if path is None:
        raise HubError(f"{name}: not here; `llama2 pull {name}` fetches it")
    return path


@dataclass(frozen=True)
class FileOptions:
    """What goes with a model's files."""

    tokenizer: Tokenizer = None
    tokenizer_mode: TokenizerMode = "auto"
    adapter: Adapter = None

    def arguments(self) -> dict[str, Any]:
        """These options as `checkpoint.open` takes them. Raises HubError for an adapter that is not here."""
        from llama2 import api

        adapters = api.located(self.adapter or (), local_path)
        return {"tokenizer": self.tokenizer, "tokenizer_mode": self.tokenizer_mode, "adapters": adapters}
