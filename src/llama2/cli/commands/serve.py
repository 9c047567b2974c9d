"""`llama2 serve`: models over HTTP."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llama2.cli.options import Adapter, Context, Template, Threads, TokenizerMode, read_text
from llama2.errors import Llama2Error

EXAMPLE = "Example: llama2 serve -m smollm2-135m-instruct --port 8080"


_DRAWN = "the model's generation_config.json, else as in chat"


def command(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Name, file or Hugging Face repository; may be repeated. The first is loaded at once, others when "
            "they are asked for.",
        ),
    ] = None,
    adapter: Adapter = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that others can reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="LLAMA2_API_KEY", help="What clients must send; may be repeated.", show_envvar=True),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line, that `ps` does not show.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this origin use the server, which may be a pattern as https://*.page.example or "
            "chrome-extension://*; * means all.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name that the server is called by; * means any.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="The cache holds so many requests of the whole context at most.")
    ] = 8,
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0.0, help="Gigabytes of a model's cache at most.", show_default="half of what is free"),
    ] = None,
    template: Template = None,
    tokenizer_mode: TokenizerMode = "auto",
    context: Context = None,
    threads: Threads = None,
    engine: Annotated[
        Literal["llama2", "vllm"],
        typer.Option(help="Who answers; vLLM divides a model among GPUs and machines, and has to be installed."),
    ] = "llama2",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --engine vllm: processes that share each layer.")
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --engine vllm: groups of them that share the layers.")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Where a request says none.", show_default=_DRAWN)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Where a request says none.", show_default=_DRAWN)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Where a request says none; 0 is all.", show_default=_DRAWN)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Where a request says none.", show_default=_DRAWN)
    ] = None,
    lookup: Annotated[
        int,
        typer.Option(min=0, max=1024, metavar="N", help="Draft up to N tokens a step where a request does not say."),
    ] = 0,
    neutralise: Annotated[
        bool, typer.Option("--neutralise", help="Defuse marks of the chat format in messages instead of refusing them.")
    ] = False,
    turns: Annotated[
        Literal["join", "strict"],
        typer.Option(
            help="Messages in an order that the chat format does not know: join neighbours of one role, or refuse."
        ),
    ] = "join",
    tools: Annotated[
        Literal["generic", "ignore", "refuse"],
        typer.Option(help="Tools where the chat template knows none: written as text, left out, or refused."),
    ] = "generic",
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most.")] = 256,
    max_wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds to the first token; a request that would wait longer is refused.")
    ] = 60.0,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request's body.")] = 4 << 20,
    max_values: Annotated[
        int, typer.Option(min=1024, help="Numbers, texts, lists and objects of a request's body.")
    ] = 250_000,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections at once; for one more, the one that is idle longest is closed.")
    ] = 4096,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds for a request to come in, and for a reader who stops reading.")
    ] = 60.0,
    idle_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a connection stays open between two requests.")
    ] = 75.0,
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds after which an unused model is unloaded, unless a request said otherwise (Ollama's "
            "keep_alive).",
            show_default="never",
        ),
    ] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that answers may take to finish at the end.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Log one JSON object a line.")] = False,
) -> None:
    """Serve models to programs and people.

    OpenAI's, Anthropic's, llama.cpp's and Ollama's routes, and a chat page at /. The first Ctrl-C lets answers finish,
    a second one does not.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _share_free_memory()
    from llama2 import api, hub
    from llama2.serve.http.address import listen
    from llama2.serve.settings import Settings, public_name

    settings = Settings(
        host=host,
        port=port,
        keys=_keys(api_key, api_key_file),
        allow_origins=tuple(allow_origin or ()),
        allow_hosts=tuple(allow_host or ()),
        max_queue=max_queue,
        max_wait=max_wait,
        max_body=max_body,
        max_values=max_values,
        max_connections=max_connections,
        timeout=timeout,
        idle_timeout=idle_timeout,
        drain=drain,
        keep_alive=keep_alive,
        sampling={
            name: value
            for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k), ("min_p", min_p))
            if value is not None
        },
        lookup=lookup,
        neutralise=neutralise,
        turns=turns,
        tools=tools,
    )
    if engine != "vllm" and (tensor_parallel, pipeline_parallel) != (1, 1):
        raise typer.BadParameter("--tensor-parallel and --pipeline-parallel need --engine vllm")
    if adapter and len(model or ()) > 1:
        raise typer.BadParameter("--adapter is merged into one model; give one -m, or a server for each")
    if engine == "vllm" and threads is not None:
        raise typer.BadParameter("--threads is for our own engine; vLLM reads VLLM_CPU_OMP_THREADS_BIND")
    files: dict[str, Any] = {"template": template, "tokenizer_mode": tokenizer_mode, "adapter": adapter or ()}
    options: dict[str, Any] = {"threads": threads, "context": context, "sequences": parallel, "engine": engine}
    options |= {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    half = _half_of_free_memory() if engine == "llama2" else None
    options["cache_bytes"] = half if cache_gb is None else int(cache_gb * 1e9)
    names = {public_name(name): name for name in model or [hub.DEFAULT]}
    if len(names) < len(model or [hub.DEFAULT]):
        raise typer.BadParameter("two models would have one name; rename a file")
    load: dict[str, Callable[[], Any]] = {
        public: partial(api.load, name, **files, **options) for public, name in names.items()
    }
    listener = listen(settings)
    first = next(iter(load))
    load[first] = _begun(load[first])

    from llama2.serve.http import access_log, server  # which take as long as the model does
    from llama2.serve.models import Models, Source

    def opener(name: str) -> Callable[[], Any]:
        return lambda: None if hub.find(name) is None else api.open_checkpoint(name, **files)

    sources = {public: Source(load[public], opener(name)) for public, name in names.items()}
    access_log.set_up(as_json=as_json)
    raise typer.Exit(server.serve(Models(sources, settings), listener))


def _share_free_memory() -> None:
    """Let threads use one pool of memory.

    By default glibc has a pool for each thread, and what large requests took stays in all of them.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        arena_max = -8  # malloc.h
        mallopt(arena_max, 1)


def _begun(load: Callable[[], Any]) -> Callable[[], Any]:
    """`load`, which begins at once for its first caller."""
    future: Future[Any] = Future()
    futures = [future]

    def begin() -> None:
        try:
            future.set_result(load())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=begin, name="loading", daemon=True).start()
    return lambda: futures.pop().result() if futures else load()


def _half_of_free_memory() -> int | None:
    from llama2.checkpoint.kept import available_memory

    return available_memory() // 2 or None


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    keys = list(given or ())
    if file is not None:
        keys += read_text(file).split()
        if not keys:
            raise Llama2Error(f"{file}: holds no key; write one a line")
    if any(not key.isascii() or not key.strip() for key in keys):
        raise Llama2Error("--api-key: a key must be of ASCII characters, and not empty")
    return tuple(keys)
