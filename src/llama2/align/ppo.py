"""`llama2 ppo`: from a chat model and reward models to a policy that they reward (paper 3.2.3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2 import checkpoint, plan
from llama2.align import ppo_recipe
from llama2.align.experience import Experience, RolloutSettings
from llama2.align.feedback import Feedback
from llama2.align.handover import Handover
from llama2.align.merging import merging
from llama2.align.ppo_prompts import PreparedPrompts, Prompts, prepare
from llama2.align.ppo_recipe import PpoRecipe, fit
from llama2.align.reward import score_head
from llama2.align.reward_training import refuse_tokenizer
from llama2.align.scorers import EngineScorer, open_scorers
from llama2.align.surrogate import Surrogate
from llama2.align.watching import HeldOutMeasure, PolicyWatch
from llama2.checkpoint import Checkpoint, identity
from llama2.checkpoint.lora import fingerprint
from llama2.data.loader import Loader
from llama2.errors import RecipeError
from llama2.model.heads import PolicyAndValue, RewardTransformer
from llama2.model.transformer import Transformer
from llama2.records import MODEL, Run
from llama2.train import adapters
from llama2.train.callbacks import Reporter
from llama2.train.lock import hold
from llama2.train.loop import Callback
from llama2.train.objective import Network
from llama2.train.processes import Processes, processes
from llama2.train.states import AdapterWriter, write_model
from llama2.train.step import Step
from llama2.train.training import Task, Training

_TRIAL, _TRIAL_TOKENS = 8, 16  # answers, and tokens of each, by which the time of drawing is estimated
#: Passes of a token, in passes forward and backward of one network: two networks learn, both and the reference read.
_PASSES = 3.0


def ppo(
    recipe: PpoRecipe,
    folder: Path,
    *,
    locate: Callable[[str], Path],
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Train a policy by PPO from a chat model, which `locate` finds by its name, and leave the run in `folder`.

    What the recipe leaves open is fitted (`ppo_recipe`), reported before the first step, and recorded. With
    `recipe.lora` adapters of policy and value network are trained; what is saved is the merged policy. Everything else
    is as in `pretrain`. Raises DataError for prompts that cannot be used, RecipeError for models that do not go
    together, and RunError for a policy that has collapsed.
    """
    with (
        processes(recipe.mesh.tensor) as dist,
        hold(folder, dist, resume=resume),
        checkpoint.open(locate(recipe.start), template=recipe.template or None) as start,
        checkpoint.open(locate(recipe.value_model)) as value,
        open_scorers(_models(recipe), recipe.runtime) as scorers,
    ):
        recipe.refuse_large(start.config.parameters())
        refuse_tokenizer(start)
        _refuse_others(recipe, start, value, scorers, dist)
        if recipe.lora and resume:
            adapters.refuse_another_base(Run.open(folder), start)
        ready = prepare(recipe, start, _context(start, value, scorers))
        source = Prompts(", ".join(map(str, recipe.prompts.every_file)), ready.train, recipe.max_tokens)
        recipe = fit(recipe, source.length, start.config, dp_size=dist.dp_size, bf16=dist.bf16)
        surrogate = Surrogate(recipe.clip, recipe.value_clip, recipe.value_weight)
        network = network_of(start, value, recipe, dist)
        made: list[Experience] = []

        def batches(step: Step, loader: Loader[Any]) -> tuple[Experience, Sequence[Callback]]:
            made.append(experience_of(recipe, step, loader, start, scorers, ready))
            own: list[Callback] = [PolicyWatch(made[0], surrogate, recipe.collapse, folder)]
            if ready.held:
                own.append(HeldOutMeasure(made[0], ready.held, recipe.evaluate, recipe.patience))
            return made[0], own

        task = Task(
            network,
            *(source, start.tokenizer, start.template_to_write),
            objective=surrogate,
            adapter=_writer(start, recipe),
            unit="a token of an answer",
            batches=batches,
            passes=_PASSES,
        )
        training = Training(recipe, folder, dist, task, reporter=reporter)
        about = _about(recipe, start, value, scorers)
        if resume:
            _refuse_other_judges(Run.open(folder), about)
        if reporter:
            note = [start.assumes_format] if start.assumes_format else []
            note.append(_estimate(recipe, made[0], source, training, ready))
            reporter.begin([*ready.notes, *ppo_recipe.describe(recipe), *note])
        return training.run(resume=resume, prompts=len(source), **about)


def _context(start: Checkpoint, value: Checkpoint, scorers: Mapping[str, EngineScorer]) -> int:
    """Tokens of a prompt with its answer that every model reads."""
    judges = (scorer.model.engine.context for scorer in scorers.values())
    return min(start.config.context_length, value.config.context_length, *judges)


def _models(recipe: PpoRecipe) -> dict[str, str]:
    """Reward models by name."""
    watched = {"watched": recipe.rewards.watched} if recipe.rewards.watched else {}
    return {**recipe.rewards.models, **watched}


def _refuse_others(
    recipe: PpoRecipe, start: Checkpoint, value: Checkpoint, scorers: Mapping[str, EngineScorer], dist: Processes
) -> None:
    """Raise RecipeError for models that do not go together, and CheckpointError for one without a scalar head."""
    if dist.devices > 1:
        raise RecipeError("ppo: runs in one process, and torchrun started several; start it without")
    score_head(value)
    others = [("value", recipe.value_model, value)]
    others += [(f"rewards.{name}", model, scorers[name].model.checkpoint) for name, model in _models(recipe).items()]
    for setting, name, other in others:
        if not _one_vocabulary(start, other):
            raise RecipeError(
                f"{setting}={name}: has another vocabulary than {recipe.start}, and reads other tokens than that "
                "writes; train one from a model of the policy's family"
            )


def _one_vocabulary(ours: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models have the same tokens under the same ids; one may not know the text of a token without use."""
    a, b = ours.tokenizer, other.tokenizer
    if (ours.config.vocab_size, a.vocab_size, a.control) != (other.config.vocab_size, b.vocab_size, b.control):
        return False
    pieces = ((a.token_bytes(token), b.token_bytes(token)) for token in range(a.vocab_size))
    return all(mine == theirs or not (mine and theirs) for mine, theirs in pieces)


def _about(
    recipe: PpoRecipe, start: Checkpoint, value: Checkpoint, scorers: Mapping[str, EngineScorer]
) -> dict[str, Any]:
    """What the run's record says of its models: digests, which are the same wherever the models lie."""
    judges = {name: scorer.digest for name, scorer in scorers.items()}
    return {"base": fingerprint(start.tensors), "value": identity.digest(value), "judges": judges}


def _refuse_other_judges(run: Run, about: Mapping[str, Any]) -> None:
    """Raise RecipeError where the models of a resumed run are not those that it was begun with."""
    for name in ("base", "value", "judges"):
        if run.origin.get(name) != about[name]:
            raise RecipeError(
                f"{run.folder}: was begun with another {'start model' if name == 'base' else name}; begin another run"
            )


def network_of(start: Checkpoint, value: Checkpoint, recipe: PpoRecipe, dist: Processes) -> PolicyAndValue:
    """Policy and value network: every weight of both trained, or adapters of both and the value head."""
    parts = []
    for model, seed in ((start, recipe.seed), (value, recipe.seed + 1)):
        if recipe.lora is None:
            parts.append(Transformer.load(model, device=dist.device))
        else:
            parts.append(adapters.build(model, recipe.lora, precision=recipe.precision, seed=seed, device=dist.device))
    return PolicyAndValue.of(parts[0], RewardTransformer.of(parts[1], value, seed=recipe.seed))


def experience_of(
    recipe: PpoRecipe,
    step: Step,
    loader: Loader[Any],
    start: Checkpoint,
    scorers: Mapping[str, EngineScorer],
    ready: PreparedPrompts,
) -> Experience:
    """The policy's rollouts, with the engine that draws them and the reward models that judge them."""
    longest = recipe.max_tokens + max(len(prompt.tokens) for prompt in [*ready.train, *ready.held])
    network = step.network
    handover = Handover(network, longest, start.tokenizer, recipe.runtime.threads)
    reference = None
    if recipe.lora is None:
        frozen = Transformer.load(start, device=step.device).requires_grad_(False)
        reference = Network(frozen, step.running.objective, None)
        reference.softmax, reference.attention = step.running.softmax, step.running.attention
    settings = RolloutSettings(
        recipe.rollouts,
        recipe.max_tokens,
        ready.stop_tokens,
        recipe.seed,
        recipe.beta,
        recipe.advantages.gamma,
        recipe.advantages.lam,
        recipe.advantages.whiten,
    )
    cut_reward = recipe.rewards.cut_reward if recipe.rewards.cut == "cut_reward" else None
    feedback = Feedback(scorers, recipe.rewards.threshold, cut_reward)
    return Experience(step, loader, handover.engine, feedback, settings, reference=reference, changed=handover)


def _writer(start: Checkpoint, recipe: PpoRecipe) -> AdapterWriter:
    """What writes a state's policy as a whole model, without the value network, which the state alone has."""
    template = start.template_to_write
    if recipe.lora:
        return merging(start, recipe.lora, template, recipe.precision)

    def write(folder: Path, weights: dict[str, Any]) -> None:
        like = Checkpoint(folder, "huggingface", start.config, {}, {}, template, tokenizer_source=start.tokenizer)
        policy = {name: weights[name] for name in start.config.tensor_shapes()}
        write_model(folder.with_name(MODEL), policy, like, recipe.precision)

    return write


def _estimate(
    recipe: PpoRecipe, experience: Experience, source: Prompts, training: Training, ready: PreparedPrompts
) -> str:
    """How long the run takes at most, by a few short answers and by the operations of learning."""
    prompts = [*source.batch(range(min(_TRIAL, len(source)))).prompts]
    short = replace(experience.settings, max_tokens=min(_TRIAL_TOKENS, recipe.max_tokens))
    whole, experience.settings = experience.settings, short
    begun = time.perf_counter()
    try:
        rollouts = experience.draw(prompts, [2, 0])
    finally:
        experience.settings = whole
    drawn = time.perf_counter()
    experience.judge([prompt.prompt for prompt in prompts], experience.answers(rollouts))
    judged = time.perf_counter()
    a_token = (drawn - begun) / sum(len(each.tokens) for each in rollouts)
    answers = recipe.iterations * recipe.rollouts
    measured = len(ready.held) * (1 + recipe.steps // recipe.evaluate)
    tokens = (answers + measured) * recipe.max_tokens
    learning = answers * source.length * training.flops / (training.peak * plan.MFU)
    judging = (judged - drawn) / len(prompts) * source.length / (source.length - recipe.max_tokens + short.max_tokens)
    hours = (tokens * a_token + (answers + measured) * judging + learning) / 3600
    return (
        f"estimate: {answers:,} answers in {recipe.iterations:,} iterations, of {tokens:,} tokens at most at "
        f"{1 / a_token:,.0f} a second, with rewards and learning {hours:.2f} hours at most; Ctrl-C loses what came "
        "after the last state, and --resume goes on"
    )
