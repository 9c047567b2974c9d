"""What an operator chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a server admits, guards and ends requests. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()  # what clients may prove themselves with; none: nobody has to
    allow_origins: tuple[str, ...] = ()  # whose pages may use this server; "*" for labels or a port; "*" alone: all
    allow_hosts: tuple[str, ...] = ()  # names that this server is called by, besides localhost and addresses; "*": all
    max_queue: int = 256  # requests that wait for their first token
    max_wait: float = 60.0  # until the first token
    max_body: int = 4 << 20
    max_values: int = 250_000  # numbers, texts, lists and so on of a body, however small
    max_connections: int = 4096  # at once; the one that is idle longest goes for a new one
    timeout: float = 60.0  # for a whole request to come in, and for a reader who does not read
    idle_timeout: float = 75.0  # between two requests of a connection
    drain: float = 30.0  # for running answers, once the server is told to end
    keep_alive: float | None = None  # an unused model is unloaded after; None: never
    sampling: Mapping[str, Any] = field(default_factory=dict)  # how tokens are drawn for requests that do not say
    lookup: int = 0  # draft length of requests that do not say
    neutralise: bool = False  # break role markers in messages instead of refusing them
    turns: Literal["join", "strict"] = "join"  # what becomes of messages in an order that a chat format does not know
    tools: Literal["generic", "ignore", "refuse"] = "generic"  # what becomes of them where the template knows none


def public_name(name: str) -> str:
    """What clients call a model: a registered name or repository as it is, a file or folder by its own name."""
    path = Path(os.path.expanduser(name))
    if not path.exists():
        return name
    return path.stem if path.is_file() else path.absolute().name
