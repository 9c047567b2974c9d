"""`llama2 reject`: answers of one or several rounds' models, judged, and the best of all as data (paper 3.2.3).

The random numbers of an answer are a function of (seed, prompt, k). So a run that was killed goes on where it was, and
leaves the same bytes in the store as one that was not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from llama2 import api, records
from llama2.align import best_of_curves, drawing, selection
from llama2.align.judging import Judged, Scorer, judge
from llama2.align.order_statistics import kl_bound
from llama2.align.outputs import write_lines
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.scorers import runtime_of
from llama2.align.selection import SelectionReport
from llama2.align.store import Policy, SampleStore, StoredSample
from llama2.api import Model
from llama2.checkpoint import identity
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, TaggedPrompt
from llama2.engine.request import Request
from llama2.errors import DataError, RecipeError
from llama2.hub.progress import Progress

BEST, PREFERENCES, REPORT = "best.jsonl", "preferences.jsonl", "report.json"

_TRIAL, _SCORED = 32, 8  # answers drawn, and of them scored, by which the run's time is estimated


def reject(
    recipe: RejectionRecipe, scorers: Mapping[str, Scorer], *, note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Draw, judge and choose by the recipe; `scorers` are its reward models, "helpful", "safety" or both.

    Writes BEST, PREFERENCES, REPORT and drawings to the recipe's output, and returns the report. Raises DataError for
    prompts or a store that cannot be used, RecipeError for two rounds of one model, and what models raise.
    """
    report = PromptReport()
    prompts = {prompt.id: prompt for prompt in prompt_files.read(recipe.prompts, recipe.seed, report)}
    for line in report.lines():
        note(line)
    with SampleStore.open(recipe.store) as store:
        store.add_prompts(prompts.values())
        sampling = _Rejection(recipe, store, prompts, scorers, note, progress)
        rounds = {name: sampling.round(name) for name in recipe.models}
        pool = sampling.pool()
    result = {
        "rounds": rounds,
        "prompts": {
            "used": len(prompts),
            "tagged": sum(prompt.safety for prompt in prompts.values()),
            **asdict(report),
        },
        "best": _choose(recipe, pool, prompts),
        "reward_models": {name: scorer.digest for name, scorer in scorers.items()},
        "recipe": recipe.model_dump(mode="json"),
        "run": records.origin(),
    }
    write_lines(recipe.output / REPORT, [json.dumps(result, indent=1)])
    if recipe.plots:
        best_of_curves.draw_rounds(
            {f"{name}, T = {each['temperature']:g}": each["curve"] for name, each in rounds.items()},
            recipe.output / "rounds.png",
        )
        for name, each in rounds.items():
            if swept := each["sweep"]:
                curves = {f"T = {row['temperature']:g}": row["curve"] for row in swept}
                best_of_curves.draw_temperatures(curves, recipe.output / f"temperatures-{name}.png")
    return result


@dataclass
class _Rejection:
    """Drawing and judging, over an open store."""

    recipe: RejectionRecipe
    store: SampleStore
    prompts: Mapping[str, TaggedPrompt]  # by digest
    scorers: Mapping[str, Scorer]
    note: Callable[[str], None]
    progress: Progress
    digests: dict[str, str] = field(init=False)  # of the rounds' models
    estimated: bool = False

    def __post_init__(self) -> None:
        self.digests = {}
        for name, model in self.recipe.models.items():
            with api.open_checkpoint(model) as opened:
                found = identity.digest(opened)
            if same := next((other for other, digest in self.digests.items() if digest == found), None):
                raise RecipeError(f"models.{name}: is the same model as models.{same}; leave one out")
            self.digests[name] = found

    def round(self, name: str) -> dict[str, Any]:
        """Draw and judge a round's answers, at its best temperature. Returns them in numbers."""
        recipe = self.recipe
        with api.load(recipe.models[name], runtime_of(recipe.runtime)) as model:
            report, given = PromptReport(), [*self.prompts.values()]
            requests = drawing.render(model, given, recipe.max_tokens, skip_bad=recipe.prompts.skip_bad, report=report)
            if not requests:
                raise DataError(f"models.{name}: cannot answer any of the prompts; the first: {report.first_bad}")
            for line in report.lines():
                self.note(f"{name}: {line}")
            some = dict(islice(requests.items(), recipe.sweep.prompts))
            temperature, sweep = recipe.temperature, []
            self._estimate(name, model, requests if temperature else some)
            if temperature is None:
                temperatures = sorted(set(recipe.sweep.temperatures))
                sweep = [{"temperature": t, **self._measure(name, model, some, t)} for t in temperatures]
                by = recipe.sweep.choose_by
                temperature, worth = best_of_curves.choose_temperature(sweep, by)
                self.note(
                    f"{name}: temperature {temperature:g} has the greatest {by} of {recipe.samples} answers' rewards, "
                    f"{worth:.3f}"
                )
            measured = self._measure(name, model, requests, temperature)
        about = {"model": recipe.models[name], "digest": self.digests[name], "left_out": report.bad}
        return {**about, "temperature": temperature, **measured, "sweep": sweep}

    def pool(self) -> list[list[Judged]]:
        """Every sample that competes, judged, by prompt; those of a prompt in the order of the store."""
        samples = [sample for sample in self.store.samples if sample.prompt in self.prompts]
        if self.recipe.pool == "these models":
            models = set(self.digests.values())
            samples = [sample for sample in samples if sample.policy.model in models]
        groups: dict[str, list[Judged]] = {prompt: [] for prompt in self.prompts}
        for each in self._judge(samples):
            groups[each.sample.prompt].append(each)
        return [*groups.values()]

    def _policy(self, name: str, temperature: float) -> Policy:
        r = self.recipe
        return Policy(self.digests[name], temperature, r.top_p, r.max_tokens, r.seed)

    def _measure(self, name: str, model: Model, requests: Mapping[str, Request], temperature: float) -> dict[str, Any]:
        """Draw and judge answers to some prompts at a temperature. Returns them in numbers."""
        policy, n = self._policy(name, temperature), self.recipe.samples
        todo = [*drawing.missing(self.store, requests, policy, n)]
        drawing.draw(model, self.store, requests, policy, todo, round=name, progress=self.progress)
        judged = self._judge([self.store.drawn[prompt, policy, k] for prompt in requests for k in range(n)])
        groups = [judged[start : start + n] for start in range(0, len(judged), n)]
        return best_of_curves.summary(groups, [self.prompts[prompt].group for prompt in requests])

    def _judge(self, samples: Sequence[StoredSample]) -> list[Judged]:
        threshold = self.recipe.rewards.threshold
        return judge(self.store, samples, self.prompts, self.scorers, threshold=threshold, progress=self.progress)

    def _estimate(self, name: str, model: Model, requests: Mapping[str, Request]) -> None:
        """Say, once, how long all will take, by the speed of the first answers that are missing."""
        answers = 0 if self.estimated else sum(map(self._missing, self.recipe.models))
        if self.estimated or not answers:
            return
        temperature = self.recipe.temperature or min(self.recipe.sweep.temperatures)
        policy, n = self._policy(name, temperature), self.recipe.samples
        todo = [*islice(drawing.missing(self.store, requests, policy, n), _TRIAL)]
        if not todo:
            return  # of this round; the next one may have some
        self.estimated = True
        speed = drawing.draw(model, self.store, requests, policy, todo, round=name, progress=self.progress)
        drawn = [self.store.drawn[prompt, policy, k] for prompt, k in todo]
        dialogs = [self.store.dialog(sample) for sample in drawn if sample.answer.strip()][:_SCORED]
        start = time.perf_counter()
        for scorer in self.scorers.values() if dialogs else ():
            scorer(dialogs)  # the time alone counts: rewards are written in the order of samples
        scoring = (time.perf_counter() - start) / max(1, len(dialogs))
        hours = (speed.seconds / speed.answers + scoring) * answers / 3600
        tokens = round(speed.tokens / speed.answers * answers)
        self.note(
            f"estimate: {answers:,} answers, about {tokens:,} tokens at {speed.tokens / speed.seconds:,.0f} a second, "
            f"with their rewards {hours:.2f} hours; Ctrl-C loses nothing, and the same command goes on"
        )

    def _missing(self, name: str) -> int:
        """How many answers a round still has to draw."""
        n, prompts, drawn = self.recipe.samples, [*self.prompts], self.store.drawn

        def count(some: Iterable[str], temperature: float) -> int:
            policy = self._policy(name, temperature)
            return sum((prompt, policy, k) not in drawn for prompt in some for k in range(n))

        if self.recipe.temperature is not None:
            return count(prompts, self.recipe.temperature)
        swept, rest = prompts[: self.recipe.sweep.prompts], prompts[self.recipe.sweep.prompts :]
        temperatures = set(self.recipe.sweep.temperatures)
        return sum(count(swept, t) for t in temperatures) + min(count(rest, t) for t in temperatures)


def _choose(
    recipe: RejectionRecipe, pool: Sequence[Sequence[Judged]], prompts: Mapping[str, TaggedPrompt]
) -> dict[str, Any]:
    """Write the best answers and the pairs. Returns them in numbers."""
    report, best, pairs = SelectionReport(), [], []
    bounds = []
    for group, prompt in zip(pool, prompts.values(), strict=True):
        ordered = selection.candidates(group, keep_cut=recipe.cut == "keep", report=report)
        if not ordered or ordered[0].reward < recipe.min_reward:
            report.without += 1
            continue
        best.append((prompt, ordered[0]))
        bounds.append(kl_bound(len(group)))
        worse = selection.rejected(ordered, recipe.preferences.rejected, recipe.preferences.min_gap, recipe.seed)
        if worse:
            pairs.append(selection.preference_record(prompt.messages, ordered[0], worse))
    if not best:
        raise DataError(f"{recipe.store}: no answer may be chosen ({dict(report.left_out)}); draw more, or longer ones")
    chosen = [each for _, each in best]
    tuning = (selection.tuning_record(prompt.messages, each) for prompt, each in best)
    write_lines(recipe.output / BEST, map(json.dumps, tuning))
    write_lines(recipe.output / PREFERENCES, map(json.dumps, pairs))
    everything = [each for group in pool for each in group]
    return {
        "dialogs": len(best),
        "pairs": len(pairs),
        "rounds": dict(Counter(each.sample.round for each in chosen)),
        "reward": {"best": _mean(e.reward for e in chosen), "all": _mean(e.reward for e in everything)},
        "tokens": {"best": _mean(e.sample.tokens for e in chosen), "all": _mean(e.sample.tokens for e in everything)},
        "rewards": {name: _mean(e.rewards[name] for e in chosen) for name in chosen[0].rewards},
        "kl_bound": _mean(bounds),
        **report.counts(),
    }


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
