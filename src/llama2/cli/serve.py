"""`llama2 serve`: models over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = "Example: llama2 serve -m smollm2-135m-instruct --port 8080"


def serve(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME", help="May be repeated; the first is loaded now."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads that compute.", show_default="every core")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer.", show_default="the model's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Log one JSON object a line.")] = False,
) -> None:
    """Serve models to programs and people: OpenAI's, llama.cpp's and Ollama's routes, and a chat page at /."""
    import os
    from functools import partial

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from llama2 import api, hub
    from llama2.serve.models import Models, public_name
    from llama2.serve.server import serve as run

    names = model or [hub.DEFAULT]
    load = {public_name(n): partial(api.load, n, threads=threads, context=context, sequences=8) for n in names}
    run(Models(load), host, port)
