"""The address of a server and the allowed origins, checked before anything heavy is imported or loaded."""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Iterable

from llama2.errors import Llama2Error
from llama2.serve.settings import ServeSettings

#: An origin, in which `*` means labels of a name, or a port.
_LABEL = r"(?:\*|[a-z0-9_-]+)"
_ORIGIN = re.compile(
    rf"[a-z][a-z0-9+.-]*://(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?:\*|[0-9]{{1,5}}))?", re.ASCII | re.I
)


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the operator's address. Raises Llama2Error if it cannot be used, or needs a key."""
    check_address(settings)
    origin_pattern(settings.allow_origins)
    host, port = settings.host, settings.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there, two programs could then take one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Llama2Error(f"{host}:{port}: {error.strerror or error}; choose another --host or --port") from error
    return listener


def check_address(settings: ServeSettings) -> None:
    """Raises Llama2Error if other machines can reach the server and no key is required."""
    host = settings.host
    local = host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    if not local and not settings.keys:
        raise Llama2Error(
            f"--host {host}: other machines can reach this address; set a key by --api-key-file FILE or LLAMA2_API_KEY"
        )


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def origin_pattern(allowed: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches these origins. Raises Llama2Error for a text that is not an origin.

    `*` alone matches all. In an origin it matches labels of a name, or a port, but never the end of a name.
    """
    parts = []
    for origin in allowed:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise Llama2Error(
                f"--allow-origin {origin}: is not an origin; write one as https://page.example, "
                "https://*.page.example or chrome-extension://*"
            )
        name = re.escape(origin).replace(r":\*", ":[0-9]+").replace(r"\*", r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
        parts.append(".*" if origin == "*" else name)
    return re.compile("|".join(parts) or r"(?!)", re.ASCII | re.I | re.DOTALL)
