"""Models that are on this machine, by the names that commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Name = Annotated[str, typer.Argument(help="smollm2-135m-instruct, a path, org/name, org/name:Q4_K_M, each @revision.")]


def local_path(name: str) -> Path:
    """The model's file or folder. Raises HubError when it would have to be fetched."""
    from llama2 import hub
    from llama2.errors import HubError

    path = hub.find(name)
    if path is None:
        raise HubError(f"{name}: not here; `llama2 pull {name}` fetches it")
    return path


def local_adapters(words: list[str] | None) -> list[tuple[Path, float]]:
    """Paths and scales of the adapters of `--adapter`. Raises HubError for one that is not here."""
    from llama2 import api

    return api.located(words or (), local_path)
