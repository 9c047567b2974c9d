"""Reward models for tests: a network with a random scalar head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from llama2 import checkpoint
from llama2.checkpoint import SCORE_HEAD, Tensor, hf_folder


def write_reward_model(policy: Path, folder: Path, seed: int, *, deviation: float = 0.3) -> None:
    """Write a policy's network with a random scalar head, as a folder."""
    with checkpoint.open(policy) as model:
        head = np.random.default_rng(seed).normal(0, deviation, (1, model.config.dim)).astype("<f4")
        extras = {SCORE_HEAD: Tensor(SCORE_HEAD, "F32", head.shape, head.view(np.uint8).reshape(-1))}
        hf_folder.write(replace(model, extras=extras), folder)
