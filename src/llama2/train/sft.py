"""`llama2 sft`: from a model and dialogs to one that answers (paper 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.lora import Adapter, fingerprint
from llama2.data import dialogs
from llama2.data.dialogs import Packed, Prepared
from llama2.data.loader import Loader, TokenBatch
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.train import adapters, tuning
from llama2.train.callbacks import Reporter, Sample
from llama2.train.lock import hold
from llama2.train.processes import processes
from llama2.train.training import Task, Training, refuse_longer
from llama2.train.tuning import SftRecipe, fit, fit_rows

#: Rows of the dialogs trained on whose loss is measured before and after.
_SAMPLE = 32


class Losses(NamedTuple):
    """Mean loss of answers' tokens, in nats: of dialogs trained on, and of those held out, if there are any."""

    train: float
    validation: float | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """A run that has ended, and its losses before the first step, as far as they are known, and after the last."""

    run: Run
    before: Losses | None
    after: Losses


def sft(
    recipe: SftRecipe,
    folder: Path,
    *,
    locate: Callable[[str], Path],
    resume: bool = False,
    sample: Callable[..., list[str]] | None = None,
    reporter: Reporter | None = None,
) -> Tuned:
    """Tune a model, which `locate` finds by its name, on dialogs, and leave the run in `folder`.

    Loss is on the assistant's answers alone. What the recipe leaves open is fitted (`tuning`), reported before the
    first step, and recorded. With `recipe.lora` an adapter is trained. `sample` then gets the base's path in place of a
    model's, and the adapter's after the other arguments. Everything else is as in `pretrain`. Raises DataError and
    DialogError for dialogs that the model's chat format does not know. Raises RecipeError for settings that the model
    cannot be trained with.
    """
    with (
        processes(recipe.mesh.tensor) as dist,
        hold(folder, dist, resume=resume),
        checkpoint.open(locate(recipe.start), template=recipe.template or None) as start,
    ):
        recipe.refuse_large(start.config.parameters())
        if "length" in recipe.data.model_fields_set:
            refuse_longer(recipe.data.length, start)
        continued = None
        if recipe.lora and recipe.lora.adapter:
            own, continued = adapters.continued(recipe.lora, start, locate)
            recipe = recipe.model_copy(update={"lora": own})
        if recipe.lora and resume:
            adapters.refuse_another_base(Run.open(folder), start)
        template = start.template_to_write
        note = start.assumes_format
        rendered = dialogs.render_all(
            recipe.data, start.tokenizer, template, start.template_for(tools=True) or template
        )
        sizes = [len(example.tokens) for example in rendered.examples]
        recipe = recipe.model_copy(update={"data": fit_rows(recipe.data, sizes, start.config.context_length)})
        ready = dialogs.prepare(recipe.data, rendered, seed=recipe.seed)
        recipe = fit(recipe, len(ready.train), width=start.config.dim, dp_size=dist.dp_size, bf16=dist.bf16)
        task = _task(recipe, start, ready, template, continued, dist.device)
        sampling = _sampling(sample, start.path if recipe.lora else None)
        training = Training(recipe, folder, dist, task, sample=sampling, reporter=reporter)
        if reporter and dist.is_main:
            notes = [*rendered.report.lines(), _describe(ready), tuning.describe(recipe), *([note] if note else [])]
            reporter.begin([*notes, *(f"warning: {each}" for each in tuning.warnings(recipe, ready.train))])
        about = {"base": fingerprint(start.tensors)} if recipe.lora else {}
        return _tuned(training, ready, resume=resume, **about)


def _task(
    recipe: SftRecipe,
    start: Checkpoint,
    ready: Prepared,
    template: str | None,
    continued: Adapter | None,
    device: torch.device,
) -> Task:
    """What is trained: every weight of `start`, or an adapter, which may be continued."""
    held = [
        replace(batch, source=packed.name)
        for packed in ready.validation
        for batch in _rows(packed, recipe.batch.micro_size)
    ]
    if recipe.lora is None:
        return Task(Transformer.load(start, device=device), ready.train, start.tokenizer, template, validation=held)
    return Task(
        adapters.build(start, recipe.lora, continued, precision=recipe.precision, seed=recipe.seed, device=device),
        *(ready.train, start.tokenizer, template),
        validation=held,
        adapter=adapters.writer(start, recipe.lora, recipe.start, template),
    )


def _tuned(training: Training, ready: Prepared, *, resume: bool, **about: Any) -> Tuned:
    """Train, and measure losses before, unless the run is resumed, and after. `about` is recorded."""
    some = _rows(ready.train, training.recipe.batch.micro_size, _SAMPLE)
    held = training.task.validation

    def losses() -> Losses:
        return Losses(training.step.evaluate(some), training.step.evaluate(held) if held else None)

    before = None if resume else losses()
    counts = {"dialogs": ready.train.dialogs, "left_out": ready.left_out, "trained_on": ready.train.loss_tokens}
    run = training.run(resume=resume, **counts, **about, before=before and before._asdict())
    if resume and (recorded := run.origin.get("before")):
        before = Losses(**recorded)
    return Tuned(run, before, losses())


def _sampling(sample: Callable[..., list[str]] | None, base: Path | None) -> Sample | None:
    """What continues texts with a state's model, or with its adapter of `base`."""
    if sample is None or base is None:
        return sample
    return lambda adapter, prompts, tokens: sample(base, prompts, tokens, adapter)


def _rows(packed: Packed, micro_size: int, most: int | None = None) -> list[TokenBatch]:
    """Every row, or the first `most`, `micro_size` at a time."""
    return Loader(packed, rows=micro_size, seed=0).first(most or len(packed))


def _describe(ready: Prepared) -> str:
    """What is trained on, in a line."""
    some, without = ready.train, ""
    if ready.left_out:
        without = f", without {ready.left_out:,} that are longer than a row"
    return (
        f"{some.dialogs:,} dialogs{without}, in {len(some):,} rows that are {some.filled:.0%} full; "
        f"{some.loss_tokens:,} tokens are trained on"
    )
