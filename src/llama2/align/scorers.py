"""Reward models that the engine runs, as judging reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from llama2 import api
from llama2.align.rejection_settings import SamplingRuntimeSettings
from llama2.align.reward import score, score_head
from llama2.api import Model
from llama2.checkpoint import identity
from llama2.engine.runtime import Runtime


class EngineScorer:
    """A reward model that the engine runs: a `judging.Scorer`."""

    def __init__(self, model: Model) -> None:
        """Raises CheckpointError for a model that is not one."""
        score_head(model.checkpoint)
        self.model = model
        self.digest = identity.digest(model.checkpoint)

    def __call__(self, dialogs: Sequence[Sequence[Mapping[str, Any]]]) -> Sequence[float]:
        rewards: list[float] = score(self.model, dialogs, sigmoid=True, neutralise=True).tolist()
        return rewards


def runtime_of(settings: SamplingRuntimeSettings) -> Runtime:
    """How a recipe's models run."""
    return Runtime(threads=settings.threads, context=settings.context, sequences=settings.sequences)


@contextmanager
def open_scorers(models: Mapping[str, str], settings: SamplingRuntimeSettings) -> Iterator[dict[str, EngineScorer]]:
    """Reward models, open, by the names that they have in a recipe; none where there are none."""
    with ExitStack() as stack:
        yield {
            name: EngineScorer(stack.enter_context(api.load(model, runtime_of(settings))))
            for name, model in models.items()
        }
