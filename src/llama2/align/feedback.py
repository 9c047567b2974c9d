"""What reward models say of answers that a policy has just drawn, as the one reward of each (paper 3.2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama2.align.combined_reward import THRESHOLD, combined
from llama2.align.judging import Scorer
from llama2.data.prompts import TaggedPrompt
from llama2.errors import DataError


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """An answer as text, without its end token, and whether it has one: else the limit of tokens cut it."""

    text: str
    ended: bool
    tokens: int  # the end token too


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of n answers: what each reward model says of them, not a number where there is no text; and the one reward."""

    rewards: Mapping[str, NDArray[np.float64]]  # (n,) from 0 to 1, by the reward model's name
    reward: NDArray[np.float64]  # (n,) R_c, or `cut_reward`
    threshold: float = THRESHOLD  # below this safety reward, an answer counts as unsafe

    def measures(self) -> dict[str, float]:
        """The mean of the one reward, those of each reward model over what it read, and the share of unsafe answers."""
        found = {"reward": float(self.reward.mean())}
        for name, rewards in self.rewards.items():
            read = rewards[~np.isnan(rewards)]
            found[name] = float(read.mean()) if len(read) else float("nan")
        if "safety" in self.rewards:
            found["unsafe"] = float((self.rewards["safety"] < self.threshold).mean())
        return found


@dataclass(frozen=True, slots=True)
class Feedback:
    """Reward models, "helpful", "safety" or both, and others that are watched and rewarded by no one.

    An answer without an end token, or without text, gets `cut_reward`: reward models would read it as if it were
    whole. With `cut_reward` None, only the one without text does, and it is 0.
    """

    scorers: Mapping[str, Scorer]
    threshold: float
    cut_reward: float | None

    def __call__(self, prompts: Sequence[TaggedPrompt], answers: Sequence[DrawnAnswer]) -> Judgement:
        """Raises DataError for a reward that is not from 0 to 1, and what the reward models raise."""
        read = [number for number, answer in enumerate(answers) if answer.text.strip()]
        dialogs = [
            [*prompts[number].messages, {"role": "assistant", "content": answers[number].text.strip()}]
            for number in read
        ]
        rewards = {}
        for name, scorer in self.scorers.items():
            found = np.full(len(answers), np.nan)
            found[read] = scorer(dialogs) if dialogs else []
            if not ((found[read] >= 0) & (found[read] <= 1)).all():
                bad = next(value for value in found[read].tolist() if not 0 <= value <= 1)
                raise DataError(f"rewards.{name}: its reward {bad} is not from 0 to 1; use another model")
            rewards[name] = found
        used = [name for name in ("helpful", "safety") if name in rewards]
        if len(used) == 2:
            tagged = [prompt.safety for prompt in prompts]
            reward = combined(rewards["helpful"], rewards["safety"], tagged, self.threshold)
        else:
            reward = rewards[used[0]].copy()
        cut = np.array([not answer.ended for answer in answers]) & (self.cut_reward is not None)
        reward[cut | np.isnan(reward)] = self.cut_reward or 0.0
        return Judgement(rewards, reward, self.threshold)
