"""Answers that follow a grammar: JSON, a JSON schema, a regular expression, or llguidance's Lark.

    constrainer = Constrainer(model.tokenizer)                       # once a model
    constraint = json_schema(schema, "response_format.json_schema.schema")
    request = Request(prompt, processors=(constrainer.processor(constraint),))

A processor belongs to one answer: make one for each choice. It masks logits by the history alone, so that tokens do not
depend on drafts, on preemption, or on what else runs.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from llama2.errors import EngineError, RequestError
from llama2.serve.constrain import compiler, schemas
from llama2.text.tokenizer import Tokenizer, one_line
from llama2.text.worker import Worker

if TYPE_CHECKING:
    from llama2.engine.request import Processor

#: Seconds that trying a grammar may take before its process is killed.
SECONDS = 1.0
#: Characters of a grammar.
LONGEST = 1 << 19

#: One space, or one line end and an indentation, where JSON allows white space: a weak model would not stop otherwise.
_OPTIONS = {"whitespace_pattern": r"[ ]|\r?\n[ \t]{0,40}"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar as llguidance reads it, and the request's field that it comes from, which errors name.

    `parts` are grammars that it is made of, whose own fields are named where they are at fault. `schema` is the JSON
    schema that it is, as it may stand in another grammar. `notes` say what of the field it does not hold an answer to.
    """

    grammar: str
    field: str
    parts: tuple[Constraint, ...] = ()
    schema: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes of the parts, and its own."""
        return tuple(note for part in self.parts for note in part.warnings) + self.notes


def json_object(field: str = "response_format") -> Constraint:
    """Any JSON object."""
    return json_schema({"type": "object"}, field)


def json_schema(schema: Mapping[str, Any], field: str, *, strict: bool = True) -> Constraint:
    """JSON that a schema describes, its properties in the schema's order.

    Unless `strict`, keywords that no grammar can hold an answer to are dropped with a note (`schemas.prepare`).
    Keywords that no draft of JSON Schema knows are annotations, as the standard says. Raises RequestError.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{field} must be a JSON schema, an object, not {type(schema).__name__}")
    prepared, dropped = schemas.prepare(schema, field, strict=strict)
    options = _OPTIONS if strict else {**_OPTIONS, "coerce_one_of": True}
    try:
        text = json.dumps({**prepared, "x-guidance": options}, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: not a JSON schema ({one_line(error)})") from None
    notes = (f"{field}: no grammar holds an answer to {', '.join(dropped)}",) if dropped else ()
    return Constraint(f'{{"grammars": [{{"json_schema": {text}}}]}}', field, schema=text, notes=notes)


def regex(pattern: str, field: str) -> Constraint:
    """Text that a regular expression of Rust's syntax matches from beginning to end; there is no look-around."""
    try:
        return Constraint(LLMatcher.grammar_from_regex(pattern), field)
    except UnicodeEncodeError as error:
        raise RequestError(f"{field}: character {error.start} is a lone surrogate; remove it") from None


def lark(source: str, field: str, parts: tuple[Constraint, ...] = ()) -> Constraint:
    """Text of a Lark grammar with llguidance's extensions, from its rule `start`."""
    return Constraint(json.dumps({"grammars": [{"lark_grammar": source}]}), field, parts)


def choice(texts: Sequence[str], field: str) -> Constraint:
    """One of several texts."""
    return lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts), field)


def grammar(source: str, field: str) -> Constraint:
    """Text of a grammar: llama.cpp's notation where rules are defined by `::=`, else llguidance's Lark."""
    return gbnf(source, field) if "::=" in source else lark(source, field)


def gbnf(source: str, field: str) -> Constraint:
    """Text of a grammar in llama.cpp's notation, from its rule `root`. Raises RequestError."""
    try:
        return lark(gbnf_to_lark(source), field)
    except Exception as error:  # the library raises plain ones
        raise RequestError(f"{field}: not GBNF ({one_line(error)})") from None


class Constrainer:
    """Makes processors for one model's vocabulary, and keeps the grammars that were used last.

    Of `entries` compiled grammars each takes at most about 20 MB, as a rule a hundredth of that; their texts have at
    most `characters` together. Safe to call from several threads; a grammar that is new takes some milliseconds, at
    worst about two `SECONDS`, so not in an event loop.
    """

    def __init__(self, tokenizer: Tokenizer, *, entries: int = 32, characters: int = 4 << 20) -> None:
        self._tokenizer = tokenizer
        self._entries, self._characters = entries, characters
        self._lock = Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def processor(self, constraint: Constraint, *, continues: bool = False) -> Processor:
        """What holds one answer to `constraint`; `continues` as in Request.

        Raises RequestError that names the constraint's field when its grammar is malformed, unsupported, or exceeds
        its limits.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer)
            vocabulary = self._vocabulary
            matcher = self._compiled.get(constraint.grammar)
            if matcher is not None:
                self._compiled.move_to_end(constraint.grammar)
        if matcher is None:
            matcher = vocabulary.compile(constraint)
            with self._lock:
                self._keep(constraint.grammar, matcher)
        return _Follower(vocabulary, constraint.grammar, matcher, continues)

    def _keep(self, text: str, matcher: Any) -> None:
        self._compiled[text] = matcher
        while len(self._compiled) > self._entries or sum(map(len, self._compiled)) > self._characters:
            self._compiled.popitem(last=False)


class _Vocabulary:
    """What llguidance knows of a tokenizer: V tokens, then those that lose their space at the start of an answer.

    SentencePiece puts a space before a text and takes it away again, so `▁{` as an answer's first token is `{`. It has
    a second entry after the vocabulary's end, with the bytes that it then stands for.
    """

    is_tokenizer_wrapper = True  # what llguidance asks of an object with the attributes that follow
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.stop_ids:
            raise RequestError("this model has no token that ends an answer, so none can follow a grammar")
        self.size = tokenizer.vocab_size
        self.stops = np.array(sorted(tokenizer.stop_ids))
        texts = {token: text.encode() for text, token in tokenizer.control.items()}
        self.special_token_ids = sorted({*texts, *tokenizer.stop_ids})
        self.tokens = [texts.get(token) or tokenizer.token_bytes(token) for token in range(self.size)]
        self.eos_token_id = int(self.stops[0])
        self.spaced = np.array([t for t in range(self.size) if tokenizer.drops_space(t)], np.int64)
        self.first = {int(token): self.size + i for i, token in enumerate(self.spaced)}
        self.bare = [token for token in self.first if len(self.tokens[token]) == 1]  # nothing but the space
        ids = {text: token for token, text in enumerate(self.tokens)}  # the last: single bytes come first
        bare = [self.tokens[token][1:] for token in self.first]
        # What must come is one token as a rule, and then its like with the same bytes are not allowed by themselves.
        self.alike = np.array([ids.get(text, self.size + i) for i, text in enumerate(bare)], np.int64)
        self.tokens += bare
        self._tokenizer = tokenizer
        self._library = LLTokenizer(cast(Any, self))

    def __call__(self, text: str) -> list[int]:
        """Tokens of what must come next, in the middle of a text: as the tokenizer has them, or else the longest."""
        encode, before = self._tokenizer.encode, "\n" if self.first else ""
        tokens = encode(before + text)[len(encode(before)) :]
        exact = b"".join(map(self._tokenizer.token_bytes, tokens)) == text.encode()
        return tokens if exact else self._library.greedy_tokenize(text)

    def says_nothing(self, tokens: NDArray[np.int32]) -> bool:
        """Whether `tokens` are a prompt without text, after which an answer starts a text of its own."""
        return not any(map(self._tokenizer.token_bytes, tokens))  # which stops at the first that says something

    def compile(self, constraint: Constraint) -> Any:
        """The matcher of a grammar, tried in a process of its own first. Raises RequestError."""
        if len(constraint.grammar) > LONGEST:
            raise RequestError(f"{constraint.field}: its grammar has more than {LONGEST} characters; simplify it")
        all_parts = (*constraint.parts, constraint)
        try:
            fault = _worker.ask([len(self.tokens), [part.grammar for part in all_parts]], SECONDS)
        except RequestError as error:
            raise RequestError(f"{constraint.field}: {error}") from None
        if fault is not None:
            at, reason = fault
            raise RequestError(f"{all_parts[at].field}: {_reason(reason)}")
        try:
            return self.matcher(constraint.grammar)
        except ValueError as error:
            raise RequestError(f"{constraint.field}: {_reason(str(error))}") from None

    def matcher(self, text: str) -> Any:
        """The matcher of a grammar that has been tried. Raises ValueError."""
        return compiler.matcher(self._library, text)


class _Follower:
    """A processor: follows one answer token by token, and starts anew when it is given another one."""

    def __init__(self, vocabulary: _Vocabulary, text: str, start: Any, continues: bool) -> None:
        self._vocabulary = vocabulary
        self._text = text
        self._start = start
        self._continues = continues
        self._matcher = start.deep_copy()
        self._followed: list[int] = []

    def __call__(self, logits: NDArray[np.float32], tokens: NDArray[np.int32], n_prompt: int) -> None:
        """Raises EngineError when the answer does not follow the grammar, or a token takes too much work."""
        v, prompt, answer = self._vocabulary, tokens[:n_prompt], tokens[n_prompt:].tolist()
        begins = not self._continues or v.says_nothing(prompt)
        try:
            bias = self._follow(answer, begins)
        except EngineError:
            # Answers to one grammar share the states of its lexer, of which others may have made too many.
            self._start, self._followed = v.matcher(self._text), []
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
        """What may come after `answer`: not 0 for the entries of the vocabulary that the grammar allows."""
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


_worker = Worker(compiler.__file__, lambda reason: RequestError(f"its grammar cannot be tried: {reason}"))
