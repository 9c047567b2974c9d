"""`llama2 distil`: context distillation for safety (paper 4.2.4, A.4.3).

A model answers risky prompts behind a safety pre-prompt. Data to tune it with have the prompt without it. An answer is
kept only where the safety reward rises: elsewhere pre-prompts make answers vague, and refuse what is harmless.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from llama2 import api, records
from llama2.align import drawing, selection
from llama2.align.distillation_settings import DistilRecipe
from llama2.align.judging import Judged, Scorer, judge
from llama2.align.outputs import write_lines
from llama2.align.scorers import runtime_of
from llama2.align.selection import SelectionReport
from llama2.align.store import Policy, SampleStore
from llama2.checkpoint import identity
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, PromptSettings, TaggedPrompt, identify
from llama2.errors import DataError
from llama2.evaluate.harm import NotJudgedError, refused
from llama2.hub.progress import Progress

DISTILLED, REPORT = "distilled.jsonl", "report.json"


@dataclass(frozen=True, slots=True)
class RiskyPrompt:
    """A prompt, and its kind of risk, if it has a label: a name of the recipe's templates."""

    prompt: TaggedPrompt
    risk: str = ""


@dataclass(frozen=True, slots=True)
class PrePrompted:
    """A prompt behind a pre-prompt, and which sort that is."""

    base: TaggedPrompt
    asked: TaggedPrompt
    sort: str  # "generic" or "template"


def read(recipe: DistilRecipe, report: PromptReport) -> list[RiskyPrompt]:
    """The risky prompts: those that are tagged, and those of the templates. A prompt with a label keeps the first one.

    Raises DataError where there are none.
    """
    found: dict[str, RiskyPrompt] = {}
    skip = recipe.prompts.skip_bad
    for name, template in recipe.templates.items():
        settings = PromptSettings(safety_files=template.files, skip_bad=skip)
        for prompt in prompt_files.read(settings, recipe.seed, report):
            found.setdefault(prompt.id, RiskyPrompt(prompt, name))
    if recipe.prompts.files or recipe.prompts.safety_files:
        for prompt in prompt_files.read(recipe.prompts, recipe.seed, report):
            if prompt.safety:
                found.setdefault(prompt.id, RiskyPrompt(prompt))
    if not found:
        raise DataError("prompts: none is tagged as risky; give prompts.safety_files, or templates with files")
    return [*found.values()]


def pre_prompts(recipe: DistilRecipe, risky: RiskyPrompt) -> list[PrePrompted]:
    """A prompt behind some pre-prompts of each sort, which its digest and the seed choose."""
    number = hashlib.sha256(f"{recipe.seed} {risky.prompt.id}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(number))
    found = {}
    generic = [text.replace("{adjective}", word) for text in recipe.generic for word in recipe.adjectives]
    for text in rng.permutation(sorted({*generic}))[: recipe.samples].tolist():
        found[text] = "generic"
    if risky.risk:
        template = recipe.templates[risky.risk]
        steps = " ".join(f"{number}. {step}" for number, step in enumerate(template.steps, 1))
        risk = template.risk or risky.risk
        words = rng.permutation(sorted({*recipe.adjectives}))[: recipe.samples].tolist()
        for word in words:
            found[f"You are a {word} assistant. This request touches on: {risk}. Go through these steps: {steps}"] = (
                "template"
            )
    return [PrePrompted(risky.prompt, _behind(text, risky.prompt, recipe.place), sort) for text, sort in found.items()]


def _behind(text: str, prompt: TaggedPrompt, place: str) -> TaggedPrompt:
    """The prompt behind a pre-prompt: in its system message, or in the first user's."""
    first, *others = prompt.messages
    if place == "system":
        given = f"{text}\n\n{first['content']}" if first["role"] == "system" else text
        messages = ({"role": "system", "content": given}, *(others if first["role"] == "system" else prompt.messages))
    else:
        at = next(i for i, message in enumerate(prompt.messages) if message["role"] == "user")
        changed = {"role": "user", "content": f"{text}\n\n{prompt.messages[at]['content']}"}
        messages = (*prompt.messages[:at], changed, *prompt.messages[at + 1 :])
    return TaggedPrompt(identify(messages), tuple(messages), True, prompt.where)


def distil(
    recipe: DistilRecipe, scorers: Mapping[str, Scorer], *, note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Answer risky prompts with and without pre-prompts, and keep what the safety reward prefers.

    `scorers` are the recipe's reward models. Writes DISTILLED and REPORT, and returns the report. Raises DataError for
    prompts or a store that cannot be used, and where no answer is kept, and what models raise.
    """
    report = PromptReport()
    risky = read(recipe, report)
    asked = [each for prompt in risky for each in pre_prompts(recipe, prompt)]
    for line in report.lines():
        note(line)
    with SampleStore.open(recipe.store) as store, api.load(recipe.model, runtime_of(recipe.runtime)) as model:
        policy = Policy(
            identity.digest(model.checkpoint), recipe.temperature, recipe.top_p, recipe.max_tokens, recipe.seed
        )
        everything = [*(each.prompt for each in risky), *(each.asked for each in asked)]
        skipped = PromptReport()
        if trial := drawing.first_missing(model, store, everything, policy, 1, round="distil", progress=progress):
            note(drawing.estimate(*trial))
        drawn = drawing.answers(
            *(model, store, everything, policy, 1), round="distil", skip_bad=True, report=skipped, progress=progress
        )
        base = [drawn[each.prompt.id][0] for each in risky if each.prompt.id in drawn]
        # What is scored, and tuned on, is the prompt without its pre-prompt.
        behind = [
            (each.sort, replace(drawn[each.asked.id][0], prompt=each.base.id))
            for each in asked
            if each.asked.id in drawn
        ]
        by_id = {each.prompt.id: each.prompt for each in risky}
        judged = judge(
            *(store, [*base, *(sample for _, sample in behind)], by_id, scorers),
            threshold=recipe.rewards.threshold,
            progress=progress,
        )
    if skipped.bad:
        note(f"{skipped.bad:,} prompts left out; the first: {skipped.first_bad}")
    originals = {each.sample.prompt: each for each in judged[: len(base)]}
    sorts = [(sort, each) for (sort, _), each in zip(behind, judged[len(base) :], strict=True)]
    return _write(recipe, by_id, originals, sorts)


def _write(
    recipe: DistilRecipe,
    prompts: Mapping[str, TaggedPrompt],
    originals: Mapping[str, Judged],
    sorts: Sequence[tuple[str, Judged]],
) -> dict[str, Any]:
    """Choose the best answer behind a pre-prompt for each prompt, pass it through the gate, and report."""
    groups: dict[str, list[tuple[str, Judged]]] = {}
    for sort, each in sorts:
        groups.setdefault(each.sample.prompt, []).append((sort, each))
    kept, report, left_out = [], SelectionReport(), Counter[str]()
    for id, original in originals.items():
        group = [replace(each, reward=each.rewards["safety"]) for _, each in groups.get(id, [])]
        ordered = selection.candidates(group, keep_cut=recipe.cut == "keep", report=report)
        if not ordered:
            left_out["every answer is empty or was cut"] += 1
            continue
        best = ordered[0]
        gain = best.reward - original.rewards["safety"]
        if recipe.gate and not (gain > 0 and gain >= recipe.min_gain):
            left_out["the safety reward does not rise"] += 1
            continue
        sort = next(sort for sort, each in groups[id] if each.sample == best.sample)
        record = selection.last_answer_record(prompts[id].messages, best.sample.answer)
        kept.append((sort, original, best, record | {"sort": sort, "gain": gain, "rewards": dict(best.rewards)}))
    if not kept:
        raise DataError(f"{recipe.model}: no answer is kept ({dict(left_out)}); try more samples, or other pre-prompts")
    write_lines(recipe.output / DISTILLED, (json.dumps(record) for *_, record in kept))
    result = {
        "prompts": len(originals),
        "kept": len(kept),
        "sorts": dict(Counter(sort for sort, *_ in kept)),
        "left_out": dict(left_out),
        "answers": dict(report.left_out),
        "rewards": {
            "original": _rewards([*originals.values()]),
            **{sort: _rewards([each for name, each in sorts if name == sort]) for sort in ("generic", "template")},
            "kept": _rewards([best for _, _, best, _ in kept]),
        },
        "gain_by_quarter": _by_quarter(kept),
        "recipe": recipe.model_dump(mode="json"),
        "run": records.origin(),
    }
    write_lines(recipe.output / REPORT, [json.dumps(result, indent=1)])
    return result


def _rewards(judged: Sequence[Judged]) -> dict[str, Any] | None:
    """Of some answers: mean and median of each reward, tokens, and the share that refuses, as far as that is judged."""
    if not judged:
        return None
    refusals = []
    for each in judged:
        try:
            refusals.append(refused(each.sample.answer, {})["refused"])
        except NotJudgedError:
            continue
    return {
        **{
            name: {"mean": fmean(e.rewards[name] for e in judged), "median": median(e.rewards[name] for e in judged)}
            for name in judged[0].rewards
        },
        "tokens": fmean(each.sample.tokens for each in judged),
        "refused": fmean(refusals) if refusals else None,
        "judged": len(refusals),
    }


def _by_quarter(kept: Sequence[tuple[str, Judged, Judged, Any]]) -> list[float]:
    """Mean gain by quarter of the original answer's safety reward, from the lowest: the paper's gains are there."""
    pairs = sorted((original.rewards["safety"], best.rewards["safety"]) for _, original, best, _ in kept)
    parts = np.array_split(np.array([after - before for before, after in pairs]), min(4, len(pairs)))
    return [float(part.mean()) for part in parts]
