"""A scalar head in place of the next-token head: a reward model (paper 3.2.2), or beside a policy its value network.

B rows  T tokens of a row  D width
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.checkpoint import SCORE_HEAD, Checkpoint
from llama2.config import ModelConfig
from llama2.model.transformer import Transformer


class RewardTransformer(Transformer):
    """A transformer whose hidden states a scalar head reads. It has no matrix for the next token's logits.

    The head's name, `score.weight`, is that of transformers' LlamaForSequenceClassification.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, tied_embeddings=True))
        self.score = nn.Linear(config.dim, 1, bias=False)
        self.draw(SCORE_HEAD, self.score.weight)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """Rewards in float32, before any sigmoid: (…, D) → (…)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.score.weight.float()).squeeze(-1)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> RewardTransformer:
        """The checkpoint's network, and its scalar head as in `of`."""
        return cls.of(Transformer.load(checkpoint, dtype=dtype, device=device), checkpoint, seed=seed)

    @classmethod
    def of(cls, network: Transformer, checkpoint: Checkpoint, *, seed: int = 0) -> RewardTransformer:
        """`network`, whose parts it takes, with the checkpoint's scalar head, or one that `seed` draws.

        A new head's weights are normal with deviation 0.02, as transformers draws them; the paper does not say.
        """
        with torch.device("meta"):
            model = cls(network.config)
        model.tok_embeddings, model.layers, model.norm = network.tok_embeddings, network.layers, network.norm
        head = torch.empty(1, model.config.dim)
        model.draw(SCORE_HEAD, head, torch.Generator().manual_seed(seed))
        if SCORE_HEAD in checkpoint.extras:
            head.copy_(torch.from_numpy(checkpoint.extras[SCORE_HEAD].dequantize()))
        model.score.weight = nn.Parameter(head.to(network.norm.weight.device))
        return model


class PolicyAndValue(Transformer):
    """A policy, with its value network: a second network, whose scalar head estimates the return at each token.

    The parameters of the policy have their own names, those of the value network begin with `value.`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.value = RewardTransformer(config)

    @classmethod
    def of(cls, policy: Transformer, value: RewardTransformer) -> PolicyAndValue:
        """The two networks, whose parts it takes. The value head becomes 0, so that no value is large at first."""
        with torch.device("meta"):
            model = cls(policy.config)
        model.tok_embeddings, model.layers, model.norm = policy.tok_embeddings, policy.layers, policy.norm
        model.output, model.value = policy.output, value
        nn.init.zeros_(value.score.weight)
        return model

    def values(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Estimated returns, having read each token and those before it: (B, T) ids → (B, T) float32."""
        return self.value.scores(self.value.hidden_states(tokens, None, documents))
