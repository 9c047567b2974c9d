"""The models of a server by name: loaded on first use, and unloaded after `keep_alive` seconds without use."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llama2.api import Model
from llama2.checkpoint import Checkpoint
from llama2.engine.request import EngineStats
from llama2.engine.runner import BLOCK
from llama2.safety import policy
from llama2.safety.moderation import Moderator
from llama2.serve.errors import Refusal
from llama2.serve.metrics import Metrics
from llama2.serve.service import Service, Stream, measure
from llama2.serve.settings import ServeSettings

log = logging.getLogger("llama2.serve")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How one model is loaded."""

    load: Callable[[], Model]
    open: Callable[[], Checkpoint | None]  # its files alone; None if they are not downloaded yet


@dataclass
class Entry:
    """One model that is served. Seconds are `time.perf_counter`'s."""

    name: str  # for clients
    source: ModelSource
    service: Service | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of loading and unloading
    keep_alive: float = math.inf  # seconds that it stays loaded after its last use
    used: float = 0.0  # when its last user ended
    users: set[asyncio.Task[Any]] = field(default_factory=set)  # running tasks that use it

    @property
    def idle(self) -> float:
        """Seconds since its last use; 0 of a model in use."""
        return 0.0 if self.users else time.perf_counter() - self.used


class Models:
    """The models of `-m`, the first of them the default."""

    def __init__(
        self, sources: Mapping[str, ModelSource], settings: ServeSettings, moderator: Moderator | None = None
    ) -> None:
        self.settings = settings
        self.moderator = moderator  # of all prompts and answers
        self.metrics = Metrics()
        self.entries = {name: Entry(name, source) for name, source in sources.items()}
        self._default_moderator: Moderator | None = None
        self.ready = False  # whether the first model is loaded
        self.draining = False  # whether the server is stopping
        self._normalised = {_normalised(name): entry for name, entry in reversed(self.entries.items())}
        self._user_ended = asyncio.Event()

    def entry(self, name: str) -> Entry:
        """The model of a name. Raises Refusal 404. As with Ollama, `:latest`, `library/` and case are ignored."""
        entry = self.entries.get(name) or self._normalised.get(_normalised(name))
        if entry is None:
            known = ", ".join(self.entries)
            raise Refusal(
                404,
                f"model {name[:100]!r} not found; the models are {known}",
                param="model",
                code="model_not_found",
            )
        return entry

    async def service(self, name: str, keep_alive: float | None = None) -> Service:
        """The service of a model, which is loaded if it is not yet. Raises Refusal, or the error of loading.

        The model stays loaded while the caller's task runs (each HTTP request has its own), and `keep_alive` seconds
        longer. None: as long as the last caller set, or else the operator.
        """
        entry = self.entry(name)
        if self.draining:
            raise Refusal(503, "the server is stopping", type="unavailable_error", headers={"Retry-After": "5"})
        async with entry.lock:
            if entry.service is None:
                model = await asyncio.to_thread(entry.source.load)
                prefill = await asyncio.to_thread(measure, model)
                entry.service = Service(entry.name, model, self.settings, self.metrics, prefill)
                entry.keep_alive = math.inf if self.settings.keep_alive is None else self.settings.keep_alive
                if self.ready:  # the server logs the first one itself, after its address
                    log_loaded(entry.service)
            if keep_alive is not None:
                entry.keep_alive = keep_alive
            self._hold(entry)
            return entry.service

    def _hold(self, entry: Entry) -> None:
        """Count the current task among a model's users until it ends."""
        task = asyncio.current_task()
        if task is None or task in entry.users:
            return
        entry.users.add(task)

        def end(task: asyncio.Task[Any]) -> None:
            entry.users.discard(task)
            entry.used = time.perf_counter()
            self._user_ended.set()

        task.add_done_callback(end)

    def default_moderator(self) -> Moderator:
        """What judges where the operator has no policy."""
        if self._default_moderator is None:
            self._default_moderator = Moderator(policy.default())
        return self._default_moderator

    @property
    def loads(self) -> dict[str, EngineStats | None]:
        """The load of each engine, by model; None for a model that is not loaded."""
        return {
            name: entry.service.model.engine.stats if entry.service else None for name, entry in self.entries.items()
        }

    @property
    def streams(self) -> list[Stream]:
        """The open streams of all models."""
        return [stream for entry in self.entries.values() if entry.service for stream in entry.service.streams]

    async def unload(self, name: str) -> None:
        """Unload a model now, or once it is not in use. Raises Refusal 404."""
        entry = self.entry(name)
        async with entry.lock:
            entry.keep_alive = 0.0
            await _expire(entry)

    async def sweep(self) -> None:
        """Unload each model at the end of its `keep_alive`; runs until it is cancelled."""
        while True:
            self._user_ended.clear()
            loaded = [entry for entry in self.entries.values() if entry.service]
            for entry in loaded:
                if not entry.lock.locked():  # else a task is loading it, and ends later
                    async with entry.lock:
                        await _expire(entry)
            left = [entry.keep_alive - entry.idle for entry in loaded if entry.service and not entry.users]
            seconds = min(left, default=math.inf)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._user_ended.wait(), None if math.isinf(seconds) else max(0.0, seconds))

    def close(self) -> None:
        """Stop every engine and release the models."""
        for entry in self.entries.values():
            if entry.service is not None:
                _end(entry.service)
                entry.service = None


def log_loaded(service: Service) -> None:
    """Log a loaded model's context and cache."""
    engine = service.model.engine
    tokens = engine.stats.blocks * BLOCK
    facts: dict[str, object] = {"model": service.name, "context": engine.context, "cache_tokens": tokens}
    facts["cache_gb"] = round(service.model.config.cache_bytes(tokens) / 1e9, 3)
    if adapters := service.model.checkpoint.adapters:
        facts["adapters"] = ", ".join(f"{adapter.name}:{adapter.scale:g}" for adapter in adapters)
    log.info("loaded", extra={"facts": facts})
    if note := service.model.checkpoint.assumes_format:
        log.warning(note)


def _normalised(name: str) -> str:
    """A model's name without the optional parts of Ollama's names."""
    name = name.casefold().removesuffix(":latest")
    return name.removeprefix("registry.ollama.ai/").removeprefix("library/")


async def _expire(entry: Entry) -> None:
    """Unload a model if its `keep_alive` is over; its lock is held."""
    service = entry.service
    if service is not None and not entry.users and entry.idle >= entry.keep_alive:
        entry.service = None
        await asyncio.to_thread(_end, service)
        log.info("unloaded", extra={"facts": {"model": entry.name}})


def _end(service: Service) -> None:
    service.stop()
    service.model.close()
