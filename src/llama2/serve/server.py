"""The process around the application: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn

from llama2.errors import Llama2Error
from llama2.serve.app import application
from llama2.serve.models import Models


def serve(models: Models, host: str, port: int) -> None:
    """Answer requests until a signal ends it. Raises OSError for an address that cannot be used, Llama2Error."""
    listener = listen(host, port)
    config = uvicorn.Config(
        application(models), http="httptools", log_config=None, access_log=False, server_header=False, lifespan="on"
    )
    server = Server(config)
    at = listener.getsockname()
    print(f"llama2: serving {', '.join(models.entries)} at http://{host}:{at[1]}/", file=sys.stderr, flush=True)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Llama2Error(f"{host}:{port}: {error.strerror or error}; choose another address or --port") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, with an exit status of 0 after a signal."""

    def handle_exit(self, sig: int, frame: object) -> None:
        """The first signal asks for the end, the second one demands it."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
