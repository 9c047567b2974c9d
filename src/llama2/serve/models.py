"""The models of a server by name: loaded on first use, let go when nobody asked for long enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama2.api import Model
from llama2.serve.errors import Refusal
from llama2.serve.service import Service


@dataclass
class Entry:
    """One model that may be asked for."""

    name: str  # what clients call it
    load: Callable[[], Model]
    service: Service | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Models:
    """What `-m` named, the first of them the default."""

    def __init__(self, loaders: Mapping[str, Callable[[], Model]]) -> None:
        self.entries = {name: Entry(name, load) for name, load in loaders.items()}

    def entry(self, name: str) -> Entry:
        """The model that a client calls so, with or without Ollama's tag `:latest`. Raises Refusal 404."""
        entry = self.entries.get(name) or self.entries.get(name.removesuffix(":latest"))
        if entry is None:
            known = ", ".join(self.entries)
            raise Refusal(
                404,
                f"model: {name[:100]!r} is not served here; there is {known}",
                param="model",
                code="model_not_found",
            )
        return entry

    async def service(self, name: str) -> Service:
        """The running service of a model, which is loaded if need be. Raises Refusal."""
        entry = self.entry(name)
        async with entry.lock:
            if entry.service is None:
                entry.service = Service(await asyncio.to_thread(entry.load))
            return entry.service

    def close(self) -> None:
        """Stop every engine and let go of the models."""
        for entry in self.entries.values():
            if entry.service is not None:
                entry.service.stop()
                entry.service.model.close()
                entry.service = None


def public_name(name: str) -> str:
    """What clients call a model: a registered name or repository as it is, a file or folder by its own name."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    return path.stem if path.is_file() else path.absolute().name
