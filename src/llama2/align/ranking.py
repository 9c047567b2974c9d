"""The objective of reward models: ranking with margins, and a loss for safety beside it (paper 3.2.2; spec 6.3).

B pairs  R rows  T tokens of a row  D width
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.data.pairs import PairBatch
from llama2.model.heads import RewardTransformer
from llama2.train.objective import Network


def ranking_losses(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """−log σ(chosen − rejected − margin) of each pair: three times (B,) → (B,).

    Raises ValueError for shapes that differ, which would be broadcast to losses of pairs that do not exist.
    """
    if not chosen.shape == rejected.shape == margins.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (chosen, rejected, margins))
        raise ValueError(f"scores and margins must have one shape, not {shapes}")
    return -F.logsigmoid(chosen - rejected - margins)


def safety_losses(scores: Tensor, safe: Tensor) -> Tensor:
    """Binary cross-entropy of σ(score) and whether the answer is safe, the mean of a pair's two: (B, 2), (B, 2) → (B,).

    `safe` is 1 or 0; a pair where it is not a number has no label, and the loss 0.
    """
    known = ~safe.isnan()
    losses = F.binary_cross_entropy_with_logits(scores, torch.where(known, safe, 0.0), reduction="none")
    return torch.where(known, losses, 0.0).mean(-1)


def pair_scores(network: Network, batch: PairBatch) -> Tensor:
    """Rewards of both sides, read at the end tokens of the answers: (B, 2) float32."""
    transformer = cast(RewardTransformer, network.transformer)
    hidden_states = network.hidden_states(network.tensor(batch.tokens), network.tensor(batch.documents))  # (R, T, D)
    ends = network.tensor(batch.ends).flatten()  # (2 B,)
    return transformer.scores(hidden_states.flatten(0, 1)[ends]).view(-1, 2)


def ranking(network: Network, batch: PairBatch, *, safety_weight: float = 0.0) -> Tensor:
    """The sum over pairs of the ranking loss, and `safety_weight` times the safety loss: () float32.

    The paper does not publish the latter's formula.
    """
    scores = pair_scores(network, batch)  # (B, 2)
    losses = ranking_losses(scores[:, 0], scores[:, 1], network.tensor(batch.margins))  # (B,)
    if safety_weight:
        losses = losses + safety_weight * safety_losses(scores, network.tensor(batch.safe))
    return losses.sum()
