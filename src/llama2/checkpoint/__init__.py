"""A model on disk ⇄ Checkpoint(config, tokenizer, tensors): memory-mapped, lazy, every size checked before use.

Names are Meta's (`layers.0.attention.wq.weight`); rows of wq and wk are in Meta's interleaved rotary order. Each
public format is adapted to that by a file of its own in this package.
"""

from __future__ import annotations

from llama2.checkpoint.checkpoint import SCORE_HEAD, Checkpoint
from llama2.checkpoint.opening import open
from llama2.checkpoint.tensor import Tensor

__all__ = ["SCORE_HEAD", "Checkpoint", "Tensor", "open"]
