"""`llama2 reward`: from a chat model and preference pairs to a reward model (paper 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llama2 import checkpoint
from llama2.align import reward_recipe
from llama2.align.merging import merging
from llama2.align.ranking import ranking
from llama2.align.reward_recipe import RewardRecipe, fit
from llama2.align.reward_report import HeldOut, Report, report_on
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.lora import fingerprint
from llama2.data import comparisons, pairs
from llama2.data.comparisons import PairReport, PreferencePair
from llama2.data.loader import Loader
from llama2.data.pairs import PairBatch, Pairs, TokenizedPair
from llama2.errors import DataError, RecipeError
from llama2.hub.progress import Progress
from llama2.model.heads import RewardTransformer
from llama2.model.transformer import Transformer
from llama2.records import MODEL, Run
from llama2.train import adapters
from llama2.train.callbacks import Reporter
from llama2.train.lock import hold
from llama2.train.processes import Processes, processes
from llama2.train.training import Task, Training

#: Held-out pairs of each set whose loss is measured now and then.
_VALIDATION = 64


@dataclass(frozen=True, slots=True)
class RewardRun:
    """A run that has ended, and what its model does on held-out pairs; the main process alone has that."""

    run: Run
    report: Report | None


@dataclass(frozen=True, slots=True)
class _Ready:
    """Pairs to train on, as text and as tokens, and those held out, by their set."""

    texts: list[PreferencePair]
    train: list[TokenizedPair]
    held: dict[str, HeldOut]
    notes: list[str]


def reward(
    recipe: RewardRecipe,
    folder: Path,
    *,
    locate: Callable[[str], Path],
    resume: bool = False,
    reporter: Reporter | None = None,
    progress: Progress | None = None,
) -> RewardRun:
    """Train a reward model from a chat model, which `locate` finds by its name, and leave the run in `folder`.

    What the recipe leaves open is fitted (`reward_recipe`), reported before the first step, and recorded. Afterwards
    the engine scores the held-out pairs of every set (`reward_report`). With `recipe.lora` an adapter is trained beside
    the head; what is saved is the merged model. Everything else is as in `pretrain`. Raises DataError for files that
    are not pairs, and RecipeError for settings that the model cannot be trained with.
    """
    with (
        processes(recipe.mesh.tensor) as dist,
        hold(folder, dist, resume=resume),
        checkpoint.open(locate(recipe.start), template=recipe.template or None) as start,
    ):
        recipe.refuse_large(start.config.parameters())
        refuse_tokenizer(start)
        if recipe.lora and resume:
            adapters.refuse_another_base(Run.open(folder), start)
        template = start.template_to_write
        ready = _prepare(recipe, start, template)
        name = ", ".join(map(str, recipe.data.files))
        source = Pairs(name, ready.train, fixed=recipe.compile)
        recipe = fit(recipe, len(source), source.length, width=start.config.dim, dp_size=dist.dp_size, bf16=dist.bf16)
        lora = recipe.lora
        task = Task(
            _network(start, recipe, dist),
            *(source, start.tokenizer, template),
            validation=_validation(ready.held, recipe.batch.micro_size),
            objective=partial(ranking, safety_weight=recipe.safety_weight),
            adapter=merging(start, lora, template, recipe.precision) if lora else None,
            unit="a pair",
        )
        training = Training(recipe, folder, dist, task, reporter=reporter)
        if reporter and dist.is_main:
            note = [start.assumes_format] if start.assumes_format else []
            reporter.begin([*ready.notes, *reward_recipe.describe(recipe), *note])
        about = {"base": fingerprint(start.tensors)} if lora else {}
        run = training.run(resume=resume, pairs=len(source), **about)
        model, main = training.states.path(recipe.steps) / MODEL, dist.is_main
    if not main:
        return RewardRun(run, None)
    report = report_on(model, ready.held, ready.texts, threshold=recipe.threshold, progress=progress)
    report.write(folder)
    return RewardRun(run, report)


def refuse_tokenizer(start: Checkpoint) -> None:
    """Raise RecipeError for a tokenizer whose ids the model does not have."""
    known, size = start.config.vocab_size, start.tokenizer.vocab_size
    if size > known:
        raise RecipeError(
            f"{start.path}: its tokenizer has {size:,} tokens and the model {known:,}; give the model's own tokenizer"
        )


def _prepare(recipe: RewardRecipe, start: Checkpoint, template: str | None) -> _Ready:
    """Read, hold out, mix and tokenize. Raises DataError where nothing is left to train on or to hold out."""
    data, report = recipe.data, PairReport()
    own = list(comparisons.read(data.files, report, safety=data.safety, skip_bad=data.skip_bad))
    other = list(comparisons.read(data.mixed.files, report, safety=data.mixed.safety, skip_bad=data.skip_bad))
    train, held = comparisons.hold_out([*own, *other], data.held_out, seed=recipe.seed)
    kinds = {id(pair) for pair in own}
    mine = [pair for pair in train if id(pair) in kinds]
    mixed = comparisons.mix(mine, [pair for pair in train if id(pair) not in kinds], data.share, seed=recipe.seed)
    if not mine or not held:
        raise DataError(f"{data.files[0]}: too few pairs, so none is left to train on or to hold out; give more")
    tokenized = partial(
        pairs.tokenize,
        tokenizer=start.tokenizer,
        template=template,
        length=min(data.length, start.config.context_length),
        margins=recipe.margins,
        neutralise=data.neutralise,
        report=report,
    )
    tokens, texts = tokenized(comparisons.some(mixed, data.fraction, seed=recipe.seed))
    notes = [f"{len(tokens):,} pairs to train on, {len(mine):,} of the model's own kind were there"]
    sets: dict[str, HeldOut] = {}
    for name in dict.fromkeys(pair.source for pair in held):
        rows, kept = tokenized([pair for pair in held if pair.source == name])
        if rows:
            sets[name] = HeldOut(kept, rows)
    notes.append("held out by prompt: " + ", ".join(f"{len(each.pairs):,} of {name}" for name, each in sets.items()))
    return _Ready(texts, tokens, sets, [*report.lines(), *notes])


def _network(start: Checkpoint, recipe: RewardRecipe, dist: Processes) -> RewardTransformer:
    """The network of `start` with a scalar head: all of it trained, or the head and an adapter."""
    if recipe.lora is None:
        network = Transformer.load(start, device=dist.device)
    else:
        network = adapters.build(start, recipe.lora, precision=recipe.precision, seed=recipe.seed, device=dist.device)
    return RewardTransformer.of(network, start, seed=recipe.seed)


def _validation(held: dict[str, HeldOut], micro_size: int) -> list[PairBatch]:
    """The first held-out pairs of each set."""
    return [
        replace(batch, source=name)
        for name, each in held.items()
        for batch in Loader(Pairs(name, each.tokens), rows=micro_size, seed=0).first(_VALIDATION)
    ]
