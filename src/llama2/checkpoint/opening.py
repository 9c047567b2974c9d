"""Opening a model: which format a file or folder has, and the reader of that format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from llama2 import files, records
from llama2.checkpoint import gguf
from llama2.checkpoint.checkpoint import Checkpoint
from llama2.errors import CheckpointError, RequestError
from llama2.text.tokenizer import Mode

#: Files of a folder by which people, and other programs, name the model in it.
_PART = r"(?:model|pytorch_model|consolidated)[\w.-]*\.(?:safetensors|bin|pth|json)|(?:config|params)\.json"


def open(
    path: str | Path,
    *,
    vocabulary: Path | None = None,
    tokenizer: Path | None = None,
    tokenizer_mode: Mode = "auto",
    adapters: Sequence[tuple[Path, float]] = (),
    template: str | None = None,
) -> Checkpoint:
    """Open a model file or folder, whichever format it has. Raises CheckpointError with the reason when it cannot.

    `vocabulary` is where artifacts of the model's vocabulary are cached, so that the next start is quick.
    `tokenizer` is a file that replaces the model's own (`text.files.read`), and `tokenizer_mode` how spaces are put in
    front of text; RequestError for another word. `adapters` are merged in, each with a factor for its own scale
    (`adapter.merge`).
    `template` replaces its chat templates: one of their names, the name of a chat format, or a Jinja file
    (`text.chat_formats`); TemplateError when it is none.
    """
    if tokenizer_mode not in get_args(Mode):
        shown = files.quote(str(tokenizer_mode))
        raise RequestError(f"tokenizer_mode {shown} is not one of {', '.join(get_args(Mode))}; choose one")
    opened = _read(files.named(Path(path)), vocabulary)
    opened.tokenizer_mode = tokenizer_mode
    if adapters:
        from llama2.checkpoint import adapter

        opened = adapter.merge(opened, adapters)
    if tokenizer is not None:
        from llama2.text import files as tokenizer_files

        opened.tokenizer_source = partial(tokenizer_files.read, tokenizer, opened.config.vocab_size)
    if template is not None:
        from llama2.text import chat_formats

        opened.template = chat_formats.choose(template, opened.templates, opened.tokenizer)
        opened.templates = {"default": opened.template}
    return opened


def _read(path: Path, vocabulary: Path | None) -> Checkpoint:
    path = records.newest(path, records.MODEL)
    if not gguf.matches(path):  # the other formats are imported when they are asked: a start must be quick
        from llama2.checkpoint import adapter, hf_folder, llama2c, meta

        path = _folder_of(records.newest(path, records.ADAPTER))
        beside = adapter.beside(path)  # raises where there is an adapter alone
        if hf_folder.matches(path) or meta.matches(path):
            opened = hf_folder.read(path) if hf_folder.matches(path) else meta.read(path)
            opened.notes += beside
            return opened
        if llama2c.matches(path):
            return llama2c.read(path)
        if path.is_dir():
            raise _no_model(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: is a file of weights alone; give the folder that has its config.json")
    return gguf.read(path, vocabulary)


def _folder_of(path: Path) -> Path:
    """The folder of a model, if the path is one of the files in it that alone are none; else the path."""
    if not re.fullmatch(_PART, path.name) or not path.is_file():
        return path
    configured = any(files.exists(path.with_name(name)) for name in ("config.json", "params.json"))
    return path.parent if configured else path


def _no_model(folder: Path) -> CheckpointError:
    """Why a folder that no reader takes holds no model, and what to do."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return CheckpointError(f"{folder}: cannot be read ({error.strerror}); check its permissions")
    if not names:
        return CheckpointError(f"{folder}: is an empty folder; download the model again, or give another")
    if found := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{folder}: is a folder of GGUF files; give one, such as {files.quote(found[0])} in it")
    if found := [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]:
        return CheckpointError(
            f"{folder}: has {files.quote(found[0])}, and neither config.json nor params.json; download that too"
        )
    if found := [name for name in names if name.startswith("tokenizer")]:
        return CheckpointError(f"{folder}: has a tokenizer ({files.quote(found[0])}), and no model; download that too")
    return CheckpointError(f"{folder}: holds no model (config.json, params.json or a GGUF file); give another folder")
