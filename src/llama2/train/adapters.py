"""Training of an adapter in place of a model's weights: its network, what it continues, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from llama2.checkpoint import Checkpoint, adapter, adapter_writer, hf_folder
from llama2.checkpoint.lora import Adapter, Update, fingerprint
from llama2.errors import RecipeError, RunError
from llama2.files import quote
from llama2.model import lora as low_rank
from llama2.model.lora import Lora
from llama2.model.transformer import Transformer, stored
from llama2.records import Run
from llama2.train.settings import LoraSettings, Target
from llama2.train.states import AdapterWriter


def build(
    start: Checkpoint,
    settings: LoraSettings,
    continued: Adapter | None = None,
    *,
    precision: Literal["bf16", "fp32"],
    seed: int,
    device: torch.device,
) -> Transformer:
    """The frozen network of `start` with an adapter: a new one drawn by `seed`, or one that is `continued`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = low_rank.load_frozen(start, dtype=dtype, quantize=settings.quantize, device=device)
    start.release_pages()
    generator = torch.Generator().manual_seed(seed)
    lora = Lora(settings.rank, settings.alpha, settings.dropout, tuple(settings.targets))
    low_rank.attach(network, lora, generator)
    if continued:
        low_rank.fill(network, _ordered(continued, start))
    return network


def continued(settings: LoraSettings, start: Checkpoint, locate: Callable[[str], Path]) -> tuple[LoraSettings, Adapter]:
    """The adapter that `settings` name, and the settings with its rank, alpha and targets.

    Raises RecipeError for an adapter that this training cannot continue: another kind, or settings that are not its
    own. Raises CheckpointError as `adapter.merge` does, and RecipeError where it was trained on another base.
    """
    found = adapter.read(locate(settings.adapter), start)
    where = f"lora.adapter={quote(settings.adapter)[1:-1]}"
    if note := adapter.of_another_base(found, start):
        raise RecipeError(note)
    names = {update.module.split(".")[-1] for update in found.updates.values()}
    ranks = {update.right.shape[0] for update in found.updates.values()}
    scales = {update.scale for update in found.updates.values()}
    if found.replacements or any(update.magnitude for update in found.updates.values()) or names - {*get_args(Target)}:
        raise RecipeError(f"{where}: has more than low-rank updates of the blocks' matrices; merge it, and begin anew")
    if len(ranks) > 1 or len(scales) > 1:
        raise RecipeError(f"{where}: has several ranks or scales, and one is trained; merge it, and begin anew")
    rank, scale = ranks.pop(), scales.pop()
    if {*low_rank.targets(start.config, tuple(names))} != {name.removesuffix(".weight") for name in found.updates}:
        raise RecipeError(f"{where}: leaves out some layers of {', '.join(sorted(names))}; merge it, and begin anew")
    own = {"rank": rank, "alpha": scale * rank, "targets": sorted(names)}
    for name, value in own.items():
        given = getattr(settings, name)
        if name in settings.model_fields_set and (sorted({*given}) if name == "targets" else given) != value:
            raise RecipeError(f"lora.{name}={given}: the adapter to continue has {value}; leave it out")
    return settings.model_copy(update=own), found


def writer(start: Checkpoint, settings: LoraSettings, name: str, template: str | None) -> AdapterWriter:
    """What writes the adapter of the model that `name` opens, with a chat template that its files do not have."""
    base = fingerprint(start.tensors)
    config, given = start.config, template if template != start.template else None

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        scale = settings.alpha / settings.rank
        updates = {
            f"{module}.weight": Update(module, stored("", lora_b.float()), stored("", lora_a.float()), scale)
            for module, (lora_b, lora_a) in low_rank.updates(weights).items()
        }
        adapter_writer.write(
            folder, updates, config=config, base=name, fingerprint=base, dropout=settings.dropout, template=given
        )

    return write


def refuse_another_base(run: Run, start: Checkpoint) -> None:
    """Raise RunError where a run that is resumed was begun with other weights than `start` has now."""
    if run.origin.get("base") not in (None, fingerprint(start.tensors)):
        raise RunError(f"{run.folder}: was begun with another model than {start.path} is now; begin another run")


def _ordered(found: Adapter, start: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """B (R, r), with rows in Meta's order, and A (r, C), by the module's name."""
    pairs = {}
    for name, update in found.updates.items():
        left = adapter.in_pairs(update, hf_folder.heads_of(name, start.config), found.halves).left
        lora_b, lora_a = (torch.from_numpy(each.dequantize()) for each in (left, update.right))
        pairs[name.removesuffix(".weight")] = lora_b, lora_a
    return pairs
