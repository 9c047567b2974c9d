"""`llama2 serve`: models over HTTP."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llama2.cli.options import (
    Adapter,
    Context,
    SignedBy,
    Template,
    Threads,
    TokenizerMode,
    demand_signature,
    moderator,
    read_text,
)
from llama2.cli.output import warn
from llama2.engine.runtime import Runtime
from llama2.errors import Llama2Error

if TYPE_CHECKING:
    from llama2.engine.watermark import Watermark
    from llama2.safety.moderation import Moderator

EXAMPLE = "Example: llama2 serve -m smollm2-135m-instruct --port 8080"

_UNSTATED = "the model's generation_config.json, else as in chat"


@dataclass(frozen=True)
class ModelsOptions:
    """Which models are served."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Name, file or Hugging Face repository; may be repeated. The first is loaded at once, others when "
            "they are requested.",
        ),
    ] = None
    adapter: Adapter = None
    template: Template = None
    tokenizer_mode: TokenizerMode = "auto"
    signed_by: SignedBy = None

    def __post_init__(self) -> None:
        if self.adapter and len(self.model or ()) > 1:
            raise typer.BadParameter("--adapter is merged into one model; give one -m, or a server for each")

    def names(self) -> dict[str, str]:
        """The models' names by what clients call them."""
        from llama2 import hub
        from llama2.serve.settings import public_name

        given = self.model or [hub.DEFAULT]
        names = {public_name(name): name for name in given}
        if len(names) < len(given):
            raise typer.BadParameter("two models would have one name; rename a file")
        return names

    def load(self, name: str, runtime: Runtime) -> Any:
        """A model, once its signature was checked where one is needed."""
        from llama2 import api

        demand_signature(self.signed_by, name, *(self.adapter or ()))
        return api.load(name, runtime, **self.files())

    def files(self) -> dict[str, Any]:
        """What goes with the models' files, as arguments of `api.load`."""
        return {"template": self.template, "tokenizer_mode": self.tokenizer_mode, "adapter": self.adapter or ()}


@dataclass(frozen=True)
class AccessOptions:
    """Where the server listens, and to whom."""

    host: Annotated[str, typer.Option(help="The address to listen on; one that others can reach needs a key.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="LLAMA2_API_KEY", help="What clients must send; may be repeated.", show_envvar=True),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line, that `ps` does not show.")
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this origin use the server. It may be a pattern such as https://*.page.example or "
            "chrome-extension://*; * means all.",
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A host name of the server; * means any.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """These options, by the names of `ServeSettings`."""
        return {
            "host": self.host,
            "port": self.port,
            "keys": self._keys(),
            "allow_origins": tuple(self.allow_origin or ()),
            "allow_hosts": tuple(self.allow_host or ()),
        }

    def _keys(self) -> tuple[str, ...]:
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            keys += read_text(self.api_key_file).split()
            if not keys:
                raise Llama2Error(f"{self.api_key_file}: holds no key; write one a line")
        if any(not key.isascii() or not key.strip() for key in keys):
            raise Llama2Error("--api-key: a key must be of ASCII characters, and not empty")
        return tuple(keys)


@dataclass(frozen=True)
class RuntimeOptions:
    """How each model runs."""

    parallel: Annotated[
        int, typer.Option(min=1, max=64, help="Requests of the whole context that the cache holds at most.")
    ] = 8
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0.0, help="Gigabytes of a model's cache at most.", show_default="half of what is free"),
    ] = None
    context: Context = None
    threads: Threads = None
    engine: Annotated[
        Literal["llama2", "vllm"],
        typer.Option(help=f"{Runtime.meaning('engine')} vLLM has to be installed."),
    ] = "llama2"
    tensor_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --engine vllm: processes that share each layer.")
    ] = 1
    pipeline_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --engine vllm: groups of processes that share the layers.")
    ] = 1

    def __post_init__(self) -> None:
        if self.engine != "vllm" and (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            raise typer.BadParameter("--tensor-parallel and --pipeline-parallel need --engine vllm")
        if self.engine == "vllm" and self.threads is not None:
            raise typer.BadParameter("--threads is for our own engine; vLLM reads VLLM_CPU_OMP_THREADS_BIND")

    def runtime(self) -> Runtime:
        """The Runtime of every model."""
        from llama2.machine import available_memory

        half = available_memory() // 2 or None if self.engine == "llama2" else None
        return Runtime(
            threads=self.threads,
            context=self.context,
            sequences=self.parallel,
            cache_bytes=half if self.cache_gb is None else int(self.cache_gb * 1e9),
            engine=self.engine,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
        )


@dataclass(frozen=True)
class RequestOptions:
    """What holds for requests that do not say."""

    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Temperature of requests without one.", show_default=_UNSTATED)
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Top-p of requests without one.", show_default=_UNSTATED)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Top-k of requests without one; 0 is all.", show_default=_UNSTATED)
    ] = None
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Min-p of requests without one.", show_default=_UNSTATED)
    ] = None
    lookup: Annotated[
        int,
        typer.Option(min=0, max=1024, metavar="N", help="Draft up to N tokens a step where a request has no number."),
    ] = 0
    neutralise: Annotated[
        bool, typer.Option("--neutralise", help="Break role markers in messages instead of refusing them.")
    ] = False
    turns: Annotated[
        Literal["join", "strict"],
        typer.Option(
            help="Messages in an order that the chat format does not know: join neighbours of one role, or refuse."
        ),
    ] = "join"
    tools: Annotated[
        Literal["generic", "ignore", "refuse"],
        typer.Option(help="Tools where the chat template knows none: written as text, left out, or refused."),
    ] = "generic"

    def settings(self) -> dict[str, Any]:
        """These options, by the names of `ServeSettings`."""
        given = asdict(self)
        drawn = {name: given.pop(name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return {**given, "sampling": {name: value for name, value in drawn.items() if value is not None}}


@dataclass(frozen=True)
class LimitOptions:
    """How much the server takes on, by the names of `ServeSettings`."""

    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most.")] = 256
    max_wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds to the first token; a request that would wait longer is refused.")
    ] = 60.0
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request's body.")] = 4 << 20
    max_values: Annotated[
        int, typer.Option(min=1024, help="Numbers, texts, lists and objects of a request's body.")
    ] = 250_000
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections at once; for one more, the one that is idle longest is closed.")
    ] = 4096
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds for a request to come in, and for a reader who stops reading.")
    ] = 60.0
    idle_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a connection stays open between two requests.")
    ] = 75.0
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds after which an unused model is unloaded, unless a request said otherwise (Ollama's "
            "keep_alive).",
            show_default="never",
        ),
    ] = None
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that answers may take to finish at the end.")] = 30.0


@dataclass(frozen=True)
class SafeguardOptions:
    """What holds for every answer."""

    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Moderate prompts and answers by this policy, in TOML.", show_default="no moderation"
        ),
    ] = None

    watermark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]FILE",
            help="Mark what is drawn by this key, which `llama2 watermark key` makes; of one model, or of all.",
        ),
    ] = None
    watermark_on_request: Annotated[
        bool, typer.Option("--watermark-on-request", help='Mark only answers whose request has "watermark": true.')
    ] = False

    def settings(self, models: Iterable[str]) -> dict[str, Any]:
        """Watermarks of the models, by the names of `ServeSettings`. Raises SafetyError, BadParameter."""
        if self.watermark_on_request and not self.watermark:
            raise typer.BadParameter("--watermark-on-request needs --watermark")
        return {"watermarks": self._watermarks([*models]), "watermark_on_request": self.watermark_on_request}

    def _watermarks(self, models: list[str]) -> dict[str, Watermark]:
        from llama2.safety import keys

        found: dict[str, Watermark] = {}
        for given in self.watermark or ():
            model, equals, file = given.rpartition("=")
            if equals and model not in models:
                raise typer.BadParameter(f"--watermark {given}: no such model; there are {', '.join(models)}")
            for name in [model] if equals else models:
                if name in found:
                    raise typer.BadParameter(f"--watermark {given}: {name} has a key already")
                found[name] = keys.load(Path(file))
        return found

    def moderator(self, threads: int | None) -> Moderator | None:
        """What moderates; None where nothing does. Says which of the policy's categories nobody judges."""
        if self.policy is None:
            return None
        found = moderator(self.policy, threads=threads)
        if found.unjudgeable:
            warn(f"{self.policy}: not judged by {found.judge.name}: {', '.join(found.unjudgeable)}")
        return found


def command(
    *,
    models: ModelsOptions,
    access: AccessOptions,
    runtime: RuntimeOptions,
    requests: RequestOptions,
    limits: LimitOptions,
    safeguards: SafeguardOptions,
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
    from llama2.serve.settings import ServeSettings

    names, files, loaded = models.names(), models.files(), runtime.runtime()
    marks = safeguards.settings(names)
    if marks["watermarks"] and loaded.engine == "vllm":
        raise typer.BadParameter("--watermark is for our own engine; vLLM draws its own tokens")
    settings = ServeSettings(**access.settings(), **requests.settings(), **asdict(limits), **marks)
    load: dict[str, Callable[[], Any]] = {public: partial(models.load, name, loaded) for public, name in names.items()}
    judging = safeguards.moderator(runtime.threads)
    listener = listen(settings)
    first = next(iter(load))
    load[first] = _loading(load[first])

    from llama2.serve.http import access_log, server  # which take as long as the model does
    from llama2.serve.models import Models, ModelSource

    def opener(name: str) -> Callable[[], Any]:
        return lambda: None if hub.find(name) is None else api.open_checkpoint(name, **files)

    sources = {public: ModelSource(load[public], opener(name)) for public, name in names.items()}
    access_log.configure_logging(as_json=as_json)
    raise typer.Exit(server.serve(Models(sources, settings, judging), listener))


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


def _loading(load: Callable[[], Any]) -> Callable[[], Any]:
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
