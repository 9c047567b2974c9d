"""A model in one object: `llama2.load(name)`, then `chat` and `generate`, whole or token by token."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from llama2 import checkpoint, hub
from llama2.checkpoint import Checkpoint
from llama2.engine.answer import Answer, collect
from llama2.engine.embedding import normalised, pieces
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import (
    Event,
    Pooling,
    Request,
    Sampling,
    answer_limit,
    flag,
    shown,
)
from llama2.engine.runtime import Runtime, RuntimeSettings, start
from llama2.engine.watermark import Watermark
from llama2.errors import ContextError, DialogError, EngineError, RequestError
from llama2.hub import store
from llama2.text import template as templates
from llama2.text import turns
from llama2.text.dialog import Dialog, Message
from llama2.text.tokenizer import Mode

Messages = str | Sequence[Message | Mapping[str, Any]]

#: A LoRA adapter's name, path or repository, with `:SCALE` behind it if wanted; or several.
Adapters = str | PathLike[str] | Sequence[str | PathLike[str]]


class Options(TypedDict, total=False):
    """Options of an answer: a Request's limits and the fields of Sampling, with their defaults.

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
    watermark: Watermark | None


def load(
    name_or_path: str | PathLike[str] = hub.DEFAULT,
    runtime: Runtime | None = None,
    *,
    tokenizer: str | PathLike[str] | None = None,
    template: str | PathLike[str] | None = None,
    tokenizer_mode: Mode = "auto",
    adapter: Adapters = (),
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Unpack[RuntimeSettings],
) -> Model:
    """Open a model by name, path, or repository of the Hugging Face Hub; it is fetched first if it is not here.

    `settings` are fields of `Runtime`, such as `threads=4` or `context=2048`. A whole `Runtime` does as well; settings
    then replace its fields.

    `tokenizer` is a file that replaces the model's own: `tokenizer.model`, `tokenizer.json`, or llama2.c's
    `tokenizer.bin`. `tokenizer_mode` decides where spaces are put in front of text. "legacy" puts one before
    each part between added tokens, "file" does as the files say, and "auto" as the model was tuned, if known.

    `template` replaces the chat template. It is a chat format's name such as "vicuna" (`text.chat_formats` has them),
    one of several that the model has by name, or a Jinja file.

    `adapter` is a LoRA adapter, or several: folders of peft, or llama.cpp's GGUF. They are merged into the weights in
    memory, each as trained, or with `DIR:0.5` half as strong.

    `progress` is called during a fetch with a name, the bytes done and the bytes in all.

    In a program that torchrun started, the torch runner divides the model among the processes. This returns in the
    first of them, and the others end here.

    Raises HubError, CheckpointError, TemplateError for a template that is not there, RequestError for an unknown
    setting or one out of range, and what `Model` raises.
    """
    for name in settings.keys() - Runtime.__annotations__.keys():
        raise RequestError(unknown("setting", name, [*Runtime.__annotations__]))
    runtime = replace(runtime or Runtime(), **settings)
    opened = open_checkpoint(
        name_or_path,
        tokenizer=tokenizer,
        template=template,
        tokenizer_mode=tokenizer_mode,
        adapter=adapter,
        progress=progress,
    )
    return Model(opened, runtime)


def open_checkpoint(
    name_or_path: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    template: str | PathLike[str] | None = None,
    tokenizer_mode: Mode = "auto",
    adapter: Adapters = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Checkpoint:
    """The files of a model as `load` opens them, without an engine: no weight is read yet."""
    path = hub.locate(path_text("name_or_path", name_or_path), progress=progress)
    if progress is not None and not callable(progress):
        raise RequestError(f"progress={shown(progress)} must be a function")
    return checkpoint.open(
        path,
        vocabulary=store.artifact(path, "vocabulary"),
        tokenizer=None if tokenizer is None else Path(path_text("tokenizer", tokenizer)),
        tokenizer_mode=tokenizer_mode,
        adapters=located(adapter, partial(hub.locate, progress=progress)),
        template=None if template is None else path_text("template", template),
    )


def located(adapter: Adapters, find: Callable[[str], Path]) -> list[tuple[Path, float]]:
    """Where each adapter lies, and the factor of its scale. Raises RequestError for that, and what `find` raises."""
    given = [adapter] if isinstance(adapter, (str, PathLike)) else adapter
    if not given:
        return []
    from llama2.checkpoint.adapter import split

    return [(find(name), scale) for name, scale in map(split, given)]


def path_text(name: str, value: Any) -> str:
    """A path as text. Raises RequestError for what is none."""
    try:
        path = fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise RequestError(f"{name}={shown(value)} must be a text or a path")
    return path


class Prompt(NamedTuple):
    """Token ids that ask for an answer, or for the rest of one, by a chat template (None: Llama 2's own format)."""

    tokens: list[int]
    within_answer: bool  # whether they end within the assistant's message
    template: str | None
    notes: tuple[str, ...] = ()  # what was changed, because the chat format cannot write it


class Model:
    """A checkpoint, and the engine that runs it. Close it, or use it in `with`, to release the file.

    The cache holds `sequences` requests of the whole context at once, or more that are shorter. When it is full, those
    that came last wait. Blocks that no request uses stay cached. So a prompt that begins like an earlier one, as the
    next turn of a dialog does, is not computed again from its beginning. Several threads may use one model; their
    requests share the steps of its engine.
    """

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime | None = None) -> None:
        """Raises ContextError for a context beyond the model's, EngineError where a library is missing or fails."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self._warned = False  # that it names no chat format
        self.engine: EngineProtocol = start(checkpoint, runtime or Runtime())

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine, and release the model's file."""
        self.engine.close()
        self.checkpoint.close()

    def prompt(
        self,
        messages: Messages,
        *,
        neutralise: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        strict: bool = False,
    ) -> Prompt:
        """What asks for the answer to a dialog, in the model's chat format; a text is one user message.

        `tools` are declarations of functions in OpenAI's form. A dialog that ends with the assistant's message is to be
        continued there. One that the chat format cannot write as it is becomes one that it can (`text.turns`); if
        `strict`, it is refused. Raises DialogError when the messages do not make a dialog, or contain a role
        marker that is not to be neutralised. Raises TemplateError when the model's chat template fails.
        """
        return prompt_of(self.checkpoint, messages, neutralise=neutralise, tools=tools, strict=strict)

    def render(
        self, messages: Messages, *, neutralise: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of `prompt`."""
        return self.prompt(messages, neutralise=neutralise, tools=tools).tokens

    def answering(self, request: Request, prompt: Prompt) -> Request:
        """`request` for the answer to a dialog, which ends where the model's chat format ends one.

        That is at the token that its template writes behind an answer, and in a format that we know by name, before who
        speaks next.
        """
        request = replace(request, prompt=tuple(prompt.tokens), raw_completion=prompt.within_answer)
        if prompt.template is None:
            return request
        stop_tokens = request.stop_tokens | templates.ends(prompt.template, self.tokenizer)
        return replace(request, stop=(*request.stop, *templates.stops(prompt.template)), stop_tokens=stop_tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of which the model continues `text`; where there would be none, the token that begins a text."""
        if not isinstance(text, str):
            raise RequestError(f"text={shown(text)} must be a text")
        t = self.tokenizer
        begin = t.eos_id if t.bos_id is None else t.bos_id
        return t.encode(text, bos=t.add_bos) or ([] if begin is None else [begin])

    def chat(self, messages: Messages, *, neutralise: bool = False, **options: Unpack[Options]) -> Answer:
        """The assistant's answer to a user's text, or to messages with `role` and `content`.

        Raises like `render`. Raises RequestError for an option that is unknown or out of range. Raises ContextError
        when the messages leave no room for an answer, and EngineError when the model fails.
        """
        return self._answer(self._chat(messages, neutralise, options))

    def chat_stream(
        self, messages: Messages, *, neutralise: bool = False, **options: Unpack[Options]
    ) -> Iterator[Event]:
        """`chat` token by token. A failure comes as an event; closing the iterator ends the answer."""
        return self.engine.run(self._chat(messages, neutralise, options))

    def generate(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Answer:
        """The continuation of a text or of token ids, without a chat format. Raises as `chat` does."""
        return self._answer(self._continuation(prompt, options))

    def generate_stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Iterator[Event]:
        """`generate` token by token. A failure comes as an event; closing the iterator ends the answer."""
        return self.engine.run(self._continuation(prompt, options))

    def embed(
        self, texts: str | Sequence[str | Sequence[int]], *, pooling: Pooling = "last", normalise: bool = True
    ) -> NDArray[np.float32]:
        """Embeddings (n, dim) of n texts, or of their token ids: hidden states after the final norm.

        `pooling` takes the last token's state, which alone has read the whole text, or the mean of all; `normalise`
        makes each vector 1 long. A vector is the same, bit for bit, whatever is embedded beside it. Raises RequestError
        for an input that is empty or not a text, ContextError for one longer than the context, EngineError when the
        model fails.
        """
        flag("normalise", normalise)
        requests = self.embedding_requests([texts] if isinstance(texts, str) else texts, pooling)
        vectors = np.empty((len(requests), self.config.dim), np.float32)
        done = 0
        for piece in pieces(requests):
            for answer in collect(self.engine.run(*piece), piece):
                if answer.embedding is None:
                    raise EngineError("the embedding was cancelled")
                vectors[done] = normalised(answer.embedding) if normalise else answer.embedding
                done += 1
        return vectors

    def embedding_requests(
        self, inputs: Sequence[str | Sequence[int]], pooling: Pooling, *, truncate: bool = False
    ) -> list[Request]:
        """Requests for the embeddings of texts or token ids, of each as much as the context holds if `truncate`.

        All of them are checked. Raises RequestError for an input that is empty, is not a text, or has a token that the
        model does not know. Raises ContextError for one longer than the context.
        """
        if not isinstance(inputs, Sequence):
            raise RequestError(f"inputs={shown(inputs)} must be a list of texts")
        context, requests = self.engine.context, []
        for i, given in enumerate(inputs):
            tokens = given
            if isinstance(given, str):
                tokens = self.encode(given) if given else []
            if truncate:
                tokens = tokens[:context]
            request = Request(tokens, max_tokens=0, pooling=pooling)  # type: ignore[arg-type]  # it takes more than it keeps
            if not request.prompt:
                raise RequestError(f"input {i} is empty; leave it out")
            if (length := len(request.prompt)) > context:
                raise ContextError(
                    f"input {i} has {length} tokens, and the context is {context}; divide it into shorter ones"
                )
            answer_limit(request, context, self.config.vocab_size)
            requests.append(request)
        return requests

    def _chat(self, messages: Messages, neutralise: bool, options: Options) -> Request:
        """Also warns of what the chat format could not write, and once, that the model names none."""
        prompt = self.prompt(messages, neutralise=neutralise)
        request = self.answering(_request((), options), prompt)
        for note in prompt.notes:
            warnings.warn(note, stacklevel=3)
        if not self._warned and (assumed := self.checkpoint.assumes_format):
            warnings.warn(assumed, stacklevel=3)
        self._warned = True
        return request

    def _continuation(self, prompt: str | Sequence[int], options: Options) -> Request:
        return _request(self.encode(prompt) if isinstance(prompt, str) else prompt, options, raw_completion=True)

    def _answer(self, request: Request) -> Answer:
        (answer,) = collect(self.engine.run(request), [request])
        return answer


def prompt_of(
    checkpoint: Checkpoint,
    messages: Messages,
    *,
    neutralise: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> Prompt:
    """`Model.prompt` of a model that no engine runs yet."""
    flag("neutralise", neutralise)
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(t, Mapping) for t in tools)):
        raise RequestError(f"tools={shown(tools)} must be a list of declarations in OpenAI's form")
    dialog = Dialog([Message("user", messages)] if isinstance(messages, str) else messages, strict=strict)
    template, tokenizer = checkpoint.template_for(tools=bool(tools)), checkpoint.tokenizer
    arranged = turns.arrange(dialog, template, tokenizer, tools, neutralise=neutralise)
    last = arranged.dialog.messages[-1]
    if last.tool_calls:
        raise DialogError(f"message {len(dialog.messages) - 1}: its calls have no answer; add a tool's message")
    tokens, _ = arranged.dialog.render(
        tokenizer, template, neutralise=neutralise, tools=arranged.tools, continue_final=True
    )
    return Prompt(tokens, last.role == "assistant", template, arranged.notes)


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """A message about a name that is not one of `names`, with the nearest of them."""
    near = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"{name}: unknown {kind}; {advice}"


def _request(prompt: Sequence[int], options: Options, *, raw_completion: bool = False) -> Request:
    for name in options:
        if name not in Options.__annotations__:
            raise RequestError(unknown("option", name, [*Options.__annotations__]))
    stop = options.get("stop", ())
    if not isinstance(stop, (str, list, tuple)):
        raise RequestError(f"stop={shown(stop)} must be a text or a list of texts")
    drawn = {field.name for field in fields(Sampling)}
    sampling: dict[str, Any] = {name: value for name, value in options.items() if name in drawn}
    if sampling.get("seed") is None:
        sampling["seed"] = int.from_bytes(os.urandom(4))
    return Request(
        prompt=prompt,  # type: ignore[arg-type]  # Request takes more than it keeps
        max_tokens=options.get("max_tokens"),
        sampling=Sampling(**sampling),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logprobs=options.get("logprobs"),
        raw_completion=raw_completion,
        lookup=options.get("lookup", 0),
        watermark=options.get("watermark"),
    )
