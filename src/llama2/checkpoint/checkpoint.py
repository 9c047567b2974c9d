"""The seam between learning and using: a Checkpoint and its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from llama2 import files, records
from llama2.config import ModelConfig
from llama2.ending import section
from llama2.errors import CheckpointError, DialogError, RequestError, TokenizerError
from llama2.formats import FORMATS, nbytes

if TYPE_CHECKING:
    from llama2.checkpoint.adapter import Adapter
    from llama2.text.tokenizer import Mode, Tokenizer


#: Files of a folder by which people, and other programs, name the model in it.
_PART = r"(?:model|pytorch_model|consolidated)[\w.-]*\.(?:safetensors|bin|pth|json)|(?:config|params)\.json"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor, still in its file's number format.

    `shape` is PyTorch's order, (rows, columns) or (n,). `source` is a read-only uint8 view of exactly the tensor's
    bytes in the mapped file if they stand there in Meta's order, else what makes a copy of them in that order.
    """

    name: str
    format: str  # "F32", "F16", "BF16", "Q8_0", "Q4_0", … as in formats.FORMATS
    shape: tuple[int, ...]
    source: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
    mapped: tuple[files.MappedFile, ...] = field(default=(), repr=False, compare=False)  # what `data` is read from

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes in Meta's order. Nothing is read before this; a copy is made each time, and not kept."""
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """How many bytes `data` has, without touching it."""
        return nbytes(self.format, self.shape)

    def dequantize(self) -> NDArray[np.float32]:
        """The tensor's values in float32, in `shape`."""
        from llama2.checkpoint import quantization

        if self.format not in FORMATS:
            raise CheckpointError(
                f"tensor {files.quote(self.name)} has format {files.quote(self.format)}, not a float's"
            )
        return quantization.dequantize(self.data, self.format, self.shape)

    def in_float32(self) -> Tensor:
        """This tensor in F32, which is made whenever it is touched."""
        if self.format == "F32":
            return self
        return replace(self, format="F32", source=lambda: self.dequantize().view(np.uint8).reshape(-1))

    def in_format(self, format: str) -> Tensor:
        """This tensor in one of formats.FORMATS, without importance; it is made whenever it is touched."""
        from llama2.checkpoint import quantization

        if format in ("F32", self.format):
            return self.in_float32() if format == "F32" else self
        return replace(self, format=format, source=lambda: quantization.quantize(self.dequantize(), format))


@dataclass
class Checkpoint:
    """A model on disk: configuration, tokenizer, named tensors, chat template and licence.

    `tensors` holds every name of `config.tensor_shapes()` and no other. `metadata` is what the file says of itself,
    for display. `notes` are sentences on what was ignored or assumed, for whoever opens it. The tokenizer is built on
    first use. `templates` are all chat templates by name, `template` among them as "default".
    """

    path: Path
    format: str  # "gguf", "huggingface", "meta", "llama2c"
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    template: str | None = None  # Jinja source of the chat template
    licence: str | None = None
    name: str = ""
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokenizer_mode: Mode = "auto"  # which parts of a text get a space in front (text.tokenizer.Mode)
    base: Checkpoint | None = None  # the model without its `adapters`, where some were merged
    adapters: tuple[Adapter, ...] = ()
    _build_tokenizer: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        named = {name: text for name, text in self.templates.items() if name != "default"}
        self.templates = named if self.template is None else {"default": self.template, **named}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer. Raises TokenizerError when its vocabulary is damaged or unsupported."""
        with self.naming(), section:
            tokenizer: Tokenizer = self._build_tokenizer()
            if self.tokenizer_mode != "auto":
                tokenizer.choose(self.tokenizer_mode)
        return tokenizer

    def template_for(self, *, tools: bool) -> str | None:
        """The chat template of a dialog, with `tools` declared or without: as transformers chooses among several.

        Raises DialogError when a file has several and calls none of them default.
        """
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if self.template is None and self.templates:
            raise DialogError(
                f"{self.path}: has the chat templates {', '.join(self.templates)}, and none for every dialog; "
                "choose one with --template NAME"
            )
        return self.template

    @property
    def assumes_format(self) -> str | None:
        """What to tell a person whose model names no chat format, and has Llama 2's for want of one; None if sure.

        Without a template, a model is Llama 2 Chat by its vocabulary and its name; Meta's own files say no more.
        """
        if self.templates or self.tokenizer.kind != "sentencepiece":
            return None
        names = f"{self.name} {self.path.name} {self.metadata.get('_name_or_path')}"
        if self.tokenizer.vocab_size == 32000 and re.search(r"llama[-_ ]?v?2\b.*chat", names, re.IGNORECASE):
            return None
        return f"{self.name} names no chat format; Llama 2's is used; --template NAME chooses another"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Whatever is wrong with the vocabulary, the message begins with the checkpoint's path, or a file's in it."""
        try:
            yield
        except TokenizerError as error:
            message = str(error)
            raise TokenizerError(message if message.startswith(str(self.path)) else f"{self.path}: {message}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_finite(self) -> None:
        """Raise CheckpointError when a weight is NaN or infinite. Reads every float and every block's scales once."""
        from llama2.checkpoint import quantization

        for tensor in self.tensors.values():
            if not quantization.is_finite(tensor.data, tensor.format):
                changed = [a for a in self.adapters if tensor.name in a.updates or tensor.name in a.replacements]
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} holds weights that are not finite numbers; "
                    + (f"{changed[-1].path} changed it, give it a smaller scale" if changed else "download it again")
                )

    def release_pages(self) -> None:
        """Take the pages of all mapped files of the model out of memory (`MappedFile.release_pages`)."""
        for file in {file for tensor in self.tensors.values() for file in tensor.mapped}:
            file.release_pages()

    def close(self) -> None:
        """Release the mapping, and end the tokenizer's process. Views still in use keep their pages until they die."""
        self.tensors = {}
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
        if self.base is not None:
            self.base.close()


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

    `vocabulary` is where what was derived from the model's vocabulary is kept, so that the next start is quick.
    `tokenizer` is a file that replaces the model's own (`text.files.read`), and `tokenizer_mode` how spaces are put in
    front of text; RequestError for another word. `adapters` are merged in, each with a factor for its own scale
    (`adapter.merge`).
    `template` replaces its chat templates: one of their names, the name of a chat format, or a Jinja file
    (`text.chat_formats`); TemplateError when it is none.
    """
    if tokenizer_mode != "auto":
        from llama2.text.tokenizer import Mode

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

        opened._build_tokenizer = partial(tokenizer_files.read, tokenizer, opened.config.vocab_size)
    if template is not None:
        from llama2.text import chat_formats

        opened.template = chat_formats.choose(template, opened.templates, opened.tokenizer)
        opened.templates = {"default": opened.template}
    return opened


def _read(path: Path, vocabulary: Path | None) -> Checkpoint:
    from llama2.checkpoint import gguf

    path = _newest(path)
    if not gguf.matches(path):  # the other formats are imported when they are asked: a start must be quick
        from llama2.checkpoint import adapter, huggingface, llama2c, meta

        path = _folder_of(path)
        beside = adapter.beside(path)  # raises where there is an adapter alone
        if huggingface.matches(path) or meta.matches(path):
            opened = huggingface.read(path) if huggingface.matches(path) else meta.read(path)
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


def _newest(path: Path) -> Path:
    """The last model that a training run has saved, if the path is a run's; else the path."""
    found = records.states_folder(path).glob(f"step-*/{records.MODEL}")
    steps = {int(step[1]): model for model in found if (step := re.fullmatch(records.STATE, model.parent.name))}
    return steps[max(steps)] if steps else path
