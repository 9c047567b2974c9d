"""The surface of Meta's deprecated reference (spec 10.6): its scripts run with `from llama2 import Llama, Dialog`.

Requests run as a batch of the engine. A row's random numbers depend on the build's seed and on how many rows came
before it. So a script gives the same answers each time it runs. The same prompt given twice has two answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

from llama2 import checkpoint, hub
from llama2.api import Model, path_text
from llama2.engine.answer import collect
from llama2.engine.request import Request, Sampling, flag, shown, token_ids, whole
from llama2.engine.runtime import Runtime
from llama2.errors import ContextError, RequestError, TokenizerError
from llama2.text import tokenizer as tokenizers
from llama2.text.dialog import SPECIAL_TAGS, UNSAFE_ERROR, Dialog, Message

AnyDialog = Dialog | Sequence[Message | Mapping[str, str]]


class CompletionPrediction(TypedDict, total=False):
    """A completion; `tokens` (each decoded alone) and `logprobs` if asked."""

    generation: str
    tokens: list[str]
    logprobs: list[float]


class AssistantMessage(TypedDict):
    """What the assistant said."""

    role: Literal["assistant"]
    content: str


class ChatPrediction(TypedDict, total=False):
    """The assistant's message; `tokens` (each decoded alone) and `logprobs` if asked."""

    generation: AssistantMessage
    tokens: list[str]
    logprobs: list[float]


class Llama:
    """A model with the limits it was built with: `max_batch_size` prompts of up to `max_seq_len` tokens with answer."""

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 8,
        model_parallel_size: int | None = None,
        seed: int = 1,
    ) -> Llama:
        """Load a model by folder, file or name. `tokenizer_path` is a SentencePiece model that replaces its own.

        One process holds a model of any size, so `model_parallel_size` may have any value and changes nothing.
        Raises TokenizerError for a tokenizer of another vocabulary, and what `llama2.load` raises.
        """
        whole("max_batch_size", max_batch_size, 1, 1 << 20)
        Sampling(seed=seed)
        opened = checkpoint.open(hub.locate(path_text("ckpt_dir", ckpt_dir)))
        if tokenizer_path is not None:
            tokenizer = tokenizers.from_sentencepiece(path_text("tokenizer_path", tokenizer_path))
            if tokenizer.vocab_size != opened.config.vocab_size:
                raise TokenizerError(
                    f"{tokenizer_path}: {tokenizer.vocab_size} tokens, and the model has {opened.config.vocab_size}; "
                    "leave tokenizer_path out to use the model's own"
                )
            opened.tokenizer = tokenizer
        return Llama(Model(opened, Runtime(context=max_seq_len, sequences=max_batch_size)), max_batch_size, seed)

    def __init__(self, model: Model, max_batch_size: int, seed: int) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.max_seq_len = model.engine.context
        self.max_batch_size = max_batch_size
        self.seed = seed
        self._rows = itertools.count()

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Answer tokens of each prompt, without the end token, and their log-probabilities under the raw logits.

        With `echo` the prompt comes first, its first token with log-probability 0. An end token within the prompt then
        cuts the row there, as in the reference. Raises RequestError for more than `max_batch_size` prompts,
        ContextError for one longer than `max_seq_len`.
        """
        _require_list("prompt_tokens", prompt_tokens, "lists of token ids")
        prompt_tokens = [token_ids(f"prompt_tokens[{i}]", prompt) for i, prompt in enumerate(prompt_tokens)]
        max_gen_len = whole("max_gen_len", max_gen_len, 0, 1 << 62)
        flag("logprobs", logprobs)
        flag("echo", echo)
        if len(prompt_tokens) > self.max_batch_size:
            raise RequestError(f"{len(prompt_tokens)} prompts are more than max_batch_size={self.max_batch_size}")
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=self.seed)
        requests = [self._request(prompt, max_gen_len, sampling, logprobs, echo) for prompt in prompt_tokens]
        rows, scores = [], []
        for prompt, answer in zip(prompt_tokens, collect(self.model.engine.run(*requests), requests), strict=True):
            tokens = answer.token_ids
            values = [x.logprob for x in answer.logprobs or ()]
            if echo:
                tokens = [*prompt, *tokens]
                values = [0.0, *(x.logprob for x in answer.prompt_logprobs or ()), *values]
            end = next((i for i, token in enumerate(tokens) if token in self.tokenizer.stop_ids), len(tokens))
            rows.append(tokens[:end])
            scores.append(values[:end])
        return rows, scores if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text, by default up to `max_seq_len`. Raises like `generate`."""
        _require_list("prompts", prompts, "texts")
        ids = [self.model.encode(prompt) for prompt in prompts]
        rows, scores = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs, echo)
        answers: list[CompletionPrediction] = [{"generation": self.tokenizer.decode(row)} for row in rows]
        for answer, row, values in zip(answers, rows, scores or (), strict=False):
            answer |= {"tokens": self._pieces(row), "logprobs": values}
        return answers

    def chat_completion(
        self,
        dialogs: Sequence[AnyDialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's answer to each dialog, by default up to `max_seq_len`.

        A dialog that contains a special tag is answered by UNSAFE_ERROR, without asking the model. Raises DialogError
        for one whose messages are out of order or do not end with the user's, and like `generate`.
        """
        _require_list("dialogs", dialogs, "dialogs")
        parsed = [dialog if isinstance(dialog, Dialog) else Dialog(dialog) for dialog in dialogs]
        safe = [not any(tag in m.content for m in dialog.messages for tag in SPECIAL_TAGS) for dialog in parsed]
        ids = [self.model.render(dialog.messages) for dialog, ok in zip(parsed, safe, strict=True) if ok]
        rows, scores = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs)
        answered = zip(rows, scores or itertools.repeat(()), strict=False)
        answers: list[ChatPrediction] = []
        for ok in safe:
            row, values = next(answered) if ok else ([], [])
            content = self.tokenizer.decode(row) if ok else UNSAFE_ERROR
            answers.append({"generation": {"role": "assistant", "content": content}})
            if logprobs:
                answers[-1] |= {"tokens": self._pieces(row), "logprobs": list(values)}
        return answers

    def _length(self, max_gen_len: int | None) -> int:
        return self.max_seq_len - 1 if max_gen_len is None else max_gen_len

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in tokens]

    def _request(
        self, prompt: Sequence[int], max_gen_len: int, sampling: Sampling, logprobs: bool, echo: bool
    ) -> Request:
        if len(prompt) > self.max_seq_len:
            raise ContextError(f"prompt of {len(prompt)} tokens is longer than max_seq_len={self.max_seq_len}")
        length = min(max_gen_len, self.max_seq_len - len(prompt))
        return Request(
            prompt=tuple(prompt),
            max_tokens=length,
            sampling=sampling,
            logprobs=0 if logprobs else None,
            score_from=1 if length == 0 or (logprobs and echo) else None,
            choice=next(self._rows),
        )


def _require_list(name: str, value: object, of: str) -> None:
    single = isinstance(value, (str, bytes, bytearray, Mapping)) or getattr(value, "ndim", 1) == 0
    if single or not isinstance(value, Iterable):
        raise RequestError(f"{name}={shown(value)} must be a list of {of}")
