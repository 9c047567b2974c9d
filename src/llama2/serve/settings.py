"""The operator's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama2.engine.watermark import Watermark


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a server admits, guards and ends requests. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()  # the API keys of clients; none: no key is needed
    allow_origins: tuple[str, ...] = ()  # of pages that may use this server; "*" for labels or a port; "*" alone: all
    allow_hosts: tuple[str, ...] = ()  # names of this server, besides localhost and addresses; "*": all
    max_queue: int = 256  # requests that wait for their first token
    max_wait: float = 60.0  # until the first token
    max_body: int = 4 << 20
    max_values: int = 250_000  # JSON values of a body
    max_connections: int = 4096  # at once; the longest idle one is closed for a new one
    timeout: float = 60.0  # for a request to arrive, and for a client that does not read
    idle_timeout: float = 75.0  # between two requests of a connection
    drain: float = 30.0  # for running answers, once the server is to stop
    keep_alive: float | None = None  # an unused model is unloaded after; None: never
    sampling: Mapping[str, Any] = field(default_factory=dict)  # how tokens are sampled by default
    lookup: int = 0  # draft tokens by default
    neutralise: bool = False  # break role markers in messages instead of refusing them
    turns: Literal["join", "strict"] = "join"  # messages in an order that the chat format cannot write
    watermarks: Mapping[str, Watermark] = field(default_factory=dict)  # what marks answers, by model
    watermark_on_request: bool = False  # whether only those answers are marked whose request asks for it
    tools: Literal["generic", "ignore", "refuse"] = "generic"  # tools with a template that has none


def public_name(name: str) -> str:
    """A model's name for clients: a registered name or repository as it is, a file or folder by its own name."""
    path = Path(os.path.expanduser(name))
    if not path.exists():
        return name
    return path.stem if path.is_file() else path.absolute().name
