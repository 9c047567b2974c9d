"""The models of a server by name: loaded on first use, let go when nobody asked for long enough."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llama2.api import Model
from llama2.engine.runner import BLOCK
from llama2.serve.errors import Refusal
from llama2.serve.metrics import Metrics
from llama2.serve.service import Service, Stream, measure
from llama2.serve.settings import Settings

log = logging.getLogger("llama2.serve")


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

    def __init__(self, loaders: Mapping[str, Callable[[], Model]], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.entries = {name: Entry(name, load) for name, load in loaders.items()}
        self.ready = False  # whether the first one was loaded
        self.draining = False  # whether the server is about to end

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
        """The running service of a model, which is loaded if need be. Raises Refusal, or why it cannot be loaded."""
        entry = self.entry(name)
        if self.draining:
            raise Refusal(503, "the server is stopping", type="unavailable_error", headers={"Retry-After": "5"})
        async with entry.lock:
            if entry.service is None:
                model = await asyncio.to_thread(entry.load)
                prefill = await asyncio.to_thread(measure, model)
                entry.service = Service(entry.name, model, self.settings, self.metrics, prefill)
                if self.ready:  # of the first one the server tells itself, after its address
                    tell(entry.service)
            entry.service.used = time.perf_counter()
            return entry.service

    @property
    def streams(self) -> list[Stream]:
        """What has not ended, of all models."""
        return [stream for entry in self.entries.values() if entry.service for stream in entry.service.streams]

    async def let_go(self, seconds: float) -> None:
        """Unload every model that is unused for so long."""
        for entry in self.entries.values():
            async with entry.lock:
                service = entry.service
                if service and not service.streams and time.perf_counter() - service.used >= seconds:
                    entry.service = None
                    await asyncio.to_thread(_end, service)

    def close(self) -> None:
        """Stop every engine and let go of the models."""
        for entry in self.entries.values():
            if entry.service is not None:
                _end(entry.service)
                entry.service = None


def tell(service: Service) -> None:
    """Log what a model that was loaded has room for."""
    engine = service.model.engine
    tokens = engine.load.blocks * BLOCK
    facts = {"model": service.name, "context": engine.context, "cache_tokens": tokens}
    facts["cache_gb"] = round(service.model.config.cache_bytes(tokens) / 1e9, 3)
    log.info("loaded", extra={"facts": facts})


def _end(service: Service) -> None:
    service.stop()
    service.model.close()
