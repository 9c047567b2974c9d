"""What an operator chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server admits, guards and ends requests. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[str, ...] = ()  # what clients may prove themselves with; none: nobody has to
    allow_origins: tuple[str, ...] = ()  # other origins whose pages may use this server; "*": all
    allow_hosts: tuple[str, ...] = ()  # names that this server is called by, besides localhost and addresses; "*": all
    max_queue: int = 256  # requests that wait for their first token
    max_wait: float = 60.0  # until the first token
    max_body: int = 4 << 20
    timeout: float = 60.0  # for a whole request to come in, and for a reader who does not read
    drain: float = 30.0  # for running answers, once the server is told to end
    keep_alive: float | None = None  # an unused model is let go after; None: never
    lookup: int = 0  # draft length of requests that do not say
    neutralise: bool = False  # break role markers in messages instead of refusing them


def public_name(name: str) -> str:
    """What clients call a model: a registered name or repository as it is, a file or folder by its own name."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    return path.stem if path.is_file() else path.absolute().name
