"""Best of K on held-out prompts: K = 1 … N, both reward models, length; and what tuning on the best is worth there.

    python bench/best_of.py recipes/reject.toml samples=64 temperature=1 > best_of.json
    python bench/best_of.py recipes/reject.toml --tuned runs/v1 > tuned.json

The recipe is that of `llama2 reject`. Its first model answers the prompts that it holds out (`prompts.held_out`). The
answers are kept in its store, so a run that was stopped goes on. The first command chooses by each reward model and by
their combination, and says how each of them rewards the choice.

With --tuned, both models draw ANSWERS to each held-out prompt at temperature 1 and top-p 1. Differences of rewards and
lengths are paired by prompt. The KL divergence of the tuned model from the first is in nats an answer. It is the mean
over the tuned model's answers of the difference of both log-probabilities, which is unbiased.

The table goes to stderr, one JSON object with every value to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2 import api
from llama2 import recipe as recipes
from llama2.align import best_of_curves, drawing
from llama2.align.combined_reward import combined
from llama2.align.judging import Judged, judge
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.scorers import EngineScorer, open_scorers, runtime_of
from llama2.align.store import Policy, SampleStore, StoredSample
from llama2.api import Model
from llama2.checkpoint import identity
from llama2.cli.progress import Bar
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, TaggedPrompt
from llama2.engine import scoring
from llama2.engine.request import Sampling
from llama2.engine.rollout import Rollout, rollout
from llama2.engine.runtime import Runtime
from llama2.evaluate.comparison import compare
from llama2.evaluate.intervals import mean_interval

ANSWERS = 4  # of each model to a prompt, with --tuned


def answers(
    model: Model, name: str, store: SampleStore, prompts: Sequence[TaggedPrompt], recipe: RejectionRecipe
) -> list[list[StoredSample]]:
    """The recipe's answers of a model to each prompt; those that the store does not have are drawn."""
    digest = identity.digest(model.checkpoint)
    policy = Policy(digest, recipe.temperature or 1.0, recipe.top_p, recipe.max_tokens, recipe.seed)
    drawn = drawing.answers(model, store, prompts, policy, recipe.samples, round=name, progress=Bar())
    return [drawn[prompt.id] for prompt in prompts]


def judged(
    store: SampleStore,
    groups: Sequence[Sequence[StoredSample]],
    prompts: Sequence[TaggedPrompt],
    scorers: Mapping[str, EngineScorer],
    recipe: RejectionRecipe,
) -> list[list[Judged]]:
    """Answers with their rewards, by prompt."""
    by_id = {prompt.id: prompt for prompt in prompts}
    flat = [sample for group in groups for sample in group]
    found = judge(store, flat, by_id, scorers, threshold=recipe.rewards.threshold, progress=Bar())
    n = len(groups[0])
    return [found[start : start + n] for start in range(0, len(found), n)]


def curves(groups: Sequence[Sequence[Judged]], conversations: Sequence[str]) -> dict[str, Any]:
    """Summaries with curves, by what chooses: each reward model, and both combined."""
    pickers: dict[str, Any] = {name: lambda each, name=name: each.rewards[name] for name in groups[0][0].rewards}
    if len(pickers) > 1:
        pickers["combined"] = lambda each: each.reward
    return {
        name: best_of_curves.summary(
            [[replace(each, reward=reward(each)) for each in group] for group in groups], conversations
        )
        for name, reward in pickers.items()
    }


def drawn(model: Model, prompts: Sequence[TaggedPrompt], recipe: RejectionRecipe) -> list[list[Rollout]]:
    """ANSWERS rollouts of each prompt, exactly from the model's own distribution."""
    requests = drawing.render(model, prompts, recipe.max_tokens, skip_bad=False, report=PromptReport())
    stops = frozenset[int]().union(*(request.stop_tokens for request in requests.values()))
    tokens = [request.prompt for request in requests.values()]
    sampling = Sampling(temperature=1, top_p=1, seed=recipe.seed)
    return rollout(model.engine, tokens, ANSWERS, sampling, max_tokens=recipe.max_tokens, stop_tokens=stops)


def text(model: Model, answer: Rollout) -> str:
    """What an answer says, without its end token."""
    tokens = answer.tokens.tolist()
    return model.tokenizer.decode(tokens[:-1] if answer.finish_reason == "stop" else tokens).strip()


def measured(
    model: Model,
    groups: Sequence[Sequence[Rollout]],
    prompts: Sequence[TaggedPrompt],
    scorers: Mapping[str, EngineScorer],
    threshold: float,
) -> dict[str, dict[str, float]]:
    """Means over each prompt's answers, by prompt: each reward, both combined, and tokens."""
    answers = [text(model, answer) for group in groups for answer in group]
    each = [prompt for prompt in prompts for _ in range(ANSWERS)]
    dialogs = [[*p.messages, {"role": "assistant", "content": a}] for p, a in zip(each, answers, strict=True) if a]
    found: dict[str, list[float]] = {}
    for name, scorer in scorers.items():
        rewards = iter(scorer(dialogs))
        found[name] = [next(rewards) if answer else 0.0 for answer in answers]
    if len(found) == 2:
        tagged = [prompt.safety for prompt in each]
        found["combined"] = combined(found["helpful"], found["safety"], tagged, threshold).tolist()
    found["tokens"] = [float(len(answer.tokens)) for group in groups for answer in group]
    return {
        name: {p.id: statistics.fmean(values[i * ANSWERS : (i + 1) * ANSWERS]) for i, p in enumerate(prompts)}
        for name, values in found.items()
    }


def tuning(
    recipe: RejectionRecipe,
    tuned: str,
    prompts: Sequence[TaggedPrompt],
    scorers: Mapping[str, EngineScorer],
    runtime: Runtime,
) -> dict[str, Any]:
    """Rewards, lengths and divergence of a tuned model beside the recipe's first."""
    clusters = {prompt.id: prompt.group for prompt in prompts}
    with api.load(next(iter(recipe.models.values())), runtime) as first, api.load(tuned, runtime) as after:
        if [first.render(p.messages) for p in prompts] != [after.render(p.messages) for p in prompts]:
            raise SystemExit(f"{tuned}: renders prompts otherwise than the recipe's model; give one tuned from that")
        before, groups = drawn(first, prompts, recipe), drawn(after, prompts, recipe)
        pairs = [
            (after.render(prompt.messages), answer.tokens.tolist())
            for prompt, group in zip(prompts, groups, strict=True)
            for answer in group
        ]
        of_first = {each.pair: float(each.logprobs.sum()) for each in scoring.score(first.engine, pairs)}
        flat = [answer for group in groups for answer in group]
        ratios = [float(answer.logprobs.sum()) - of_first[pair] for pair, answer in enumerate(flat)]
        sides = [measured(first, before, prompts, scorers, recipe.rewards.threshold)]
        sides.append(measured(after, groups, prompts, scorers, recipe.rewards.threshold))
    owners = [prompt.group for prompt in prompts for _ in range(ANSWERS)]
    return {
        "kl": mean_interval(ratios, owners, proportion=False).to_json(),
        "cut": {
            name: sum(answer.finish_reason == "length" for group in side for answer in group)
            for name, side in (("before", before), ("after", groups))
        },
        "compared": {name: compare(sides[1][name], sides[0][name], clusters).to_json() for name in sides[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--tuned", metavar="MODEL", help="compare this model with the recipe's first instead")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the curves there")
    options = parser.parse_args()
    recipe = recipes.load(options.recipe, RejectionRecipe, options.settings)
    prompts = prompt_files.read_held_out(recipe.prompts, recipe.seed)
    if not prompts:
        raise SystemExit("prompts.held_out is 0; hold out some, such as prompts.held_out=200")
    runtime = runtime_of(recipe.runtime)
    result: dict[str, Any] = {
        "provenance": provenance(),
        "prompts": len(prompts),
        "recipe": recipe.model_dump(mode="json"),
    }
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers(recipe.rewards.models, recipe.runtime))
        store = stack.enter_context(SampleStore.open(recipe.store))
        store.add_prompts(prompts)
        if options.tuned:
            result |= tuning(recipe, options.tuned, prompts, scorers, runtime)
            for name, each in result["compared"].items():
                print(
                    f"{name}: {each['mean_b']:.4g} before, {each['mean_a']:.4g} after, difference "
                    f"{each['difference']:.4g} ± {1.96 * each['se']:.2g}",
                    file=sys.stderr,
                )
            print(f"KL: {result['kl']['mean']:.3g} nats an answer", file=sys.stderr)
        else:
            name, first = next(iter(recipe.models.items()))
            with api.load(first, runtime) as model:
                drawn = answers(model, name, store, prompts, recipe)
            groups = judged(store, drawn, prompts, scorers, recipe)
            result["chosen_by"] = curves(groups, [prompt.group for prompt in prompts])
            table(result["chosen_by"])
            if options.plot:
                options.plot.mkdir(parents=True, exist_ok=True)
                best_of_curves.draw_rounds(
                    {name: each["curve"] for name, each in result["chosen_by"].items()}, options.plot / "best_of.png"
                )
    print(json.dumps(result))


def table(chosen_by: Mapping[str, Any]) -> None:
    """Print the curves."""
    for picker, each in chosen_by.items():
        print(f"chosen by {picker}; {each['cut']} of {each['answers']} answers cut", file=sys.stderr)
        for point in each["curve"]:
            rewards = "  ".join(f"{n} {r['mean']:.3f} (median {r['median']:.3f})" for n, r in point["rewards"].items())
            print(
                f"  K {point['k']:>4}  {rewards}  {point['tokens']:.0f} tokens  KL ≤ {point['kl_bound']:.2f}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
