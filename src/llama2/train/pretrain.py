"""`llama2 pretrain`: from a corpus to a base model (paper 2.2)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from llama2 import checkpoint, files
from llama2 import recipe as recipes
from llama2.checkpoint import Checkpoint
from llama2.data import shards
from llama2.data.compressed import SUFFIXES
from llama2.data.loader import TokenBatch, Windows
from llama2.data.settings import DOCUMENTS, BuildRecipe, SourceSettings
from llama2.data.shards import Shards
from llama2.errors import DataError, RecipeError, RunError
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.text import tokenizer_folder
from llama2.text.tokenizer import Tokenizer
from llama2.train.callbacks import Reporter, Sample
from llama2.train.lock import hold
from llama2.train.processes import Processes, processes
from llama2.train.settings import PretrainRecipe, precision_of
from llama2.train.training import Task, Training, refuse_longer

#: Repetitions of a text that train a model about as well as new text (Muennighoff et al. 2023).
_MOST_EPOCHS = 4
#: Names of files whose size does not show how much text they contain.
_PACKED = (*SUFFIXES, ".parquet")
#: A text by which tokenizers are compared, beside their vocabularies.
_PROBE = "The 3 quick foxes' café:\n\tif x >= 10: return 'naïve' # 你好 🙂  end"


def pretrain(
    recipe: PretrainRecipe,
    folder: Path,
    *,
    beside: Path = Path(),
    locate: Callable[[str], Path] = Path,
    resume: bool = False,
    sample: Sample | None = None,
    reporter: Reporter | None = None,
) -> Run:
    """Train by a recipe, whose paths are relative to `beside`, and leave the run in `folder`.

    With `recipe.start`, training continues from a model that `locate` finds by its name. Its tokenizer makes the
    corpus, and the learning rate warms up again from zero to the recipe's peak. With `resume`, the run in `folder`
    continues from its last state, with the same losses as if it had never stopped. Under torchrun every process calls
    this. Raises RunError, DataError, RecipeError and ConfigError, before the first step if they can be known then.
    """
    with ExitStack() as stack:
        dist = stack.enter_context(processes(recipe.mesh.tensor))
        stack.enter_context(hold(folder, dist, resume=resume))
        start = stack.enter_context(checkpoint.open(locate(recipe.start))) if recipe.start else None
        length, boundaries = recipe.data.length, recipe.data.boundaries
        recipe = recipe.model_copy(update={"precision": precision_of(recipe, dist.bf16)})
        if start:
            refuse_longer(length, start)
        notes: list[str] = []
        corpus = _Corpus(recipe, folder, beside, start, notes.append).folder(dist, resume)
        train = Shards.open(corpus, "train")
        if start and not _same(start.tokenizer, train.load_tokenizer()):
            raise DataError(f"{corpus}: does not have the tokens of {start.path}; give data.dir or data.recipe instead")
        validation: list[TokenBatch] = []
        if recipe.data.validation:
            windows = Windows(Shards.open(corpus, "validation"), length=length, boundaries=boundaries)
            validation = windows.spread(recipe.data.validation, recipe.batch.micro_size)
        if start:
            network = Transformer.load(start, device=dist.device)
            notes.append(_describe(recipe, start))
        else:
            with torch.device("meta"):
                network = Transformer(recipe.model.config(train.manifest.tokenizer.vocabulary, length))
        source = Windows(train, length=length, boundaries=boundaries)
        epochs = recipe.steps * recipe.batch.size / len(source)
        if epochs > _MOST_EPOCHS:
            notes.append(f"warning: each text is read {epochs:.0f} times; fewer steps, or more text, may do as well")
        task = Task(
            network,
            source,
            tokenizer=start.tokenizer if start else train.load_tokenizer(),
            template=start.template_for(tools=False) if start else None,
            validation=validation,
        )
        training = Training(recipe, folder, dist, task, sample=sample, reporter=reporter)
        if reporter and dist.is_main and notes:
            reporter.begin(notes)
        return training.run(resume=resume)


def _describe(recipe: PretrainRecipe, start: Checkpoint) -> str:
    """How training continues from a model, in a line."""
    lr, warmup = recipe.optimizer.lr, recipe.optimizer.warmup
    shape = "; its shape is its own, not that of model" if "model" in recipe.model_fields_set else ""
    return f"continues from {start.path}{shape}; the learning rate warms up again, to {lr:g} in {warmup} steps"


def _same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same tokens."""
    return (
        one.vocab_size == other.vocab_size
        and one.encode(_PROBE) == other.encode(_PROBE)
        and all(one.token_bytes(token) == other.token_bytes(token) for token in range(one.vocab_size))
    )


class _Corpus:
    """A run's corpus, which is built as the recipe says. `note` receives what is not as expected."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        run: Path,
        beside: Path,
        start: Checkpoint | None,
        note: Callable[[str], None],
    ) -> None:
        self._recipe, self._data, self._run, self._beside = recipe, recipe.data, run, beside
        self._start, self._note = start, note
        self._own = bool(self._data.dir or start)  # this run's, and in its folder

    def folder(self, dist: Processes, resume: bool) -> Path:
        """The corpus's folder; a missing one is built by the main process. A resumed run keeps its corpus."""
        if self._data.corpus is not None:
            return self._data.corpus
        asked = self._asked()
        if dist.is_main and not (resume and (asked.output / shards.MANIFEST).exists()):
            self._build(asked)
        dist.barrier()
        return asked.output

    def _asked(self) -> BuildRecipe:
        """The recipe of the corpus, with this run's folder of documents and its model's tokenizer."""
        data, changed = self._data, []
        if self._own:
            changed.append(f"output={json.dumps(str(self._run / 'corpus'))}")
        if self._start:
            changed.append(f"tokenizer={{file = {json.dumps(str(self._tokenizer(self._start)))}}}")
        if data.recipe is None:
            asked = recipes.make({"dir": data.dir}, BuildRecipe, changed, where=f"data.dir={data.dir}")
        else:
            if data.dir:
                changed.append(f"dir={json.dumps(data.dir)}")
            asked = recipes.load(self._beside / data.recipe, BuildRecipe, changed)
            if not data.dir or "dir" not in recipes.load(self._beside / data.recipe, BuildRecipe).model_fields_set:
                return asked  # its sources are in any folder that it is given
        return asked.model_copy(update={"sources": _all_but(asked.folder, self._run)})

    def _tokenizer(self, start: Checkpoint) -> Path:
        """The model's tokenizer as a file, which a GGUF does not have."""
        written = tokenizer_folder.written(start.tokenizer, {})
        if model := written.get("tokenizer.model"):
            written = {"tokenizer.model": model}
        place = self._run / "tokenizer"
        place.mkdir(parents=True, exist_ok=True)
        for name, content in written.items():
            if not (place / name).is_file() or (place / name).read_bytes() != content:
                with files.create(place / name, error=RunError) as file:
                    file.write(content)
        return place / next(iter(written))

    def _build(self, asked: BuildRecipe) -> None:
        from llama2.data.build import build, differences
        from llama2.data.read import find

        found = find(asked)
        changed = differences(asked, found)
        if changed and self._own:
            self._note(f"{asked.output}: is built again, because {'; '.join(changed)}")
        elif changed:
            raise DataError(
                f"{asked.output}: was built from something else: {'; '.join(changed)}; build it anew with `llama2 data "
                f"build {self._beside / (self._data.recipe or '')} --force`, or use it as it is with data.corpus="
            )
        elif changed is not None:
            return
        size, length = sum(file.size for file in found), self._data.length
        packed = any(file.path.endswith(_PACKED) for file in found)
        if self._data.validation and not packed and max(asked.validation, 0.1) * size + 2 * len(found) <= length:
            raise RecipeError(
                f"{asked.dir}: {size:,} bytes of documents are too few to hold out a row of {length} tokens; "
                "give more text, a smaller data.length, or data.validation=0"
            )
        if build(asked, force=bool(changed), note=self._note, files=found) is None:
            raise RunError(f"{asked.output}: is being built by {asked.executor.kind}; begin again when it is whole")


def _all_but(folder: str, run: Path) -> dict[str, SourceSettings]:
    """All documents of a folder, but what runs leave behind in it."""
    [(name, source)] = DOCUMENTS.items()
    exclude = [*source.exclude]
    for own in (run, run.parent):
        place = os.path.relpath(own.resolve(), folder) if "://" not in folder else ".."
        if place != "." and not place.startswith(".."):
            exclude.append(f"{place}/*")
    return {name: source.model_copy(update={"exclude": exclude})}
