"""The answers of a policy as batches to learn from: drawn, judged, and read again in torch (paper 3.2.3).

The network's own rollouts are the loop's batches. An iteration draws one answer to each of its prompts, before its
first step. What it draws follows from the weights and the seed alone. So a run that is resumed after an iteration goes
on to the same weights.

n answers  N tokens of a batch's answers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llama2.align.advantages import gae, logit, token_rewards, whiten
from llama2.align.feedback import DrawnAnswer, Judgement
from llama2.align.surrogate import RolloutBatch, token_scores
from llama2.data.loader import Loader
from llama2.data.pairs import in_rows
from llama2.data.prompts import TaggedPrompt
from llama2.engine.engine import Engine
from llama2.engine.request import Sampling
from llama2.engine.rollout import Rollout, rollout
from llama2.errors import RunError
from llama2.model.lora import without_adapters
from llama2.train.objective import Network
from llama2.train.step import Step


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt, and the token ids that ask the policy for an answer."""

    prompt: TaggedPrompt
    tokens: NDArray[np.int32]  # (n,)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Some prompts: what a loader deals."""

    prompts: tuple[RenderedPrompt, ...]
    source: str = ""

    @property
    def count(self) -> int:
        """How many."""
        return len(self.prompts)


class Judge(Protocol):
    """What gives each answer its reward, such as `Feedback`."""

    def __call__(self, prompts: Sequence[TaggedPrompt], answers: Sequence[DrawnAnswer], /) -> Judgement:
        """Rewards of one answer to each prompt."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How answers are drawn, and how rewards become advantages: the settings of PpoRecipe, by its names."""

    rollouts: int
    max_tokens: int
    stop_tokens: frozenset[int]
    seed: int
    beta: float
    gamma: float
    lam: float
    whiten: bool


@dataclass
class _Read:
    """A micro-batch, and of each of its answers what the passes without gradients say of its tokens."""

    batch: RolloutBatch
    logprobs: list[NDArray[np.float64]]
    reference: list[NDArray[np.float64]]
    values: list[NDArray[np.float64]]
    entropy: float  # sum over tokens


class Experience:
    """Batches of the network's own answers: the loop's `Batches`.

    `engine` runs the network that `step` trains. `reference` is the policy at its start; None: the network without its
    adapters. `changed` hands the weights over to the engine, and empties its prefix cache.
    """

    def __init__(
        self,
        step: Step,
        loader: Loader[Any],
        engine: Engine,
        judge: Judge,
        settings: RolloutSettings,
        *,
        reference: Network | None = None,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self.step, self.engine, self.judge, self.settings = step, engine, judge, settings
        self.iteration = 0
        self.measured: dict[str, float] = {}  # of the last iteration's answers
        self.seconds: dict[str, float] = {}  # that it took to draw, to judge and to read
        self.memory: dict[str, Any] = {}  # what callbacks remember
        self._loader, self._reference = loader, reference
        self._changed = changed or engine.weights_changed
        self._left: list[RolloutBatch] = []

    @property
    def epoch(self) -> float:
        """How often all prompts were answered."""
        return self._loader.epoch

    def next(self) -> RolloutBatch:
        """The next micro-batch; after the last of an iteration, those of another."""
        if not self._left:
            self._left = self._iterate()[::-1]
        return self._left.pop()

    def state(self) -> dict[str, Any]:
        """What `restore` continues from. Raises RunError within an iteration, whose answers are not saved."""
        if self._left:
            raise RunError("a state within an iteration: save.every must be a multiple of the steps of an iteration")
        return {"prompts": self._loader.state(), "iteration": self.iteration, "memory": self.memory}

    def restore(self, state: Any) -> None:
        """Continue from a state. Raises DataError when it was of other prompts."""
        self._loader.restore(state["prompts"])
        self.iteration, self.memory, self._left = state["iteration"], state["memory"], []

    def draw(self, prompts: Sequence[RenderedPrompt], seed: Sequence[int]) -> list[Rollout]:
        """An answer to each prompt by the weights as they are: at temperature 1, and nothing cut off."""
        self._changed()
        s = self.settings
        number = int(np.random.SeedSequence([s.seed, *seed]).generate_state(1, np.uint64)[0])
        sampling = Sampling(temperature=1, top_p=1, seed=number)
        tokens = [prompt.tokens.tolist() for prompt in prompts]
        groups = rollout(self.engine, tokens, 1, sampling, max_tokens=s.max_tokens, stop_tokens=s.stop_tokens)
        return [group[0] for group in groups]

    def answers(self, rollouts: Sequence[Rollout]) -> list[DrawnAnswer]:
        """Rollouts as text. The end token is looked for in the answer alone, by how the engine ended it."""
        decode = self.engine.tokenizer.decode
        found = []
        for each in rollouts:
            ended = each.finish_reason == "stop"
            ids = each.tokens.tolist()
            found.append(DrawnAnswer(decode(ids[:-1] if ended else ids), ended, len(ids)))
        return found

    def _iterate(self) -> list[RolloutBatch]:
        """Draw, judge, read, and compute advantages."""
        count = 0
        dealt: list[PromptBatch] = []
        while count < self.settings.rollouts:
            dealt.append(self._loader.next())
            count += dealt[-1].count
        prompts = [prompt for batch in dealt for prompt in batch.prompts]
        self.iteration += 1
        times = [time.perf_counter()]
        rollouts = self.draw(prompts, [0, self.iteration])
        times.append(time.perf_counter())
        answers = self.answers(rollouts)
        judgement = self.judge([prompt.prompt for prompt in prompts], answers)
        times.append(time.perf_counter())
        reads, at = [], 0
        for batch in dealt:
            reads.append(self._read(batch.prompts, rollouts[at : at + batch.count]))
            at += batch.count
        batches = self._advantages(reads, judgement)
        times.append(time.perf_counter())
        self.seconds = dict(zip(("draw", "judge", "read"), np.diff(times).tolist(), strict=True))
        self.measured = measures(answers, judgement) | self._divergences(reads, rollouts)
        return batches

    @torch.no_grad()
    def _read(self, prompts: Sequence[RenderedPrompt], rollouts: Sequence[Rollout]) -> _Read:
        """A micro-batch as the step will read it: policy, value and reference in the same rows, in the same numbers.

        That is why ratios are 1 before a step: the engine's own log-probabilities are of other arithmetic.
        """
        step, network = self.step, self.step.running
        empty = np.empty(0, np.float32)
        batch = replace(_rows(prompts, rollouts), logprobs=empty, values=empty, advantages=empty, returns=empty)
        step.network.eval()
        with step.autocast():
            logprobs, values, states = token_scores(network, batch)
            entropy = float(network.entropies(states).sum())
            with without_adapters(step.network) if self._reference is None else nullcontext():
                reference = reference_logprobs(self._reference or network, batch)
        ends = np.cumsum([len(each.tokens) for each in rollouts])[:-1]

        def by_answer(each: torch.Tensor) -> list[NDArray[np.float64]]:
            return np.split(each.double().cpu().numpy(), ends)

        batch = replace(batch, logprobs=logprobs.cpu().numpy(), values=values.cpu().numpy())
        return _Read(batch, by_answer(logprobs), by_answer(reference), by_answer(values), entropy)

    def _advantages(self, reads: Sequence[_Read], judgement: Judgement) -> list[RolloutBatch]:
        """The micro-batches with advantages and returns: whitened over answers, and over tokens of answers alone."""
        s = self.settings
        rewards = iter(whiten(logit(judgement.reward)).tolist())
        found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        for read in reads:
            advantages, returns = [], []
            for logprobs, reference, values in zip(read.logprobs, read.reference, read.values, strict=True):
                each = token_rewards(next(rewards), logprobs, reference, s.beta)
                advantages.append(np.array(gae(each.tolist(), values.tolist(), s.gamma, s.lam)))
                returns.append(advantages[-1] + values)
            found.append((np.concatenate(advantages), np.concatenate(returns)))
        whole = np.concatenate([advantages for advantages, _ in found])
        whole = whiten(whole) if s.whiten else whole
        ends = np.cumsum([len(advantages) for advantages, _ in found])[:-1]
        return [
            replace(read.batch, advantages=advantages.astype(np.float32), returns=returns.astype(np.float32))
            for read, advantages, (_, returns) in zip(reads, np.split(whole, ends), found, strict=True)
        ]

    def _divergences(self, reads: Sequence[_Read], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """KL from the start in nats an answer, entropy of a token, and the gap to the engine's log-probabilities."""
        ours = [each for read in reads for each in read.logprobs]
        reference = [each for read in reads for each in read.reference]
        gaps = np.abs(np.concatenate(ours) - np.concatenate([each.logprobs for each in rollouts]))
        kl = [float((mine - theirs).sum()) for mine, theirs in zip(ours, reference, strict=True)]
        return {
            "kl": float(np.mean(kl)),
            "entropy": sum(read.entropy for read in reads) / len(gaps),
            "engine_gap": float(gaps.mean()),
            "engine_gap_max": float(gaps.max()),
        }


def reference_logprobs(network: Network, batch: RolloutBatch) -> torch.Tensor:
    """Log-probabilities (N,) of the answers' tokens by a network alone, in the rows of the batch."""
    states = network.hidden_states(network.tensor(batch.tokens), network.tensor(batch.documents))
    return network.log_probabilities(states.flatten(0, 1)[network.tensor(batch.places)], network.tensor(batch.targets))


def _rows(prompts: Sequence[RenderedPrompt], rollouts: Sequence[Rollout]) -> RolloutBatch:
    """Prompts with their answers in rows. Which tokens are the answers' follows from their places, never from ids.

    An end token may be what others pad with, and a prompt may have one.
    """
    pairs = [(prompt.tokens, each.tokens) for prompt, each in zip(prompts, rollouts, strict=True)]
    tokens, documents, ends = in_rows([np.concatenate(pair).astype(np.int32) for pair in pairs])
    # The token before the answer's first is where that is drawn, and so on; the last token draws nothing.
    places = np.concatenate([np.arange(end - len(answer), end) for end, (_, answer) in zip(ends, pairs, strict=True)])
    none = np.empty(0, np.float32)
    return RolloutBatch(tokens, documents, places, tokens.flatten()[places + 1], none, none, none, none)


def measures(answers: Sequence[DrawnAnswer], judgement: Judgement) -> dict[str, float]:
    """Of some answers: rewards, length, and shares of those without an end token, and of those that are different."""
    return {
        **judgement.measures(),
        "tokens": float(np.mean([answer.tokens for answer in answers])),
        "cut": float(np.mean([not answer.ended for answer in answers])),
        "distinct": len({answer.text for answer in answers}) / len(answers),
    }
