"""Prompts that a policy learns to answer: read, rendered in its chat format, and dealt by a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llama2 import api
from llama2.align.experience import PromptBatch, RenderedPrompt
from llama2.align.ppo_recipe import PpoRecipe
from llama2.checkpoint import Checkpoint
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, TaggedPrompt
from llama2.errors import ContextError, DataError, DialogError, RecipeError, RequestError, TemplateError
from llama2.text import template as templates


class Prompts:
    """Prompts as a loader's RowSource: a row is a prompt; `length` is its mean tokens with the longest answer's."""

    def __init__(self, name: str, prompts: Sequence[RenderedPrompt], max_tokens: int) -> None:
        self.name, self._prompts = name, prompts
        self.length = max_tokens + round(sum(len(prompt.tokens) for prompt in prompts) / len(prompts))

    @cached_property
    def sha256(self) -> str:
        """Of every prompt's tokens and tag."""
        digest = hashlib.sha256()
        for each in self._prompts:
            digest.update(f"{each.prompt.id} {each.prompt.safety} {len(each.tokens)}".encode() + each.tokens.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._prompts)

    def batch(self, numbers: Sequence[int]) -> PromptBatch:
        """Prompts by number."""
        return PromptBatch(tuple(self._prompts[number] for number in numbers))


@dataclass(frozen=True, slots=True)
class PreparedPrompts:
    """Prompts to learn from, held-out ones to measure on, what ends an answer, and what a person should know."""

    train: list[RenderedPrompt]
    held: list[RenderedPrompt]
    stop_tokens: frozenset[int]
    notes: list[str]


def prepare(recipe: PpoRecipe, start: Checkpoint, context: int) -> PreparedPrompts:
    """Read and render the prompts of a recipe, which with their answers have at most `context` tokens.

    Raises DataError where none is left, or one cannot be used and is not to be skipped. Raises RecipeError for a model
    whose answers do not end by a token.
    """
    report, template = PromptReport(), start.template_for(tools=False)
    if template and templates.stops(template):
        raise RecipeError(
            f"{recipe.start}: its chat format ends answers by a text; PPO needs an end token, use another"
        )
    stop_tokens = templates.ends(template, start.tokenizer) if template else start.tokenizer.stop_ids
    if not stop_tokens:
        raise RecipeError(f"{recipe.start}: its tokenizer has no end token, so no answer would end; use another model")
    given = prompt_files.read(recipe.prompts, recipe.prompt_seed, report)
    held = prompt_files.read_held_out(recipe.prompts, recipe.prompt_seed)[: recipe.prompts.measured]
    render = _Renderer(start, context - recipe.max_tokens, recipe.prompts.skip_bad, report)
    ready = PreparedPrompts([*render(given)], [*render(held)], stop_tokens, [])
    if not ready.train:
        raise DataError(f"{recipe.prompts.every_file[0]}: no prompts are left; the first left out: {report.first_bad}")
    tagged = sum(each.prompt.safety for each in ready.train)
    ready.notes.extend([*report.lines(), f"{len(ready.train):,} prompts, {tagged:,} of them tagged as risky"])
    return ready


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Renders prompts that leave room for an answer: at most `most` tokens."""

    start: Checkpoint
    most: int
    skip_bad: bool
    report: PromptReport

    def __call__(self, prompts: Sequence[TaggedPrompt]) -> Iterator[RenderedPrompt]:
        for prompt in prompts:
            try:
                tokens = api.prompt_of(self.start, prompt.messages).tokens
                if len(tokens) > self.most:
                    raise ContextError(f"has {len(tokens)} tokens, and an answer leaves room for {self.most}")
            except (DialogError, TemplateError, RequestError, ContextError) as error:
                reason = f"{prompt.where}: {error}"
                if not self.skip_bad:
                    raise DataError(f"{reason}; prompts.skip_bad=true leaves such out") from None
                self.report.leave_out(reason)
                continue
            yield RenderedPrompt(prompt, np.array(tokens, np.int32))
