"""Our engine as a model of lm-evaluation-harness.

This module imports lm_eval, which takes seconds: import it where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama2.api import Model, Prompt
from llama2.engine.request import Request
from llama2.errors import ContextError, EvaluationError
from llama2.evaluate.queries import GenerationQuery, LikelihoodQuery, Query, answers


class RenderedPrompt(str):
    """A dialog as text, with the token ids that its chat template gives; encoding the text anew could differ."""

    __slots__ = ("prompt",)
    prompt: Prompt


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A model of ours as the harness calls one. The command asks through its queries, which it stores."""

    def __init__(self, model: Model, *, in_flight: int = 64) -> None:
        super().__init__()
        self.model = model
        self.in_flight = in_flight
        self._encode = lru_cache(maxsize=16)(self._encoded)  # the choices of an item share its context

    @property
    def eot_token_id(self) -> int:
        token = self.model.tokenizer.eos_id
        if token is None:
            raise EvaluationError(f"{self.model.checkpoint.path}: its tokenizer has no EOS; give one with --tokenizer")
        return token

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without a context: BOS, or else EOS."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.checkpoint.path.name

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self.model.engine.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS in front where the tokenizer adds one, once, also before a text that begins with it."""
        return list(self._encode(string, add_special_tokens))

    def _encoded(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        t = self.model.tokenizer
        bos = next((written for written, token in t.control.items() if token == t.bos_id), None)
        begins = bos is not None and text.startswith(bos)
        add = t.add_bos if add_special_tokens is None else add_special_tokens and t.bos_id is not None
        if begins and bos is not None and add_special_tokens is None:
            text, add = text.removeprefix(bos), True
        return tuple(t.encode(text, bos=add))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        query = self.likelihood(context, continuation)
        return list(query.context), list(query.continuation)

    def likelihood(self, context: str, continuation: str) -> LikelihoodQuery:
        """Token ids of a context, and of what follows it in the encoding of both together.

        White space at the context's end belongs to the continuation, as words of most vocabularies begin with their
        space. A token that covers both the context's end and the continuation's beginning is scored whole, so that the
        continuation is never without a token. In place of an empty context is the prefix token. Raises EvaluationError
        for an empty continuation.
        """
        if not continuation:
            raise EvaluationError("a continuation is empty, so it has no likelihood; check the row's choices")
        if isinstance(context, RenderedPrompt):
            return LikelihoodQuery(tuple(context.prompt.tokens), tuple(self.model.tokenizer.encode(continuation)))
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if not context:
            return LikelihoodQuery((self.prefix_token_id,), self._unconditional(continuation))
        before = self._encode(context, None)
        whole = self._encoded(context + continuation, None)
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        shared = min(shared, len(whole) - 1)
        if shared == 0:
            return LikelihoodQuery((self.prefix_token_id,), whole)
        # An item's choices share one tuple, as a long context takes more memory than all else.
        return LikelihoodQuery(before if shared == len(before) else whole[:shared], whole[shared:])

    def _unconditional(self, continuation: str) -> tuple[int, ...]:
        """Ids of a text without a context. The space that SentencePiece puts in front is the text's own first one.

        Two would leave a lone "▁" before the first word, which costs likelihood.
        """
        if self.model.tokenizer.kind == "sentencepiece" and self.model.tokenizer.prepend_scheme != "never":
            continuation = continuation.removeprefix(" ") or continuation
        return self._encoded(continuation, False)

    def generation(
        self, context: str, settings: Mapping[str, Any], *, sample: int = 0, seed: int = 0
    ) -> GenerationQuery:
        """The query of a prompt, by the harness's generation settings: until, max_gen_toks, temperature, top_p."""
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        most = int(settings.get("max_gen_toks", DEFAULT_MAX_GEN_TOKS))
        sampled = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
        query = GenerationQuery(
            self._encoded(context, None),
            most,
            stop,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
            seed=seed if sampled else 0,
            sample=sample if sampled else 0,
        )
        if not isinstance(context, RenderedPrompt):
            return query
        request = self.model.answering(Request(()), context.prompt)
        return replace(
            query,
            prompt=request.prompt,
            stop=(*stop, *request.stop),
            stop_tokens=tuple(sorted(request.stop_tokens)),
            raw_completion=request.raw_completion,
        )

    def refuse_longer(self, query: Query) -> str | None:
        """Why a query does not fit the context; None if it does. Nothing is ever cut."""
        if query.needed <= self.max_length:
            return None
        return f"prompt of {query.needed} tokens, and the context is {self.max_length}"

    def _ask(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        for query in queries:
            if reason := self.refuse_longer(query):
                raise ContextError(f"{reason}; choose a model with a longer one, or fewer examples")
        return list(answers(self.model.engine, queries, self.in_flight))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        queries = [LikelihoodQuery(tuple(before), tuple(after)) for _, before, after in requests]
        return [(answer["logprob"], answer["greedy"]) for answer in self._ask(queries)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods in nats of (context, continuation), and whether each continuation is the greedy one.

        Raises ContextError for a pair that is longer than the context.
        """
        queries = [self.likelihood(*request.args) for request in requests]
        return [(answer["logprob"], answer["greedy"]) for answer in self._ask(queries)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods in nats of whole texts; one longer than the context in windows that each predict anew."""
        return [sum(answer["logprob"] for answer in self._ask(self.windows(*each.args))) for each in requests]

    def windows(self, text: str) -> list[LikelihoodQuery]:
        """A text as continuations that together cover it, after the prefix token and what the context holds."""
        tokens = self.tok_encode(text, add_special_tokens=False)
        pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
        return [LikelihoodQuery(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, pairs)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to (prompt, settings). Raises ContextError for a prompt that leaves no room for one."""
        queries = [self.generation(*request.args) for request in requests]
        return [answer["text"] for answer in self._ask(queries)]

    @property
    def has_template(self) -> bool:
        """Whether the model's chat format is known: its files have it, or its name is Llama 2 Chat's."""
        checkpoint = self.model.checkpoint
        named = checkpoint.tokenizer.kind == "sentencepiece" and checkpoint.assumes_format is None
        return bool(checkpoint.templates) or named

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, for the harness's records."""
        return self.model.checkpoint.template_for(tools=False) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> RenderedPrompt:
        """A dialog in the model's chat format. BOS is in it if the format has it, and is not added again."""
        prompt = self.model.prompt(chat_history)
        rendered = RenderedPrompt(self.model.tokenizer.decode(prompt.tokens))
        rendered.prompt = prompt
        return rendered
