"""The process of the application: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
import sys
import time
from dataclasses import replace
from types import FrameType

import uvicorn

from llama2.console import say
from llama2.serve.http.app import application
from llama2.serve.http.protocol import protocol
from llama2.serve.models import Models, log_loaded

#: The most files that are open besides connections.
_OTHER_FILES = 256


def serve(models: Models, listener: socket.socket) -> int:
    """Answer requests until a signal, and return the exit status.

    Raises Llama2Error if the first model cannot be loaded.
    """
    settings = replace(models.settings, max_connections=_connections(models.settings.max_connections))
    config = uvicorn.Config(
        application(models),
        http=protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(settings.idle_timeout) + 1,  # so a request that comes in time is answered
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, models)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server.address = f"http://{host}:{listener.getsockname()[1]}/"
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # and not nohup's
        signal.signal(signal.SIGHUP, server.handle_exit)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))
    if server.failure is not None:
        raise server.failure
    return server.status


def _connections(wanted: int) -> int:
    """`wanted` connections, or as many as the system's limit of open files allows."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_FILES))


class _Server(uvicorn.Server):
    """Loads the first model once it listens. The first signal lets answers finish, the second ends them."""

    address = ""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self._models = models
        self._loading: asyncio.Task[None] | None = None
        self._deadline: float | None = None  # when running answers are cancelled
        self.failure: Exception | None = None
        self.status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._deadline is None:
            self._models.draining = True
            self._deadline = time.monotonic() + self._models.settings.drain
        else:
            self.should_exit = self.force_exit = True
            self.status = 128 + int(sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections. After a second signal, nothing is logged of the requests that end with them."""
        if self.force_exit:
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
            say(f"llama2: interrupted; {len(self._models.streams)} answers were cancelled", file=sys.stderr, flush=True)
        await super().shutdown(sockets)

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
        gc.freeze()  # else a collection stops every answer for 50 ms now and then
        self._models.ready = True
        names = ", ".join(self._models.entries)
        say(f"llama2: serving {names} at {self.address}", file=sys.stderr, flush=True)
        log_loaded(service)
