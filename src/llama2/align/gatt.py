"""`llama2 gatt`: Ghost Attention (paper 3.3). Dialogs in which an instruction of the first turn holds to the end.

A model answers while the instruction precedes every user's message. What is trained on has it at the beginning alone.
Only the last answer has a loss, since earlier ones do not match what the model now reads. Probes then run dialogs with
the instruction at their beginning, and check the answers of some turns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama2 import api, records
from llama2.align import drawing, selection
from llama2.align.gatt_settings import GattRecipe
from llama2.align.judging import Judged, Scorer, judge
from llama2.align.outputs import write_lines
from llama2.align.scorers import runtime_of
from llama2.align.selection import SelectionReport
from llama2.align.standing_instructions import VERIFIABLE, Place, StandingInstruction, combination, placed
from llama2.align.store import Policy, SampleStore, StoredSample
from llama2.api import Model
from llama2.checkpoint import identity
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptReport, TaggedPrompt, identify
from llama2.errors import DataError
from llama2.evaluate.comparison import compare
from llama2.evaluate.intervals import mean_interval
from llama2.hub.progress import Progress

DIALOGS, REPORT, PROBES = "gatt.jsonl", "report.json", "probes.json"


@dataclass
class GrowingDialog:
    """A dialog that is being made: its users' messages, its instruction, and the answers so far."""

    number: int
    users: list[str]
    instruction: StandingInstruction
    answers: list[str] = field(default_factory=list)
    reason: str = ""  # why it ended before its last turn

    def prompt(self, turn: int, place: Place) -> TaggedPrompt:
        """What asks for the answer of a turn, from 0 on."""
        messages = tuple(placed(self.instruction.text, self.users[: turn + 1], self.answers, place))
        return TaggedPrompt(identify(messages), messages, False)


def plan(recipe: GattRecipe) -> list[GrowingDialog]:
    """The dialogs to make: users' messages of prompts, in order, filled up from other prompts; and instructions."""
    prompts = prompt_files.read(recipe.prompts, recipe.seed)
    users = [[m["content"] for m in prompt.messages if m["role"] == "user"] for prompt in prompts]
    found = []
    for number in range(recipe.dialogs):
        rng = np.random.default_rng([recipe.seed, number])
        count = int(rng.integers(recipe.min_turns, recipe.max_turns + 1))
        found.append(GrowingDialog(number, _users(users, count, rng), combination(recipe.instructions, rng)))
    return found


def _users(users: Sequence[Sequence[str]], count: int, rng: np.random.Generator) -> list[str]:
    """Users' messages of as many turns, from one prompt after another in random order; prompts repeat if they must."""
    found: list[str] = []
    while len(found) < count:
        for i in rng.permutation(len(users)):
            found += users[i]
            if len(found) >= count:
                break
    return found[:count]


def gatt(
    recipe: GattRecipe, scorers: Mapping[str, Scorer], *, note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Make dialogs by the recipe; `scorers` are its reward models. Writes DIALOGS and REPORT, and returns the report.

    Raises DataError for prompts or a store that cannot be used, and where no dialog is left, and what models raise.
    """
    dialogs = plan(recipe)
    with SampleStore.open(recipe.store) as store, api.load(recipe.model, runtime_of(recipe.runtime)) as model:
        digest = identity.digest(model.checkpoint)
        policy = Policy(digest, recipe.temperature, recipe.top_p, recipe.max_tokens, recipe.seed)
        drawer = TurnDrawer(model, store, policy, recipe.samples, note, progress)
        drawer.expected = recipe.samples * sum(len(dialog.users) for dialog in dialogs)
        for turn in range(max(len(dialog.users) for dialog in dialogs)):
            asked = [dialog for dialog in dialogs if not dialog.reason and turn < len(dialog.users)]
            for dialog, prompt, samples in drawer.draw(asked, turn, "every", f"turn {turn + 1}"):
                judged = _judged(recipe, store, prompt, samples, scorers, progress)
                _answer(dialog, judged, keep_cut=recipe.cut == "keep", last=turn + 1 == len(dialog.users))
    left_out = Counter(dialog.reason for dialog in dialogs if dialog.reason)
    whole = [dialog for dialog in dialogs if not dialog.reason]
    if not whole:
        raise DataError(f"{recipe.model}: no dialog is left ({dict(left_out)}); draw more answers, or longer ones")
    write_lines(recipe.output / DIALOGS, (json.dumps(training_record(dialog, recipe)) for dialog in whole))
    report = {
        "dialogs": len(whole),
        "left_out": dict(left_out),
        "turns": dict(sorted(Counter(len(dialog.users) for dialog in whole).items())),
        "checked": sum(bool(dialog.instruction.checks) for dialog in whole),
        "model": digest,
        "recipe": recipe.model_dump(mode="json"),
        "run": records.origin(),
    }
    write_lines(recipe.output / REPORT, [json.dumps(report, indent=1)])
    return report


def training_record(dialog: GrowingDialog, recipe: GattRecipe) -> dict[str, Any]:
    """A dialog that `llama2 sft` reads: the instruction at its beginning, and a loss on its last answer alone."""
    messages = placed(dialog.instruction.text, dialog.users, dialog.answers[:-1], recipe.place)
    return selection.last_answer_record(messages, dialog.answers[-1]) | {"instruction": dialog.instruction.text}


def _judged(
    recipe: GattRecipe,
    store: SampleStore,
    prompt: TaggedPrompt,
    samples: Sequence[StoredSample],
    scorers: Mapping[str, Scorer],
    progress: Progress,
) -> list[Judged]:
    """Answers to a turn with their rewards; without reward models, all are equal."""
    if not scorers or recipe.rewards is None:
        return [Judged(sample, {}, 0.0) for sample in samples]
    by_id = {prompt.id: prompt}
    return judge(store, samples, by_id, scorers, threshold=recipe.rewards.threshold, progress=progress)


def _answer(dialog: GrowingDialog, judged: Sequence[Judged], *, keep_cut: bool, last: bool) -> None:
    """Add the best answer that follows the instruction; before the last turn, the best one does as well."""
    ordered = selection.candidates(judged, keep_cut=keep_cut, report=SelectionReport())
    following = [each for each in ordered if dialog.instruction.is_followed(each.sample.answer.strip()) is not False]
    if chosen := following or ([] if last else ordered):
        dialog.answers.append(chosen[0].sample.answer.strip())
    else:
        none = "no answer follows the instruction" if last and ordered else "every answer is empty or was cut"
        dialog.reason = none


@dataclass
class TurnDrawer:
    """Draws answers to a turn of several dialogs at once, and says once how long all turns take."""

    model: Model
    store: SampleStore
    policy: Policy
    samples: int
    note: Callable[[str], None]
    progress: Progress
    expected: int = 0  # answers of all turns

    def draw(
        self, dialogs: Sequence[GrowingDialog], turn: int, place: Place, name: str
    ) -> list[tuple[GrowingDialog, TaggedPrompt, list[StoredSample]]]:
        """The dialogs that the model can read, each with its answers; the others end here, with the reason."""
        prompts = [dialog.prompt(turn, place) for dialog in dialogs]
        if self.expected:
            self._estimate(prompts)
        drawn = drawing.answers(
            *(self.model, self.store, prompts, self.policy, self.samples),
            round=name,
            skip_bad=True,
            report=PromptReport(),
            progress=self.progress,
        )
        found = []
        for dialog, prompt in zip(dialogs, prompts, strict=True):
            if prompt.id in drawn:
                found.append((dialog, prompt, drawn[prompt.id]))
            else:
                dialog.reason = "too long for the model, or not for its chat format"
        return found

    def _estimate(self, prompts: Sequence[TaggedPrompt]) -> None:
        """Draw the first answers that are missing, and say how long those of all turns take."""
        there = sum(sample.policy == self.policy for sample in self.store.samples)
        of = (self.model, self.store, prompts, self.policy, self.samples)
        if trial := drawing.first_missing(*of, round="turn 1", progress=self.progress):
            self.note(drawing.estimate(trial[0], max(0, self.expected - there)))
        self.expected = 0


def probe(
    recipe: GattRecipe, models: Sequence[str], *, note: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """How often each model follows an instruction that was given once, by turn: on held-out prompts.

    Models after the first are compared with it, dialog by dialog. Writes PROBES, and returns it. Raises DataError
    without held-out prompts, and EvaluationError without the checks' library.
    """
    held = prompt_files.read_held_out(recipe.prompts, recipe.seed)
    if not held:
        raise DataError("prompts.held_out is 0; hold out some to probe with, such as prompts.held_out=100")
    found: dict[str, Any] = {}
    values: list[dict[int, dict[str, float]]] = []
    with SampleStore.open(recipe.store) as store:
        for name in models:
            with api.load(name, runtime_of(recipe.runtime)) as model:
                with_it = _run_probes(recipe, model, store, held, note, progress, given=True)
                without = (
                    _run_probes(recipe, model, store, held, note, progress, given=False) if recipe.probe.chance else {}
                )
            values.append(with_it)
            found[name] = {"turns": {turn: _rate(each) for turn, each in with_it.items()}}
            found[name]["by_instruction"] = _by_instruction(recipe, with_it)
            if without:
                found[name]["chance"] = {turn: _rate(each) for turn, each in without.items()}
            if name != models[0]:
                pairs = {turn: (values[-1][turn], values[0][turn]) for turn in with_it}
                found[name]["compared"] = {turn: compare(*_common(*pair)).to_json() for turn, pair in pairs.items()}
    report = {"models": found, "recipe": recipe.model_dump(mode="json"), "run": records.origin()}
    write_lines(recipe.output / PROBES, [json.dumps(report, indent=1)])
    return report


def _run_probes(
    recipe: GattRecipe,
    model: Model,
    store: SampleStore,
    held: Sequence[TaggedPrompt],
    note: Callable[[str], None],
    progress: Progress,
    *,
    given: bool,
) -> dict[int, dict[str, float]]:
    """Whether the answers of each probed turn follow the instruction, by dialog. It is in the dialog only if `given`.

    A dialog that the model cannot read whole any more has no value from there on.
    """
    p = recipe.probe
    users = [[m["content"] for m in prompt.messages if m["role"] == "user"] for prompt in held]
    dialogs = []
    for number in range(p.dialogs):
        rng = np.random.default_rng([recipe.seed, number, 1])
        check = VERIFIABLE[p.instructions[number % len(p.instructions)]]
        dialogs.append(GrowingDialog(number, _users(users, max(p.turns), rng), check))
    policy = Policy(identity.digest(model.checkpoint), p.temperature, 1.0, recipe.max_tokens, recipe.seed)
    drawer = TurnDrawer(model, store, policy, 1, note, progress, p.dialogs * max(p.turns) if given else 0)
    found: dict[int, dict[str, float]] = {turn: {} for turn in p.turns}
    place: Place = recipe.place if given else "nowhere"
    for turn in range(max(p.turns)):
        asked = [dialog for dialog in dialogs if not dialog.reason]
        for dialog, _, (sample,) in drawer.draw(asked, turn, place, f"probe, turn {turn + 1}"):
            answer = sample.answer.strip()
            dialog.answers.append(answer or "…")  # an empty answer follows nothing, and the dialog goes on
            if turn + 1 in found:
                found[turn + 1][str(dialog.number)] = float(bool(dialog.instruction.is_followed(answer)))
    return found


def _rate(values: Mapping[str, float]) -> dict[str, Any]:
    return mean_interval([*values.values()], proportion=True).to_json()


def _by_instruction(recipe: GattRecipe, found: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Rates of each instruction, by turn."""
    names = recipe.probe.instructions
    rates: dict[str, dict[int, float]] = {}
    for place, name in enumerate(names):
        for turn, values in found.items():
            mine = [value for number, value in values.items() if int(number) % len(names) == place]
            if mine:
                rates.setdefault(name, {})[turn] = float(np.mean(mine))
    return rates


def _common(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Values of dialogs that both have."""
    both = [key for key in a if key in b]
    return {key: a[key] for key in both}, {key: b[key] for key in both}
