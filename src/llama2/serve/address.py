"""Where a server listens, which is known before anything heavy is imported or loaded."""

from __future__ import annotations

import ipaddress
import socket
import sys

from llama2.errors import Llama2Error
from llama2.serve.settings import Settings


def listen(settings: Settings) -> socket.socket:
    """A socket at the operator's address. Raises Llama2Error for one that cannot be used, or may not without a key."""
    check_address(settings)
    host, port = settings.host, settings.port
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # where it would let two programs take one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Llama2Error(f"{host}:{port}: {error.strerror or error}; choose another --host or --port") from error
    return listener


def check_address(settings: Settings) -> None:
    """Raises Llama2Error when others could reach the server, and no key is demanded of them."""
    host = settings.host
    local = host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    if not local and not settings.keys:
        raise Llama2Error(
            f"--host {host}: others can reach this address, so a key is needed: --api-key-file FILE, or LLAMA2_API_KEY"
        )


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
