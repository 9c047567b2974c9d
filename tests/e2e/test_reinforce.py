"""REINFORCE on a toy: the engine's rollouts over the live network, an objective of its own, the loop of every training.

The reward is how often one token is in the answer. `python tests/e2e/test_reinforce.py` prints the curve as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is run as a program

from fakes import ByteTokenizer
from llama2 import native, records
from llama2.config import ModelConfig
from llama2.data.loader import IGNORED
from llama2.engine.engine import Engine
from llama2.engine.request import Sampling
from llama2.engine.rollout import rollout
from llama2.engine.runner import BLOCK
from llama2.engine.runner_native import LiveNativeRunner
from llama2.model.transformer import Transformer
from llama2.train.loop import Callback, Loop, StepReport
from llama2.train.objective import Network
from llama2.train.schedule import SchedulePart
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step

#: As stories260K.
CONFIG = ModelConfig(
    dim=64,
    n_layers=5,
    n_heads=8,
    n_kv_heads=4,
    hidden_dim=172,
    vocab_size=512,
    head_dim=8,
    context_length=512,
    tied_embeddings=True,
)
REWARDED = 42
PROMPTS = [list(range(3, 3 + 2 * BLOCK + 5)), list(range(300, 300 + BLOCK + 1))]  # of more than a block, to be cached
STEPS, ANSWERS, LENGTH, RATE = 20, 16, 16, 2e-2


class Tokenizer(ByteTokenizer):
    """Has no bytes for the tokens beyond them."""

    vocab_size = CONFIG.vocab_size

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(min(token, 256))


@dataclass(frozen=True)
class Answers:
    """A training batch: prompts with answers, and by how much each answer's reward is above its group's mean."""

    tokens: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T), IGNORED but for the answer
    advantages: NDArray[np.float32]  # (B,)
    source: str = ""

    @property
    def count(self) -> int:
        return int((self.targets != IGNORED).sum())


def log_probabilities(network: Network, batch: Answers) -> Tensor:
    """Of every target: (B, T), 0 where there is none."""
    logits = network.transformer.logits(network.hidden_states(network.tensor(batch.tokens)))  # (B, T, V)
    targets = network.tensor(batch.targets)
    return -F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


def reinforce(network: Network, batch: Answers) -> Tensor:
    """−Σ advantage × log p(token) over the answers' tokens (Williams 1992)."""
    return -(network.tensor(batch.advantages)[:, None] * log_probabilities(network, batch)).sum()


@dataclass
class Rollouts:
    """Batches that the network makes itself: the loop's `Batches`."""

    engine: Engine
    network: Network
    rewards: list[float] = field(default_factory=list)  # mean of each batch
    gaps: list[float] = field(default_factory=list)  # largest |engine's − torch's| log-probability of each batch
    epoch: float = 0.0

    def next(self) -> Answers:
        sampling = Sampling(temperature=1, top_p=1, seed=len(self.rewards))
        groups = rollout(self.engine, PROMPTS, ANSWERS, sampling, max_tokens=LENGTH)
        rows = [(p, a) for p, group in zip(PROMPTS, groups, strict=True) for a in group]
        width = max(len(p) + len(a.tokens) for p, a in rows)
        tokens = np.zeros((len(rows), width), np.int64)
        theirs = np.zeros((len(rows), width), np.float32)
        answered = np.zeros((len(rows), width), bool)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer.tokens)
            tokens[row, :end] = [*prompt, *answer.tokens]
            theirs[row, len(prompt) : end], answered[row, len(prompt) : end] = answer.logprobs, True
        rewards = (answered & (tokens == REWARDED)).sum(1).reshape(len(PROMPTS), ANSWERS).astype(np.float32)
        advantages = (rewards - rewards.mean(1, keepdims=True)).flatten()
        batch = Answers(tokens[:, :-1], np.where(answered, tokens, IGNORED)[:, 1:].copy(), advantages)
        with torch.no_grad():
            ours = log_probabilities(self.network, batch).numpy()
        self.rewards.append(float(rewards.mean()))
        self.gaps.append(float(np.abs(ours - theirs[:, 1:]).max()))
        return batch

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        raise NotImplementedError


class Flush(Callback):
    """Makes the engine forget what it cached of the weights before the step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def after_step(self, loop: Loop, report: StepReport) -> None:
        self.engine.weights_changed()


def train(steps: int = STEPS, *, flush: bool = True) -> Rollouts:
    """The rewards and gaps of a run."""
    torch.manual_seed(0)
    network = Transformer(CONFIG)
    network.initialise(torch.Generator().manual_seed(0))
    step = Step(network, reinforce, optimizer=OptimizerSettings(weight_decay=0.0), precision="fp32")
    blocks = len(PROMPTS) * ANSWERS * 4
    engine = Engine(LiveNativeRunner(CONFIG, network.tensors, blocks, threads=2), Tokenizer())
    rollouts = Rollouts(engine, step.running)
    schedule = [SchedulePart(begin=0, start=0.0, peak=RATE, warmup=1, min_lr_ratio=1.0, steps=steps)]
    Loop(step, rollouts, steps=steps, schedule=schedule, callbacks=[Flush(engine)] if flush else []).run()
    return rollouts


def summary(rollouts: Rollouts) -> dict[str, Any]:
    rewards = rollouts.rewards
    ends = {"start": float(np.mean(rewards[:5])), "end": float(np.mean(rewards[-5:])), "gap": max(rollouts.gaps)}
    return {"parameters": CONFIG.parameters(), **ends, "rewards": rewards, "gaps": rollouts.gaps}


@pytest.mark.usefixtures("one_thread")
def test_the_reward_rises() -> None:
    found = summary(train())
    assert found["start"] < 0.5
    assert found["end"] > found["start"] + 4  # of 16 tokens
    # The engine caches keys and values in 16 bits: in bfloat16, of 8 bits of precision, where it multiplies these.
    bfloat16 = native.module().__name__.endswith("bf16")
    assert found["gap"] < (0.2 if bfloat16 else 0.02)


@pytest.mark.usefixtures("one_thread")
def test_a_cache_of_old_weights_shows() -> None:
    """Without a flush, prompts are read with the keys and values of weights that have changed."""
    assert max(train(8, flush=False).gaps) > 0.2


if __name__ == "__main__":
    stale = {"gap with a cache of old weights": max(train(8, flush=False).gaps)}
    json.dump({**records.origin(), **summary(train()), **stale}, sys.stdout, indent=1)
    print()
