"""The seam between learning and using: a Checkpoint and its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.config import ModelConfig
from llama2.ending import section
from llama2.errors import CheckpointError, DialogError, TokenizerError
from llama2.formats import FORMATS, nbytes

if TYPE_CHECKING:
    from llama2.checkpoint.adapter import Adapter
    from llama2.text.tokenizer import Mode, Tokenizer


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor, still in its file's number format.

    `shape` is PyTorch's order, (rows, columns) or (n,). `source` is a read-only uint8 view of exactly the tensor's
    bytes in the mapped file if they are there in Meta's order, else what makes a copy of them in that order.
    """

    name: str
    format: str  # "F32", "F16", "BF16", "Q8_0", "Q4_0", … as in formats.FORMATS
    shape: tuple[int, ...]
    source: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
    mapped: tuple[files.MappedFile, ...] = field(default=(), repr=False, compare=False)  # what `data` is read from

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes in Meta's order. Nothing is read before this; a copy is made each time, and not cached."""
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

    `tensors` holds every name of `config.tensor_shapes()` and no other; `extras` are tensors beside them, by names of
    their own, such as a reward model's `value_head.weight`. Hugging Face's folders alone have a place for these.
    `metadata` is what the file says of itself, for display. `notes` are sentences on what was ignored or assumed.
    `tokenizer_source` is the tokenizer, or a function that makes it on first use. `templates` are all chat templates by
    name, `template` among them as "default".
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
    tokenizer_source: Tokenizer | Callable[[], Tokenizer] | None = field(default=None, repr=False)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {name: text for name, text in self.templates.items() if name != "default"}
        self.templates = named if self.template is None else {"default": self.template, **named}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokenizer. Raises TokenizerError when its vocabulary is damaged or unsupported."""
        if self.tokenizer_source is None:
            raise TokenizerError(f"{self.path}: has no tokenizer; give one with --tokenizer")
        with self.naming(), section:
            source = self.tokenizer_source
            tokenizer = source() if callable(source) else source
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
        """What to say where a model names no chat format, and gets Llama 2's for want of one; None if sure.

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

        for tensor in (*self.tensors.values(), *self.extras.values()):
            if not quantization.is_finite(tensor.data, tensor.format):
                changed = [a for a in self.adapters if tensor.name in a.updates or tensor.name in a.replacements]
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} holds weights that are not finite numbers; "
                    + (f"{changed[-1].path} changed it, give it a smaller scale" if changed else "download it again")
                )

    def refuse_extras(self, format: str) -> None:
        """Raise CheckpointError, for a format of files that has no place for extra tensors, where there are some."""
        if self.extras:
            name = files.quote(min(self.extras))
            raise CheckpointError(
                f"{self.path}: has the extra tensor {name}, which {format} has no place for; choose hf"
            )

    def release_pages(self) -> None:
        """Take the pages of all mapped files of the model out of memory (`MappedFile.release_pages`)."""
        tensors = (*self.tensors.values(), *self.extras.values())
        for file in {file for tensor in tensors for file in tensor.mapped}:
            file.release_pages()

    def close(self) -> None:
        """Release the mapping, and end the tokenizer's process. Views still in use keep their pages until they die."""
        self.tensors = self.extras = {}
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
        if self.base is not None:
            self.base.close()
