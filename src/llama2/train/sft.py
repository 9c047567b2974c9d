"""`llama2 sft`: from a model and dialogs to one that answers (paper 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from llama2 import checkpoint
from llama2.data import dialogs, loader
from llama2.data.dialogs import Packed, Prepared
from llama2.data.loader import Loader
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.text import chat_formats
from llama2.train import tuning
from llama2.train.lock import hold
from llama2.train.loop import Loop, Sample, Watch, refuse_longer
from llama2.train.processes import processes
from llama2.train.tuning import SftRecipe, fit, fit_rows, refuse_large

#: Rows of the dialogs learnt whose loss is measured before and after.
_SAMPLE = 32


class Losses(NamedTuple):
    """Mean loss of answers' tokens, in nats: of dialogs that are learnt, and of those held out, if there are any."""

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
    sample: Sample | None = None,
    watch: Watch | None = None,
) -> Tuned:
    """Tune a model, which `locate` finds by its name, on dialogs, and leave the run in `folder`.

    Loss is on what the assistant says alone. What the recipe leaves open is fitted (`tuning`), told before the first
    step, and recorded. What is left is as `pretrain` does it. Raises DataError and DialogError for dialogs that the
    model's chat format does not know, RecipeError for what the model cannot be trained by.
    """
    with (
        processes(recipe.mesh.tensor) as here,
        hold(folder, here, resume=resume),
        checkpoint.open(locate(recipe.start), template=recipe.template or None) as start,
    ):
        refuse_large(recipe, start.config.parameters())
        if "length" in recipe.data.model_fields_set:
            refuse_longer(recipe.data.length, start)
        template = start.template_for(tools=False)
        note = start.assumes_format
        if template is None and start.tokenizer.kind == "sentencepiece":  # what it learns is what its folder says
            template = chat_formats.source(chat_formats.LLAMA2, bos=True)
        rendered = dialogs.render_all(
            recipe.data, start.tokenizer, template, start.template_for(tools=True) or template
        )
        sizes = [len(example.tokens) for example in rendered.examples]
        recipe = recipe.model_copy(update={"data": fit_rows(recipe.data, sizes, start.config.context_length)})
        ready = dialogs.prepare(recipe.data, rendered, seed=recipe.seed)
        recipe = fit(recipe, len(ready.train), width=start.config.dim, world=here.world, bf16=here.bf16)
        held = [
            replace(batch, source=packed.name)
            for packed in ready.validation
            for batch in _rows(packed, recipe.batch.micro)
        ]
        loop = Loop(
            recipe,
            folder,
            here,
            source=ready.train,
            validation=held,
            network=Transformer.load(start, device=here.device),
            tokenizer=start.tokenizer,
            template=template,
            about={"dialogs": ready.train.dialogs, "left_out": ready.left_out, "learnt": ready.train.loss_tokens},
            sample=sample,
            watch=watch,
        )
        if watch and here.first:
            notes = [*rendered.report.lines(), _told(ready), tuning.told(recipe), *([note] if note else [])]
            watch.begin([*notes, *(f"warning: {each}" for each in tuning.warnings(recipe, ready.train))])
        some = _rows(ready.train, recipe.batch.micro, _SAMPLE)
        before: Losses | None = None
        if not resume:
            before = Losses(loop.step.evaluate(some), loop.step.evaluate(held) if held else None)
            loop.about = {**loop.about, "before": before._asdict()}
        run = loop.run(resume)
        if resume and (kept := run.origin.get("before")):
            before = Losses(**kept)
        return Tuned(run, before, Losses(loop.step.evaluate(some), loop.step.evaluate(held) if held else None))


def _rows(packed: Packed, micro: int, most: int | None = None) -> list[loader.Batch]:
    """Every row, or the first `most`, `micro` at a time."""
    return Loader(packed, rows=micro, seed=0).first(most or len(packed))


def _told(ready: Prepared) -> str:
    """What is learnt from, in a line."""
    some, without = ready.train, ""
    if ready.left_out:
        without = f", without {ready.left_out:,} that are longer than a row"
    return (
        f"{some.dialogs:,} dialogs{without}, in {len(some):,} rows that are {some.filled:.0%} full; "
        f"{some.loss_tokens:,} tokens are learnt"
    )
