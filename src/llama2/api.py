"""A model in one object: `llama2.load(name)`, then `chat` and `generate`, whole or token by token."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from llama2 import checkpoint, hub
from llama2.checkpoint import Checkpoint
from llama2.engine.engine import Engine
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import Event, FinishReason, Logprob, Request, Sampling
from llama2.engine.runner import BLOCK, Runner
from llama2.engine.scheduler import blocks_for
from llama2.errors import ContextError, DialogError, EngineError, RequestError
from llama2.hub import store
from llama2.text.dialog import Dialog, Message

Messages = str | Sequence[Message | Mapping[str, Any]]


class Options(TypedDict, total=False):
    """What may be asked of an answer: a Request's limits and the fields of Sampling, with their defaults.

    `stop` may also be one text. Without a `seed`, one is drawn, so that each answer differs.
    """

    max_tokens: int | None
    stop: str | Sequence[str]
    logprobs: int | None
    lookup: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. `token_ids` are all that were drawn, also the end token and those of a stop string.

    Of `drafted_tokens`, which `lookup` proposed, `accepted_tokens` were drawn.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[Logprob] | None  # one a token, if asked
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def load(
    name_or_path: str | PathLike[str] = hub.DEFAULT,
    *,
    threads: int | None = None,
    runner: Literal["native", "numpy", "torch"] = "native",
    compile: bool = False,
    context: int | None = None,
    sequences: int = 1,
    cache_bytes: int | None = None,
    tokenizer: str | PathLike[str] | None = None,
    engine: Literal["llama2", "vllm"] = "llama2",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Open a model by name, path, or repository of the Hugging Face Hub; it is fetched first if it is not here.

    `context` is how many tokens prompt and answer may have together, by default as many as the model was made for; a
    shorter one saves memory. The cache holds `sequences` requests of the whole context at once, or more that are
    shorter; `cache_bytes` bounds it, but one whole context fits in any case. `tokenizer` is a file
    (`tokenizer.model`, llama2.c's `tokenizer.bin`) that replaces the model's own. `progress` is told of a fetch: what,
    bytes done, bytes in all. Raises HubError, CheckpointError, and what Model raises.

    The torch runner takes the GPU if there is one, and with `compile` is faster after its first steps. In a program
    that torchrun started, it shares the model among the processes: this returns in the first, the others end here.

    With `engine="vllm"`, vLLM answers in processes of its own, if it is installed: `tensor_parallel` of them share each
    layer, and `pipeline_parallel` such groups the layers. `engine/cluster.py` says what differs.
    """
    path = hub.locate(fspath(name_or_path), progress=progress)
    own = Path(tokenizer) if tokenizer is not None else None
    opened = checkpoint.open(path, vocabulary=store.kept(path, "vocabulary"), tokenizer=own)
    return Model(
        opened,
        threads=threads,
        runner=runner,
        compile=compile,
        context=context,
        sequences=sequences,
        cache_bytes=cache_bytes,
        engine=engine,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )


class Model:
    """A checkpoint, and the engine that runs it. Close it, or use it in `with`, to let go of the file.

    The cache holds `sequences` requests of the whole context at once, or more that are shorter; when it is full, those
    that came last wait. What nobody needs of it keeps prompts and answers, so that a prompt which begins like one of
    them, as the next turn of a dialog does, is not read again from its beginning. Several threads may use one model;
    their requests share the steps of its engine.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        runner: Literal["native", "numpy", "torch"] = "native",
        compile: bool = False,
        context: int | None = None,
        sequences: int = 1,
        cache_bytes: int | None = None,
        engine: Literal["llama2", "vllm"] = "llama2",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
    ) -> None:
        """Raises ContextError for a context that the model has not, RequestError for other values out of range, and
        EngineError where what runner or engine needs is not installed, or does not start.
        """
        longest = checkpoint.config.context_length
        context = longest if context is None else context
        if not 1 <= context <= longest:
            raise ContextError(f"context={context} must be from 1 to {longest}, which this model was made for")
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.engine: EngineProtocol
        if engine == "vllm":
            if runner != "native" or compile or threads is not None:
                raise RequestError("runner, compile and threads are for our own engine; vLLM has settings of its own")
            from llama2.engine.cluster import ClusterEngine

            self.engine = ClusterEngine(
                checkpoint,
                context=context,
                sequences=sequences,
                cache_bytes=cache_bytes,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
            )
            return
        if engine != "llama2":
            raise RequestError(f"engine={engine!r} must be llama2 or vllm")
        if (tensor_parallel, pipeline_parallel) != (1, 1):
            raise RequestError('tensor_parallel and pipeline_parallel need engine="vllm"')
        whole = blocks_for(context)
        blocks = sequences * whole
        if cache_bytes is not None:
            blocks = min(blocks, max(whole, cache_bytes // self.config.cache_bytes(BLOCK)))
        arithmetic = _runner(runner, checkpoint, blocks, threads, compile)
        self.engine = Engine(arithmetic, self.tokenizer, context=context)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine, and let go of the model's file."""
        self.engine.close()
        self.checkpoint.close()

    def render(
        self, messages: Messages, *, neutralise: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids that ask for the answer to a dialog, in the model's chat format; a text is one user message.

        `tools` are declarations of functions in OpenAI's form. Raises DialogError when the messages are out of order,
        contain a role marker and it is not to be neutralised, or use tools that the format does not know; TemplateError
        when the model's chat template fails.
        """
        dialog = Dialog([Message("user", messages)] if isinstance(messages, str) else messages)
        if dialog.messages[-1].role == "assistant":
            raise DialogError(f"message {len(dialog.messages) - 1}: the last one must be the user's, to be answered")
        return dialog.render(self.tokenizer, self.checkpoint.template, neutralise=neutralise, tools=tools)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of which the model continues `text`; where there would be none, the token that begins a text."""
        t = self.tokenizer
        begin = t.eos_id if t.bos_id is None else t.bos_id
        return t.encode(text, bos=t.add_bos) or ([] if begin is None else [begin])

    def chat(self, messages: Messages, *, neutralise: bool = False, **options: Unpack[Options]) -> Answer:
        """The assistant's answer to a user's text, or to messages with `role` and `content`.

        Raises like `render`; RequestError for an option that is unknown or out of range; ContextError when the
        messages leave no room for an answer; EngineError when the model fails.
        """
        return self._answer(_request(self.render(messages, neutralise=neutralise), options))

    def chat_stream(
        self, messages: Messages, *, neutralise: bool = False, **options: Unpack[Options]
    ) -> Iterator[Event]:
        """`chat` token by token. A failure comes as an event; closing the iterator ends the answer."""
        return self.engine.run(_request(self.render(messages, neutralise=neutralise), options))

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Answer:
        """The continuation of a text or of token ids, without a chat format. Raises as `chat` does."""
        return self._answer(self._continuation(prompt, options))

    def generate_stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Iterator[Event]:
        """`generate` token by token. A failure comes as an event; closing the iterator ends the answer."""
        return self.engine.run(self._continuation(prompt, options))

    def _continuation(self, prompt: str | Sequence[int], options: Options) -> Request:
        return _request(self.encode(prompt) if isinstance(prompt, str) else prompt, options, continues=True)

    def _answer(self, request: Request) -> Answer:
        events = list(self.engine.run(request))
        if events[-1].error is not None:
            raise EngineError(events[-1].error)
        return Answer(
            text="".join(event.text for event in events),
            token_ids=[event.token for event in events if event.token is not None],
            finish_reason=events[-1].finish or "stop",
            prompt_tokens=len(request.prompt),
            logprobs=None if request.logprobs is None else [e.logprob for e in events if e.logprob is not None],
            drafted_tokens=events[-1].drafted_tokens,
            accepted_tokens=events[-1].accepted_tokens,
        )


def _request(prompt: Sequence[int], options: Options, *, continues: bool = False) -> Request:
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(Options.__annotations__)}"
            raise RequestError(f"{name}: unknown option; {advice}")
    stop = options.get("stop", ())
    if not isinstance(stop, (str, list, tuple)):
        raise RequestError(f"stop={stop!r} must be a text or a list of texts")
    drawn = {field.name for field in fields(Sampling)}
    sampling: dict[str, Any] = {name: value for name, value in options.items() if name in drawn}
    if sampling.get("seed") is None:
        sampling["seed"] = secrets.randbits(32)
    return Request(
        prompt=tuple(prompt),
        max_tokens=options.get("max_tokens"),
        sampling=Sampling(**sampling),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=options.get("logprobs"),
        continues=continues,
        lookup=options.get("lookup", 0),
    )


def _runner(kind: str, checkpoint: Checkpoint, n_blocks: int, threads: int | None, compile: bool) -> Runner:
    if compile and kind != "torch":
        raise RequestError(f"compile is for the torch runner, not for {kind}; choose that one, or leave it out")
    if threads is not None and kind in ("numpy", "torch"):
        raise RequestError(f"threads: the {kind} runner leaves them to its library; set OMP_NUM_THREADS instead")
    if kind == "native":
        from llama2.engine.runner_native import NativeRunner

        if threads is not None and not 1 <= threads <= 1024:
            raise RequestError(f"threads={threads} must be from 1 to 1024")
        return NativeRunner(checkpoint, n_blocks, threads=threads)
    if kind == "numpy":
        from llama2.engine.runner_numpy import NumpyRunner

        return NumpyRunner(checkpoint, n_blocks)
    if kind == "torch":
        try:
            from llama2.engine.runner_torch import start
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise EngineError(
                "the torch runner needs PyTorch, which is not installed; `pip install 'whole-llama[train]'` brings it"
            ) from None
        return start(checkpoint, n_blocks, compile=compile)
    raise RequestError(f"runner={kind!r} must be native, numpy or torch")
