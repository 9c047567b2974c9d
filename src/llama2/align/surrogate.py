"""The objective of PPO: clipped losses of policy and value (Schulman et al. 2017; paper 3.2.3).

N tokens of answers  R rows  T tokens of a row
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2.model.heads import PolicyAndValue
from llama2.train.objective import Network


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Prompts with their answers in R rows of T tokens, and what is known of the answers' N tokens, in order.

    `places` are those in R × T where the token before each is read: what the policy draws from, and the value of.
    """

    tokens: NDArray[np.int64]  # (R, T)
    documents: NDArray[np.int32]  # (R, T) numbers of a row's sequences, which do not read each other
    places: NDArray[np.int64]  # (N,)
    targets: NDArray[np.int64]  # (N,) the answers' tokens, the end token too
    logprobs: NDArray[np.float32]  # (N,) of the policy that drew them, recomputed in torch
    values: NDArray[np.float32]  # (N,) of the value network at that time
    advantages: NDArray[np.float32]  # (N,)
    returns: NDArray[np.float32]  # (N,)
    source: str = ""

    @property
    def count(self) -> int:
        """Losses, one a token of an answer."""
        return len(self.targets)


def surrogate_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) of each token: twice (N,) → (N,).

    Raises ValueError for shapes that differ, which would be broadcast to losses of tokens that do not exist.
    """
    _refuse_unlike(log_ratios, advantages)
    ratios = log_ratios.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def value_losses(values: Tensor, before: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (V′ − R)²), with V′ at most `clip` from the value before: three times (N,) → (N,).

    Raises ValueError for shapes that differ.
    """
    _refuse_unlike(values, before, returns)
    near = before + (values - before).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def _refuse_unlike(*given: Tensor) -> None:
    if len({each.shape for each in given}) > 1:
        raise ValueError(f"losses need one shape, not {', '.join(str(tuple(each.shape)) for each in given)}")


def token_scores(network: Network, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N,) and values (N,) of the answers' tokens, and the states (N, D) that the policy read."""
    transformer = cast(PolicyAndValue, network.transformer)
    tokens, documents = network.tensor(batch.tokens), network.tensor(batch.documents)
    places, targets = network.tensor(batch.places), network.tensor(batch.targets)
    states = network.hidden_states(tokens, documents).flatten(0, 1)[places]  # (N, D)
    values = transformer.values(tokens, documents).flatten()[places]  # (N,)
    return network.log_probabilities(states, targets), values, states


@dataclass
class Surrogate:
    """The objective: the sum over tokens of the policy's loss and `value_weight` times the value's.

    `seen` has a row for each call since it was emptied. These are sums over its tokens: of both losses, of the
    log-ratio, and of clipped tokens. The largest distance of a ratio from 1 follows, and the number of tokens.
    """

    clip: float
    value_clip: float
    value_weight: float
    seen: list[tuple[float, ...]] = field(default_factory=list)

    def __call__(self, network: Network, batch: RolloutBatch) -> Tensor:
        logprobs, values, _ = token_scores(network, batch)
        advantages, returns = network.tensor(batch.advantages), network.tensor(batch.returns)
        log_ratios = logprobs - network.tensor(batch.logprobs)
        policy = surrogate_losses(log_ratios, advantages, self.clip)
        value = value_losses(values, network.tensor(batch.values), returns, self.value_clip)
        with torch.no_grad():
            away = (log_ratios.exp() - 1).abs()
            sums = policy.sum(), value.sum(), log_ratios.sum(), (away > self.clip).sum(), away.max()
            self.seen.append((*(each.item() for each in sums), batch.count))
        return policy.sum() + self.value_weight * value.sum()

    def means(self) -> dict[str, float]:
        """What was seen since the last call: means over tokens, and the largest distance of a ratio from 1."""
        count = sum(each[-1] for each in self.seen)
        names = ("policy_loss", "value_loss", "log_ratio", "clipped")
        found = {name: sum(each[i] for each in self.seen) / count for i, name in enumerate(names)}
        found["ratio_away"] = max(each[4] for each in self.seen)
        self.seen.clear()
        return found
