"""A scalar head in place of the next-token head: what makes a network a reward model (paper 3.2.2).

D width
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
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
        """The checkpoint's network with its scalar head, or with one that `seed` draws where it has none.

        A new head's weights are normal with deviation 0.02, as transformers draws them; the paper does not say.
        """
        with torch.device("meta"):
            model = cls(checkpoint.config)
        weights = {
            name: torch.from_numpy(tensor.dequantize()).to(device, dtype)
            for name, tensor in checkpoint.tensors.items()
            if name in model.config.tensor_shapes()
        }
        if SCORE_HEAD in checkpoint.extras:
            head = torch.from_numpy(np.array(checkpoint.extras[SCORE_HEAD].dequantize()))
        else:
            head = torch.empty(1, model.config.dim)
            model.draw(SCORE_HEAD, head, torch.Generator().manual_seed(seed))
        weights[SCORE_HEAD] = head.to(device, dtype)
        model.load_state_dict(weights, assign=True)
        return model
