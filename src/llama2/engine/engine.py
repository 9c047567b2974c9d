"""Tokens in, tokens out: schedule, run, sample, emit; one step at a time for any number of requests."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from llama2.ending import section
from llama2.engine import sampling
from llama2.engine.cache import hash_blocks
from llama2.engine.embedding import Pool
from llama2.engine.lookup import Lookup
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import EngineStats, Event, FinishReason, Logprob, Request, answer_limit
from llama2.engine.runner import BLOCK, Batch, LiveRunner, Runner
from llama2.engine.sampling import Sampler
from llama2.engine.scheduler import MAX_PREFILL_TOKENS, MAX_SEQUENCES, Scheduler, Sequence, blocks_for
from llama2.engine.stop import AnswerText
from llama2.errors import EngineError, Llama2Error, RequestError
from llama2.text.tokenizer import Tokenizer


@dataclass(slots=True, eq=False, kw_only=True)
class RunningRequest(Sequence):
    """A request on its way: its tokens so far, and what draws them and turns them into text."""

    request: Request
    tokens: NDArray[np.int32]  # the first `length` are known; drafts of a step, or a token to be scored, follow them
    table: NDArray[np.int32]  # (W,) its cache blocks, −1 past the last
    sampler: Sampler
    text: AnswerText
    stop_tokens: frozenset[int]
    score_from: int | None  # position of the first token that is scored, until those of a prompt are in an event
    score_end: int  # position after the last one
    scores: list[Logprob]  # of the tokens from score_from on, as far as they are known
    continuation_logprobs: list[list[Logprob]]  # of each, once the prompt has run; one of them is `scores`
    pool: Pool | None
    lookup: Lookup | None
    thread: int  # that asked for it
    cached_tokens: int = 0  # of the prompt, that were found in the cache
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class ScheduledSequence:
    """What a step runs of one sequence: its next `tokens` known tokens, then `drafts` drafted ones.

    Logits are needed for the last `logit_rows` of all these.
    """

    sequence: RunningRequest
    tokens: int
    drafts: int
    logit_rows: int


class Engine(EngineProtocol):
    """Answers requests with one runner, batching those that are there together.

    `context` shortens the model's own; the runner's cache bounds it too. Nobody waits for a forward pass but those who
    want its events.
    """

    runs_processors = True
    scores_continuations = True

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        max_batch_tokens: int = 512,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        generates: bool = True,
    ) -> None:
        """`generates` is False for a reward model, whose output head says nothing."""
        self.runner = runner
        self.generates = generates
        self.arithmetic = runner.arithmetic
        self.tokenizer = tokenizer
        self.context = min(context or runner.config.context_length, runner.n_blocks * BLOCK)
        self.scheduler: Scheduler[RunningRequest] = Scheduler(
            runner.n_blocks,
            max_batch_tokens=max_batch_tokens,
            max_prefill_tokens=max_prefill_tokens,
            max_sequences=max_sequences,
        )
        self._ids = itertools.count()
        self._active: dict[int, RunningRequest] = {}
        self._events: list[Event] = []  # to be returned by the next step
        self._queues: dict[int, deque[Event]] = {}  # those of requests that `run` follows
        self._stepping = threading.RLock()  # held for a whole step, and taken before the other
        self._lock = threading.RLock()  # held for bookkeeping
        self._range = np.arange(max(self.context, max_batch_tokens), dtype=np.int32)
        self._batch = Batch(
            tokens=np.empty(max_batch_tokens, np.int32),
            positions=np.empty(max_batch_tokens, np.int32),
            sequences=np.empty(max_batch_tokens, np.int32),
            blocks=np.empty((max_sequences, blocks_for(self.context)), np.int32),
            outputs=np.empty(max_batch_tokens, np.int32),
        )
        _watch_forks()
        _engines.add(self)

    @property
    def busy(self) -> bool:
        return bool(self._active or self._events)

    @property
    def stats(self) -> EngineStats:
        with section, self._lock:
            s = self.scheduler
            return EngineStats(
                running=len(s.running),
                waiting=len(s.waiting),
                prefill_tokens=sum(g.length - g.cached for g in (*s.running, *s.waiting) if g.length - g.cached > 1),
                blocks=s.cache.total,
                held_blocks=s.cache.total - s.cache.available,
                evictable_blocks=s.cache.evictable,
                preemptions=s.preemptions,
            )

    def add(self, request: Request) -> int:
        generation = self._prepare(request)
        self._enqueue(generation)
        return generation.id

    def cancel(self, id: int) -> None:
        with section, self._lock:
            if generation := self._active.get(id):
                self._events.append(self._finish(generation, "cancelled"))

    def run(self, *requests: Request) -> Iterator[Event]:
        return self._follow([self._prepare(request) for request in requests])

    def close(self) -> None:
        """It started nothing."""

    def step(self) -> list[Event]:
        """Run the model once over what is scheduled, and return the new events of the added requests.

        A request fails alone, with `finish="error"`, unless the forward pass does: then all that were in it fail.
        """
        with section, self._stepping:
            with self._lock:
                parts = self._plan()
                batch = self._fill(parts)
            if parts:
                hidden = self._hidden(parts, batch)
                logits = self._forward(batch, hidden)
            with self._lock:
                if parts:
                    self._account(parts, logits, hidden)
                events, self._events = self._events, []
                rest: list[Event] = []
                for event in events:
                    self._queues.get(event.request, rest).append(event)
                return rest

    def weights_changed(self) -> None:
        """Use the weights as they are now: no key or value of those before is found again.

        Call it after every change of a live network, between answers. Raises EngineError while requests are there,
        whose cache is of the weights before, and for a runner over a checkpoint, whose weights do not change.
        """
        if not isinstance(self.runner, LiveRunner):
            raise EngineError(
                f"{type(self.runner).__name__} runs a checkpoint, whose weights do not change; use a live runner"
            )
        with section, self._stepping, self._lock:
            if count := len(self._active):
                raise EngineError(f"{count} requests run with the weights before; finish or cancel them first")
            self.scheduler.cache.clear()
            self.runner.weights_changed()

    def _prepare(self, request: Request) -> RunningRequest:
        length = len(request.prompt)
        answer = answer_limit(request, self.context, self.runner.config.vocab_size)
        if answer and not self.generates:
            raise RequestError(
                "this is a reward model, which scores answers and writes none; ask it with `llama2 reward score`"
            )
        tokens = np.empty(length + answer, np.int32)
        tokens[:length] = request.prompt
        block_hashes: list[bytes] = []
        hash_blocks(block_hashes, tokens[:length])
        score_from = length if request.continuations else request.score_from
        prefix_limit = len(tokens) if score_from is None else score_from - 1
        if not request.cache_prompt or request.pooling == "mean":
            prefix_limit = 0
        return RunningRequest(
            id=next(self._ids),
            length=length,
            limit=length if request.continuations else length + answer,
            block_hashes=block_hashes,
            prefix_limit=prefix_limit,
            request=request,
            tokens=tokens,
            table=np.full(self._batch.blocks.shape[1], -1, np.int32),
            sampler=Sampler(request),
            text=AnswerText(request, self.tokenizer),
            stop_tokens=self.tokenizer.stop_ids | request.stop_tokens,
            score_from=score_from,
            score_end=length,
            scores=[],
            continuation_logprobs=[],
            pool=Pool(request.pooling) if request.pooling else None,
            lookup=Lookup(request.lookup) if request.lookup else None,
            thread=threading.get_ident(),
        )

    def _enqueue(self, generation: RunningRequest) -> None:
        with section, self._lock:
            self.scheduler.add(generation)
            self._active[generation.id] = generation

    def _release(self, generation: RunningRequest) -> None:
        self.scheduler.remove(generation)
        del self._active[generation.id]

    def _follow(self, generations: list[RunningRequest]) -> Iterator[Event]:
        queue: deque[Event] = deque()
        self._queues |= {generation.id: queue for generation in generations}
        try:
            for generation in generations:
                self._enqueue(generation)
            unfinished = len(generations)
            while unfinished:
                with section, self._stepping:
                    if not queue:
                        rest = self.step()
                        with self._lock:
                            self._events[:0] = rest  # for the next caller of step
                while queue:
                    event = queue.popleft()
                    unfinished -= event.finish is not None
                    yield event
        finally:
            with section, self._lock:
                for generation in generations:
                    if generation.id in self._active:
                        self._release(generation)
                    del self._queues[generation.id]

    def _plan(self) -> list[ScheduledSequence]:
        """The next step: what the scheduler says, and drafts in the room that it leaves, in order of arrival."""
        plan = self.scheduler.schedule()
        room = self.scheduler.max_batch_tokens - sum(count for _, count in plan)
        parts = []
        for g, count in plan:
            drafts, last = 0, g.cached + count == g.length
            if last and g.lookup is not None:
                # The answer's last token is drawn but never run, and the one before it is the last draft of use.
                draft = g.lookup.draft(g.tokens[: g.length], min(room, g.limit - g.length - 1))
                drafts = self.scheduler.reserve(g, count + len(draft)) - count
                g.tokens[g.length : g.length + drafts] = draft[:drafts]
                g.drafted += drafts
                room -= drafts
            parts.append(ScheduledSequence(g, count, drafts, _known_rows(g, count) + drafts))
        return parts

    def _hidden(self, parts: list[ScheduledSequence], batch: Batch) -> NDArray[np.float32] | None:
        """Where the runner is to write the step's hidden states, if a part is embedded: (N, D)."""
        if all(part.sequence.pool is None for part in parts):
            return None
        return np.empty((len(batch.tokens), self.runner.config.dim), np.float32)

    def _forward(self, batch: Batch, hidden: NDArray[np.float32] | None) -> NDArray[np.float32] | Exception:
        try:
            return self.runner.forward(batch, hidden)
        except Exception as error:
            return error

    def _account(
        self,
        parts: list[ScheduledSequence],
        logits: NDArray[np.float32] | Exception,
        hidden: NDArray[np.float32] | None,
    ) -> None:
        """Go on with every request of a step that was not cancelled meanwhile."""
        end = tokens = 0
        for part in parts:
            start, end = end, end + part.logit_rows
            first, tokens = tokens, tokens + part.tokens + part.drafts
            if part.sequence.id not in self._active:
                continue
            try:
                if isinstance(logits, Exception):
                    raise logits
                self._advance(part, logits[start:end], None if hidden is None else hidden[first:tokens])
            except Exception as error:
                self._events.append(self._fail(part.sequence, error))

    def _fill(self, parts: list[ScheduledSequence]) -> Batch:
        """The step's batch: views of arrays that every step writes anew."""
        batch = self._batch
        n = m = 0
        for s, part in enumerate(parts):
            generation, count = part.sequence, part.tokens + part.drafts
            start, end = generation.cached, generation.cached + count
            if (placed := generation.placed) < len(generation.blocks):
                generation.table[placed : len(generation.blocks)] = generation.blocks[placed:]
                generation.placed = len(generation.blocks)
            if count == 1:  # an answer that grows, as most do: numbers are quicker than views of one
                batch.tokens[n], batch.positions[n], batch.sequences[n] = generation.tokens[start], start, s
            else:
                batch.tokens[n : n + count] = generation.tokens[start:end]
                batch.positions[n : n + count] = self._range[start:end]
                batch.sequences[n : n + count] = s
            batch.blocks[s] = generation.table
            n += count
            if part.logit_rows == 1:
                batch.outputs[m] = n - 1
            else:
                batch.outputs[m : m + part.logit_rows] = self._range[n - part.logit_rows : n]
            m += part.logit_rows
        return Batch(
            batch.tokens[:n], batch.positions[:n], batch.sequences[:n], batch.blocks[: len(parts)], batch.outputs[:m]
        )

    def _advance(
        self, part: ScheduledSequence, logits: NDArray[np.float32], hidden: NDArray[np.float32] | None
    ) -> None:
        """Account for the tokens that ran, and draw what follows the known ones: logits (rows, V), hidden (tokens, D).

        After the last known token comes a drawn one. While it equals the draft at its place, it has already run, and
        the row after it draws the next.
        """
        g = part.sequence
        if g.score_from is not None:
            _score(g, g.score_from, part.tokens, logits)
        if g.pool is not None and hidden is not None:
            g.pool.push(g.cached, hidden)
        g.cached += part.tokens
        if g.cached < g.length:
            return
        if g.length == len(g.request.prompt):
            g.cached_tokens = g.prefix_hit_tokens
        if g.request.continuations and _continue(g, logits[-1]):
            return
        if g.length == g.limit:  # nothing but log-probabilities or an embedding was asked for
            embedding = None if g.pool is None else g.pool.vector()
            scores = tuple(map(tuple, g.continuation_logprobs)) or None
            last = self._finish(g, "length")._replace(embedding=embedding, continuation_logprobs=scores)
            self._events.append(last)
            return
        drafts = g.tokens[g.length : g.length + part.drafts].tolist()
        for row, draft in zip(logits[-1 - part.drafts :], (*drafts, None), strict=True):
            event = self._draw(g, row, draft)
            self._events.append(event)
            if event.finish is not None or event.token != draft:
                return
            g.cached += 1

    def _draw(self, g: RunningRequest, row: NDArray[np.float32], draft: int | None) -> Event:
        """The answer's next token, from its logits (V,)."""
        raw = row.copy() if g.request.processors else row
        token = g.sampler.draw(row, g.tokens[: g.length])
        logprob = None if g.request.logprobs is None else _logprob(g, raw, token)
        g.accepted += token == draft
        g.tokens[g.length] = token
        g.length += 1
        if g.length % BLOCK == 0:
            hash_blocks(g.block_hashes, g.tokens[: g.length])
        if token in g.stop_tokens:
            return self._finish(g, "stop", token, logprob=logprob)
        text = g.text.push(token)
        if g.text.found:
            return self._finish(g, "stop", token, text, logprob=logprob)
        if g.length == g.limit:
            return self._finish(g, "length", token, text, logprob=logprob)
        return self._event(g, token, text, logprob)

    def _fail(self, g: RunningRequest, error: Exception) -> Event:
        """Free the cache of `g`; its last event says what went wrong."""
        self._release(g)
        reason = str(error) if isinstance(error, Llama2Error) else f"{type(error).__name__}: {error}"
        return _last(self._event(g), g, "error")._replace(error=reason)

    def _finish(
        self,
        g: RunningRequest,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        *,
        logprob: Logprob | None = None,
    ) -> Event:
        """Free the cache of `g`; its last event has the text that was held back, unless a stop string cut it."""
        self._release(g)
        return _last(self._event(g, token, text + g.text.flush(), logprob), g, reason)

    def _event(
        self, g: RunningRequest, token: int | None = None, text: str = "", logprob: Logprob | None = None
    ) -> Event:
        """An event of `g`; the first has the log-probabilities of its prompt."""
        scores = None
        if g.score_from is not None and not g.request.continuations:
            scores, g.score_from = tuple(g.scores), None
        return Event(g.id, token, text, None, logprob, None, scores)


def _known_rows(g: RunningRequest, count: int) -> int:
    """How many of the next `count` known tokens of `g` need logits: the last ones."""
    if g.pool is not None:
        return 0
    first = g.length if g.score_from is None else g.score_from
    return min(count, max(0, g.cached + count + 1 - first))


def _score(g: RunningRequest, start: int, count: int, logits: NDArray[np.float32]) -> None:
    """Score those of the tokens from `start` on that follow the next `count` of `g`: logits (rows, V)."""
    first, end = max(g.cached + 1, start), min(g.cached + count + 1, g.score_end)
    del g.scores[first - start :]  # those from before a preemption
    for row, token in zip(logits, g.tokens[first:end].tolist(), strict=False):
        g.scores.append(_logprob(g, row, token))


def _continue(g: RunningRequest, row: NDArray[np.float32]) -> bool:
    """Go back to the prompt's end and on with the next continuation, if one is left.

    The first tokens of all are scored by the prompt's last row of logits (V,). So a continuation of one token needs no
    more, and of any other, all tokens run but the last.
    """
    start = len(g.request.prompt)
    if g.length == start:
        g.continuation_logprobs = [[_logprob(g, row, tokens[0])] for tokens in g.request.continuations]
    for tokens, scores in zip(g.request.continuations, g.continuation_logprobs, strict=True):
        if len(scores) < len(tokens):
            g.scores, g.score_end = scores, start + len(tokens)
            g.tokens[start : g.score_end] = tokens
            g.length = g.limit = g.score_end - 1
            g.cached = start
            return True
    return False


def _logprob(g: RunningRequest, row: NDArray[np.float32], token: int) -> Logprob:
    return sampling.logprob(row, token, g.request.logprobs or 0)


def _last(event: Event, g: RunningRequest, reason: FinishReason) -> Event:
    return event._replace(
        finish=reason,
        cached_tokens=g.cached_tokens,
        drafted_tokens=g.drafted,
        accepted_tokens=g.accepted,
        stop=g.text.found,
    )


#: Engines that a fork may find at work. Filled by `Engine.__init__`; the import registers nothing. It is global because
#: a fork copies the whole process. Its references are weak, so it keeps no engine alive.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_forking: list[Engine] = []


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    """A child has a copy of every engine, but no threads: no lock may be held while the copy is made."""
    engines = sorted(_engines, key=id)  # one order, as several threads may fork
    for engine in engines:
        engine._lock.acquire()
    _forking[:] = engines


def _after_fork() -> None:
    engines = _forking[:]
    _forking.clear()  # before the locks are free, as the next thread that forks waits for them
    for engine in engines:
        engine._lock.release()


def _after_fork_in_child() -> None:
    """Free what the parent's other threads held, and end what they asked for."""
    for engine in _forking:
        engine._stepping = threading.RLock()
        for generation in list(engine._active.values()):
            if generation.thread != threading.get_ident():
                engine.cancel(generation.id)
    _after_fork()
