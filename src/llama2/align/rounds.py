"""`llama2 rounds`: the recipe's rounds V1 … V5, one after another (paper 3.2.3; spec 7.1).

Each round draws answers from the policy of the round before, into one store, and takes the best of all rounds. The base
is tuned on them, with the supervised dialogs, and perhaps with dialogs of Ghost Attention and distilled answers. PPO
may follow. Each stage is recorded with digests of all that it read and left (`lineage`). A stage that is done is not
done again; one that was stopped goes on.

FOLDER/lineage.json          the stages
FOLDER/samples/              the store of all rounds' answers
FOLDER/sft/                  the base, tuned on dialogs alone: the first policy
FOLDER/ROUND/best, gatt, distilled, run, ppo, model, scores.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama2 import api, checkpoint, files
from llama2 import recipe as recipes
from llama2.align import distillation, drawing, gatt, rejection
from llama2.align.distillation_settings import DistilRecipe
from llama2.align.gatt_settings import GattRecipe
from llama2.align.judging import judge
from llama2.align.lineage import Lineage
from llama2.align.outputs import write_lines
from llama2.align.ppo_recipe import PpoRecipe
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.rounds_settings import RoundSettings, RoundsRecipe
from llama2.align.scorers import open_scorers, runtime_of
from llama2.align.store import Policy, SampleStore
from llama2.checkpoint import Checkpoint, hf_folder, identity
from llama2.data import dialog_files
from llama2.data import prompts as prompt_files
from llama2.errors import RecipeError, RunError
from llama2.evaluate.intervals import mean_interval
from llama2.hub.progress import Progress
from llama2.recipe import Settings
from llama2.records import ADAPTER, MODEL, newest
from llama2.train.tuning import SftRecipe

if TYPE_CHECKING:
    from llama2.train.callbacks import Reporter

SCORES = "scores.json"

#: What a stage leaves: files, and scores.
Left = tuple[list[Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class StageRecipes:
    """The recipes of stages, as their files have them."""

    sft: SftRecipe
    reject: RejectionRecipe
    gatt: GattRecipe | None
    distil: DistilRecipe | None
    ppo: PpoRecipe | None

    @classmethod
    def load(cls, recipe: RoundsRecipe, beside: Path) -> StageRecipes:
        """Read them all, so that a mistake shows before anything is done. Raises RecipeError."""

        def read(path: Path | None, kind: type[Settings]) -> Any:
            return None if path is None else recipes.load(beside / path, kind)

        found = cls(
            read(recipe.sft, SftRecipe),
            read(recipe.reject, RejectionRecipe),
            read(recipe.gatt, GattRecipe),
            read(recipe.distil, DistilRecipe),
            read(recipe.ppo, PpoRecipe),
        )
        if not found.reject.prompts.held_out:
            raise RecipeError(f"{recipe.reject}: prompts.held_out is 0; hold out some prompts to measure rounds with")
        return found


@dataclass
class Rounds:
    """The rounds of a recipe in a folder."""

    recipe: RoundsRecipe
    stages: StageRecipes
    folder: Path
    locate: Callable[[str], Path]
    note: Callable[[str], None]
    progress: Progress
    reporter: Reporter | None = None
    digests: dict[str, str] = field(default_factory=dict)  # of models by name, which do not change meanwhile

    def run(self) -> Lineage:
        """Do what is not done. Raises RunError where something that was done has changed, and what the stages raise."""
        self.lineage = Lineage.open(self.folder)
        self.lineage.check()
        self.note(self._plan())
        policy = self.recipe.first or self._tune("sft", [], self.folder / "sft")
        for name, settings in self.recipe.rounds.items():
            policy = self._round(name, settings, policy)
        return self.lineage

    def _plan(self) -> str:
        """What there is to do, in a line."""
        extra = [
            stage for each in self.recipe.rounds.values() for stage in ("gatt", "distil", "ppo") if getattr(each, stage)
        ]
        count = (not self.recipe.first) + 3 * len(self.recipe.rounds) + len(extra)
        reject = self.stages.reject
        return (
            f"estimate: {count} stages, of which {len(self.lineage.stages)} are done; each round draws "
            f"{reject.samples} answers to each prompt; every stage says how long it takes before it begins"
        )

    def _round(self, name: str, settings: RoundSettings, policy: str) -> str:
        """One round; returns its model."""
        place = self.folder / name
        data = [self._reject(name, policy, place / "best")]
        stages = self.stages  # RoundsRecipe refuses a stage without its recipe
        if settings.gatt and stages.gatt:
            data.append(self._gatt(name, stages.gatt, policy, place / "gatt"))
        if settings.distil and stages.distil:
            data.append(self._distil(name, stages.distil, policy, place / "distilled"))
        model = self._tune(f"{name}/tune", data, place)
        if settings.ppo and stages.ppo:
            model = self._ppo(name, stages.ppo, model, place / "ppo")
        self._measure(name, model, place)
        return model

    def _stage(self, name: str, inputs: Mapping[str, str], recipe: Settings, work: Callable[[], Left]) -> None:
        """Do a stage, unless it is done, by the same inputs and settings."""
        settings = recipes.leaves(recipe.model_dump(mode="json"))
        self.lineage.refuse_other(name, inputs, settings)
        if self.lineage.find(name):
            return
        self.note(f"stage {name}")
        outputs, scores = work()
        self.lineage.add(name, inputs, settings, outputs, scores)

    def _reject(self, name: str, policy: str, output: Path) -> Path:
        given = self.stages.reject
        changed = {"models": {name: policy}, "store": self.folder / "samples", "output": output}
        chosen = given.model_copy(update=changed)
        inputs = {
            "policy": self._digest(policy),
            **self._rewards(given.rewards.models),
            **_files(given.prompts.every_file),
        }

        def work() -> Left:
            with open_scorers(chosen.rewards.models, chosen.runtime) as scorers:
                report = rejection.reject(chosen, scorers, note=self.note, progress=self.progress)
            left = [output / rejection.BEST, output / rejection.PREFERENCES]
            return left, {key: report["best"][key] for key in ("dialogs", "pairs", "rounds", "reward", "tokens")}

        self._stage(f"{name}/reject", inputs, given, work)
        return output / rejection.BEST

    def _gatt(self, name: str, given: GattRecipe, policy: str, output: Path) -> Path:
        changed = {"model": policy, "store": self.folder / "gatt-samples", "output": output}
        chosen = given.model_copy(update=changed)
        rewards, read = self._rewards(given.reward_models), _files(given.prompts.every_file)
        inputs = {"policy": self._digest(policy), **rewards, **read}

        def work() -> Left:
            with open_scorers(chosen.reward_models, chosen.runtime) as scorers:
                report = gatt.gatt(chosen, scorers, note=self.note, progress=self.progress)
            return [output / gatt.DIALOGS], {key: report[key] for key in ("dialogs", "left_out")}

        self._stage(f"{name}/gatt", inputs, given, work)
        return output / gatt.DIALOGS

    def _distil(self, name: str, given: DistilRecipe, policy: str, output: Path) -> Path:
        changed = {"model": policy, "store": self.folder / "distil-samples", "output": output}
        chosen = given.model_copy(update=changed)
        labelled = [file for template in given.templates.values() for file in template.files]
        read = _files([*given.prompts.every_file, *labelled])
        inputs = {"policy": self._digest(policy), **self._rewards(given.rewards.models), **read}

        def work() -> Left:
            with open_scorers(chosen.rewards.models, chosen.runtime) as scorers:
                report = distillation.distil(chosen, scorers, note=self.note, progress=self.progress)
            return [output / distillation.DISTILLED], {key: report[key] for key in ("kept", "left_out", "rewards")}

        self._stage(f"{name}/distil", inputs, given, work)
        return output / distillation.DISTILLED

    def _tune(self, name: str, data: Sequence[Path], place: Path) -> str:
        """Tune the base on the supervised dialogs and `data`; returns the whole model."""
        from llama2.train.sft import sft

        given = self.stages.sft
        changed = {
            "start": self.recipe.start,
            "data": given.data.model_copy(update={"files": [*given.data.files, *data]}),
        }
        chosen = given.model_copy(update=changed)
        model = place / MODEL
        inputs = {"base": self._digest(self.recipe.start), **_files(given.data.files)}
        inputs |= {
            f"data {file.relative_to(self.folder).as_posix()}": files.sha256(file, error=RunError) for file in data
        }

        def work() -> Left:
            tuned = self._train(sft, chosen, place / "run")
            _write_whole(place / "run", self.locate(self.recipe.start), chosen, model)
            losses = {"train": tuned.after.train, "validation": tuned.after.validation}
            return _model_files(model), {"losses": losses}

        self._stage(name, inputs, given, work)
        return str(model)

    def _ppo(self, name: str, given: PpoRecipe, start: str, place: Path) -> str:
        from llama2.align.ppo import ppo

        chosen = given.model_copy(update={"start": start})
        rewards, read = self._rewards(given.rewards.models), _files(given.prompts.every_file)
        inputs = {"start": self._digest(start), **rewards, **read}

        def work() -> Left:
            run = self._train(ppo, chosen, place)
            last = run.curve()[-1]["measured"]
            last = {key: value for key, value in last.items() if not key.startswith("seconds")}
            return _model_files(newest(place, MODEL)), {"last": last}

        self._stage(f"{name}/ppo", inputs, given, work)
        return str(newest(place, MODEL))

    def _measure(self, name: str, model: str, place: Path) -> None:
        """Rewards, length and unsafe answers of a round's model on held-out prompts, with intervals."""
        given = self.stages.reject
        rewards, read = self._rewards(given.rewards.models), _files(given.prompts.every_file)
        inputs = {"model": self._digest(model), **rewards, **read}

        def work() -> Left:
            scores = measured(given, model, self.folder / "measured", self.recipe.measure.samples, name, self.progress)
            write_lines(place / SCORES, [json.dumps(scores, indent=1)])
            said = ", ".join(f"{key} {each['mean']:.3f}" for key, each in scores.items())
            self.note(f"{name}: {said}")
            return [place / SCORES], scores

        self._stage(f"{name}/measure", inputs, self.recipe.measure, work)

    def _train(self, train: Callable[..., Any], recipe: Any, folder: Path) -> Any:
        """Begin a run, or go on with it."""
        resume = (folder / "run.json").is_file()
        return train(recipe, folder, locate=self.locate, resume=resume, reporter=self.reporter)

    def _rewards(self, models: Mapping[str, str]) -> dict[str, str]:
        return {f"rewards.{name}": self._digest(model) for name, model in models.items()}

    def _digest(self, model: str) -> str:
        if model not in self.digests:
            with api.open_checkpoint(model) as opened:
                self.digests[model] = identity.digest(opened)
        return self.digests[model]


def _write_whole(run: Path, base: Path, recipe: SftRecipe, folder: Path) -> None:
    """Write a run's model; an adapter is merged into the base, in float32."""
    if not recipe.lora:
        with checkpoint.open(run) as opened:
            hf_folder.write(opened, folder)
        return
    with checkpoint.open(base, adapters=[(newest(run, ADAPTER), 1.0)], template=recipe.template or None) as opened:
        template, tensors = opened.template_to_write, {n: t.in_float32() for n, t in opened.tensors.items()}
        whole = Checkpoint(
            folder, "huggingface", opened.config, tensors, {}, template, tokenizer_source=opened.tokenizer
        )
        hf_folder.write(whole, folder)


def measured(
    recipe: RejectionRecipe, model: str, store: Path, samples: int, round: str, progress: Progress
) -> dict[str, Any]:
    """Of a model's answers to held-out prompts, at temperature 1: each reward, the combined one, tokens, and shares.

    Each is a mean with its interval of 95 %, clustered by conversation.
    """
    held = prompt_files.read_held_out(recipe.prompts, recipe.seed)
    with SampleStore.open(store) as opened, api.load(model, runtime_of(recipe.runtime)) as loaded:
        policy = Policy(identity.digest(loaded.checkpoint), 1.0, 1.0, recipe.max_tokens, recipe.seed)
        drawn = drawing.answers(loaded, opened, held, policy, samples, round=round, progress=progress)
        with open_scorers(recipe.rewards.models, recipe.runtime) as scorers:
            flat = [sample for group in drawn.values() for sample in group]
            by_id = {prompt.id: prompt for prompt in held}
            judged = judge(opened, flat, by_id, scorers, threshold=recipe.rewards.threshold, progress=progress)
    values: dict[str, list[float]] = {name: [each.rewards[name] for each in judged] for name in judged[0].rewards}
    if len(values) > 1:
        values["combined"] = [each.reward for each in judged]
    values["tokens"] = [float(each.sample.tokens) for each in judged]
    values["cut"] = [float(each.sample.finish == "length") for each in judged]
    if "safety" in values:
        values["unsafe"] = (np.array(values["safety"]) < recipe.rewards.threshold).astype(float).tolist()
    clusters = [by_id[each.sample.prompt].group for each in judged]
    shares = {"cut", "unsafe"}
    return {name: mean_interval(found, clusters, proportion=name in shares).to_json() for name, found in values.items()}


def verify(folder: Path) -> list[str]:
    """Walk the chain of a folder; a line for each stage. Raises RunError for what does not hold."""
    lineage = Lineage.open(folder)
    if not lineage.stages:
        raise RunError(f"{folder}: has no stage that is done; run `llama2 rounds` first")
    lineage.check()
    _refuse_unlinked(lineage)
    return [
        f"{stage['name']}: {len(stage['inputs'])} inputs, {len(stage['outputs'])} outputs" for stage in lineage.stages
    ]


def _refuse_unlinked(lineage: Lineage) -> None:
    """Raise RunError where a stage read data of the folder that no stage before it left so."""
    left: dict[str, str] = {}
    for stage in lineage.stages:
        for name, digest in stage["inputs"].items():
            path = name.removeprefix("data ")
            if name.startswith("data ") and left.get(path) != digest:
                raise RunError(f"{lineage.folder}: stage {stage['name']} read {path}, which no stage left so")
        left |= stage["outputs"]


def _files(paths: Sequence[Path]) -> dict[str, str]:
    """Digests of data files, by name; of a folder, those of all its files."""
    found = {}
    for path in paths:
        for file in dialog_files.find([path]) if path.exists() else []:
            found[f"file {file.as_posix()}"] = files.sha256(file, error=RunError)
    return found


def _model_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def rounds(recipe: RoundsRecipe, folder: Path, *, beside: Path, **rest: Any) -> Lineage:
    """Do the rounds of a recipe, whose stages' recipes lie in `beside`, in a folder; see `Rounds`."""
    return Rounds(recipe, StageRecipes.load(recipe, beside), folder, **rest).run()
