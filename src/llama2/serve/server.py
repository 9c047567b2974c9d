"""The process around the application: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time
from types import FrameType

import uvicorn

from llama2.serve.app import application
from llama2.serve.models import Models, tell
from llama2.serve.protocol import protocol

#: Connections that may be open at once.
_CONNECTIONS = 4096


def serve(models: Models, listener: socket.socket) -> int:
    """Answer requests until a signal ends it, and return the exit status.

    Raises Llama2Error when the first model cannot be loaded.
    """
    settings = models.settings
    config = uvicorn.Config(
        application(models),
        http=protocol(settings.timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, models)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.address = f"http://{host}:{listener.getsockname()[1]}/"
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))
    if server.failure is not None:
        raise server.failure
    return server.status


class _Server(uvicorn.Server):
    """Loads the first model once it listens. A signal lets answers finish, a second one ends them."""

    address = ""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self._models = models
        self._loading: asyncio.Task[None] | None = None
        self._deadline: float | None = None  # when what still runs is cancelled
        self.failure: Exception | None = None
        self.status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._deadline is None:
            self._models.draining = True
            self._deadline = time.monotonic() + self._models.settings.drain
        else:
            self.should_exit = self.force_exit = True
            self.status = 128 + int(sig)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
        if self._deadline is not None:
            late = time.monotonic() > self._deadline
            for stream in self._models.streams if late else ():
                stream.close()
            self.should_exit |= late or not self.server_state.tasks
        return await super().on_tick(counter)

    async def _load(self) -> None:
        name = next(iter(self._models.entries))
        try:
            service = await self._models.service(name)
        except Exception as error:
            self.failure, self.should_exit = error, True
            return
        gc.freeze()  # or looking through all that was imported and loaded stops every answer for 50 ms, now and then
        self._models.ready = True
        names = ", ".join(self._models.entries)
        print(f"llama2: serving {names} at {self.address}", file=sys.stderr, flush=True)
        tell(service)
