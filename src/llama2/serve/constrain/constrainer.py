"""Processors that hold an answer to a constraint.

    constrainer = Constrainer(model.tokenizer)                       # once a model
    constraint = json_schema(schema, "response_format.json_schema.schema")
    request = Request(prompt, processors=(constrainer.processor(constraint),))

A processor belongs to one answer: make one for each choice. Its mask depends on the history alone, so that tokens do
not depend on drafts, on preemption, or on other requests.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2.errors import EngineError, RequestError
from llama2.serve.constrain import compiler
from llama2.serve.constrain.constraints import Constraint
from llama2.serve.constrain.vocabulary import Vocabulary
from llama2.text.tokenizer import Tokenizer
from llama2.text.worker import Worker

if TYPE_CHECKING:
    from llama2.engine.request import Processor

#: Seconds that the trial of a grammar may take before its process is killed.
SECONDS = 1.0
#: Characters of a grammar.
LONGEST = 1 << 19


class Constrainer:
    """Makes processors for one model's vocabulary, and caches the compiled grammars that were used last.

    Each of `entries` compiled grammars takes at most about 20 MB, as a rule a hundredth of that. Their texts have at
    most `characters` in total. Safe to call from several threads. A new grammar takes some milliseconds, at worst
    about two `SECONDS`, so do not call it in an event loop. `close` it at the end.
    """

    def __init__(self, tokenizer: Tokenizer, *, entries: int = 32, characters: int = 4 << 20) -> None:
        self._tokenizer = tokenizer
        self._entries, self._characters = entries, characters
        self._lock = Lock()
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._worker = Worker(compiler.__file__, _cannot_compile)

    def processor(self, constraint: Constraint, *, raw_completion: bool = False) -> Processor:
        """The processor that holds one answer to `constraint`; `raw_completion` as in Request.

        Raises RequestError that names the constraint's field if its grammar is malformed, unsupported, or exceeds
        its limits.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer)
            vocabulary = self._vocabulary
            matcher = self._compiled.get(constraint.grammar)
            if matcher is not None:
                self._compiled.move_to_end(constraint.grammar)
        if matcher is None:
            matcher = self._compile(vocabulary, constraint)
            with self._lock:
                self._cache(constraint.grammar, matcher)
        return _Follower(vocabulary, constraint.grammar, matcher, raw_completion)

    def close(self) -> None:
        """End the process in which grammars are tried."""
        self._worker.close()

    def _cache(self, text: str, matcher: Any) -> None:
        self._compiled[text] = matcher
        while len(self._compiled) > self._entries or sum(map(len, self._compiled)) > self._characters:
            self._compiled.popitem(last=False)

    def _compile(self, vocabulary: Vocabulary, constraint: Constraint) -> Any:
        """The matcher of a grammar, tried in a process of its own first. Raises RequestError."""
        if len(constraint.grammar) > LONGEST:
            raise RequestError(f"{constraint.field}: its grammar has more than {LONGEST} characters; simplify it")
        all_parts = (*constraint.parts, constraint)
        try:
            fault = self._worker.ask([len(vocabulary.tokens), [part.grammar for part in all_parts]], SECONDS)
        except RequestError as error:
            raise RequestError(f"{constraint.field}: {error}") from None
        if fault is not None:
            at, reason = fault
            raise RequestError(f"{all_parts[at].field}: {_reason(reason)}")
        try:
            return compiler.matcher(vocabulary.library, constraint.grammar)
        except ValueError as error:
            raise RequestError(f"{constraint.field}: {_reason(str(error))}") from None


class _Follower:
    """A processor: follows one answer token by token, and starts again when it is called with another one."""

    def __init__(self, vocabulary: Vocabulary, text: str, start: Any, raw_completion: bool) -> None:
        self._vocabulary = vocabulary
        self._text = text
        self._start = start
        self._raw_completion = raw_completion
        self._matcher = start.deep_copy()
        self._followed: list[int] = []

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32], n_prompt: int) -> None:
        """Raises EngineError if the answer does not follow the grammar, or a token takes too much work."""
        v, prompt, answer = self._vocabulary, tokens[:n_prompt], tokens[n_prompt:].tolist()
        begins = not self._raw_completion or v.is_empty_text(prompt)
        try:
            bias = self._follow(answer, begins)
        except EngineError:
            # Answers to one grammar share the states of its lexer, and others may have made too many of them.
            self._start, self._followed = compiler.matcher(v.library, self._text), []
            self._matcher = self._start.deep_copy()
            bias = self._follow(answer, begins)
        allowed = bias[: v.size] != 0
        if begins and not answer:
            allowed[v.spaced] = (bias[v.size :] | bias[v.alike]) != 0
            allowed[v.bare] = True
        allowed[v.stops] = self._matcher.is_accepting()
        np.copyto(logits[: v.size], -math.inf, where=~allowed)
        logits[v.size :] = -math.inf

    def _follow(self, answer: list[int], begins: bool) -> NDArray[np.uint8]:
        """The mask after `answer`: not 0 for the entries of the vocabulary that the grammar allows."""
        if answer[: len(self._followed)] != self._followed:
            self._matcher, self._followed = self._start.deep_copy(), []
        for token in answer[len(self._followed) :]:
            first = begins and not self._followed
            self._followed.append(token)
            if first and token in self._vocabulary.bare:
                continue
            entry = self._vocabulary.first.get(token, token) if first else token
            if not self._matcher.consume_token(entry):
                raise self._failure()
        bias = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        if self._matcher.is_error():
            raise self._failure()
        return bias

    def _failure(self) -> EngineError:
        return EngineError(f"token {len(self._followed)} of the answer: {_reason(self._matcher.get_error())}")


def _reason(text: str) -> str:
    """The library's reason in one line."""
    if match := re.search(r"Unimplemented keys: \[(.*)\]", text):
        return f"keywords that are not supported: {match[1]}"
    return " ".join(text.replace("<non-verbose/>", "").split())[:300] or "the grammar is not followed"


def _cannot_compile(reason: str) -> RequestError:
    return RequestError(f"its grammar cannot be tried: {reason}")
