"""Samples with their rewards, by one reward model or two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama2.align.combined_reward import combined
from llama2.align.store import SampleStore, StoredSample
from llama2.data.prompts import TaggedPrompt, identify
from llama2.hub.progress import Progress

_AT_ONCE = 256  # dialogs that a reward model gets


class Scorer(Protocol):
    """A reward model: `digest` identifies it in the store."""

    digest: str

    def __call__(self, dialogs: Sequence[Sequence[Mapping[str, Any]]]) -> Sequence[float]:
        """Rewards from 0 to 1 of dialogs that end with the assistant, which do not depend on each other."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample, what each reward model says of it, by name, and the one reward by which it is chosen."""

    sample: StoredSample
    rewards: Mapping[str, float]
    reward: float


def unscored(store: SampleStore, samples: Iterable[StoredSample], scorer: Scorer) -> dict[str, StoredSample]:
    """Samples without a reward, by their dialogs' digests, in order; equal answers to a prompt count once."""
    known = store.rewards(scorer.digest)
    found = ((identify(store.dialog(sample)), sample) for sample in samples)
    return {dialog: sample for dialog, sample in found if dialog not in known}


def judge(
    store: SampleStore,
    samples: Sequence[StoredSample],
    prompts: Mapping[str, TaggedPrompt],
    scorers: Mapping[str, Scorer],
    *,
    threshold: float,
    progress: Progress,
) -> list[Judged]:
    """Samples with the rewards of `scorers`, "helpful", "safety" or both; what the store does not have is computed.

    Answers without any text have the reward 0, and no reward model reads them. Raises DataError for a reward that is
    not from 0 to 1, and what the scorers raise.
    """
    read = [sample for sample in samples if sample.answer.strip()]
    found: dict[str, list[float]] = {}
    for name, scorer in scorers.items():
        left = [*unscored(store, read, scorer).items()]
        for start in range(0, len(left), _AT_ONCE):
            some = dict(left[start : start + _AT_ONCE])
            rewards = scorer([store.dialog(sample) for sample in some.values()])
            store.add_rewards(scorer.digest, {d: float(r) for d, r in zip(some, rewards, strict=True)})
            progress(f"rewards: {name}", start + len(some), len(left))
        known = store.rewards(scorer.digest)
        found[name] = [known[identify(store.dialog(s))] if s.answer.strip() else 0.0 for s in samples]
    if len(found) == 2:
        tagged = [prompts[sample.prompt].safety for sample in samples]
        chosen = combined(found["helpful"], found["safety"], tagged, threshold).tolist()
    else:
        (chosen,) = found.values()
    by_sample = (dict(zip(found, rewards, strict=True)) for rewards in zip(*found.values(), strict=True))
    return [Judged(*each) for each in zip(samples, by_sample, chosen, strict=True)]
