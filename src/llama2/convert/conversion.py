"""Any format → any format, tensor by tensor, with a receipt that the model is still the same."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llama2 import checkpoint, files, plan
from llama2.checkpoint import Checkpoint, Tensor, gguf_writer, hf_folder, llama2c, meta
from llama2.convert import answers, receipt
from llama2.convert.bounds import BOUNDS
from llama2.convert.staging import RECEIPT, beside, carry_terms, check_room, staged
from llama2.errors import CheckpointError, ParityError
from llama2.formats import FLOATS, nbytes
from llama2.hub import store
from llama2.hub.progress import Progress, reporting
from llama2.machine import available_memory
from llama2.text.tokenizer import Mode

Target = Literal["gguf", "hf", "meta", "llama2c"]

#: The number formats that can be asked of each target.
FORMATS: dict[str, tuple[str, ...]] = {
    "gguf": ("F32", *BOUNDS),
    "hf": FLOATS,
    "meta": FLOATS,
    "llama2c": ("F32", "Q8_0"),  # versions 0 and 2, which run.c and runq.c read
}


# 11 parameters: the program's public interface, one for each option of `llama2 convert`
def convert(
    source: str | Path,
    target: str | Path,
    to: Target,
    *,
    format: str | None = None,
    tokenizer: str | Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    shards: int = 1,
    run: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model at `source` to `target` in another file format, verify it, and return its receipt.

    The receipt is also at `target`.receipt.json, or receipt.json in its folder. `format` is one of FORMATS[to];
    without it numbers stay as they are where the file format has them, and become F32 elsewhere. `tokenizer` replaces
    the source's own; `tokenizer_mode` decides what is written of its spaces in front of text. `adapters` are merged
    into it, as `checkpoint.open` does. `shards` is for Meta's. With `run`, both models answer through the engine, one
    after the other.

    Nothing is at `target` unless the receipt is in order. Raises ParityError when it is not; CheckpointError,
    ConfigError and TokenizerError when `source` cannot be read, or not be expressed or written so.
    """
    source, target = files.named(Path(source)), files.named(Path(target))
    given = None if tokenizer is None else Path(tokenizer)
    _check_request(to, format, shards)
    with (
        reporting(progress) as report,
        checkpoint.open(source, tokenizer=given, tokenizer_mode=tokenizer_mode, adapters=adapters) as model,
    ):
        formats = _formats(model, to, format)
        if run:
            _check_memory(model, formats)
        with staged(source, target, force=force) as stage:
            check_room(stage, model, formats)
            if to == "llama2c":
                llama2c.refuse_other_tokenizer(target, llama2c.vocabulary(model))
            place = stage / target.name
            _write(_watched(model, formats, report), place, to, shards, integers=format == "Q8_0")
            carry_terms(source, model, place)
            inputs, outputs = _inputs(model, given), sorted(path for path in stage.rglob("*") if path.is_file())
            try:
                with checkpoint.open(place) as output:
                    facts = receipt.take(model, output, inputs=inputs, outputs=outputs, run=run, report=report)
            except ParityError as error:
                raise ParityError(f"{target}: would not be the same model as {source}: {error}") from error
            finally:
                store.forget(place)
            text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
            beside(place, RECEIPT).write_text(text, encoding="utf-8")
    return facts


def _check_request(to: str, format: str | None, shards: int) -> None:
    if to not in get_args(Target):
        raise CheckpointError(f"{to!r} is not a format of files; choose one of {', '.join(get_args(Target))}")
    if to == "gguf" and format not in (None, *FORMATS[to]) and format in plan.FORMATS:
        raise CheckpointError(f"{format} is searched for, not rounded to; write it with `llama2 quantize`")
    if format is not None and format not in FORMATS[to]:
        raise CheckpointError(f"{to} cannot have {format}; choose one of {', '.join(FORMATS[to])}")
    if shards != 1 and to != "meta":
        raise CheckpointError(f"shards={shards} is for Meta's files, not for {to}; leave it out")


def _formats(model: Checkpoint, to: str, format: str | None) -> dict[str, str]:
    """The number format that each tensor becomes."""
    formats = {}
    for name, tensor in model.tensors.items():
        keeps = to == "gguf" or (to != "llama2c" and tensor.format in FLOATS)
        chosen = format or (tensor.format if keeps else "F32")
        plain = to == "llama2c" or (to == "gguf" and len(tensor.shape) == 1)  # integers are its writer's work; norms
        formats[name] = "F32" if plain else chosen
        try:
            nbytes(formats[name], tensor.shape, name)
        except CheckpointError as error:
            raise CheckpointError(f"{model.path}: {error}") from None
    return formats


def _check_memory(model: Checkpoint, formats: Mapping[str, str]) -> None:
    """Raise CheckpointError when one of the models would not fit this machine's memory, where that is known."""
    c, available = model.config, available_memory()
    context = min(c.context_length, answers.PROMPT_TOKENS + answers.TOKENS)
    as_run = {name: formats[name] if formats[name] == "F32" else t.format for name, t in model.tensors.items()}
    machine = plan.Machine("this machine", operations=1, bandwidth=1, overhead=plan.PROCESS)
    need = max(
        sum(plan.generation(c, each, machine, context=context, batch=1).memory.values()) for each in (as_run, formats)
    )
    if 0 < available < need:
        raise CheckpointError(
            f"{model.path}: to run it for the receipt takes {need / 1e9:.2f} GB of memory, and "
            f"{available / 1e9:.2f} GB are free; --receipt tensors compares without running"
        )


def _watched(model: Checkpoint, formats: Mapping[str, str], report: Progress) -> Checkpoint:
    """The model in `formats`; `report` is called whenever a tensor is read."""
    total, done = sum(tensor.nbytes for tensor in model.tensors.values()), 0

    def read(tensor: Tensor) -> NDArray[np.uint8]:
        nonlocal done
        model.release_pages()
        done = min(total, done + tensor.nbytes)
        report("writing", done, total)
        return tensor.data

    tensors = {
        name: replace(tensor, source=partial(read, tensor)).in_format(formats[name])
        for name, tensor in model.tensors.items()
    }
    return replace(model, tensors=tensors, tokenizer_source=lambda: model.tokenizer)


def _write(model: Checkpoint, path: Path, to: str, shards: int, *, integers: bool) -> None:
    if to == "gguf":
        gguf_writer.write(model, path)
    elif to == "hf":
        hf_folder.write(model, path)
    elif to == "meta":
        meta.write(model, path, shards=shards)
    else:
        llama2c.write(model, path, version=2 if integers else 0)


def _inputs(model: Checkpoint, tokenizer: Path | None) -> list[Path]:
    """The source's files."""
    path = model.path
    if path.is_dir():
        kinds = {".json", ".jinja", ".model", ".safetensors", ".pth"}
        files = [file for file in sorted(path.iterdir()) if file.suffix in kinds and file.is_file()]
        if model.format == "meta":
            files = [*meta.files(path), path / "params.json"]
    elif split := re.fullmatch(r"(.+)-00001(-of-\d{5}\.gguf)", path.name):
        files = sorted(path.parent.glob(f"{glob.escape(split[1])}-?????{split[2]}"))
    else:
        files = [path]
    files += [file for adapter in model.adapters for file in adapter.files]
    beside = {"meta": meta.tokenizer_file(path), "llama2c": path.with_name("tokenizer.bin")}.get(model.format)
    own = tokenizer or beside
    return files if own is None or own in files else [*files, own]
