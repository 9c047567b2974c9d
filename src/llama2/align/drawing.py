"""Answers of a model to prompts, drawn by the engine into the sample store."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llama2.align.store import Policy, SampleStore, StoredSample
from llama2.api import Model
from llama2.data.prompts import PromptReport, TaggedPrompt
from llama2.engine.answer import collect
from llama2.engine.request import Event, Request, Sampling, answer_limit
from llama2.errors import DataError, DialogError, RequestError, TemplateError
from llama2.hub.progress import Progress

_TRIAL = 16  # answers by which the time is estimated
_WINDOW = 1024  # answers that are begun or wait; the engine runs as many of them as its cache holds


@dataclass(frozen=True, slots=True)
class DrawingSpeed:
    """What drawing took."""

    answers: int
    tokens: int
    seconds: float


def render(
    model: Model, prompts: Sequence[TaggedPrompt], max_tokens: int, *, skip_bad: bool, report: PromptReport
) -> dict[str, Request]:
    """A request for an answer to each prompt, by its digest.

    Raises DataError for a prompt that the chat format cannot write, or that leaves no room for an answer. With
    `skip_bad`, `report` counts such prompts.
    """
    requests: dict[str, Request] = {}
    for prompt in prompts:
        try:
            rendered = model.prompt(prompt.messages)
            request = model.answering(Request((), max_tokens), rendered)
            answer_limit(request, model.engine.context, model.config.vocab_size)
        except (DialogError, TemplateError, RequestError) as error:
            reason = f"{prompt.where}: {error}"
            if not skip_bad:
                raise DataError(f"{reason}; prompts.skip_bad=true leaves such out") from None
            report.leave_out(reason)
            continue
        for note in rendered.notes:
            warnings.warn(note, stacklevel=2)
        requests[prompt.id] = request
    return requests


def missing(
    store: SampleStore, requests: Mapping[str, Request], policy: Policy, samples: int
) -> Iterator[tuple[str, int]]:
    """Prompts and numbers of the answers that the store does not have, in order."""
    for prompt in requests:
        for k in range(samples):
            if (prompt, policy, k) not in store.drawn:
                yield prompt, k


def draw(
    model: Model,
    store: SampleStore,
    requests: Mapping[str, Request],
    policy: Policy,
    todo: Sequence[tuple[str, int]],
    *,
    round: str,
    progress: Progress,
) -> DrawingSpeed:
    """Draw the answers `todo` (prompt, k) into the store, in that order, whichever ends first.

    Random numbers are a function of (seed, prompt, k). So an answer has the same bytes whatever is drawn beside it, and
    whenever. Raises EngineError when the model fails.
    """
    engine, start, tokens = model.engine, time.perf_counter(), 0
    left, running = deque(todo), deque[_Running]()
    by_id: dict[int, _Running] = {}
    try:
        while left or running:
            while left and len(running) < _WINDOW:
                prompt, k = left.popleft()
                request = replace(requests[prompt], sampling=_sampling(policy, prompt), choice=k)
                running.append(_Running(engine.add(request), prompt, k, request))
                by_id[running[-1].id] = running[-1]
            for event in engine.step():
                by_id[event.request].events.append(event)
            ended = []
            while running and running[0].ended:
                ended.append(running.popleft())
                del by_id[ended[-1].id]
            samples = [each.sample(policy, round) for each in ended]
            store.add_samples(samples)
            tokens += sum(sample.tokens for sample in samples)
            if samples:
                done = len(todo) - len(left) - len(running)
                progress(f"{round}: answers at temperature {policy.temperature:g}", done, len(todo))
    finally:
        for each in running:
            engine.cancel(each.id)
    return DrawingSpeed(len(todo), tokens, time.perf_counter() - start)


def answers(  # 9 parameters: those of `render`, `missing` and `draw`, which it calls in turn
    model: Model,
    store: SampleStore,
    prompts: Sequence[TaggedPrompt],
    policy: Policy,
    n: int,
    *,
    round: str,
    skip_bad: bool = False,
    report: PromptReport | None = None,
    progress: Progress,
) -> dict[str, list[StoredSample]]:
    """`n` answers to each prompt, by its digest; those that the store does not have are drawn.

    Raises as `render` and `draw`. A prompt that `report` counted has no answers.
    """
    store.add_prompts(prompts)
    requests = render(model, prompts, policy.max_tokens, skip_bad=skip_bad, report=report or PromptReport())
    todo = [*missing(store, requests, policy, n)]
    draw(model, store, requests, policy, todo, round=round, progress=progress)
    return {prompt: [store.drawn[prompt, policy, k] for k in range(n)] for prompt in requests}


def first_missing(
    model: Model,
    store: SampleStore,
    prompts: Sequence[TaggedPrompt],
    policy: Policy,
    n: int,
    *,
    round: str,
    progress: Progress,
) -> tuple[DrawingSpeed, int] | None:
    """Draw the first answers that are missing, whose speed says how long the others take; None where none is missing.

    Returns that speed, and how many were missing. Prompts that cannot be used are left to `answers`.
    """
    store.add_prompts(prompts)
    requests = render(model, prompts, policy.max_tokens, skip_bad=True, report=PromptReport())
    todo = [*missing(store, requests, policy, n)]
    if not todo:
        return None
    return draw(model, store, requests, policy, todo[:_TRIAL], round=round, progress=progress), len(todo)


def estimate(speed: DrawingSpeed, answers: int) -> str:
    """How long so many answers take, in a line, by the speed of the first ones."""
    each = speed.seconds / max(1, speed.answers)
    tokens = round(speed.tokens / max(1, speed.answers) * answers)
    return (
        f"estimate: {answers:,} answers, about {tokens:,} tokens, {each * answers / 3600:.2f} hours; Ctrl-C loses "
        "nothing, and the same command goes on"
    )


@dataclass
class _Running:
    """An answer that is being drawn."""

    id: int  # of the engine's request
    prompt: str
    k: int
    request: Request
    events: list[Event] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].finish is not None

    def sample(self, policy: Policy, round: str) -> StoredSample:
        """Raises EngineError when the model failed."""
        (answer,) = collect(self.events, [self.request])
        tokens = len(answer.token_ids)
        return StoredSample(self.prompt, policy, round, self.k, answer.text, tokens, answer.finish_reason)


def _sampling(policy: Policy, prompt: str) -> Sampling:
    seed = hashlib.sha256(f"{policy.seed} {prompt}".encode()).digest()[:8]
    return Sampling(policy.temperature, policy.top_p, seed=int.from_bytes(seed))
